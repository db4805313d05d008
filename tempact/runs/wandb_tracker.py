"""Feeds a metrics.jsonl to Weights & Biases: `python -m tempact.runs.wandb_tracker FILE PROJECT RESUMED_STEP`.

A process of its own that follows the file until its end mark, or until the run that started it is gone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.5

log = logging.getLogger(__name__)


def follow(path: Path) -> Iterator[dict]:
    """Rows as they are written; ends at the mark that `MetricsLogger.close` writes or when the parent dies."""
    parent = os.getppid()
    with path.open() as file:
        line = ""
        while os.getppid() == parent:
            line += file.readline()
            if not line.endswith("\n"):
                time.sleep(POLL_S)
                continue
            row, line = json.loads(line), ""
            if "finished" in row:
                return
            yield row


def main(path: Path, project: str, resumed_step: int) -> int:
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        import wandb
    except ImportError:
        log.warning('wandb is not installed (pip install "tempact[wandb]"); metrics are in %s only', path)
        return 1
    run = wandb.init(project=project, name=path.parent.name, dir=path.parent)
    for row in follow(path):
        if row["step"] > resumed_step:
            run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
