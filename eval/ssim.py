"""Structural similarity, single and multi-scale.

SSIM: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity"; MS-SSIM: Wang,
Simoncelli and Bovik 2003. Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, mean over RGB channels.
The default form takes windows that lie wholly inside the picture, as the authors' code, scikit-image and pytorch-msssim
do. torchmetrics pads the picture by reflection, so its numbers differ in the third digit; that form has its own name
here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ImageError
from vtc.eval.metric import MeanOverImages, check_pair

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
#: exponents of the five scales, finest first (Wang et al. 2003, section 3.2)
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
#: the smallest side whose fifth scale still holds a window, by the rule of pytorch-msssim
MS_SSIM_MIN_SIDE = (WINDOW - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 1


def _blur(x: Tensor) -> Tensor:
    """Gaussian window over (N, 1, H, W), inside only: (N, 1, H - 10, W - 10).

    As eleven shifted sums along each axis: torch's convolution of single channels takes twenty times as long on a CPU.
    """
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window /= window.sum()
    for dim in (2, 3):
        length = x.shape[dim] - WINDOW + 1
        total = x.narrow(dim, 0, length) * window[0]
        for i in range(1, WINDOW):
            total = total.addcmul_(x.narrow(dim, i, length), window[i])
        x = total
    return x


def _ssim_and_contrast(preds: Tensor, target: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure term of each channel of each image; two (B, C)."""
    batch, channels = preds.shape[:2]
    # The variances are differences of large sums: about the middle grey, float32 loses less of them.
    x, y = (images.flatten(0, 1).unsqueeze(1) - data_range / 2 for images in (preds, target))
    # |x + y|^2 and |x - y|^2 give the sum of the variances and the covariance with four blurs instead of five.
    mean_x, mean_y, plus, minus = _blur(torch.cat([x, y, (x + y).square(), (x - y).square()])).chunk(4)
    plus = plus - (mean_x + mean_y).square()
    minus = minus - (mean_x - mean_y).square()
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    contrast = ((plus - minus) / 2 + c2) / ((plus + minus) / 2 + c2)
    mean_x, mean_y = mean_x + data_range / 2, mean_y + data_range / 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    similarity = luminance * contrast
    return (similarity.flatten(1).mean(1).view(batch, channels), contrast.flatten(1).mean(1).view(batch, channels))


def structural_similarity(preds: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """SSIM of each image, windows inside the picture.

    preds, target: (B, C, H, W) in [0, data_range], sides of at least 11. Returns (B,) in the input's precision.

    >>> ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    >>> structural_similarity(ramp * 0.8, ramp)
    tensor([0.9564])
    """
    check_pair(preds, target, data_range)
    _check_side(preds, WINDOW, "SSIM")
    return _ssim_and_contrast(preds, target, data_range)[0].mean(1)


def padded_structural_similarity(preds: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """SSIM as torchmetrics computes it: both pictures padded by 5 pixels by reflection, mean over all pixels.

    >>> ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    >>> padded_structural_similarity(ramp * 0.8, ramp)
    tensor([0.9569])
    """
    check_pair(preds, target, data_range)
    _check_side(preds, WINDOW // 2 + 1, "padded SSIM")
    preds, target = (F.pad(images, [WINDOW // 2] * 4, mode="reflect") for images in (preds, target))
    return _ssim_and_contrast(preds, target, data_range)[0].mean(1)


def multiscale_structural_similarity(preds: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """MS-SSIM of each image: five scales by 2x2 means, windows inside the picture.

    A negative mean contrast counts as zero, and an odd side is padded with zeros before halving, as in pytorch-msssim.
    preds, target: (B, C, H, W) in [0, data_range], sides of at least 161. Returns (B,) in the input's precision.

    >>> ramp = torch.linspace(0, 1, 176).expand(1, 3, 176, 176)
    >>> multiscale_structural_similarity(ramp * 0.8, ramp)
    tensor([0.9809])
    """
    check_pair(preds, target, data_range)
    _check_side(preds, MS_SSIM_MIN_SIDE, "MS-SSIM")
    product = preds.new_ones(preds.shape[:2])
    for scale, weight in enumerate(SCALE_WEIGHTS):
        similarity, contrast = _ssim_and_contrast(preds, target, data_range)
        last = scale == len(SCALE_WEIGHTS) - 1
        product = product * (similarity if last else contrast).relu().pow(weight)
        if not last:
            padding = [side % 2 for side in preds.shape[2:]]
            preds, target = (F.avg_pool2d(images, 2, padding=padding) for images in (preds, target))
    return product.mean(1)


def _check_side(images: Tensor, smallest: int, name: str) -> None:
    if min(images.shape[2:]) < smallest:
        raise ImageError(f"{name} needs sides of at least {smallest} pixels, "
                         f"not {images.shape[3]}x{images.shape[2]}.")


class StructuralSimilarity(MeanOverImages):
    """Mean SSIM over images; see `structural_similarity`.

    >>> ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    >>> metric = StructuralSimilarity()
    >>> metric.update(ramp * 0.8, ramp)
    >>> metric.compute()
    tensor(0.9564, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True

    def per_image(self, preds: Tensor, target: Tensor) -> Tensor:
        """(B,)."""
        return structural_similarity(preds, target, self.data_range)


class PaddedStructuralSimilarity(MeanOverImages):
    """Mean of torchmetrics' form of SSIM; see `padded_structural_similarity`."""

    is_differentiable = True
    higher_is_better = True

    def per_image(self, preds: Tensor, target: Tensor) -> Tensor:
        """(B,)."""
        return padded_structural_similarity(preds, target, self.data_range)


class MultiscaleStructuralSimilarity(MeanOverImages):
    """Mean MS-SSIM over images; see `multiscale_structural_similarity`.

    >>> ramp = torch.linspace(0, 1, 176).expand(1, 3, 176, 176)
    >>> metric = MultiscaleStructuralSimilarity()
    >>> metric.update(ramp * 0.8, ramp)
    >>> metric.compute()
    tensor(0.9809, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True

    def per_image(self, preds: Tensor, target: Tensor) -> Tensor:
        """(B,)."""
        return multiscale_structural_similarity(preds, target, self.data_range)
