"""DISTS: structure and texture of VGG-16 features, tolerant of resampled texture.

Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity" (2004.07728): the means and the
covariances over space of each channel of the picture and of five VGG stages, whose pooling is a Hann-weighted L2 norm.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ImageError, ModelError
from vtc.eval.metric import MeanOverImages, check_pair
from vtc.tokenizers.lpips import LPIPS

#: channels of the picture and of the five stages
WIDTHS = (3, 64, 128, 256, 512, 512)
EPSILON = 1e-6
MIN_SIDE = 16


class DISTS(nn.Module):
    """The network; frozen, differentiable in both images.

    weights: VGG-16's convolutions, as of `vtc.tokenizers.lpips.LPIPS`.
    channel_weights: a file with `alpha` and `beta`, (1, 1475, 1, 1) each; by default the one that torchmetrics carries.
    Raises ModelError where either is not found.
    """

    alpha: Tensor
    beta: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | os.PathLike[str] | None = None,
                 channel_weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.features = LPIPS("vgg", weights).features
        state = _channel_weights(channel_weights)
        total = state["alpha"].sum() + state["beta"].sum()
        for name in ("alpha", "beta"):
            self.register_buffer(name, (state[name] / total).reshape(-1))
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        window = torch.hann_window(5, periodic=False)[1:-1]
        kernel = torch.outer(window, window)
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of images (B, 3, H, W) in [0, 1]; (B,)."""
        similarity = a.new_zeros(len(a))
        for x, y, alpha, beta in zip(self.stages(a), self.stages(b), self.alpha.split(WIDTHS),
                                     self.beta.split(WIDTHS), strict=True):
            mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
            texture = (2 * mean_x * mean_y + EPSILON) / (mean_x.square() + mean_y.square() + EPSILON)
            variances = x.var((2, 3), correction=0) + y.var((2, 3), correction=0)
            covariance = (x * y).mean((2, 3)) - mean_x * mean_y
            structure = (2 * covariance + EPSILON) / (variances + EPSILON)
            similarity = similarity + (alpha * texture + beta * structure).sum(1)
        return 1 - similarity

    def stages(self, images: Tensor) -> list[Tensor]:
        """The picture itself and the last activation of each stage."""
        x, found = (images - self.mean) / self.std, [images]
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
                x = self._pool(x)
            else:
                x = layer(x)
        return [*found, x]

    def _pool(self, x: Tensor) -> Tensor:
        """Square root of the Hann-weighted mean of squares, every second position."""
        kernel = self.get_buffer("kernel").expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


def _channel_weights(path: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    if path is None:
        spec = importlib.util.find_spec("torchmetrics")
        folder = Path(spec.origin).parent if spec and spec.origin else Path()
        path = folder / "functional" / "image" / "dists_models" / "weights.pt"
    if not Path(path).is_file():
        raise ModelError(f"DISTS needs its channel weights, and {path} does not exist; install torchmetrics 1.5 "
                         "or give channel_weights.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if any(name not in state or state[name].numel() != sum(WIDTHS) for name in ("alpha", "beta")):
        raise ModelError(f"{path} does not hold DISTS' alpha and beta of {sum(WIDTHS)} channels.")
    return {name: state[name].detach() for name in ("alpha", "beta")}


@torch.no_grad()
def deep_image_structure_and_texture_similarity(preds: Tensor, target: Tensor, network: DISTS) -> Tensor:
    """DISTS of each image, at the size it has; lower is closer. Upstream's demo shrinks to 256 pixels first.

    preds, target: (B, 3, H, W) in [0, 1], sides of at least 16. Returns (B,).
    """
    check_pair(preds, target)
    if preds.shape[1] != 3 or min(preds.shape[2:]) < MIN_SIDE:
        raise ImageError(f"DISTS needs RGB pictures with sides of at least {MIN_SIDE} pixels, "
                         f"not {tuple(preds.shape[1:])}.")
    return network(preds, target)


class DeepImageStructureAndTextureSimilarity(MeanOverImages):
    """Mean DISTS over images; see `DISTS` for the weights.

    >>> DeepImageStructureAndTextureSimilarity("no/such/folder")
    Traceback (most recent call last):
    vtc.errors.ModelError: ...
    """

    is_differentiable = False
    higher_is_better = False

    def __init__(self, weights: str | os.PathLike[str] | None = None,
                 channel_weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__(data_range=1.0)
        self.network = DISTS(weights, channel_weights)

    def per_image(self, preds: Tensor, target: Tensor) -> Tensor:
        """(B,)."""
        return deep_image_structure_and_texture_similarity(preds, target, self.network)
