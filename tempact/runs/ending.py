"""How an exception or a signal ends a command, in one process or in several that end together."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tempact.cli import EXIT_ABORTED
from tempact.distributed import FAILED, STOPPED, End, Ranks, told
from tempact.errors import EXIT_USER_ERROR, Aborted, Stopped, StopRequest, UserError
from tempact.rewards.judges import JudgeOutage

log = logging.getLogger(__name__)

TRACEBACKS = "tracebacks.txt"
LONGEST_ERROR = 300  # characters of an unexpected exception in its line


class RunFailed(RuntimeError):
    """An unexpected exception, of this process or another one, ended a run. The message is one line: the exception,
    what is saved, where the traceback is. Entry points print it and exit with `code`."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


@contextmanager
def quiet(silent: bool) -> Iterator[None]:
    """Inside, warnings are not logged, if so asked."""
    if not silent:
        yield
        return
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass
class Ending:
    """How an exception ends the command, in a run of one process or several, of which one alone tells."""

    ranks: Ranks
    stop: StopRequest

    def code(self, error: Exception | Stopped, folder: Path, kept: Callable[[], str] | None = None) -> int:
        """The exit code after an exception that ended a run; kept: saves what is done and says so, None before the
        first iteration.

        Raises UserError, or RunFailed for an unexpected exception, where this process is to tell.
        """
        self.stop.close("saving what is done")
        self.stop.last = not self.ranks.alone  # another process' end may come as a signal here
        if isinstance(error, Stopped):
            return self._ended(self.ranks.stopping(str(error)), kept)
        code = exit_code(error)
        line = str(error) if code != 1 else f"{failed(folder, error)}; traceback in {folder / TRACEBACKS}"
        if not self.ranks.alone:
            end = self.ranks.fail(self._where(error) + line, code)
            if not self.ranks.first or end.kind == STOPPED:
                return self._ended(end, kept)
            told()
            line, code = (end.line, end.code) if kept else (line, code)
        if kept is None and code == EXIT_USER_ERROR:
            raise error
        line += f"; {kept() if kept else 'no iteration was started'}"
        if code == EXIT_ABORTED:
            log.error("%s", line)
            return code
        raise (UserError(line) if code == EXIT_USER_ERROR else RunFailed(line, code)) from error

    def _where(self, error: Exception) -> str:
        """The rank that has failed (`Ranks.agreed` notes another one), unless all of them have alike."""
        alike = isinstance(error, Aborted)
        notes = getattr(error, "__notes__", [] if alike else [self.ranks.where(self.ranks.rank)])
        return "".join(f"{where}: " for where in notes)

    def _ended(self, end: End, kept: Callable[[], str] | None) -> int:
        if not self.ranks.first:
            return self._silent(end)
        told()
        saved = kept() if kept else "stopped before the first iteration; nothing is lost"
        if end.kind == FAILED:
            raise RunFailed(f"{end.line}; {saved}", end.code)
        log.warning("%s: %s", end.line, saved)
        return end.code

    def _silent(self, end: End) -> int:
        """Of a process other than the first, which tells for all of them unless it is lost."""
        if self.ranks.teller(end):
            told()
            raise RunFailed(f"{end.line}; what is saved is in the run's folder, and the same command goes on", end.code)
        return end.code


def exit_code(error: Exception) -> int:
    """Of a command that the exception ends."""
    if isinstance(error, Aborted | JudgeOutage):
        return EXIT_ABORTED
    return EXIT_USER_ERROR if isinstance(error, UserError) else 1


def failed(folder: Path, error: Exception) -> str:
    """Notes the traceback in the run's folder; the exception in a line."""
    with (folder / TRACEBACKS).open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}\n{traceback.format_exc()}\n")
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR]
