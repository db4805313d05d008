"""Which checkpoint a run goes on from, and whether its configuration allows that."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
from dataclasses import MISSING
from pathlib import Path

from tempact.config import REPLACED, RESUME_MAY_CHANGE, RunConfig, flatten, keys_of
from tempact.errors import UserError
from tempact.reporting import ENVIRONMENT, METRICS, SAMPLES
from tempact.runs.checkpoint import ASIDE, FOLDER, Checkpoint, course_of, latest, listed, stem_of, step_of, verify

log = logging.getLogger(__name__)

# of a run's last evaluation, and the page that shows it
EVALUATED = (
    "evaluation.json", "evaluation_scores.jsonl", "comparisons.json", "events.json", "videos", "report.html"
)  # fmt: skip


def resolve_resume(value: str, run_folder: Path) -> Checkpoint | None:
    """The checkpoint that `--resume` names, None for a run from the start.

    "auto": the newest intact checkpoint of `run_folder`, if there is one. "none": a new run, refused where the folder
    already holds checkpoints. Any other value is the path of a checkpoint or of a run folder; a checkpoint of another
    folder is refused where `run_folder` holds some of its own.
    """
    present = [path for _, path in listed(Path(run_folder) / FOLDER)]
    if value == "none":
        if present:
            raise UserError(
                f"output: {run_folder} already holds {present[0].name} of another run; accepted: --resume auto to go "
                f"on with it, or another --output"
            )
        return None
    if value == "auto":
        found = latest(run_folder)
        if found is None and present:
            raise UserError(
                f"resume: none of the {len(present)} checkpoints in {run_folder} is intact; accepted: another --output"
            )
        return found
    path = Path(value)
    if (path / FOLDER).is_dir():
        found = latest(path)
        if found is None:
            raise UserError(
                f"resume: {path} holds no intact checkpoint; accepted: auto, none, a checkpoint or run folder"
            )
    elif not path.is_dir() or step_of(stem_of(path)) is None:
        raise UserError(f"resume: {value} is no checkpoint; accepted: auto, none, .../step-000040 or a run folder")
    else:
        found = verify(path)
    if present and not found.within(run_folder):
        raise UserError(
            f"resume: found {found.path}, but {run_folder} holds {present[0].name} of its own; accepted: auto to go on "
            f"with that, or another --output"
        )
    return found


def continues(run_folder: Path, checkpoint: Checkpoint) -> bool:
    """Is a checkpoint of the run its newest, and all others of its course?"""
    parent = Path(run_folder) / FOLDER
    return all(step <= checkpoint.step and course_of(path) == checkpoint.course for step, path in listed(parent))


def records_aside(run_folder: Path, step: int) -> None:
    """Puts what another course has recorded in the run's folder into `checkpoints/aside`.

    Its metrics are copied, for rows up to `step` belong to both courses; samples after `step`, evaluations and their
    videos are moved. step 0: nothing is shared, and metrics are moved too.
    """
    run = Path(run_folder)
    aside = run / FOLDER / ASIDE
    numbered = (aside / f"records-{number}" for number in itertools.count(1))
    target = next(path for path in numbered if not path.exists())
    numbers = {path: re.match(r"step-(\d+)", path.name) for path in (run / SAMPLES).glob("step-*")}
    samples = [path for path, number in numbers.items() if number and int(number[1]) > step]
    moved = [path for path in (*map(run.joinpath, EVALUATED), *samples) if path.exists()]
    shared = [path for path in (run / METRICS, run / ENVIRONMENT) if path.exists()]
    if not moved and not shared:
        return
    target.mkdir(parents=True)
    for path in shared:
        if step:
            shutil.copy(path, target)
        else:
            path.rename(target / path.name)
    for path in moved:
        place = target / path.relative_to(run)
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    log.warning("%s: records of another course are set aside in %s", run, target)


def check_config(checkpoint: Checkpoint, config: RunConfig) -> None:
    """UserError that lists the keys in which `config` differs from the checkpoint's and a resumed run may not.

    Keys that the checkpoint's version had not have their defaults there. Keys that this version has no more are named
    in a warning, and so are changes that are accepted.
    """
    keys, then = keys_of(RunConfig), checkpoint.config
    now, before = (
        json.loads(json.dumps(values))
        for values in (flatten(config), {name: own.default for name, own in keys.items() if own.default is not MISSING})
    )
    gone = sorted(name for name in then.keys() - now.keys() if then[name] or name not in REPLACED)
    if gone:
        told = (f"{name} (now {REPLACED[name]})" if name in REPLACED else name for name in gone)
        log.warning("%s: passed over, as this version has no such keys: %s", checkpoint.path, ", ".join(told))
    before |= then
    changed = {
        name: f"{name} ({json.dumps(before.get(name))} -> {json.dumps(value)})"
        for name, value in sorted(now.items())
        if value != before.get(name)
    }
    refused = [words for name, words in changed.items() if keys[name].sets not in RESUME_MAY_CHANGE]
    if refused:
        raise UserError(
            f"{checkpoint.path}: saved with another configuration: {', '.join(refused)}; accepted: the same values"
        )
    if changed:
        log.info("changed since %s: %s", checkpoint.path.name, ", ".join(changed.values()))
    if "trainer.iterations" in changed and {config.planner.optim.lr_end, config.executor.optim.lr_end} != {1.0}:
        log.warning(
            "trainer.iterations: learning rates fall over all iterations, so the change moves them from here on"
        )
