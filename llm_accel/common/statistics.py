"""Intervals of what was measured on a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_BLOCK = 200  # draws at once, so that many images need little memory
Floats = npt.NDArray[np.float64]


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of ``successes`` out of ``n``; (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(
    counts: Sequence[Sequence[float]], statistic: Callable[[Floats], Floats], seed: int = 0, draws: int = 2000
) -> tuple[float, float] | None:
    """95 % percentile interval over images drawn with replacement.

    Args:
        counts: what each image adds, [images, k].
        statistic: of sums over images, [draws, k] to [draws]; may be NaN where nothing was counted.

    Returns:
        The interval, or None where the statistic is NaN in more than one draw of forty.
    """
    table = np.asarray(counts, dtype=np.float64)
    if not len(table):
        return None
    rng, alike = np.random.default_rng(seed), np.full(len(table), 1 / len(table))
    with np.errstate(invalid="ignore", divide="ignore"):
        blocks = [statistic(rng.multinomial(len(table), alike, _BLOCK) @ table) for _ in range(draws // _BLOCK)]
    values = np.concatenate(blocks)
    values = values[~np.isnan(values)]
    if len(values) < 0.975 * draws:
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def share_of_sums(sums: Floats) -> Floats:
    """First column over second, [n, 2] to [n]; NaN where the second is 0."""
    return sums[:, 0] / sums[:, 1]
