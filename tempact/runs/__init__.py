"""What a command does, in one process or several: training runs, evaluations, generated videos."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tempact.config import RunConfig
from tempact.errors import EXIT_UNREAD, Stopped, StopRequest, UserError

if TYPE_CHECKING:  # modules of this room are imported by processes without torch
    from tempact.distributed import Ranks


def together(config: RunConfig, folder: Path, act: Callable[[Ranks], int], kept: str) -> int:
    """`act` in this process, or in those that torchrun has started for the command, which end together; the exit code.

    folder: for the traceback of an unexpected exception. kept: what remains where this ends early, in words. A process
    that is alone raises what `act` raises; of several one tells it, in a line.
    """
    import torch

    from tempact.distributed import Ranks, told
    from tempact.runs.ending import Ending, RunFailed

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    with StopRequest().listening() as stop, Ranks.joined(stop, config.trainer.stall_s, on_gpu) as ranks:
        try:
            code = act(ranks)
            sys.stdout.flush()  # here, where a reader that went away can be told to the others
            return code
        except BrokenPipeError as error:  # of what reads rank 0's output
            if not ranks.alone:
                ranks.fail(str(error), EXIT_UNREAD)
                told()
            raise
        except (Exception, Stopped) as error:
            if ranks.alone:
                raise
            mistake = isinstance(error, UserError)  # is told as in one process
            if not mistake and isinstance(error, Exception):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                return Ending(ranks, stop).code(error, folder, None if mistake else lambda: kept)
            except RunFailed as failure:
                sys.stderr.write(f"error: {failure}\n")
                return failure.code
