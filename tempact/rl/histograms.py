"""Where advantages and ratios lie: shares of the fixed bins of metrics.jsonl (`config.HISTOGRAM_BINS`).

A share is a number of terms over the number of all terms, so that shares of micro-batches and processes add up.
"""

from __future__ import annotations

from torch import Tensor

from tempact.config import HISTOGRAM_BINS, HISTOGRAM_REACH

ADVANTAGES, RATIOS = HISTOGRAM_REACH


def ratio_bins(distance: Tensor) -> dict[str, Tensor]:
    """Which ratios lie in which bin, bool of the shape of `distance`, by metric name.

    distance: ratios less 1, in units of their clip; NaN is in no bin.
    """
    return _bins(RATIOS, distance)


def advantage_shares(advantage: Tensor, mask: Tensor, clip: float) -> dict[str, float]:
    """Share of the counted advantages in each bin, by metric name; NaN where none counts.

    advantage, mask: of one shape. clip: the largest size of an advantage, the unit of the bins.
    """
    counted = int(mask.sum())
    inside = _bins(ADVANTAGES, advantage / clip)
    return {name: int((own & mask).sum()) / counted if counted else float("nan") for name, own in inside.items()}


def _bins(histogram: str, values: Tensor) -> dict[str, Tensor]:
    place = ((values / HISTOGRAM_REACH[histogram] + 1.0) * (HISTOGRAM_BINS / 2)).floor().clamp(0, HISTOGRAM_BINS - 1)
    return {f"{histogram}/{number:02d}": place == number for number in range(HISTOGRAM_BINS)}
