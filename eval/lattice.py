"""Lattice energy: does the error repeat at the network's strides?

A decoder that draws 2x2 or 16x16 cells side by side leaves a grid in the picture: narrow peaks in the spectrum of the
error at the harmonics of the stride. Measured is each peak against its neighbouring bins, so image content cancels.
Own definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.eval.metric import Metric, check_pair


def error_spectrum(images: Tensor, reconstructions: Tensor, period: int, cells: int = 16) -> Tensor:
    """Power of the luminance error at frequencies k / (period * cells), k = 0 .. period * cells / 2, over both axes.

    Lines are cut into Hann-windowed pieces of period * cells pixels (Welch), half overlapping, so images of any
    size add up; (period * cells / 2 + 1,) float64, a sum over pieces.
    """
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=images.device).view(1, 3, 1, 1)
    error = ((reconstructions.double() - images.double()) * luma).sum(1)
    length = period * cells
    window = torch.hann_window(length, periodic=True, dtype=torch.float64, device=images.device)
    total = torch.zeros(length // 2 + 1, dtype=torch.float64, device=images.device)
    for lines in (error, error.transpose(1, 2)):
        if lines.shape[-1] >= length:
            pieces = lines.unfold(-1, length, length // 2)
            total += torch.fft.rfft(pieces * window).abs().square().flatten(0, -2).sum(0)
    return total


def lattice_ratio(spectrum: Tensor, period: int, cells: int = 16) -> float:
    """The largest peak at a harmonic of 1 / period over the mean of its neighbours; 1 means no lattice.

    spectrum: from `error_spectrum`, summed over images. The Hann window spreads a line over three bins, so neighbours
    are those two to five bins away; near the highest frequency only the lower side exists.
    """
    if spectrum.shape != (period * cells // 2 + 1,):
        raise ConfigError(f"The spectrum of period {period} and {cells} cells has {period * cells // 2 + 1} bins, "
                          f"not {tuple(spectrum.shape)}.")
    ratios = []
    for harmonic in range(1, period // 2 + 1):
        k = harmonic * cells
        near = [spectrum[j] for d in range(2, 6) for j in (k - d, k + d) if 0 < j < len(spectrum) - 1]
        # At the highest frequency the real transform has one phase instead of two: half the power of its neighbours.
        ratios.append(float(spectrum[k] / torch.stack(near).mean()))
    return max(ratios)


class LatticeRatio(Metric):
    """`lattice_ratio` of a data set: the spectra of all errors are added up before the peaks are measured.

    period: the largest stride of the network in pixels; its harmonics hold those of the smaller ones.
    Pictures with both sides shorter than period * cells add nothing; without any larger one the result is NaN.

    >>> _ = torch.manual_seed(0)
    >>> target = torch.full((1, 3, 256, 256), 0.5)
    >>> noisy = target + 0.1 * torch.rand(1, 3, 256, 256)
    >>> metric = LatticeRatio(period=16)
    >>> metric.update(noisy, target)
    >>> metric.compute().item() < 1.3
    True
    >>> noisy[..., ::2] += 0.02
    >>> metric.reset()
    >>> metric.update(noisy, target)
    >>> metric.compute().item() > 2
    True
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    spectrum: Tensor

    def __init__(self, period: int = 16, cells: int = 16) -> None:
        super().__init__()
        if period < 2 or period % 2 or cells < 12:
            raise ConfigError(f"The period must be even and at least 2, and cells at least 12, not {period}, {cells}.")
        self.period, self.cells = period, cells
        bins = torch.zeros(period * cells // 2 + 1, dtype=torch.float64)
        self.add_state("spectrum", bins, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of pairs, (B, 3, H, W) in [0, 1]."""
        check_pair(preds, target)
        self.spectrum += error_spectrum(target, preds, self.period, self.cells)

    def compute(self) -> Tensor:
        """The ratio, float64."""
        ratio = lattice_ratio(self.spectrum, self.period, self.cells) if self.spectrum.any() else float("nan")
        return torch.tensor(ratio, dtype=torch.float64)
