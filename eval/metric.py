"""What all metrics share: the torchmetrics base class, the check of a pair of images, a mean over images."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import ConfigError, ImageError
from vtc.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()

from torchmetrics import Metric  # noqa: E402  torchmetrics imports torchvision where it is installed

#: how far beyond its range a picture may lie before it is refused: a float32 rounding, not an unclamped output
TOLERANCE = 1e-4


def check_pair(preds: Tensor, target: Tensor, data_range: float = 1.0) -> None:
    """Refuse what would give a number that means nothing; both (B, C, H, W), floating, within [0, data_range].

    Raises ImageError: sizes differ, not floating, not finite, or outside the range.
    """
    for images in (preds, target):
        if not isinstance(images, Tensor):
            raise ImageError(f"Pictures come as torch tensors, not as {type(images).__name__}.")
    if preds.shape != target.shape:
        raise ImageError(f"The pictures have different sizes, {tuple(preds.shape)} and {tuple(target.shape)}; "
                         "crop or resize them first.")
    for images in (preds, target):
        check_images(images, data_range)


def check_images(images: Tensor, data_range: float = 1.0) -> None:
    """As `check_pair`, for one batch."""
    if data_range <= 0:
        raise ConfigError(f"data_range must be positive, not {data_range}.")
    if not isinstance(images, Tensor):
        raise ImageError(f"Pictures come as torch tensors, not as {type(images).__name__}.")
    if images.ndim != 4 or images.numel() == 0:
        raise ImageError(f"Pictures come as a batch (B, C, H, W), not as {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ImageError(f"Pictures must be floating-point in [0, {data_range:g}], not {images.dtype}; "
                         "divide 8-bit values by 255.")
    low, high = (v.item() for v in images.detach().aminmax())
    if not (low >= -TOLERANCE * data_range and high <= (1 + TOLERANCE) * data_range):  # false for NaN too
        raise ImageError(f"Pixel values run from {low:g} to {high:g}, but data_range={data_range:g} was given.")


class FeatureMetric(Metric):
    """A metric that may also be fed with features that were computed elsewhere, past `update`."""

    def _fed(self) -> None:
        """What torchmetrics does around `update`: forget the cached result, count the call."""
        self._computed = None
        self._update_count = max(1, self._update_count)


class MeanOverImages(Metric):
    """A metric that is a number an image, averaged: a subclass only says `per_image`.

    The state is a float64 sum and a count, so memory does not grow and processes add up.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, data_range: float = 1.0) -> None:
        super().__init__()
        if data_range <= 0:
            raise ConfigError(f"data_range must be positive, not {data_range}.")
        self.data_range = data_range
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def per_image(self, preds: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, C, H, W) to (B,)."""
        raise NotImplementedError(f"{type(self).__name__} has no per_image.")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of pairs, (B, C, H, W) in [0, data_range]."""
        values = self.per_image(preds, target)
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """Mean of all images so far, float64; NaN before the first."""
        return self.total / self.count
