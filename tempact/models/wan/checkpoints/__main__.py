"""Converts published checkpoints of the Wan transformer, and their adapters, to safetensors with hashes.

`python -m tempact.models.wan.checkpoints convert SRC DST` reads Wan's own and diffusers' folders, self_forcing_dmd.pt,
causal_forcing.pt, longlive_base.pt and lora.pt, PEFT folders, and converted folders; `verify` compares a converted
folder with its hashes. No conversion is needed for loading: `load` reads all of these files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tempact.errors import LineParser, guarded

PROGRAM = "python -m tempact.models.wan.checkpoints"


def parser() -> argparse.ArgumentParser:
    made = LineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    convert = verbs.add_parser("convert", help="weights or an adapter to a new folder")
    convert.add_argument("source", metavar="SRC", type=Path, help="file or folder")
    convert.add_argument("folder", metavar="DST", type=Path, help="new folder")
    convert.add_argument(
        "--adapter", metavar="PATH", type=Path, action="append", default=[],
        help="LoRA file or PEFT folder to merge into the weights; may be given several times",
    )  # fmt: skip
    convert.add_argument("--layout", default="wan", help="wan (default; an adapter becomes a PEFT folder) or diffusers")
    convert.add_argument("--dtype", default="stored", help="stored (default: every tensor keeps its own), fp32 or bf16")
    convert.add_argument("--entry", default="", help="of a .pt file with several models, such as generator")
    convert.add_argument(
        "--config", metavar="FILE", type=Path,
        help="config.json of the transformer, where none is beside SRC and it is not Wan2.1-T2V-1.3B",
    )  # fmt: skip
    verify = verbs.add_parser("verify", help="compare a converted folder with its hashes")
    verify.add_argument("folder", metavar="DST", type=Path)
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done; 2 bad input: one line on stderr, nothing written."""
    return guarded(lambda: _run(parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    """Prints a line a file: its hash and path."""
    from tempact.models.wan.checkpoints import convert as conversion
    from tempact.models.wan.checkpoints.names import read_config

    if arguments.verb == "verify":
        manifest = conversion.verify(arguments.folder)
    else:
        manifest = conversion.convert(
            arguments.source,
            arguments.folder,
            adapters=arguments.adapter,
            layout=arguments.layout,
            dtype=arguments.dtype,
            entry=arguments.entry,
            config=read_config(arguments.config) if arguments.config else None,
        )
    for name, entry in manifest["files"].items():
        sys.stdout.write(f"{entry['sha256']}  {arguments.folder / name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
