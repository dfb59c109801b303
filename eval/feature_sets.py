"""Metrics that need the features themselves: a bounded random sample of them, the same for any split into processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError, ImageError
from vtc.eval.metric import FeatureMetric, check_images


def check_features(real: Tensor, fake: Tensor) -> None:
    """Refuse what are no (M, d) and (N, d) finite features: ConfigError."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ConfigError(f"Features come as (M, d) and (N, d), not as {tuple(real.shape)} and {tuple(fake.shape)}.")
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise ConfigError("The features are not all finite.")


class FeatureSetMetric(FeatureMetric):
    """Collects features of real and other images.

    extractor: images (B, 3, H, W) in [0, 1] to (B, num_features); states `num_features` and `name`.
    max_samples: at most this many feature vectors are kept of each side. Each vector gets a key out of its own bits
        and the seed, and the vectors with the smallest keys stay: a random sample that does not depend on the order
        or the processes, in memory that does not grow.
    """

    is_differentiable = False
    full_state_update = False
    inception_name, other_prefix = "", ""

    def __init__(self, extractor: nn.Module, max_samples: int = 10_000, seed: int = 0) -> None:
        super().__init__()
        if max_samples < 2:
            raise ConfigError(f"At least two samples must be kept, not {max_samples}.")
        self.extractor = extractor.eval()
        self.max_samples, self.seed = max_samples, seed
        self._dim = int(extractor.num_features)  # type: ignore[arg-type]  # torch's stub: Tensor or Module
        for side in ("real", "fake"):
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")

    @property
    def metric_name(self) -> str:
        """Under which the result may be reported."""
        name = str(self.extractor.name)
        return self.inception_name if name == "inception-2015-12-05" else f"{self.other_prefix}_{name}"

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add images (B, 3, H, W) in [0, 1] to the real or to the other set."""
        check_images(images)
        self.update_features(self.extractor(images), real)

    def update_features(self, features: Tensor, real: bool) -> None:
        """Add (B, d) features that were computed elsewhere."""
        if features.ndim != 2 or features.shape[1] != self.extractor.num_features:
            raise ConfigError(f"The network {self.extractor.name} has {self.extractor.num_features} features an image, "
                              f"not {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise ImageError("The feature network gave values that are not finite.")
        self._fed()
        kept: list[Tensor] = getattr(self, self._state(real))
        kept.append(features.float())
        if sum(map(len, kept)) > 2 * self.max_samples:
            kept[:] = [self.samples(real)]

    def samples(self, real: bool) -> Tensor:
        """The kept vectors of one side, (N, d), in the order of their keys."""
        kept = getattr(self, self._state(real))
        features = kept if isinstance(kept, Tensor) else torch.cat(kept) if kept else torch.empty(0, self._dim)
        return features[_keys(features, self.seed).argsort(stable=True)[: self.max_samples]]

    @staticmethod
    def _state(real: bool) -> str:
        return "real_features" if real else "fake_features"


def _keys(features: Tensor, seed: int) -> Tensor:
    """(N, d) float32 to (N,) int64: a multiplicative hash of each vector's bits."""
    bits = features.contiguous().view(torch.int32).long()
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(2**62, (features.shape[1],), generator=generator).to(bits.device) * 2 + 1
    mixed = (bits * odd).sum(1)  # wraps around, which is the point
    mixed = (mixed ^ (mixed >> 32)) * 0x2545F4914F6CDD1D
    return mixed ^ (mixed >> 29)
