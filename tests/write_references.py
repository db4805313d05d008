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


HISTOGRAMS = """
## Histograms

A histogram is a list of 21 shares that add up to 1. The bins are fixed, so that iterations and runs compare, and have
one unit, the clip: of an advantage `POLICY.advantage_clip`, of a ratio the largest distance from 1 that still has a
gradient (`planner.clip_low` below 1, `planner.clip_high` above; of the executor what `executor.clip_velocity_rms`
comes to). Ratios are binned less 1, from -3 to 3 clips, and -1 and 1 are edges; what lies beyond is in the outermost
bins. In an iteration's first update all ratios are 1, so the report draws those of its last one. The numbers are the
same on any number of processes, and a resumed run keeps them.

- A dark middle row of advantages: groups without reward differences, which teach nothing (`frac_reward_zero_std`).
- Advantages in the outermost bins: the clip cuts what the rewards say; `advantage_clip` is too small or one reward
  rare.
- Ratios that leave -1 to 1: steps are too large for what an iteration's samples can still tell.
"""
ALARMS = """
## Alarms

A policy that is trained on a reward may learn the reward's holes. Every `alarms.every` iterations the run shows
videos that it has just made (`alarms.continuations` of every plan) to judges that are no reward. ShapeWorld has them:
the matcher, the held-out judge of the evaluation, clearness of pictures and duplicates; other worlds have no alarms.
No video is made for this, no random number drawn, and the training does not see what they say. By default a look
takes less than a hundredth of the time of the iterations between two looks.

A signal's change is the mean of its latest `alarms.window` looks less that of its first ones. An alarm is a change
for the worse that exceeds its limit, and `alarms.deviations` standard errors of the difference. It is a line in the
log when it begins, `alarms/ALARM` in the metrics, and a row and a note in the report. It stops nothing.

| alarm | signal | worse | limit | look at |
| --- | --- | --- | --- | --- |
| `gap` | `watch/gap` | rises | `alarms.gap` | best samples: what is paid for that the judge does not see? |
| `held_out` | `watch/held_out` | falls | `alarms.held_out` | the same, and the weights of the other rewards |
| `quality` | `watch/clearness` | falls | `alarms.quality` | the weight of `rewards.aesthetics`, the learning rate |
| `duplicates` | `watch/duplicates` | rises | `alarms.duplicates` | best samples: is a second shape paid for? |

A judge that was right about the untrained policy's videos may be wrong about others; an alarm says where to look, not
who is right.
"""
TRACKED = """
## Trackers

`--trackers tensorboard wandb trackio`, or any of the three, show a run while it goes on: metrics, histograms, and
after the evaluation its videos. `--tracker_project` names the project of wandb and trackio.

| tracker | install | where |
| --- | --- | --- |
| `tensorboard` | `pip install "tempact[tensorboard]"` | `RUN/tensorboard`; `tensorboard --logdir runs` |
| `wandb` | `pip install "tempact[wandb]"` | the project, or `RUN/wandb` with `WANDB_MODE=offline` |
| `trackio` | `pip install "tempact[trackio]"` | `trackio show`; a Space or server as its environment variables say |

Each is a process of its own at low priority that reads metrics.jsonl, so that none can stop or slow a run: one that
is not installed, fails or hangs costs a line in the log, and at the run's end at most 10 seconds (120 for videos). A
resumed run goes on in the same run of its trackers, without a row twice; one that is asked for late gets all rows. A
new run in the same folder is another. The first process of a run starts them, whatever the number of processes. Trackio
takes no pillow above 12, which constraints.txt has: it is
installed without them.
"""


def metrics_page() -> str:
    """Every key of metrics.jsonl."""
    lines = ["# Metrics", "", NOTE, ""]
    lines += [
        "`metrics.jsonl` in a run's folder has one JSON object an iteration; null stands for no value.",
        "POLICY is planner or executor; REWARD is plan_quality, format_score, temporal_following, step_following,",
        "aesthetics or one of `rewards.custom`; ROLE is that of a judge; SIGMA is a noise level of the sampler; DEPTH",
        "is depth2 for the second fork of a tree, depth3 for its third, and so on; KIND is that of an event of",
        "ShapeWorld; ALARM is gap, held_out, quality or duplicates.",
        "",
        *table(("key", "meaning"), ((f"`{key}`", meaning) for key, meaning in MEANINGS.items())),
        "",
        *HISTOGRAMS.strip().splitlines(),
        "",
        *ALARMS.strip().splitlines(),
        "",
        *TRACKED.strip().splitlines(),
    ]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Every public name of csrc_triton."""
    return "\n".join(api_lines(NOTE)).rstrip("\n") + "\n"


PAGES = {"config.md": config_page, "metrics.md": metrics_page, "kernels-api.md": api_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
