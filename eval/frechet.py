"""Frechet distance between the Gaussians of two feature clouds, streamed.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (1706.08500), equation 6. The trace of (S1 S2)^(1/2) is
taken from the symmetric form S1^(1/2) S2 S1^(1/2), which has the same eigenvalues, real and not negative: no complex
square root of an asymmetric matrix, no epsilon on the diagonal.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vtc.errors import ConfigError, FileError, ImageError
from vtc.eval.metric import FeatureMetric, check_images
from vtc.files import reason, write_file


class FeatureStatistics(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d), both float64, of `num_images` feature vectors."""

    mean: Tensor
    covariance: Tensor
    num_images: int


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Of (N, d) features, N at least 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ConfigError(f"A covariance needs at least two feature vectors (N, d), not {tuple(features.shape)}.")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return FeatureStatistics(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Where a cloud has fewer vectors than dimensions the zero eigenvalues are known to rounding only, and so is the
    distance: to about 1e-8 of the traces. One Cholesky factor and the eigenvalues of one matrix.

    >>> mean, covariance = torch.zeros(2).double(), torch.eye(2).double()
    >>> frechet_distance(FeatureStatistics(mean, covariance, 9), FeatureStatistics(mean + 1, 4 * covariance, 9))
    4.0
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"The clouds have {a.mean.numel()} and {b.mean.numel()} dimensions.")
    if not all(part.sum().isfinite() for part in (a.mean, b.mean, a.covariance, b.covariance)):
        raise ConfigError("The features' statistics are not finite.")
    # A^T S2 A has the eigenvalues of the covariances' product; eigvalsh reads its lower triangle only.
    factor, triangular = _factor(a.covariance)
    spectrum = torch.linalg.eigvalsh(_congruent(factor, b.covariance, triangular)).clamp(min=0)
    difference = (a.mean - b.mean).square().sum()
    return float(difference + a.covariance.trace() + b.covariance.trace() - 2 * spectrum.sqrt().sum())


def _factor(covariance: Tensor) -> tuple[Tensor, bool]:
    """A with A A^T = covariance, and whether it is lower triangular.

    Cholesky's where no direction is all but flat, else from the eigenvectors.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and factor.diagonal().square().min() > 1e-10 * covariance.diagonal().max():
        return factor, True
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt(), False


def _congruent(factor: Tensor, covariance: Tensor, triangular: bool, block: int = 256) -> Tensor:
    """factor^T covariance factor, of which only the lower triangle is sure to be filled, block by block.

    The zeros above a triangular factor's diagonal are left out: a third of the multiplications of two whole products.
    """
    dim = len(factor)
    blocks = [(slice(start, min(start + block, dim)), slice(start if triangular else 0, dim))
              for start in range(0, dim, block)]
    left, found = torch.empty_like(covariance), torch.zeros_like(covariance)
    for columns, rows in blocks:  # left = factor^T covariance, a row of blocks at a time: slices that lie together
        torch.matmul(factor[rows, columns].T, covariance[rows], out=left[columns])
    for columns, rows in blocks:
        torch.matmul(factor[rows, columns].T, left[: columns.stop, rows].T, out=found[columns, : columns.stop])
    return found


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Reference statistics from an `.npz` with `mu` and `sigma` (ADM's, pytorch-fid's) or `mean` and `cov`.

    Raises FileError where the file holds neither. Arrays only: pickled objects are refused. The file does not say how
    many images it was made of, so `num_images` is 0 unless it has an entry `count`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = next((pair for pair in (("mu", "sigma"), ("mean", "cov")) if set(pair) <= set(file.files)), None)
            if names is None:
                raise FileError(f"{path} holds {', '.join(file.files)}, not the statistics mu and sigma.")
            mean, covariance = (torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in names)
            count = int(file["count"]) if "count" in file.files else 0
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read as statistics: {reason(error)}.") from error
    except ValueError as error:
        raise FileError(f"{path} cannot be read as statistics: {error}.") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise FileError(f"{path} holds a mean of {tuple(mean.shape)} and a covariance of {tuple(covariance.shape)}.")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise FileError(f"{path} holds statistics that are not finite.")
    return FeatureStatistics(mean, covariance, count)


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Write what `load_statistics`, pytorch-fid and ADM's evaluator read (`mu`, `sigma`), and `count`."""
    arrays = {"mu": statistics.mean.cpu().numpy(), "sigma": statistics.covariance.cpu().numpy()}
    stream = io.BytesIO()
    np.savez(stream, **arrays, count=statistics.num_images)
    write_file(path, stream.getvalue())


