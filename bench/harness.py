"""Shared by the benches: contenders, their error check, timing of a case, and its report."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.report import OURS, Row
from bench.timing import Spread, Timed, interleaved, yardsticks

Outputs = dict[str, Tensor]
ROUNDING = 1e-6  # of an output's largest value: what any fp32 arithmetic may be off by


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    run            timed as run(*setup())
    outputs        tensors to check, by the reference's names, from the result of `run`; None: nothing is checked
    setup          makes the arguments of `run`; not timed
    flops, nbytes  the least operations and bytes moved that the case needs
    compiled       the first run compiles for seconds: left out where only errors are checked
    """

    name: str
    run: Callable[..., Any]
    outputs: Callable[[Any], Outputs] | None
    setup: Callable[[], tuple[Any, ...]] = tuple
    flops: float | None = None
    nbytes: float | None = None
    compiled: bool = False


@dataclass
class Bench:
    """One run of the bench: its device and options, and the rows so far.

    timed: measure times; else check errors only. folder: folder of the JSON file and the chart; None: not written.
    """

    device: torch.device
    timed: bool
    folder: Path | None
    write: Callable[[str], None]
    rows: list[Row] = field(default_factory=list, repr=False)
    ceilings: dict[str, float] = field(default_factory=dict)  # "copy" in GB/s, "matmul" in TFLOP/s

    @property
    def real(self) -> bool:
        """Real shapes; tiny ones where there is no GPU."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.real else "cpu"

    @property
    def path(self) -> Path | None:
        """The results file; None where nothing is kept."""
        return self.folder / f"{report.slug(self.name)}.json" if self.timed and self.folder is not None else None

    def size(self, real: int, tiny: int) -> int:
        return real if self.real else tiny

    def measure_ceilings(self) -> None:
        """The yardsticks, once a run, before the first case."""
        if self.ceilings or not (self.timed and self.real):
            return
        found = yardsticks(self.device)
        self.ceilings = {name: speed for name, (_, speed) in found.items()}
        rows = []
        for name, (spread, speed) in found.items():
            work = {"gbps": speed} if name == "copy" else {"tflops": speed}
            rows.append(Row("yardstick", name, "torch", spread.ms, spread.p20, spread.p80, **work))
        for row in rows:
            self.record([row])

    def measure(
        self,
        op: str,
        case: str,
        contenders: Sequence[Contender],
        exact: Mapping[str, Tensor],
        same_precision: Mapping[str, Tensor],
        *,
        budget_s: float = 2.0,
        parts: int = 1,
    ) -> None:
        """Checks every contender, times those whose check passed, and records the rows.

        exact: the outputs in fp64; same_precision: those of plain torch in the contenders' precision. A contender
        passes if for each output |it - exact| <= 2 |same_precision - exact| + 1e-6 |exact|, by the largest values.
        parts: equal parts of one run, of which one's time is reported.

        Raises:
            AssertionError: if ours did not pass.
        """
        self.measure_ceilings()
        allowed = {
            name: 2 * worst(same_precision[name], value) + ROUNDING * value.abs().max().item()
            for name, value in exact.items()
        }
        contenders = [c for c in contenders if self.timed or not c.compiled]
        refusals: dict[str, str] = {}
        rows = []
        for contender in contenders:
            found, refusal = self._check(contender, exact, allowed)
            if refusal:
                refusals[contender.name] = refusal
            rows.append(Row(op, case, contender.name, error=max(found.values(), default=None)))
        if self.timed:
            good = {c.name: Timed(c.run, c.setup) for c in contenders if c.name not in refusals}
            spreads = interleaved(good, self.device, budget_s=budget_s if self.real else 0.1) if good else {}
            spreads = {name: Spread(s.ms / parts, s.p20 / parts, s.p80 / parts) for name, s in spreads.items()}
            rows = [_with_times(row, c, spreads.get(row.impl)) for row, c in zip(rows, contenders, strict=True)]
        notes = [f"{name}: no speed, {refusal}" for name, refusal in refusals.items()]
        self.record(rows, [*notes, *self._summary(rows)])
        assert OURS not in refusals, refusals[OURS]

    def _check(
        self, contender: Contender, exact: Mapping[str, Tensor], allowed: Mapping[str, float]
    ) -> tuple[dict[str, float], str]:
        """Largest difference to the reference for each output, and why it gets no speed ("" if it gets one)."""
        if contender.name == OURS:
            found = errors(contender, exact)
        else:
            try:
                found = errors(contender, exact)
            except Exception as error:  # noqa: BLE001 - a peer that cannot run here is no fault of ours
                return {}, f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        wrong = [name for name, error in found.items() if not error <= allowed[name]]
        return found, ", ".join(f"{name} is off by {found[name]:.2e}, allowed {allowed[name]:.2e}" for name in wrong)

    def record(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        """Adds the rows of one case, prints them and brings the results file up to date."""
        costs = {row.impl: row.cost for row in rows if row.cost}
        about = {"torch": torch.__version__, "triton": version("triton"), "commit": report.commit()}
        rows = [
            replace(
                row, ratio_to={o: c / row.cost for o, c in costs.items() if o != row.impl} if row.cost else {}, **about
            )
            for row in rows
        ]
        self.rows += rows
        self.write(report.table(rows, notes))
        if self.path is not None:
            report.save(self.path, self.rows, {"device": self.name, "command": "pytest bench --benchmark"})

    def finish(self) -> None:
        """The chart, of everything that the results file holds."""
        if self.path is not None and self.rows:
            last = self.rows[-1]
            title = f"{self.name}, torch {last.torch}, triton {last.triton}: less is better (commits: {self.path.name})"
            report.chart(self.path.with_suffix(".png"), report.load(self.path), title)

    def _summary(self, rows: Sequence[Row]) -> list[str]:
        ours = next((row for row in rows if row.impl == OURS), None)
        peers = [row for row in rows if row.impl != OURS and row.ms is not None]
        notes = []
        if ours is not None and ours.ms is not None and peers:
            best = min(peers, key=lambda row: row.ms or 0.0)
            notes.append(f"best peer: {best.impl}; ours is {(best.ms or 0.0) / ours.ms:.2f}x as fast")
        if ours is not None and ours.gbps is not None and ours.tflops is None and "copy" in self.ceilings:
            notes.append(f"ours at {ours.gbps / self.ceilings['copy']:.0%} of copy bandwidth")
        if ours is not None and ours.tflops is not None and "matmul" in self.ceilings:
            notes.append(f"ours at {ours.tflops / self.ceilings['matmul']:.0%} of a large matmul")
        return notes


def errors(contender: Contender, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference to the reference, for each output of the contender."""
    if contender.outputs is None:
        return {}
    outputs = contender.outputs(contender.run(*contender.setup()))
    return {name: worst(value, exact[name]) for name, value in outputs.items()}


def worst(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where only `got` is not finite."""
    assert got.shape == exact.shape, f"{tuple(got.shape)}, not {tuple(exact.shape)}"
    gap = (got.detach().double() - exact.detach().double()).abs()
    return gap.nan_to_num(nan=float("inf")).max().item()


def _with_times(row: Row, contender: Contender, spread: Spread | None) -> Row:
    if spread is None:
        return row
    tflops = None if contender.flops is None else contender.flops / spread.ms / 1e9
    gbps = None if contender.nbytes is None else contender.nbytes / spread.ms / 1e6
    return replace(row, ms=spread.ms, p20=spread.p20, p80=spread.p80, tflops=tflops, gbps=gbps)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def gradients(leaves: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """run(out, grad): the gradient of `out` with respect to the leaves."""

    def run(out: Tensor | tuple[Tensor, ...], grad: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad)

    return run
