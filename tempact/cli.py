"""Command lines and YAML files to configurations, and the console script `tempact <verb>`.

Both give values for dotted keys over a preset, and are read by the same strict rules. Nothing here imports torch: a
wrong option is refused at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import logging
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

import yaml

from tempact.config import (
    NAME_PREFIXES,
    NAME_WRAPPERS,
    NOT_NEGATIVE,
    REPLACED,
    RUN,
    Rule,
    RunConfig,
    at_least,
    check_keys,
    flatten,
    key,
    keys_of,
    refuse,
    sections_of,
    validate,
)
from tempact.errors import UserError, guarded
from tempact.presets import DEFAULT, PRESETS, get_preset

log = logging.getLogger(__name__)

RECORDED = "config.yaml"  # in a run's folder
VERBS = {
    "train": "trains a planner and an executor",
    "generate": "makes videos of instructions, and their plans",
    "evaluate": "scores a run or untrained policies on held-out instructions",
    "report": "writes report.html of a run, finished or not",
    "doctor": "checks this machine for a run",
}
MORE_HELP = "COMMAND --help tells its options."
EXIT_ABORTED = 3  # a run that could not go on, or a judge that was silent for too long
MOST_PROCESSES = 64  # of one machine; a slip of the finger must not start more
SHOWN_CHARACTERS = 80  # of a wrong value in a message
ACCEPTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


@dataclass(frozen=True)
class RunOptions:
    """Options of a command line beside the configuration."""

    config: str = key("", RUN, "YAML file with any of the keys below")
    resume: str = key("auto", RUN, "auto (newest checkpoint of the output folder), none, or a checkpoint or run folder")
    dry_run: bool = key(False, RUN, "print the whole configuration, its needs and what is missing, and stop")
    gpu_gib: float = key(
        0.0, RUN, "with --dry-run: memory of the GPU to plan for, GiB; 0: that at hand, else usual ones",
        at_least(0, "GiB of the GPU to plan for, 0 for the one at hand"),
    )  # fmt: skip
    gpus: int = key(
        0, RUN, "processes of this machine, one a GPU; 0: as started, one process or those of torchrun",
        Rule(f"0 (as started), or 1 to {MOST_PROCESSES}", lambda value: 0 <= value <= MOST_PROCESSES),
    )  # fmt: skip
    max_restarts: int = key(
        0, RUN, "with --gpus: how often all processes start again after one is lost; the run resumes", NOT_NEGATIVE
    )


def main(argv: list[str] | None = None) -> int:
    """`tempact <verb> ...` is `python -m tempact.<verb> ...`."""
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _verb(arguments[0] if arguments else "")(arguments[1:]))


def of_ranks(action: Callable[[], int]) -> int:
    """`guarded`, for a command that several processes may run together."""
    code = guarded(action)
    if joined := sys.modules.get("tempact.distributed"):
        joined.leave(code)
    return code


def _verb(name: str) -> Callable[[list[str]], int]:
    if name in VERBS:
        return importlib.import_module(f"tempact.{name}").main
    if name in ("-h", "--help"):
        commands = "".join(f"  {verb:<10}{about}\n" for verb, about in VERBS.items())
        return _printed(f"usage: tempact COMMAND ..., or python -m tempact COMMAND ...\n\n{commands}\n{MORE_HELP}\n")
    if name == "--version":
        return _printed(f"tempact {importlib.import_module('tempact').__version__}\n")
    hint = f" (nearest: {nearest(name, VERBS)})" if name else ""
    raise UserError(f"command: found {name!r}; accepted: {', '.join(VERBS)}{hint}, --help, --version")


def _printed(text: str) -> Callable[[list[str]], int]:
    """A command that prints `text`."""
    return lambda _: 0 if sys.stdout.write(text) else 1


class Command(ModuleType):
    """A command's module that can be called: `tempact.train(config)` is `tempact.runs.run.train(config)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(self.home), self.__name__.rpartition(".")[2])(*arguments, **options)


def callable_command(module: str, home: str) -> None:
    """Makes `module` a `Command` for the function of its own name in the module `home`."""
    sys.modules[module].__class__ = Command
    sys.modules[module].home = home  # type: ignore[attr-defined]


