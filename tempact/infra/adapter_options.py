"""What a PEFT folder says of itself, as options of a command line. Imports no torch, so that parsing stays quick."""

from __future__ import annotations

import json
from pathlib import Path

from tempact.errors import UserError

CONFIG = "adapter_config.json"


def lora_options(folder: Path, policy: str) -> list[str]:
    """`--<policy>.lora.*` with the rank, alpha and targets of the adapter in `folder`; UserError where it has none.

    Targets that are no list of names (PEFT also takes a pattern) are left to the configuration.
    """
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha, targets = settings["r"], settings["lora_alpha"], settings["target_modules"]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable ({error}); accepted: the JSON that PEFT writes") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: found no {error}; accepted: r, lora_alpha and target_modules of a LoRA") from error
    if isinstance(alpha, float) and alpha.is_integer():
        alpha = int(alpha)
    options = [f"--{policy}.lora.rank", str(rank), f"--{policy}.lora.alpha", str(alpha)]
    if isinstance(targets, list) and targets:
        options += [f"--{policy}.lora.targets", *sorted(map(str, targets))]
    return options
