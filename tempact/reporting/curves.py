"""Curves of a run's metrics as one SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHING = 0.15  # weight of the newest value in the thick line
COLUMNS = 3
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
RC = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "tempact"}


@dataclass(frozen=True)
class Panel:
    """A chart of one or several metrics. A line is (label, metric names); several names are added up."""

    title: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    stacked: bool = False


PANELS = (
    Panel("Reward that is optimised", (("executor", ("executor/reward",)), ("planner", ("planner/reward",)))),
    Panel(
        "Raw rewards",
        tuple(
            (name.replace("_", " "), (f"rewards/{name}/mean",))
            for name in ("temporal_following", "step_following", "aesthetics", "plan_quality", "format_score")
        ),
    ),
    Panel("KL to the start", (("executor", ("executor/kl",)), ("planner", ("planner/kl",)))),
    Panel(
        "Clipped fraction",
        tuple((who, (f"{who}/clip_ratio/low", f"{who}/clip_ratio/high")) for who in ("executor", "planner")),
    ),
    Panel(
        "Groups without reward differences",
        tuple((who, (f"{who}/frac_reward_zero_std",)) for who in ("executor", "planner")),
    ),
    Panel(
        "Seconds an iteration",
        tuple((phase, (f"timing_s/{phase}",)) for phase in ("plan", "rollout", "rewards", "update")),
        stacked=True,
    ),
)


def curves_svg(rows: Sequence[dict]) -> bytes | None:
    """The PANELS that `rows` (of `read_metrics`) have values for; None when there is not one."""
    panels = [panel for panel in PANELS if any(np.isfinite(line).any() for line in _lines(panel, rows).values())]
    if not panels:
        return None
    height = -(-len(panels) // COLUMNS)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(4 * COLUMNS, 2.7 * height), layout="constrained")
        axes = figure.subplots(height, COLUMNS, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, rows)
        for axis in axes[len(panels) :]:
            axis.remove()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw(axis: Axes, panel: Panel, rows: Sequence[dict]) -> None:
    steps = np.array([row["step"] for row in rows])
    lines = {label: values for label, values in _lines(panel, rows).items() if np.isfinite(values).any()}
    if panel.stacked:
        axis.stackplot(steps, np.nan_to_num(list(lines.values())), labels=list(lines), colors=COLOURS, alpha=0.85)
    else:
        for colour, (label, values) in zip(COLOURS, lines.items(), strict=False):
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, marker="." if len(steps) < 3 else "")
            axis.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)
    axis.set_title(panel.title, loc="left", fontweight="bold", fontsize=10)
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(frameon=panel.stacked, fontsize=8)


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean without the bias of its start; a NaN leaves the mean where it was."""
    total = weight = 0.0
    means = []
    for value in values:
        if np.isfinite(value):
            total = (1 - SMOOTHING) * total + SMOOTHING * value
            weight = (1 - SMOOTHING) * weight + SMOOTHING
        means.append(total / weight if weight else np.nan)
    return np.array(means)


def _lines(panel: Panel, rows: Sequence[dict]) -> dict[str, np.ndarray]:
    return {
        label: np.array([sum(_value(row, name) for name in names) for row in rows], float)
        for label, names in panel.lines
    }


def _value(row: dict, name: str) -> float:
    value = row.get(name)
    return float("nan") if value is None else value
