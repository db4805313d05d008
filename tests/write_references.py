"""Generated pages of docs/ (see PAGES), from the code: `PYTHONPATH=tests python tests/write_references.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from pathlib import Path

from write_api import api_lines

from tempact.cli import kind_word, word
from tempact.config import RUN, SPEED, TRAINING, VIDEO, RunConfig, keys_of, sections_of
from tempact.presets import PRESETS, get_preset
from tempact.reporting import MEANINGS

DOCS = Path(__file__).parents[1] / "docs"
SHOWN = ("window", "frames", "chunk_frames", "timesteps", "first_timesteps", "precision", "entry", "text_switch")
NOTE = "Written by `tests/write_references.py` from the code; edit that, not this page."
SETS = {
    VIDEO: "videos of given weights, and the training",
    TRAINING: "the training, but no video of given weights",
    SPEED: "time and memory; results are the same up to rounding",
    RUN: "what is recorded and evaluated, how long a run goes on, when it gives up",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines]


def config_page() -> str:
    """Presets, and every key by section."""
    lines = ["# Configuration", "", NOTE, ""]
    lines += [
        "`python -m tempact.train [PRESET] [--config FILE] [--section.key value ...]`: the file's values go over the",
        "preset's, single values over both. In a file sections are mappings. Unknown keys and values that are not",
        "accepted are refused before anything is loaded, in one line that names the key.",
        "",
        "*Sets* says what a key sets, and so where its value may differ:",
        "",
        *table(
            ("sets", "meaning", "a resumed run may change it", "videos of given weights stay the same"),
            ((k, m, "yes" if k in (SPEED, RUN) else "no", "no" if k == VIDEO else "yes") for k, m in SETS.items()),
        ),
        "",
        "## Presets",
        "",
        *table(("preset", "it is"), ((f"`{name}`", summary(name)) for name in PRESETS)),
        "",
        *table(
            ("preset", *(f"`executor.{key}`" for key in SHOWN)),
            ((f"`{name}`", *(value(getattr(get_preset(name).executor, key)) for key in SHOWN)) for name in PRESETS),
        ),
    ]
    keys = keys_of(RunConfig)
    for section, kind in sections_of(RunConfig).items():
        own = {name: key for name, key in keys.items() if name.rpartition(".")[0] == section}
        rows = (
            (f"`{name}`", kind_word(key.kind), "the preset's" if key.default is MISSING else value(key.default),
             "; ".join(rule.accepted for rule in key.rules), key.sets, key.about)
            for name, key in own.items()
        )  # fmt: skip
        lines += ["", f"## {section or 'the run'}", "", str(kind.__doc__), ""]
        lines += table(("key", "type", "default", "accepted", "sets", "description"), rows)
    return "\n".join(lines) + "\n"


def value(raw: object) -> str:
    return f"`{word(raw)}`" if raw not in ("", ()) else ""


def summary(name: str) -> str:
    return " ".join(str(PRESETS[name].__doc__).partition("\n\n")[0].split())


def metrics_page() -> str:
    """Every key of metrics.jsonl."""
    lines = ["# Metrics", "", NOTE, ""]
    lines += [
        "`metrics.jsonl` in a run's folder has one JSON object an iteration; null stands for no value.",
        "Weights & Biases, if asked for (`wandb_project`), gets the same keys. POLICY is planner or executor; REWARD",
        "is plan_quality, format_score, temporal_following, step_following, aesthetics or one of `rewards.custom`;",
        "ROLE is that of a judge; SIGMA is a noise level of the sampler; DEPTH is depth2 for the second fork of a",
        "tree, depth3 for its third, and so on.",
        "",
        *table(("key", "meaning"), ((f"`{key}`", meaning) for key, meaning in MEANINGS.items())),
    ]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Every public name of csrc_triton."""
    return "\n".join(api_lines(NOTE)).rstrip("\n") + "\n"


PAGES = {"config.md": config_page, "metrics.md": metrics_page, "kernels-api.md": api_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
