"""Kernel inception distance: unbiased, so small sets can be compared.

Binkowski et al., "Demystifying MMD GANs" (1801.01401), section 4: squared maximum mean discrepancy with the kernel
k(x, y) = (x.y / d + 1)^3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.eval.feature_sets import FeatureSetMetric, check_features


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    std: float


def polynomial_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of (M, d) and (N, d) features; it may be slightly negative.

    >>> polynomial_mmd(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]))
    -13.0
    """
    check_features(a, b)
    a, b = a.double(), b.double()
    m, n = len(a), len(b)
    if min(m, n) < 2:
        raise ConfigError(f"KID needs at least two images on each side, not {m} and {n}.")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within = (aa.sum() - aa.trace()) / (m * (m - 1)) + (bb.sum() - bb.trace()) / (n * (n - 1))
    return float(within - 2 * ab.mean())


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000,
                    seed: int = 0) -> KernelDistance:
    """Mean over random subsets, as everybody reports it; sets smaller than `subset_size` are taken whole, once."""
    if subsets < 1 or subset_size < 2:
        raise ConfigError(f"KID needs subsets of at least two images, not {subsets} of {subset_size}.")
    size = min(subset_size, len(real), len(fake))
    if subset_size >= max(len(real), len(fake)):
        return KernelDistance(polynomial_mmd(real, fake), 0.0)
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([polynomial_mmd(real[torch.randperm(len(real), generator=generator)[:size]],
                                          fake[torch.randperm(len(fake), generator=generator)[:size]])
                           for _ in range(subsets)], dtype=torch.float64)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


class KernelInceptionDistance(FeatureSetMetric):
    """KID of two sets of images over a feature network; called "kid" for FID's Inception, else "kd_<name>".

    extractor, max_samples, seed: see `FeatureSetMetric`. subsets, subset_size: the paper's 100 and 1000.
    """

    higher_is_better = False
    inception_name, other_prefix = "kid", "kd"

    def __init__(self, extractor: torch.nn.Module, subsets: int = 100, subset_size: int = 1000,
                 max_samples: int = 10_000, seed: int = 0) -> None:
        super().__init__(extractor, max_samples, seed)
        if subsets < 1 or subset_size < 2:
            raise ConfigError(f"KID needs subsets of at least two images, not {subsets} of {subset_size}.")
        self.subsets, self.subset_size = subsets, subset_size

    def compute(self) -> KernelDistance:
        """Over the samples kept so far."""
        return kernel_distance(self.samples(True), self.samples(False), self.subsets, self.subset_size, self.seed)
