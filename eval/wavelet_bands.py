"""Where in scale an error lies: energies of its Haar bands, as the wavelet loss (WLF) of Diffusion-4K sees them.

The Haar transform is orthonormal, so for even sides the bands' energies add up to the plain squared error: with equal
weights the loss of that paper is plain MSE, and this table shows what its bands hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import ConfigError, ImageError
from vtc.eval.metric import Metric
from vtc.tokenizers.wavelets import WaveletTransform

DETAILS = ("horizontal", "vertical", "diagonal")


def haar_bands(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level: low pass, horizontal, vertical, diagonal detail, each (B, C, ceil(H/2), ceil(W/2)).

    PyWavelets' `dwt2(x, "haar", mode="zero")`: an odd side is continued by zeros.
    """
    low, (details,) = WaveletTransform("haar", 1, "zero")(x)
    horizontal, vertical, diagonal = details.unbind(-3)
    return low, horizontal, vertical, diagonal


def band_energies(x: Tensor, levels: int = 1) -> dict[str, float]:
    """Sum of squares in each band of (B, C, H, W): "low", and "level1_horizontal" (finest) and so on.

    >>> band_energies(torch.ones(1, 1, 2, 2))
    {'level1_horizontal': 0.0, 'level1_vertical': 0.0, 'level1_diagonal': 0.0, 'low': 4.0}
    """
    if x.ndim != 4:
        raise ImageError(f"Bands are taken of (B, C, H, W), not {tuple(x.shape)}.")
    if levels < 1:
        raise ConfigError(f"A wavelet transform has at least one level, not {levels}.")
    energies: dict[str, float] = {}
    low = x.double()
    for level in range(1, levels + 1):
        low, *details = haar_bands(low)
        energies |= {f"level{level}_{name}": float(band.square().sum())
                     for name, band in zip(DETAILS, details, strict=True)}
    return energies | {"low": float(low.square().sum())}


class WaveletBandEnergies(Metric):
    """Energy of the error in each Haar band, relative to the target's own energy there; for images or latents.

    `compute` gives {band: ratio}; 0 is a perfect band, 1 is one that was left out; NaN where the target has nothing.

    >>> target = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    >>> metric = WaveletBandEnergies()
    >>> metric.update(torch.full((1, 1, 2, 2), 0.25), target)
    >>> {band: ratio.item() for band, ratio in metric.compute().items()}
    {'level1_horizontal': 1.0, 'level1_vertical': 1.0, 'level1_diagonal': 1.0, 'low': 0.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    error: Tensor
    reference: Tensor

    def __init__(self, levels: int = 1) -> None:
        super().__init__()
        self.levels = levels
        self.bands = tuple(band_energies(torch.zeros(1, 1, 2, 2), levels))
        for name in ("error", "reference"):
            self.add_state(name, torch.zeros(len(self.bands), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of pairs, (B, C, H, W), of any range."""
        if preds.shape != target.shape:
            raise ImageError(f"The tensors have different sizes, {tuple(preds.shape)} and {tuple(target.shape)}.")
        for state, x in ((self.error, preds.double() - target.double()), (self.reference, target)):
            state += torch.tensor(list(band_energies(x, self.levels).values()), dtype=torch.float64,
                                  device=state.device)

    def compute(self) -> dict[str, Tensor]:
        """Band -> energy of the error over energy of the target."""
        return dict(zip(self.bands, self.error / self.reference, strict=True))