def parse_run(argv: Sequence[str] | None, program: str) -> tuple[RunConfig, RunOptions]:
    """[PRESET] [--config FILE] [--OPTION value ...] [--section.field value ...], the options those of `RunOptions`.

    The file's values go over the preset's, single values over both. Raises UserError in one line for what cannot be
    read or cannot work; --help and --version print and exit with code 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    refuse_named(arguments, program, ("preset",))
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    config, options = get_preset(preset or DEFAULT), RunOptions()
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(help_text(config, program))
        sys.exit(0)
    if "--version" in arguments:
        sys.exit(_verb("--version")([]))
    keys, others = keys_of(RunConfig), keys_of(RunOptions)
    for name, words in sorted(_options(arguments).items(), key=lambda option: option[0] not in others):  # these first
        positive = name.replace(".no_", ".") if "." in name else name.removeprefix("no_")
        if name != positive and positive in keys and keys[positive].kind is bool and not words:
            name, words = positive, ["false"]
        if name not in keys and name not in others:
            raise UserError(f"--{name}: {_unknown('option', name, [*keys, *others], '--')}")
        kind = (keys | others)[name].kind
        words = words or (["true"] if kind is bool else [])
        # a file may give an empty list, but an option without a word is a mistake
        raw = words[0] if len(words) == 1 and get_origin(kind) is not tuple else words or None
        found = repr(" ".join(words)) if words else "nothing after it"
        if name in keys:
            config = _put(config, name, raw, found, "--")
        else:
            options = _put(options, name, raw, found, "--")
        if name == "config":
            config = from_yaml(Path(options.config), config if preset else None)
    check_keys(options, "--")
    validate(config)
    return config, options


def refuse_named(arguments: Sequence[str], program: str, kinds: Sequence[str] = ("preset", "run")) -> None:
    """UserError where an option names the preset or run: in every command it is the first word."""
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.removeprefix("--") in kinds and name.startswith("--"):
            value = value or " ".join(arguments[i + 1 : i + 2]) or name[2:].upper()
            raise UserError(f"{name}: no such option; accepted: {program} {value} ..., as the first word")


def preset_or_run(word: str) -> tuple[list[str], Path | None]:
    """The beginning of `parse_run`'s command line for a preset's name or a run's folder, and that folder.

    No processes share weights in a command that does not train: each holds all of them. UserError for a word that is
    neither.
    """
    whole = ["--executor.shard", "1"]
    run = Path(word)
    if (run / "config.yaml").is_file():
        return ["--config", str(run / "config.yaml"), *whole], run
    if word not in PRESETS:
        presets = ", ".join(PRESETS)
        raise UserError(f"{word}: holds no config.yaml; accepted: the folder of a training run, or a preset: {presets}")
    return [word, *whole], None


def check_whole(config: RunConfig) -> RunConfig:
    """`config`; UserError where it asks that processes share weights, in a command that does not train."""
    if config.executor.shard > 1:
        refuse("executor.shard", config.executor.shard, "1 in a command that does not train")
    return config


def _options(arguments: list[str]) -> dict[str, list[str]]:
    """The words after each option, by its dotted key; the last mention of an option counts."""
    given: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            given.pop(name := name.replace("-", "_"), None)
            given[name] = [value] if equals else []
        elif not given:
            raise UserError(f"{argument}: found before any option; accepted: [PRESET] --section.field value ...")
        else:
            next(reversed(given.values())).append(argument)
    return given


def help_text(config: RunConfig, program: str) -> str:
    """Presets, and every option by section: its type, value in `config`, description and accepted values."""
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    lines = [f"usage: {program} [PRESET] [--config FILE] [--section.key value ...]", "", "presets:"]

    def tell(head: str, about: str) -> None:
        lines.extend([f"  {head}", textwrap.indent(textwrap.fill(about, width - 8), " " * 8)])

    for name, make in PRESETS.items():
        tell(name, str(make.__doc__).partition("\n\n")[0])
    lines += ["", "options; defaults are those of the preset:"]
    values, sections, section = flatten(RunOptions()) | flatten(config), sections_of(RunConfig), ""
    for name, own in (keys_of(RunOptions) | keys_of(RunConfig)).items():
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            lines += ["", f"{section}: {sections[section].__doc__}"]
        if name != "preset":
            accepted = (f"accepted: {rule.accepted}" for rule in own.rules)
            tell(f"--{name} {kind_word(own.kind)} (default: {word(values[name])})", "; ".join((own.about, *accepted)))
    return "\n".join(lines) + "\n"


def kind_word(kind: Any) -> str:
    """INT, "INT ..." for a tuple of any length."""
    return " ".join("..." if one is Ellipsis else one.__name__.upper() for one in get_args(kind) or (kind,))


def word(value: object) -> str:
    """A value as on the command line."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return repr(shown) if shown != shown.strip() else shown or "nothing"


