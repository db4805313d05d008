"""Whatever happens to a rank, all end in time and in one line, and the run goes on from what is saved."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed.processes import SMALL, differences, ended, launched, left, trained

from tempact.runs.checkpoint import verify

STALL_S, END_S = 8, 25
ITERATIONS = ("--trainer.iterations", "3")
PHASES = ("plan", "rollout", "rewards", "update", "step", "meeting", "save")
EVERYWHERE = [(rank, phase, 2) for phase in PHASES for rank in (0, 1) if (rank, phase) != (1, "save")]
ALTERNATING = [(i % 2 if phase != "save" else 0, phase, 2) for i, phase in enumerate(PHASES)]
THE_OTHER = [(1 - rank, phase, 2) for rank, phase, _ in ALTERNATING if phase != "save"]
PLACES = {
    "kill": [*EVERYWHERE, (2, "update", 3), (2, "meeting", 3)],
    "stop": [*ALTERNATING, (2, "rollout", 3), (2, "meeting", 3)],
    "hang": [*THE_OTHER, (2, "step", 3)],
    "exception": [*EVERYWHERE, (2, "update", 3), (2, "meeting", 3)],
    "memory": ALTERNATING,
    "term": [*EVERYWHERE, (2, "rollout", 3), (2, "meeting", 3)],
    "int": THE_OTHER,
    "outage": [(0, "rewards", 2), (1, "rewards", 2), (1, "rollout", 2), (2, "rewards", 3)],
    "disk": [(0, "save", 2), (0, "metrics", 2)],
}
SOON = [("kill", 1, "meeting", 2), ("term", 1, "step", 2)]
CASES = [(kind, *place) for kind, places in PLACES.items() for place in places]
CODES = {
    "kill": 137, "stop": 137, "hang": 137, "exception": 1, "memory": 1, "term": 130, "int": 130, "outage": 3, "disk": 2,
}  # fmt: skip
CAUSES = {
    "kill": r"was lost \(killed, or hangs\)",
    "stop": r"gave no sign for \d+ s|did not move for \d+ s",
    "hang": r"did not move for \d+ s",
    "exception": "ValueError: planted",
    "memory": r"OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB \(planted\)",
    "disk": r".*no space left on the disk.*",
    "outage": r"judge step_following: silent for 300 s \(planted\)",
}
PHASE_OF = {"meeting": "update", "save": "recording", "metrics": "recording"}
LOGGED = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING iteration \d+: (no group|\d+ videos)) .*")


def test_there_are_enough_faults() -> None:
    assert len(CASES) >= 60 and set(SOON) <= set(CASES)


@pytest.mark.parametrize(
    ("kind", "rank", "phase", "size"),
    [pytest.param(*case, marks=[] if case in SOON else pytest.mark.slow) for case in CASES],
)
def test_a_fault_ends_the_run_in_one_line_and_the_run_goes_on(
    kind: str, rank: int, phase: str, size: int, tmp_path: Path, alone: Callable[..., Path]
) -> None:  # fmt: skip
    folder, log, planted = tmp_path / "run", tmp_path / "log", tmp_path / "planted"
    stall_s = STALL_S if kind in ("stop", "hang") else 600  # nothing else needs to wait for it
    arguments = [*SMALL, *ITERATIONS, "--trainer.stall-s", str(stall_s), "--output", str(folder)]
    (code,) = ended([launched(log, arguments, size, 0, (kind, rank, phase, 2), planted)])
    took = time.time() - float(planted.read_text())
    said = [line for line in log.read_text().splitlines() if not LOGGED.fullmatch(line)]
    sys.stdout.write(f"{kind} {rank} of {size} {phase}: {took:.1f} s, code {code}: {said}\n")
    assert code == CODES[kind]
    assert took < (STALL_S if stall_s == STALL_S else 0) + END_S
    assert len(said) == 1, said
    told = ending(kind, rank, phase)
    assert re.match(told, said[0]), f"{said[0]!r} is not {told!r}"
    assert left(tmp_path) == []
    for checkpoint in (folder / "checkpoints").glob("step-*[0-9]"):
        verify(checkpoint)
    assert differences(alone(*ITERATIONS), trained(folder, 1, *ITERATIONS)) == []


def ending(kind: str, rank: int, phase: str) -> str:
    """The line's beginning, a pattern."""
    if kind in ("term", "int"):
        return rf"\S+ WARNING {'SIGTERM' if kind == 'term' else 'SIGINT'}: saved after iteration [12]; "
    # which of those that sit in a collective has not entered it cannot be seen from outside
    named = r"\d" if (kind, phase) == ("hang", "meeting") else rank
    where = rf"rank {named} on {re.escape(socket.gethostname())}, iteration 2, {PHASE_OF.get(phase, phase)}: "
    return (r"(\S+ ERROR|error:) " if kind == "outage" else "error: ") + where + f"({CAUSES[kind]}); "
