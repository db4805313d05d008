"""Command lines and YAML to configurations, and the console script `tempact <verb>`.

Nothing here imports torch: a wrong option is refused at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from tempact.config import RunConfig, validate
from tempact.errors import UserError
from tempact.presets import DEFAULT, PRESETS, get_preset

VERBS = ("train", "generate", "evaluate", "report")
EXIT_USER_ERROR = 2


@dataclass(frozen=True)
class RunOptions:
    """What a command line says beside the configuration."""

    resume: str  # auto, none or a path
    dry_run: bool


def main(argv: list[str] | None = None) -> int:
    """`tempact <verb> ...` is `python -m tempact.<verb> ...`."""
    arguments = sys.argv[1:] if argv is None else argv
    verb = arguments[0] if arguments else ""
    if verb in ("-h", "--help"):
        sys.stdout.write(f"usage: tempact {{{','.join(VERBS)}}} ...\n")
        return 0
    return guarded(lambda: _verb(verb)(arguments[1:]))


def _verb(name: str) -> Callable[[list[str]], int]:
    if name not in VERBS:
        raise UserError(f"verb: found {name!r}; accepted: {', '.join(VERBS)}")
    return importlib.import_module(f"tempact.{name}").main


def guarded(action: Callable[[], int]) -> int:
    """Runs `action`; a user's mistake is one line on stderr and exit code 2, without a traceback."""
    try:
        return action()
    except UserError as error:
        logging.getLogger(__name__).debug("user error", exc_info=True)
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR


def parse_run(argv: Sequence[str] | None, program: str) -> tuple[RunConfig, RunOptions]:
    """[PRESET] [--config FILE] [--resume auto|none|PATH] [--dry-run] [--section.field value ...].

    The preset comes first, then the file, then single values. Raises UserError in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    file, resume = _take(arguments, "--config"), _take(arguments, "--resume") or "auto"
    dry_run = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    config = get_preset(name or DEFAULT)
    if file is not None:
        config = from_yaml(Path(file), config if name else None)
    if "-h" in arguments or "--help" in arguments:
        arguments = ["--help"]
        sys.stdout.write(usage(program))
    config = _override(config, arguments, program)
    validate(config)
    return config, RunOptions(resume, dry_run)


def usage(program: str) -> str:
    """Presets and options, before the list of all keys."""
    presets = "\n".join(f"  {name:18} {make.__doc__}" for name, make in PRESETS.items())
    return (
        f"{program} [PRESET] [--config FILE.yaml] [--resume auto|none|PATH] [--dry-run] [--section.field value ...]\n\n"
        f"presets:\n{presets}\n\n"
    )


def _take(arguments: list[str], option: str) -> str | None:
    """Removes `option VALUE` or `option=VALUE` and returns the value."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return arguments.pop(i).split("=", 1)[1]
        if argument == option:
            if i + 1 == len(arguments):
                raise UserError(f"{option}: found nothing after it; accepted: a value")
            arguments.pop(i)
            return arguments.pop(i)
    return None


def _override(config: RunConfig, arguments: list[str], program: str) -> RunConfig:
    keys = sorted(key.replace("_", "-") for key in flat_keys(config))
    flags = {f"--{key}" for key in keys} | {re.sub(r"([^.]+)$", r"no-\1", f"--{key}", count=1) for key in keys}
    for argument in arguments:
        flag = argument.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags and flag != "--help":
            raise UserError(f"{argument.split('=', 1)[0]}: unknown option; nearest: {nearest(flag, flags)}")
    seen = io.StringIO()
    try:
        with contextlib.redirect_stderr(seen) if "--help" not in arguments else contextlib.nullcontext():
            return tyro.cli(RunConfig, default=config, args=arguments, prog=program, description="All keys:")
    except SystemExit as stop:
        if not stop.code:
            raise
        words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", seen.getvalue()).split())
        raise UserError(words.split("For full helptext")[0].strip() or "options could not be parsed") from None


def nearest(word: str, choices: Iterable[str]) -> str:
    return difflib.get_close_matches(word, sorted(choices), 1, cutoff=0.0)[0]


def flat_keys(value: object, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration."""
    names: list[str] = []
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        inner = getattr(value, field.name)
        key = f"{prefix}{field.name}"
        names += flat_keys(inner, f"{key}.") if dataclasses.is_dataclass(inner) else [key]
    return names


def to_yaml(config: RunConfig) -> str:
    """All values; `from_yaml` reads them back unchanged."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def from_yaml(path: Path, base: RunConfig | None = None) -> RunConfig:
    """A configuration from a file; missing keys come from `base`, else from the preset that the file names.

    Raises UserError for a file that cannot be read, unknown keys (with the nearest valid one) and wrong values.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {type(data).__name__}; accepted: a mapping of configuration keys")
    base = base or get_preset(str(data.get("preset", DEFAULT)))
    merged = _merge(json.loads(json.dumps(dataclasses.asdict(base))), data, path, "")
    try:
        return TypeAdapter(RunConfig).validate_json(json.dumps(merged), strict=True)
    except (ValidationError, TypeError) as error:
        if not isinstance(error, ValidationError):
            raise UserError(f"{path}: a value is not plain data ({error})") from error
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: found {first['input']!r}; accepted: {first['msg']}") from error


def _merge(base: dict, data: dict, path: Path, prefix: str) -> dict:
    for key, value in data.items():
        if key not in base:
            raise UserError(f"{path}: {prefix}{key}: unknown key; nearest: {prefix}{nearest(str(key), base)}")
        if isinstance(base[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {prefix}{key}: found {value!r}; accepted: a mapping")
            base[key] = _merge(base[key], value, path, f"{prefix}{key}.")
        else:
            base[key] = value
    return base


def fingerprint(config: RunConfig) -> str:
    """Short hash of all values."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
