"""Does an autoencoder do the same at every scale, in its place, and in tiles? A probe, never a loss.

EQ-VAE (2502.09509) measures ||tau E(x) - E(tau x)||^2 / ||E(tau x)||^2 for a scaling tau; as a loss that collapses.
The shift estimate is there because a published decoder moves its pictures by one pixel and no score says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError, ImageError
from vtc.eval.metric import Metric, check_images, check_pair
from vtc.eval.psnr import mean_squared_error, peak_signal_noise_ratio

Codec = Callable[[Tensor], Tensor]

SCALES = (Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))


class ScaleConsistency(NamedTuple):
    """At one scale; sums are taken over all images before dividing.

    latent_error: ||down E(x) - E(down x)||^2 / ||E(down x)||^2; 0 is equivariant.
    decoded_latent_psnr: D(down E(x)) against down(x), decibels of the mean squared error.
    decode_psnr: down(D(E(x))) against D(E(down x)).
    """

    latent_error: float
    decoded_latent_psnr: float
    decode_psnr: float


def downscale(x: Tensor, scale: Fraction) -> Tensor:
    """Bilinear with antialiasing, (B, C, H, W) by `scale`; ImageError where a side does not come out whole."""
    sides = [side * scale for side in x.shape[2:]]
    if any(side.denominator != 1 or side < 1 for side in sides):
        raise ImageError(f"A grid of {x.shape[3]}x{x.shape[2]} cannot be scaled by {scale} to whole numbers.")
    return F.interpolate(x, [int(side) for side in sides], mode="bilinear", antialias=True, align_corners=False)


class ScaleConsistencyProbe(Metric):
    """Runs an autoencoder on images and on the same images shrunk.

    encode: images (B, 3, H, W) in [0, 1] to latents (B, d, h, w). decode: latents to images.
    scales: fractions below 1; the sides of the images must be such that pixels and latents scale to whole grids.

    >>> def halve(x):
    ...     return F.avg_pool2d(x, 2)
    >>> def double(z):
    ...     return F.interpolate(z, scale_factor=2)
    >>> probe = ScaleConsistencyProbe(halve, double, [Fraction(1, 2)])
    >>> probe.update(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    >>> found = probe.compute()["1/2"]
    >>> 0 < found.latent_error < 0.01 and found.decode_psnr > found.decoded_latent_psnr
    True
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, encode: Codec, decode: Codec,
                 scales: Sequence[Fraction] = SCALES) -> None:
        super().__init__()
        if not scales or not all(0 < scale < 1 for scale in scales):
            raise ConfigError(f"Scales are fractions between 0 and 1, not {list(map(str, scales))}.")
        self.encode, self.decode, self.scales = encode, decode, tuple(map(Fraction, scales))
        # For each scale: the latent's error and energy, the two squared errors of pictures.
        self.add_state("sums", torch.zeros(len(self.scales), 4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Add images (B, 3, H, W) in [0, 1]."""
        check_images(images)
        latents = self.encode(images)
        decoded = self.decode(latents).clamp(0, 1)
        for row, scale in enumerate(self.scales):
            small = downscale(images, scale)
            small_latents, latents_small = downscale(latents, scale), self.encode(small)
            if small_latents.shape != latents_small.shape:
                raise ImageError(f"At scale {scale} the latents are {tuple(small_latents.shape[2:])} and "
                                 f"{tuple(latents_small.shape[2:])}; choose sides that the stride divides.")
            pairs = ((self.decode(small_latents).clamp(0, 1), small),
                     (downscale(decoded, scale), self.decode(latents_small).clamp(0, 1)))
            self.sums[row] += torch.stack([(small_latents - latents_small).double().square().sum(),
                                           latents_small.double().square().sum(),
                                           *(mean_squared_error(a, b).sum() for a, b in pairs)])
        self.count += len(images)

    def compute(self) -> dict[str, ScaleConsistency]:
        """Scale ("1/2") -> `ScaleConsistency`."""
        psnr = -10 * torch.log10(self.sums[:, 2:] / self.count)
        error = self.sums[:, 0] / self.sums[:, 1]
        return {str(scale): ScaleConsistency(error[i].item(), *psnr[i].tolist())
                for i, scale in enumerate(self.scales)}


def scale_consistency(images: Tensor, encode: Codec, decode: Codec,
                      scales: Sequence[Fraction] = SCALES) -> dict[str, ScaleConsistency]:
    """`ScaleConsistencyProbe` of one batch, (B, 3, H, W) in [0, 1]."""
    probe = ScaleConsistencyProbe(encode, decode, scales)
    probe.update(images)
    return probe.compute()


def estimate_shift(preds: Tensor, target: Tensor, max_shift: int = 8) -> Tensor:
    """By how many pixels, (rows, columns), each picture of `preds` lies below and right of `target`; (B, 2) float64.

    Whole pixels by the peak of the cross-correlation within `max_shift`; the rest by Gauss-Newton on the linearised
    brightness equation (Lucas and Kanade 1981), to about 0.01 pixels for sharp pictures.

    >>> x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> estimate_shift(x.roll((1, -2), (2, 3)), x).round()
    tensor([[ 1., -2.]], dtype=torch.float64)
    """
    check_pair(preds, target)
    if min(preds.shape[2:]) < 4 * max_shift:
        raise ImageError(f"A shift of {max_shift} pixels is looked for in pictures of at least {4 * max_shift} pixels.")
    return torch.stack([_shift_of(a, b, max_shift) for a, b in zip(preds.double().mean(1), target.double().mean(1),
                                                                   strict=True)])


def _shift_of(moved: Tensor, fixed: Tensor, max_shift: int) -> Tensor:
    height, width = fixed.shape
    best = torch.zeros(2, dtype=torch.int64)
    best_error = torch.inf
    inner = fixed[max_shift : height - max_shift, max_shift : width - max_shift]
    for dy in range(-max_shift, max_shift + 1):
        for dx in range(-max_shift, max_shift + 1):
            window = moved[max_shift + dy : height - max_shift + dy, max_shift + dx : width - max_shift + dx]
            error = (window - inner).square().mean().item()
            if error < best_error:
                best, best_error = torch.tensor([dy, dx]), error
    shift = best.double()
    spectrum = torch.fft.rfft2(moved)
    frequencies = (torch.fft.fftfreq(height).double()[:, None], torch.fft.rfftfreq(width).double()[None])
    rows = (fixed[2:, 1:-1] - fixed[:-2, 1:-1]) / 2
    columns = (fixed[1:-1, 2:] - fixed[1:-1, :-2]) / 2
    margin = _inside(max_shift)
    gradient = torch.stack([rows[margin].flatten(), columns[margin].flatten()], 1)
    for _ in range(5):
        turn = torch.polar(torch.ones(height, width // 2 + 1, dtype=torch.float64),
                           2 * torch.pi * (frequencies[0] * shift[0] + frequencies[1] * shift[1]))
        back = torch.fft.irfft2(spectrum * turn, s=(height, width))  # moved, put back by the estimate
        difference = (fixed - back)[1:-1, 1:-1][margin].flatten()
        shift = shift + torch.linalg.lstsq(gradient, difference[:, None]).solution[:, 0]
    return shift


def _inside(margin: int) -> tuple[slice, slice]:
    """The inside of a picture, `margin` pixels from its border: the Fourier shift wraps around there."""
    return slice(margin, -margin), slice(margin, -margin)


class TilingError(NamedTuple):
    """Tiled against whole: the largest difference of any value, and the PSNR between the two in decibels."""

    max_error: float
    psnr: float


def tiling_error(tiled: Tensor, whole: Tensor) -> TilingError:
    """Of two decodes of the same latents, (B, 3, H, W) in [0, 1].

    >>> a = torch.full((1, 3, 8, 8), 0.5)
    >>> tiling_error(a + 0.125, a)
    TilingError(max_error=0.125, psnr=18.06...)
    """
    check_pair(tiled, whole)
    return TilingError((tiled - whole).abs().max().item(), peak_signal_noise_ratio(tiled, whole).mean().item())
