"""How far a mean over images would move with other images: percentile intervals of the bootstrap.

Efron 1979: the images are drawn with replacement as often as there are images, and the result is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vtc.errors import ConfigError

#: draws of an image at a time, 32 MiB: the resamples are cut into blocks of this
BLOCK = 2**22


def bootstrap_interval(columns: Sequence[np.ndarray], function: Callable[..., Any] = lambda mean: mean,
                       level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """The interval that holds `level` of the resampled values of `function(mean of each column)`.

    columns: arrays (n,) of the same images, all of which are drawn together. None for fewer than two images.
    The same seed and the same n draw the same images, so results of two methods on the same images are comparable.

    >>> low, high = bootstrap_interval([np.arange(101.0)])
    >>> bool(44 < low < 45 and 55 < high < 56.5)
    True
    """
    if not 0 < level < 1 or resamples < 2:
        raise ConfigError(f"A bootstrap has a level between 0 and 1 and two resamples, not {level} and {resamples}.")
    values = np.stack([np.asarray(column, dtype=np.float64) for column in columns])
    n = values.shape[1]
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, resamples, step := max(1, BLOCK // n)):
            drawn = rng.integers(n, size=(min(step, resamples - start), n))
            found.append(function(*(column[drawn].mean(1) for column in values)))
        low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)
