"""WLF: the wavelet-based loss on latents of Diffusion-4K (Zhang et al., 2503.18352), for flow-matching models.

    noisy     z_s = (1 - s) z_0 + s noise
    estimate  z_0' = z_s - s v,            v what the model says at (z_s, s)
    loss      mean  weight(s) * band_weight * (bands(z_0') - bands(z_0))^2

**With equal band weights this is the plain squared error.** An orthonormal wavelet in periodization on even sides keeps
sums of squares (Parseval), and so does Haar in the published zero mode, which has nothing to pad there. So

    loss = mean weight(s) (z_0' - z_0)^2 = mean weight(s) s^2 (v - (noise - z_0))^2,

and the published loss, whose bands all weigh 1, adds no emphasis on details: against ordinary flow matching it only
adds the factor s^2. Unequal `band_weights` do add one. Odd sides change the mean's denominator, no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.wavelets import Mode, WaveletTransform


def estimate_clean(noisy: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """z_s - s v: the clean latent that a velocity points to."""
    return noisy - sigma * velocity


class WaveletLoss(nn.Module):
    """Squared error of wavelet bands; the defaults are the published loss.

    wavelet, levels, mode: of `WaveletTransform`.
    band_weights: of (A, H, V, D), each level's details alike; or of A and then H, V, D of every level, coarse to fine.
    """

    band_weights: Tensor

    def __init__(self, wavelet: str = "haar", levels: int = 1, mode: Mode = "zero",
                 band_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.transform = WaveletTransform(wavelet, levels, mode)
        weights = [float(w) for w in band_weights]
        if len(weights) not in (4, 1 + 3 * levels) or not all(w >= 0 for w in weights):
            raise ConfigError(f"{levels} levels take four band weights, of A, H, V and D, or {1 + 3 * levels}, none "
                              f"below zero; not {tuple(band_weights)}.")
        if len(weights) == 4:
            weights = weights[:1] + weights[1:] * levels
        self.register_buffer("band_weights", torch.tensor(weights), persistent=False)

    def forward(self, prediction: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """A scalar from two (B, C, h, w) latents; `weight` is that of each time, a number or (B, 1, 1, 1).

        diffusers' `compute_loss_weighting_for_sd3` gives the published weights. The mean is over all coefficients.
        """
        if prediction.shape != target.shape:
            raise ConfigError(f"Prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape.")
        # The transform is linear: one of the difference instead of a difference of two.
        bands = self.transform(prediction.float() - target.float())
        of_a = bands.approximation.square() * weight * self.band_weights[0]
        total, count = of_a.sum(), of_a.numel()
        for level, details in enumerate(bands.details):  # (B, C, 3, h, w)
            of_level = self.band_weights[1 + 3 * level : 4 + 3 * level].view(3, 1, 1)
            squares = (details.square() * of_level).sum(-3) * weight
            total, count = total + squares.sum(), count + details.numel()
        return total / count

    def band_errors(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The mean squared error of each band, unweighted: "a_2", "h_2", "v_2", "d_2", "h_1", ... for two levels."""
        bands = self.transform(prediction.float() - target.float())
        levels = self.transform.levels
        errors = {f"a_{levels}": bands.approximation.square().mean()}
        for level, details in zip(range(levels, 0, -1), bands.details, strict=True):
            for name, detail in zip("hvd", details.unbind(-3), strict=True):
                errors[f"{name}_{level}"] = detail.square().mean()
        return errors
