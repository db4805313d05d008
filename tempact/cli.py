"""Command lines and YAML to configurations, and the console script `tempact <verb>`.

Both come to the same thing, values for dotted keys over a preset, and are read by the same strict rules.
Nothing here imports torch: a wrong option is refused at once.

What a PEFT folder says of itself, as options of a command line. Imports no torch, so that parsing stays quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import importlib
import json
import logging
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import tyro
import yaml

from tempact.config import RunConfig, validate
from tempact.errors import UserError
from tempact.presets import DEFAULT, PRESETS, get_preset

VERBS = ("train", "generate", "evaluate", "report", "doctor")
EXIT_USER_ERROR = 2
EXIT_STOPPED = 130
EXIT_ABORTED = 3  # a run that could not go on, or a judge that was silent for too long
SHOWN_CHARACTERS = 80  # of a wrong value in a message
ACCEPTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


@dataclass(frozen=True)
class RunOptions:
    """What a command line says beside the configuration."""

    resume: str = "auto"  # auto (the newest checkpoint in the output folder), none, or a checkpoint or run folder
    dry_run: bool = False  # print the whole configuration, what it takes and what is missing, and stop
    gpu_gib: float = 0.0  # with --dry-run: memory of the GPU to plan for, GiB; 0: that at hand, else usual ones


@dataclass(frozen=True)
class _CommandLine(RunConfig):
    """All options, for the help; the preset is an argument of its own."""

    preset: tyro.conf.Suppress[str]
    config: str = ""  # YAML file with any of the keys below
    resume: str = RunOptions.resume  # auto (newest checkpoint in the output folder), none, or a folder
    dry_run: bool = RunOptions.dry_run  # print the whole configuration, what it takes and what is missing, and stop
    gpu_gib: float = RunOptions.gpu_gib  # with --dry-run: memory of the GPU to plan for, GiB; 0: that at hand


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
        hint = f" (nearest: {nearest(name, VERBS)})" if name else ""
        raise UserError(f"verb: found {name!r}; accepted: {', '.join(VERBS)}{hint}")
    return importlib.import_module(f"tempact.{name}").main


def guarded(action: Callable[[], int]) -> int:
    """Runs `action`; a user's mistake is one line on stderr and exit code 2, without a traceback."""
    try:
        return action()
    except UserError as error:
        logging.getLogger(__name__).debug("user error", exc_info=True)
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return EXIT_STOPPED


class LineParser(argparse.ArgumentParser):
    """An argument parser for `guarded` actions: a wrong option is a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; accepted: {self.format_usage().removeprefix('usage: ')}")


def parse_run(argv: Sequence[str] | None, program: str) -> tuple[RunConfig, RunOptions]:
    """[PRESET] [--config FILE] [--resume auto|none|PATH] [--dry-run] [--gpu-gib GIB] [--section.field value ...].

    The preset comes first, then the file, then single values. Raises UserError in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    config = get_preset(preset or DEFAULT)
    if "-h" in arguments or "--help" in arguments:
        show_help(config, program)
    given = _options(arguments)
    file = given.pop("config", None)
    if file is not None:
        config = from_yaml(Path(_read_option("config", str, file)), config if preset else None)
    options = RunOptions()
    for key, kind in keys_of(RunOptions).items():
        if key in given:
            options = dataclasses.replace(options, **{key: _read_option(key, kind, given.pop(key))})
    kinds = keys_of(RunConfig)
    for key, words in given.items():
        positive = key.replace(".no_", ".") if "." in key else key.removeprefix("no_")
        if key != positive and kinds.get(positive) is bool and not words:
            key, words = positive, ["false"]
        if key == "preset":
            raise UserError(f"--preset: no such option; accepted: {program} {words[0] if words else 'PRESET'} ...")
        if key not in kinds:
            known = [*kinds, *keys_of(RunOptions), "config"]
            raise UserError(f"--{key}: unknown option; nearest: --{nearest(key, known)}")
        config = _assign(config, key, _read_option(key, kinds[key], words))
    validate(config)
    return config, options


def _options(arguments: list[str]) -> dict[str, list[str]]:
    """The words after each option, by its dotted key; the last mention of an option counts."""
    given: dict[str, list[str]] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            key = name.replace("-", "_")
            given[key] = [value] if equals else []
        elif key is None:
            raise UserError(f"{argument}: found before any option; accepted: [PRESET] --section.field value ...")
        else:
            given[key].append(argument)
    return given


