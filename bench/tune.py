"""`python -m bench.tune {forward,dq,dkv}`: times tilings of a fork attention kernel and prints the best ones.

Every combination of the options is compiled, checked as the bench checks, and timed interleaved with the others. The
winner goes into the kernel's table in csrc_triton/fork_attention/tiles.py by hand.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.bench_fork_attention import Sample, make_inputs
from bench.harness import Bench, worst
from bench.timing import Spread, Timed, interleaved
from csrc_triton import fork_attention
from csrc_triton.fork_attention import tiles
from csrc_triton.fork_attention.tiles import Tiling
from csrc_triton.runtime import backend

TABLES = {"forward": tiles.FORWARD, "dq": tiles.QUERY_GRADIENT, "dkv": tiles.KEY_GRADIENT}
ROUNDING = 1e-6


def candidates(options: argparse.Namespace) -> Iterator[Tiling]:
    for sizes in itertools.product(options.queries, options.keys, options.warps, options.stages):
        yield Tiling(*sizes, descriptors=options.descriptors)


class Trial:
    """The kernel's case, run under one tiling after another."""

    def __init__(self, bench: Bench, kernel: str, branches: int):
        self.table, self.backward = TABLES[kernel], kernel != "forward"
        self.inputs = make_inputs(bench, branches, requires_grad=self.backward)
        q = self.inputs.q
        self.key = next(key for key, tiling in self.table.items() if tiling is tiles.tiling(self.table, q))
        self.sample = Sample(self.inputs)
        self.grad = torch.randn_like(q) if self.backward else None
        self.exact = self.sample.outputs(self.grad, exact=True)
        same = self.sample.outputs(self.grad, exact=False)
        self.allowed = {
            name: 2 * worst(same[name], value) + ROUNDING * value.abs().max().item()
            for name, value in self.exact.items()
        }

    def forward(self, tiling: Tiling) -> Tensor:
        self.table[self.key] = tiling
        with backend("triton"):
            return fork_attention(self.inputs.q, self.inputs.k, self.inputs.v, self.inputs.view)

    def gradients(self, tiling: Tiling, out: Tensor) -> tuple[Tensor, ...]:
        self.table[self.key] = tiling
        return torch.autograd.grad(out, (self.inputs.q, self.inputs.k, self.inputs.v), self.grad)

    def timed(self, tiling: Tiling) -> Timed:
        if not self.backward:
            return Timed(lambda: self.forward(tiling))
        return Timed(lambda out: self.gradients(tiling, out), lambda: (self.forward(tiling),))

    def refusal(self, tiling: Tiling) -> str:
        """Why this tiling is out of the race; "" if it is not."""
        timed = self.timed(tiling)
        try:
            found: Any = timed.run(*timed.setup())
        except Exception as error:  # noqa: BLE001 - a tiling that does not compile or fit is what is looked for
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:100] if str(error) else ''}"
        values = (found,) if isinstance(found, Tensor) else found
        for (name, exact), value in zip(self.exact.items(), values, strict=True):
            if not worst(self.sample(value), exact) <= self.allowed[name]:
                return f"{name} is off by {worst(self.sample(value), exact):.1e}, allowed {self.allowed[name]:.1e}"
        return ""


def tune(bench: Bench, options: argparse.Namespace) -> list[tuple[Tiling, Spread]]:
    """Tilings that passed, with their times, fastest first; the table is left as it was."""
    trial = Trial(bench, options.kernel, options.branches)
    present = trial.table[trial.key]
    runs: dict[str, Timed] = {}
    tried: dict[str, Tiling] = {}
    try:
        for tiling in dict.fromkeys([present, *candidates(options)]):
            refusal = trial.refusal(tiling)
            if refusal:
                bench.write(f"out: {tiling}: {refusal}")
            else:
                runs[str(tiling)], tried[str(tiling)] = trial.timed(tiling), tiling
        found = interleaved(runs, bench.device, budget_s=options.seconds, rounds=(options.rounds, 100)) if runs else {}
    finally:
        trial.table[trial.key] = present
    ranked = sorted(((tried[name], spread) for name, spread in found.items()), key=lambda pair: pair[1].ms)
    for tiling, spread in ranked:
        mark = " (in the table)" if tiling == present else ""
        bench.write(f"{spread.ms:9.3f} ms  {spread.p20:.3f}-{spread.p80:.3f}  {trial.key}: {tiling}{mark}")
    return ranked


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=TABLES)
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--queries", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--keys", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--descriptors", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for all together")
    parser.add_argument("--rounds", type=int, default=7, help="at least")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tune(Bench(device, True, None, print), parser.parse_args(arguments))


if __name__ == "__main__":
    main()
