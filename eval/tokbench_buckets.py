"""TokBench's buckets by the size of what is shown, and its means: of each bucket, and of the three bucket means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vtc.errors import ConfigError
from vtc.eval.tokbench import Kind, Medium

#: a mean of fewer is marked
FEW = 50
NAMES = ("small", "medium", "large")

#: (kind, medium) -> size of the tokenizer's picture -> edges of [small | medium | large), as ratios
EDGES: dict[tuple[Kind, Medium], dict[int, tuple[float, float, float, float]]] = {
    ("text", "image"): {256: (0.02, 0.03, 0.04, 1), 512: (0.01, 0.02, 0.03, 1), 1024: (0.005, 0.01, 0.02, 1)},
    ("text", "video"): {256: (0.01, 0.02, 0.03, 1), 480: (0.005, 0.01, 0.02, 1)},
    ("face", "image"): {256: (0.1, 0.2, 0.3, 1), 512: (0.05, 0.1, 0.2, 1), 1024: (0.02, 0.05, 0.1, 1)},
    ("face", "video"): {256: (0.05, 0.1, 0.2, 1), 480: (0.02, 0.05, 0.1, 1)},
}


@dataclass(frozen=True)
class BucketMean:
    """Mean of what has low <= ratio < high; None where there is nothing."""

    low: float
    high: float
    n: int
    mean: float | None

    @property
    def few(self) -> bool:
        """Whether the mean rests on fewer than 50: shown with a mark."""
        return self.n < FEW


@dataclass(frozen=True)
class BucketMeans:
    """TokBench's row of one measure.

    mean_of_buckets: the headline, the plain mean of the three; None where a bucket is empty (upstream gives NaN).
    micro: over everything, in a bucket or not; what upstream prints as "Accuracy", which is not the table's number.
    n: all; n_outside: below the lowest edge or from the highest on, in no bucket.
    """

    small: BucketMean
    medium: BucketMean
    large: BucketMean
    mean_of_buckets: float | None
    micro: float | None
    n: int
    n_outside: int

    def describe(self) -> dict[str, object]:
        """For JSON."""
        buckets = {name: {"low": b.low, "high": b.high, "n": b.n, "mean": b.mean, "few": b.few}
                   for name, b in zip(NAMES, (self.small, self.medium, self.large), strict=True)}
        return {**buckets, "mean_of_buckets": self.mean_of_buckets, "micro": self.micro, "n": self.n,
                "n_outside": self.n_outside}


def edges(kind: Kind, size: int, medium: Medium = "image") -> tuple[float, float, float, float]:
    """Edges of the three buckets at a published size; ConfigError for another.

    >>> edges("face", 256)
    (0.1, 0.2, 0.3, 1)
    """
    sizes = EDGES.get((kind, medium), {})
    if size not in sizes:
        raise ConfigError(f"TokBench has {kind} buckets of {medium}s for the sizes {', '.join(map(str, sizes))}, "
                          f"not {size}.")
    return sizes[size]


def bucket_means(values: Sequence[float], ratios: Sequence[float],
                 bucket_edges: tuple[float, float, float, float]) -> BucketMeans:
    """Means of `values` by their `ratios`, equally long.

    >>> means = bucket_means([1, 0, 1], [0.02, 0.025, 0.5], (0.02, 0.03, 0.04, 1))
    >>> means.small.mean, means.medium.mean, means.large.mean, means.mean_of_buckets
    (0.5, None, 1.0, None)
    """
    if len(values) != len(ratios):
        raise ConfigError(f"{len(values)} values have {len(ratios)} ratios.")
    buckets = []
    for low, high in pairwise(bucket_edges):
        inside = [value for value, ratio in zip(values, ratios, strict=True) if low <= ratio < high]
        buckets.append(BucketMean(low, high, len(inside), _mean(inside)))
    means = [bucket.mean for bucket in buckets if bucket.mean is not None]
    small, medium, large = buckets
    return BucketMeans(small, medium, large, _mean(means) if len(means) == 3 else None, _mean(values), len(values),
                       len(values) - sum(bucket.n for bucket in buckets))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