def _put(config: Any, name: str, raw: object, found: str, before: str) -> Any:
    """`config` with one more value, read from `raw`; `found`, and `before` ahead of the key, are for the UserError."""
    try:
        value = _read(keys_of(type(config))[name].kind, raw)
    except ValueError as error:
        raise UserError(f"{before}{name}: found {found[:SHOWN_CHARACTERS]}; accepted: {error}") from error
    return _replaced(config, name, value)


def _replaced(section: Any, name: str, value: object) -> Any:
    head, _, rest = name.partition(".")
    return dataclasses.replace(section, **{head: _replaced(getattr(section, head), rest, value) if rest else value})


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
        value: Any = kind(raw) if isinstance(raw, str) or (kind is float and type(raw) is int) else raw
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(ACCEPTED[kind]) from None
    return value


def _unknown(what: str, name: str, choices: Iterable[str], before: str = "") -> str:
    """What is wrong with an option or key of no such name."""
    if name in REPLACED:
        return f"is no {what} any more; accepted: {REPLACED[name]}"
    return f"unknown {what}; nearest: {before}{nearest(name, choices)}"


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

    The config.yaml of a run may be that of another version: its missing keys have their own defaults, and unknown ones
    are passed over with a warning. Raises UserError for a file that cannot be read, unknown keys (with the nearest
    valid one), wrong values, and a preset other than that of `base`.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)  # a SafeLoader
    except (OSError, yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); accepted: a YAML file") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {type(data).__name__}; accepted: a mapping of configuration keys")
    preset = data.pop("preset", base.preset if base else DEFAULT)
    if base is not None and preset != base.preset:
        raise UserError(f"{path}: preset: found {preset!r}; accepted: {base.preset}, as on the command line")
    try:
        config = base or get_preset(str(preset))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    keys, sections = keys_of(RunConfig), sections_of(RunConfig)
    given = dict(dotted(data, sections))
    if path.name == RECORDED and (path.parent / "checkpoints").is_dir():
        gone = sorted(given.keys() - keys.keys() - sections.keys())
        if told := [name for name in gone if given[name] or name not in REPLACED]:
            named = (f"{name} (now {REPLACED[name]})" if name in REPLACED else name for name in told)
            log.warning("%s: passed over, as this version has no such keys: %s", path, ", ".join(named))
        given = {name: raw for name, raw in given.items() if name not in gone}
        config = _with_defaults(config, [name for name in keys if name not in given and name != "preset"])
    for name, raw in given.items():
        if name not in keys:
            fault = f"found {raw!r}; accepted: a mapping" if name in sections else None
            raise UserError(f"{path}: {name}: {fault or _unknown('key', name, keys)}")
        config = _put(config, name, raw, repr(raw), f"{path}: ")
    return config


def _with_defaults(config: RunConfig, names: Iterable[str]) -> RunConfig:
    """`config` with the defaults of these keys, where they have one."""
    for name in names:
        default = keys_of(RunConfig)[name].default
        if default is not dataclasses.MISSING:
            config = _replaced(config, name, default)
    return config


def dotted(data: dict, sections: Iterable[str], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Dotted keys and values of nested mappings; only sections are opened."""
    for name, value in data.items():
        if isinstance(value, dict) and f"{prefix}{name}" in sections:
            yield from dotted(value, sections, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def fingerprint(config: RunConfig) -> str:
    """Short hash of all values."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]


CONFIG = "adapter_config.json"


def lora_options(folder: Path, policy: str) -> list[str]:
    """`--<policy>.lora.*` with the largest rank, the alpha and the targets of the adapter in `folder`.

    Targets lose what trainers put around names; those that are no list (PEFT also takes a pattern) are left to the
    configuration. UserError where the folder has none.
    """
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha, targets = settings["r"], settings["lora_alpha"], settings["target_modules"]
        rank = max([rank, *(settings.get("rank_pattern") or {}).values()])
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable ({error}); accepted: the JSON that PEFT writes") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: found no {error}; accepted: r, lora_alpha and target_modules of a LoRA") from error
    if isinstance(alpha, float) and alpha.is_integer():
        alpha = int(alpha)
    options = [f"--{policy}.lora.rank", str(rank), f"--{policy}.lora.alpha", str(alpha)]
    if isinstance(targets, list) and targets:
        inner = (re.sub(rf"\b({'|'.join(NAME_WRAPPERS)})\.", "", str(target)) for target in targets)
        names = {re.sub(rf"^({'|'.join(NAME_PREFIXES)})+", "", name) for name in inner}
        options += [f"--{policy}.lora.targets", *sorted(names)]
    return options


if __name__ == "__main__":
    sys.exit(main())
