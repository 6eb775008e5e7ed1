"""How fast a series of measurements grows, with a bound that noise and steps do not fool.

Owns: the estimate and its bounds. Knows nothing of processes or of what was measured.

The slope is Theil and Sen's: the median of the slopes between all pairs of points, which neither outliers nor a single
step (an allocator that takes a megabyte once and keeps it) can move far. Its bounds come from a moving block bootstrap:
blocks of neighbouring residuals are drawn with replacement, put in a row and added to the line again, and the slope of
each such series is taken. Whole blocks, because neighbours in such a series are alike, and bounds that took them for
independent would be far too narrow. (H. R. Kuensch, The jackknife and the bootstrap for general stationary
observations, 1989.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 400
_LEAST_POINTS = 20
# Blocks are so long a part of the series: long enough for a step's plateau, short enough for ten of them.
_BLOCKS = 10


@dataclass(frozen=True)
class Slope:
    """In units of y for one of x; `low` and `high` are the ends of the 95 % interval."""

    value: float
    low: float
    high: float

    def verdict(self, limit: float) -> str:
        """`flat`: below the limit for sure; `grows`: above it for sure; `unclear`: measure for longer."""
        return "flat" if self.high < limit else "grows" if self.low > limit else "unclear"


def fit_slope(x: NDArray[np.float64], y: NDArray[np.float64], seed: int = 0) -> Slope:
    """Deterministic for a seed. Raises ValueError for fewer than 20 points, or an `x` that does not ascend."""
    if len(x) < _LEAST_POINTS or len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} points: at least {_LEAST_POINTS} of each are needed")
    if not np.all(np.diff(x) > 0):
        raise ValueError("x must ascend")
    first, second = np.triu_indices(len(x), k=1)
    distances = x[second] - x[first]

    def slope(values: NDArray[np.float64]) -> float:
        return float(np.median((values[second] - values[first]) / distances))

    value = slope(y)
    line = value * x
    residuals = y - line
    residuals = residuals - np.median(residuals)
    length = max(len(x) // _BLOCKS, 2)
    starts = len(x) - length + 1
    random = np.random.default_rng(seed)
    slopes = []
    for _ in range(_ROUNDS):
        drawn = [residuals[start : start + length] for start in random.integers(0, starts, -(-len(x) // length))]
        slopes.append(slope(line + np.concatenate(drawn)[: len(x)]))
    low, high = np.percentile(slopes, [2.5, 97.5])
    return Slope(value, float(low), float(high))
