"""Precision and recall of a generator: how many of its images look real, how many real ones it can make.

Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (1904.06991): a point
lies in a set's manifold where it is within the k-th neighbour's distance of any of the set's points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.eval.feature_sets import FeatureSetMetric, check_features


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1."""

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, chunk: int = 1024) -> PrecisionRecall:
    """Of (M, d) real and (N, d) other features; distances are computed `chunk` rows at a time.

    >>> real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> precision_recall(real, torch.tensor([[1.5], [9.0]]), neighbours=1)
    PrecisionRecall(precision=0.5, recall=1.0)
    """
    check_features(real, fake)
    if neighbours < 1 or min(len(real), len(fake)) <= neighbours:
        raise ConfigError(f"{neighbours} neighbours need more images than {len(real)} and {len(fake)}.")
    real, fake = real.double(), fake.double()
    return PrecisionRecall(_covered(fake, real, neighbours, chunk), _covered(real, fake, neighbours, chunk))


def _covered(points: Tensor, manifold: Tensor, neighbours: int, chunk: int) -> float:
    """Share of the points that lie in the manifold."""
    radii = torch.cat([_distances(part, manifold).kthvalue(neighbours + 1).values for part in manifold.split(chunk)])
    inside = [(_distances(part, manifold) <= radii).any(1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Differences, not the expanded square: a point's distance to itself must be zero.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class PrecisionRecallMetric(FeatureSetMetric):
    """Precision and recall over a feature network (the paper's is VGG-16; here any named one).

    extractor, max_samples, seed: see `FeatureSetMetric`.
    """

    higher_is_better = True
    inception_name, other_prefix = "precision_recall_inception", "precision_recall"

    def __init__(self, extractor: torch.nn.Module, neighbours: int = 3, max_samples: int = 10_000,
                 seed: int = 0) -> None:
        super().__init__(extractor, max_samples, seed)
        if neighbours < 1:
            raise ConfigError(f"Precision and recall need at least one neighbour, not {neighbours}.")
        self.neighbours = neighbours

    def compute(self) -> PrecisionRecall:
        """Over the samples kept so far."""
        return precision_recall(self.samples(True), self.samples(False), self.neighbours)
