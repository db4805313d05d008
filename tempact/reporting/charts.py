"""Charts of a run's report: lines of metrics by iteration, and histograms as they move."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tempact.config import HISTOGRAM_BINS, HISTOGRAM_REACH
from tempact.reporting import HISTOGRAM
from tempact.reporting.strips import data_uri
from tempact.shapeworld.story import KINDS

SMOOTHING = 0.15  # weight of the newest value in the thick line
MOST_PARTS = 400  # of a line, each drawn by its least and its greatest value: about one a pixel
MOST_VALUE = 1e30  # larger values are not drawn
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 46, 4, 8, 20  # of a chart and its edges, in the SVG's units
GAPS = 5  # between the marks of a chart's axis, about


@dataclass(frozen=True)
class Panel:
    """A chart of one or several metrics. A line is (label, metric name). each: every iteration's value is drawn too."""

    title: str
    lines: tuple[tuple[str, str], ...]
    stacked: bool = False
    each: bool = True


POLICIES = ("executor", "planner")
RAW = ("temporal_following", "step_following", "aesthetics", "plan_quality", "format_score")
ENDS, PHASES = ("low", "high"), ("plan", "rollout", "rewards", "update")
PANELS = (
    Panel("Reward that is optimised", tuple((who, f"{who}/reward") for who in POLICIES)),
    Panel("Raw rewards", tuple((name.replace("_", " "), f"rewards/{name}/mean") for name in RAW)),
    Panel("KL to the start", tuple((who, f"{who}/kl") for who in POLICIES)),
    Panel("Clipped fraction", tuple((f"{who}, {to}", f"{who}/clip_ratio/{to}") for who in POLICIES for to in ENDS)),
    Panel("Groups without reward differences", tuple((who, f"{who}/frac_reward_zero_std") for who in POLICIES)),
    Panel("Events that happen as told", tuple((kind, f"events/{kind}/success") for kind in KINDS), each=False),
    Panel("Watched videos: temporal order", (("reward", "watch/reward"), ("held-out judge", "watch/held_out"))),
    Panel("Watched videos: clearness of pictures", (("clearness", "watch/clearness"),)),
    Panel("Watched videos: duplicates", (("frames with an extra or misplaced shape", "watch/duplicates"),)),
    Panel("Seconds an iteration", tuple((phase, f"timing_s/{phase}") for phase in PHASES), stacked=True),
)


@dataclass(frozen=True)
class Line:
    """A line of a chart: the number of its colour, and SVG paths of its values (or area) and of their running mean."""

    label: str
    colour: int
    values: str
    mean: str


@dataclass(frozen=True)
class Chart:
    """A chart in the SVG's units. marks: (y, text) of the horizontal lines. ends: the first and last iteration."""

    title: str
    marks: list[tuple[float, str]]
    ends: tuple[int, int]
    lines: list[Line]
    stacked: bool


def charts(rows: Sequence[dict]) -> list[Chart]:
    """The PANELS that `rows` (of `read_metrics`) have values for; those that are 0 all the time are left out."""
    steps = np.array([row["step"] for row in rows])
    found = []
    for panel in PANELS:
        lines = {label: _values(rows, name) for label, name in panel.lines}
        lines = {label: values for label, values in lines.items() if np.isfinite(values).any()}
        if any(np.nan_to_num(values).any() for values in lines.values()):
            found.append(_chart(panel, steps, lines))
    return found


def _chart(panel: Panel, steps: np.ndarray, lines: dict[str, np.ndarray]) -> Chart:
    heights = np.array(list(lines.values()))
    if panel.stacked:
        heights = np.cumsum(np.nan_to_num(heights), 0)
    shown = heights if panel.each else np.array([smooth(own) for own in heights])
    marks = _marks(0.0 if panel.stacked else float(np.nanmin(shown)), float(np.nanmax(shown)))
    low, high, first, last = marks[0], marks[-1], int(steps.min()), int(steps.max())

    def y(value: Any) -> Any:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)

    def path(own: np.ndarray) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (steps - first) / max(1, last - first)
        points = [f"{x[i]:.1f} {y(own[i]):.1f}" for i in thinned(own)]
        return f"M{'L'.join(points)}" + ("h3" if len(points) == 1 else "")

    def means(own: np.ndarray) -> np.ndarray:
        return np.where(np.isfinite(own), smooth(own), np.nan)  # no steps between the values of a metric with few

    drawn = []
    for colour, (label, own) in enumerate(zip(lines, heights, strict=True)):
        area = f"L{WIDTH - RIGHT} {y(0)}L{LEFT} {y(0)}Z" if panel.stacked else ""
        values = path(own) + area if panel.each else ""
        drawn.append(Line(label, colour, values, "" if panel.stacked else path(means(own))))
    return Chart(panel.title, [(y(mark), f"{mark:.4g}") for mark in marks], (first, last), drawn, panel.stacked)


