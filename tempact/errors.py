"""Why a command ends early: a user's mistake, or a signal."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class UserError(ValueError):
    """Bad input. The message is one line: the file, key or row, what was found, what is accepted.

    Entry points print it without a traceback and exit with code 2.
    """


class Stopped(BaseException):
    """A signal ended what was being done. The value is the signal's name. Entry points exit with code 130."""


class StopRequest:
    """Set by a signal that asks a process to end: Ctrl-C, a scheduler's SIGTERM or SIGUSR1, a closed terminal's SIGHUP.

    opened: what is being done can be dropped, so the first signal raises `Stopped` there and then. Otherwise the first
    signal is noted, which makes the object true, and `finishing` is told. The second signal raises `Stopped` in any
    case; a third one is left to the system.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self.opened = True
        self.finishing = ""  # what is done before the end, where that is not opened

    def __bool__(self) -> bool:
        return bool(self.name)

    def open(self) -> None:
        """What follows can be dropped; raises `Stopped` where a signal has been noted."""
        self.opened = True
        if self:
            raise Stopped(self.name)

    def close(self, finishing: str) -> None:
        """What follows is finished first."""
        self.opened, self.finishing = False, finishing

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Inside, signals are taken here. Signals that the process ignores (nohup) stay ignored, and threads other than
        the main one get none."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {each: signal.getsignal(each) for each in self.SIGNALS}
        for each, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(each, self._note)
        try:
            yield self
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.name = bool(self), signal.Signals(number).name
        if again:
            for each in self.SIGNALS:
                if signal.getsignal(each) == self._note:
                    signal.signal(each, signal.SIG_DFL)
        if again or self.opened:
            raise Stopped(self.name)
        log.warning("%s: %s first; once more to give that up", self.name, self.finishing)