class FrechetDistance(FeatureMetric):
    """Frechet distance of two sets of images over the features of a named network.

    extractor: images (B, 3, H, W) in [0, 1] to (B, num_features); it states `num_features` and `name`. The result is
        called `metric_name`: "fid" for the Inception network of FID, "fd_<name>" for any other, never FID.
    reference: statistics to compare with in place of real images.

    The state is two sums, two sums of outer products (float64) and two counts, however many images there are;
    processes add up. For reconstructions (rFID) the originals are the real images.

    >>> class Means(nn.Module):
    ...     name, num_features = "means", 3
    ...     def forward(self, images):
    ...         return images.mean((2, 3))
    >>> images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 2
    >>> metric = FrechetDistance(Means())
    >>> metric.update(images, real=True)
    >>> metric.update(images + 0.5, real=False)
    >>> metric.metric_name, metric.compute()
    ('fd_means', tensor(0.7500, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, extractor: nn.Module, reference: FeatureStatistics | None = None) -> None:
        super().__init__()
        self.extractor = extractor.eval()
        self.reference = reference
        dim = int(extractor.num_features)  # type: ignore[arg-type]  # torch's stub: Tensor or Module
        if reference is not None and reference.mean.numel() != dim:
            raise ConfigError(f"The reference has {reference.mean.numel()} dimensions and the network {dim}.")
        for side in ("real", "fake"):
            self.add_state(f"{side}_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def metric_name(self) -> str:
        """Under which the result may be reported."""
        name = str(self.extractor.name)
        return "fid" if name == "inception-2015-12-05" else f"fd_{name}"

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add images (B, 3, H, W) in [0, 1] to the real or to the other set."""
        check_images(images)
        if real and self.reference is not None:
            raise ConfigError("Reference statistics were given, so no real images are expected.")
        self.update_features(self.extractor(images), real)

    def update_features(self, features: Tensor, real: bool) -> None:
        """Add (B, d) features that were computed elsewhere."""
        if features.ndim != 2 or features.shape[1] != self.extractor.num_features:
            raise ConfigError(f"The network {self.extractor.name} has {self.extractor.num_features} features an image, "
                              f"not {tuple(features.shape)}.")
        features = features.double()
        if not torch.isfinite(features).all():
            raise ImageError("The feature network gave values that are not finite.")
        self._fed()
        side = "real" if real else "fake"
        getattr(self, f"{side}_sum").add_(features.sum(0))
        getattr(self, f"{side}_outer").add_(features.T @ features)
        getattr(self, f"{side}_count").add_(len(features))

    def statistics(self, real: bool) -> FeatureStatistics:
        """Of one of the sets so far."""
        side = "real" if real else "fake"
        total, outer, count = (getattr(self, f"{side}_{part}") for part in ("sum", "outer", "count"))
        n = int(count)
        if n < 2:
            raise ConfigError(f"The {side} set has {n} image{'s' * (n != 1)}; a covariance needs two.")
        mean = total / n
        return FeatureStatistics(mean, (outer - n * torch.outer(mean, mean)) / (n - 1), n)

    def compute(self) -> Tensor:
        """The distance, float64. It is biased upwards for small sets: report the counts with it."""
        reference = self.statistics(real=True) if self.reference is None else self.reference
        return torch.tensor(frechet_distance(reference, self.statistics(real=False)), dtype=torch.float64)