def _marks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spread from at most `low` to at least `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a flat line, in the middle
        room = 0.1 * abs(high) or 1.0
        low, high = low - room, high + room
    unit = 10.0 ** math.floor(math.log10((high - low) / GAPS))
    gap = next(unit * times for times in (1, 2, 5, 10) if unit * times * GAPS >= high - low)
    return [gap * i + 0.0 for i in range(math.floor(low / gap), math.ceil(high / gap) + 1)]


def thinned(values: np.ndarray) -> np.ndarray:
    """Places of the finite values to draw: all, or of each of MOST_PARTS parts the least, the greatest, the ends."""
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= 2 * MOST_PARTS:
        return finite
    kept = {finite[0], finite[-1]}
    for part in np.array_split(finite, MOST_PARTS):
        kept |= {part[values[part].argmin()], part[values[part].argmax()]}
    return np.array(sorted(kept))


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean without the bias of its start; a NaN leaves the mean where it was."""
    total = weight = 0.0
    means = []
    for value in values.tolist():  # numpy's own numbers take ten times as long
        if math.isfinite(value):
            total = (1 - SMOOTHING) * total + SMOOTHING * value
            weight = (1 - SMOOTHING) * weight + SMOOTHING
        means.append(total / weight if weight else math.nan)
    return np.array(means)


def _values(rows: Sequence[dict], name: str) -> np.ndarray:
    values = np.array([row.get(name) for row in rows], float)  # None becomes NaN
    return np.where(np.abs(values) < MOST_VALUE, values, np.nan)


MOST_COLUMNS = 120  # of a histogram's picture: each is the mean of consecutive iterations
TITLES = {
    "advantage_histogram": "Advantages of the {}, in clips",
    "ratio_histogram": "Ratios less 1 of the {}, in clips",
}
DARKEST = (0, 114, 178)  # where all terms are in one bin


@dataclass(frozen=True)
class Heat:
    """A histogram by iteration: a PNG of a pixel a bin and column, the darker the more terms, as a data URI; marks and
    ends as those of a `Chart`."""

    title: str
    picture: str
    marks: list[tuple[float, str]]
    ends: tuple[int, int]


def heats(rows: Sequence[dict]) -> list[Heat]:
    """Histograms of `rows` (of `read_metrics`), of ratios those of the last update; those of ratios that are 1 all the
    time, as in a first update, are left out."""
    names = [name for row in rows for name, value in row.items() if isinstance(value, list)]
    last = {name.partition("@")[0]: name for name in sorted(dict.fromkeys(names), key=_update)}
    found = []
    for name, latest in sorted(last.items()):
        own = [(row["step"], row[latest]) for row in rows if isinstance(row.get(latest), list)]
        shares = np.array([value for _, value in own])
        who, kind = name.split("/")
        if kind == "advantage_histogram" or shares[:, HISTOGRAM_BINS // 2].min() < 1.0:
            found.append(_heat(TITLES[kind].format(who), HISTOGRAM_REACH[kind], shares, (own[0][0], own[-1][0])))
    return found


def _update(name: str) -> int:
    matched = HISTOGRAM.fullmatch(name)
    return int(matched[2][1:]) if matched and matched[2] else 1


def _heat(title: str, reach: float, shares: np.ndarray, ends: tuple[int, int]) -> Heat:
    """shares: [iterations, bins]."""
    columns = np.array([part.mean(0) for part in np.array_split(shares, min(MOST_COLUMNS, len(shares)))])
    # the root, so that a bin with a hundredth of the terms is seen
    opacity = (255 * np.sqrt(columns.T[::-1].clip(0.0, 1.0))).round().astype(np.uint8)
    pixels = np.concatenate([np.full((*opacity.shape, 3), DARKEST, np.uint8), opacity[..., None]], -1)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG")
    tall = HEIGHT - BOTTOM - TOP
    marks = [(TOP + tall * (1 - (at / reach + 1) / 2), f"{at:g}") for at in sorted({-reach, -1.0, 0.0, 1.0, reach})]
    return Heat(title, data_uri(file.getvalue()), marks, ends)