def _read_option(key: str, kind: Any, words: list[str]) -> Any:
    if kind is bool and not words:
        return True
    # a file may give an empty list, but an option without a word is a mistake
    raw: object = words[0] if len(words) == 1 and get_origin(kind) is not tuple else words or None
    try:
        return _read(kind, raw)
    except ValueError as error:
        found = repr(" ".join(words))[:SHOWN_CHARACTERS] if words else "nothing after it"
        raise UserError(f"--{key}: found {found}; accepted: {error}") from error


def show_help(config: RunConfig, program: str) -> None:
    """Prints presets and all options with this configuration's values, and exits with code 0."""
    presets = "\n\n".join(f"{name}: {make.__doc__}" for name, make in PRESETS.items())
    tyro.cli(
        _CommandLine,
        args=["--help"],
        default=_CommandLine(**vars(config)),
        prog=f"{program} [PRESET]",
        description=f"Presets:\n\n{presets}\n\nThe preset comes first; its values are the defaults below.",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def keys_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration class, with the types of their values."""
    hints = get_type_hints(kind)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        key, inner = f"{prefix}{field.name}", hints[field.name]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            keys |= keys_of(inner, f"{key}.")
        else:
            keys[key] = inner
    return keys


def _assign(config: Any, key: str, value: object) -> Any:
    head, _, rest = key.partition(".")
    return dataclasses.replace(config, **{head: _assign(getattr(config, head), rest, value) if rest else value})


def _read(kind: Any, raw: object) -> Any:
    """`raw`, a word or a YAML value, as a `kind`; ValueError that says what is accepted.

    Words count as numbers because YAML takes 1e-3 (without a dot) for a text.
    """
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        many = inner[-1] is Ellipsis
        try:
            if not isinstance(raw, list) or (not many and len(raw) != len(inner)):
                raise ValueError
            return tuple(_read(inner[0] if many else inner[i], value) for i, value in enumerate(raw))
        except ValueError:
            count = "one or more values" if many else f"{len(inner)} values"
            raise ValueError(f"{count}, each {ACCEPTED[inner[0]]}") from None
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(raw).lower()]
        if isinstance(raw, str):
            value = kind(raw)
        elif kind is float and type(raw) is int:
            value = float(raw)
        else:
            value = raw
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(ACCEPTED[kind]) from None
    return value


def nearest(word: str, choices: Iterable[str]) -> str:
    """The most similar choice; in dotted keys the last name counts as much as the whole."""

    def alike(choice: str) -> float:
        pairs = ((word, choice), (word.rpartition(".")[2], choice.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(choices, key=alike)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, which YAML forbids and PyYAML takes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def to_yaml(config: RunConfig) -> str:
    """All values; `from_yaml` reads them back unchanged."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path, base: RunConfig | None = None) -> RunConfig:
    """A configuration from a file; missing keys come from `base`, else from the preset that the file names.

    Raises UserError for a file that cannot be read, unknown keys (with the nearest valid one), wrong values,
    and a preset other than that of `base`.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); accepted: a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); accepted: a YAML file") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {type(data).__name__}; accepted: a mapping of configuration keys")
    preset = data.pop("preset", base.preset if base else DEFAULT)
    if base is not None and preset != base.preset:
        raise UserError(f"{path}: preset: found {preset!r}; accepted: {base.preset}, as on the command line")
    try:
        config = base or get_preset(str(preset))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    kinds = keys_of(RunConfig)
    sections = {key[:i] for key in kinds for i, letter in enumerate(key) if letter == "."}
    for key, raw in _flat(data, sections):
        if key not in kinds:
            if key in sections:
                raise UserError(f"{path}: {key}: found {raw!r}; accepted: a mapping")
            raise UserError(f"{path}: {key}: unknown key; nearest: {nearest(key, kinds)}")
        try:
            config = _assign(config, key, _read(kinds[key], raw))
        except ValueError as error:
            raise UserError(f"{path}: {key}: found {repr(raw)[:SHOWN_CHARACTERS]}; accepted: {error}") from error
    return config


def _flat(data: dict, sections: set[str], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Dotted keys and values of nested mappings; only sections are opened."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in sections:
            yield from _flat(value, sections, f"{key}.")
        else:
            yield key, value


def fingerprint(config: RunConfig) -> str:
    """Short hash of all values."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]


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


if __name__ == "__main__":
    sys.exit(main())
