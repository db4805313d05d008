"""What the judges of a run have been asked, in one file for all its processes and all times that it is resumed."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tempact.errors import UserError
from tempact.rewards.judges import TOKENS, JudgeBudget

log = logging.getLogger(__name__)

COUNTED = ("requests", *TOKENS)
Spent = dict[str, dict[str, int]]  # by role and name of COUNTED


class Ledger:
    """Requests and tokens by role, and the run's limit of requests. For one thread at a time, and for all processes.

    A request is entered before it is sent, under the file's lock, so that processes together never send more than the
    limit. One that costs nothing (refused, or never received) is taken out again. What cannot be written in mid-run
    (disk full) ends a run that has a limit, and is reported once where there is none.
    """

    def __init__(self, path: Path, limit: int):
        """limit: requests of the run, 0 for any number. UserError if the file cannot be made or is none of these."""
        self.path, self.limit, self._reported = path, limit, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            with self._held():
                pass
        except (OSError, ValueError) as error:
            accepted = "a file that a run wrote, in a folder that can be written"
            raise UserError(f"{path}: found no ledger of judges ({error}); accepted: {accepted}") from error

    def spent(self) -> str:
        """None but where the limit is reached: one line about what was spent, and how to go on."""
        with self._held() as spent:
            return self._line(spent) if self._is_spent(spent) else ""

    def take(self, role: str) -> None:
        """Enters a request that is about to be sent; JudgeBudget if the run may send no more."""
        try:
            with self._held() as spent:
                if self._is_spent(spent):
                    raise JudgeBudget(self._line(spent))
                _add(spent, role, {"requests": 1})
        except (OSError, ValueError) as error:
            if self.limit:
                told = f"{self.path}: the requests to judges cannot be counted ({error})"
                raise JudgeBudget(f"{told}, nor judges.max_calls be kept") from error
            self._report(error)

    def add(self, role: str, amounts: Mapping[str, int]) -> None:
        """Enters amounts by name of COUNTED; negative ones take out."""
        if not amounts:
            return
        try:
            with self._held() as spent:
                _add(spent, role, amounts)
        except (OSError, ValueError) as error:
            self._report(error)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    @contextmanager
    def _held(self) -> Iterator[Spent]:
        """The file's content while no other process has it; what is changed is written back."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            raw = os.pread(self._file, os.fstat(self._file).st_size, 0)
            spent = _read(raw)
            yield spent
            used = any(amount for each in spent.values() for amount in each.values())
            if (changed := json.dumps(spent).encode() if used else b"") != raw:
                os.pwrite(self._file, changed, 0)
                os.ftruncate(self._file, len(changed))
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _is_spent(self, spent: Spent) -> bool:
        return 0 < self.limit <= sum(each["requests"] for each in spent.values())

    def _line(self, spent: Spent) -> str:
        total = {name: sum(each[name] for each in spent.values()) for name in COUNTED}
        roles = ", ".join(f"{role} {each['requests']:,}" for role, each in sorted(spent.items()))
        tokens = f"{total['prompt_tokens']:,} prompt and {total['completion_tokens']:,} completion tokens"
        told = (
            f"judges: {total['requests']:,} requests are spent ({roles}; {tokens}), judges.max_calls is {self.limit:,}"
        )
        return f"{told}; one above {total['requests']:,}, or 0 for no limit, lets the run go on"

    def _report(self, error: Exception) -> None:
        if not self._reported:
            log.warning("%s: %s; requests to judges are not counted where it does not serve", self.path, error)
        self._reported = True


def _add(spent: Spent, role: str, amounts: Mapping[str, int]) -> None:
    own = spent.setdefault(role, dict.fromkeys(COUNTED, 0))
    for name, amount in amounts.items():
        own[name] += amount


def _read(raw: bytes) -> Spent:
    """ValueError where the bytes are no ledger."""
    found = json.loads(raw) if raw else {}
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise ValueError("not one object of roles")
    spent = {role: {name: each.get(name, 0) for name in COUNTED} for role, each in found.items()}
    if not all(type(amount) is int and amount >= 0 for each in spent.values() for amount in each.values()):
        raise ValueError("amounts that are no whole numbers")
    return spent
