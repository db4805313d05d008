"""Why a command ends early: a user's mistake, a signal, a reader that went away."""

from __future__ import annotations

import argparse
import io
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

log = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_STOPPED = 130
EXIT_UNREAD = 141  # what was printed has no reader any more, as after `| head`; a shell's number for that
REMIND_S = 0.5


class UserError(ValueError):
    """Bad input. The message is one line: the file, key or row, what was found, what is accepted.

    Entry points print it without a traceback and exit with code 2.
    """


class Aborted(RuntimeError):
    """The run cannot go on: what is done is saved, and the command exits with code 3."""


class Stopped(BaseException):
    """A signal ended what was being done. The value is the signal's name. Entry points exit with code 130."""


def _without_stops(told: Callable[[Any], object]) -> Callable[[Any], object]:
    """A hook of `sys.unraisablehook` that says nothing of `Stopped` in a destructor, which is raised again."""
    return lambda ignored: None if isinstance(ignored.exc_value, Stopped) else told(ignored)


class StopRequest:
    """Set by a signal that asks a process to end: Ctrl-C, a scheduler's SIGTERM or SIGUSR1, a closed terminal's SIGHUP.

    opened: what is being done can be dropped, so the first signal raises `Stopped` there and then. Otherwise the first
    signal is noted, which makes the object true, and `finishing` is told. The second signal raises `Stopped` in any
    case; a third one is left to the system. Python ignores what is raised in a destructor, and libraries may swallow
    it: `Stopped` is raised again until somebody handles it.

    once: several processes stop together, so that one request comes as several signals, of which the first alone
    counts. last: what is done is what ends the process, and no signal interrupts it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self.opened = True
        self.finishing = ""  # what is done before the end, where that is not opened
        self.once = self.last = False
        self._held = 0

    def __bool__(self) -> bool:
        return bool(self.name)

    def open(self) -> None:
        """What follows can be dropped; raises `Stopped` where a signal has been noted."""
        self.opened = True
        if self:
            raise Stopped(self.name)

    def close(self, finishing: str) -> None:
        """What follows is finished first."""
        self.handled()
        self.opened, self.finishing = False, finishing

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, signals are noted and raise nothing; `Stopped` is raised at the end, where that is opened."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self and self.opened and not self._held and not self.last:
            raise Stopped(self.name)

    def handled(self) -> None:
        """`Stopped` has arrived: it is not raised again."""
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Inside, signals are taken here. Signals that the process ignores (nohup) stay ignored, and threads other than
        the main one get none."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        taken = {each: self._note for each in self.SIGNALS if signal.getsignal(each) is not signal.SIG_IGN}
        before = {each: signal.signal(each, act) for each, act in {**taken, signal.SIGALRM: self._remind}.items()}
        told, sys.unraisablehook = sys.unraisablehook, _without_stops(sys.unraisablehook)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = told
            for each, handler in before.items():
                signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = bool(self)
        if again and self.once:
            return
        self.name = signal.Signals(number).name
        if self._held or self.last:
            return
        if again:
            for each in self.SIGNALS:
                if signal.getsignal(each) == self._note:
                    signal.signal(each, signal.SIG_DFL)
        if again or self.opened:
            signal.setitimer(signal.ITIMER_REAL, REMIND_S, REMIND_S)
            raise Stopped(self.name)
        # of several processes, it may follow from the loss of one, which the last line tells
        level, more = (logging.INFO, "") if self.once else (logging.WARNING, "; once more to give that up")
        log.log(level, "%s: %s first%s", self.name, self.finishing, more)

    def _remind(self, number: int, frame: FrameType | None) -> None:
        if isinstance(sys.exception(), Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0)  # handled, or on its way there
        else:
            raise Stopped(self.name)


class LineParser(argparse.ArgumentParser):
    """An argument parser for `guarded` actions: a wrong option is a UserError."""

    def __init__(self, *words: Any, **options: Any):
        super().__init__(*words, **options)
        self.add_argument("--version", action="version", version=f"tempact {sys.modules['tempact'].__version__}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; accepted: {' '.join(self.format_usage().split()).removeprefix('usage: ')}")


def guarded(action: Callable[[], int]) -> int:
    """Runs `action`, a command, and returns its exit code.

    A user's mistake is one line on stderr, without a traceback; a signal that asks to stop and a reader that went away
    are no faults. What is printed is UTF-8 whatever the locale, as all files are; a file name's bytes stay as they are.
    """
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    try:
        try:
            with StopRequest().listening():
                return action()
        finally:
            sys.stdout.flush()  # here, where a reader that went away can be told
    except UserError as error:
        log.debug("user error", exc_info=True)
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    except (Stopped, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":  # the others of a run's processes are stopped, too
            sys.stderr.write(f"stopped{f' by {error}' if str(error) else ''}\n")
        return EXIT_STOPPED
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter's end flushes
        return EXIT_UNREAD


def _unread() -> bool:
    """Is standard output a pipe without a reader?"""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)  # an error is told unasked
    return any(event & select.POLLERR for _, event in watched.poll(0))
