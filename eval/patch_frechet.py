"""Frechet distance over patches: enough samples from few large pictures, and no resizing of what is judged.

Mentzer et al., "High-Fidelity Generative Image Compression" (2006.09965), appendix A.7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError, ImageError
from vtc.eval.frechet import FrechetDistance
from vtc.eval.metric import check_images


def patches(images: Tensor, size: int = 256) -> Tensor:
    """All size x size tiles from the top left, then those of the grid moved by half a tile both ways.

    (B, C, H, W) to (B * (rows * columns + (rows - 1) * (columns - 1)), C, size, size).

    >>> patches(torch.zeros(1, 3, 512, 768)).shape
    torch.Size([8, 3, 256, 256])
    """
    if size < 2 or size % 2:
        raise ConfigError(f"A patch has an even side of at least 2 pixels, not {size}.")
    if min(images.shape[2:]) < size:
        raise ImageError(f"A {images.shape[3]}x{images.shape[2]} picture holds no {size}x{size} patch.")
    rows, columns = images.shape[2] // size, images.shape[3] // size

    def tiles(part: Tensor) -> Tensor:
        return part.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    found = [tiles(images[..., : rows * size, : columns * size])]
    if rows > 1 and columns > 1:
        half = size // 2
        found.append(tiles(images[..., half : (rows - 1) * size + half, half : (columns - 1) * size + half]))
    return torch.cat(found)


class PatchFrechetDistance(FrechetDistance):
    """`FrechetDistance` over the `patches` of pictures of any size, as "patch_fid" or "patch_fd_<name>".

    batch_size: how many patches go through the network at once.

    >>> class Means(nn.Module):
    ...     name, num_features = "means", 3
    ...     def forward(self, images):
    ...         return images.mean((2, 3))
    >>> images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    >>> metric = PatchFrechetDistance(Means(), size=4)
    >>> metric.update(images, real=True)
    >>> metric.update(images + 0.5, real=False)
    >>> metric.metric_name, metric.compute()
    ('patch_fd_means', tensor(0.7500, dtype=torch.float64))
    """

    def __init__(self, extractor: nn.Module, size: int = 256, batch_size: int = 32) -> None:
        super().__init__(extractor)
        self.size, self.batch_size = size, batch_size

    @property
    def metric_name(self) -> str:
        """Under which the result may be reported."""
        return f"patch_{super().metric_name}"

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add the patches of images (B, 3, H, W) in [0, 1] to the real or to the other set."""
        check_images(images)
        for part in patches(images, self.size).split(self.batch_size):
            self.update_features(self.extractor(part), real)


def patch_frechet_distance(preds: Tensor, target: Tensor, extractor: nn.Module, size: int = 256) -> float:
    """Of the patches of two batches, (B, 3, H, W) in [0, 1], over the features of a network."""
    metric = PatchFrechetDistance(extractor, size)
    metric.update(target, real=True)
    metric.update(preds, real=False)
    return metric.compute().item()
