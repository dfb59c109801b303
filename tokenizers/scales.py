"""What multi-scale quantizers share: grids of tokens, coarse to fine, and the sums that their steps add up to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.quantizer import Quantizer

Scale = int | tuple[int, int]
Grid = tuple[int, int]


def grids(scales: Sequence[Scale]) -> tuple[Grid, ...]:
    """Sides or (rows, columns) to (rows, columns); ConfigError for none or for an empty grid."""
    result = tuple((s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in scales)
    if not result or min(min(g) for g in result) < 1:
        raise ConfigError(f"Scales are grids of at least 1x1, not {tuple(scales)}.")
    return result


def split_scales(indices: Tensor, steps: Sequence[Grid]) -> list[Tensor]:
    """(B, L, ...) to a (B, h, w, ...) view a scale; L may end after any of the scales."""
    if indices.ndim < 2:
        raise ConfigError(f"Indices of several scales are (B, L, ...), not {tuple(indices.shape)}.")
    parts, start = [], 0
    for rows, columns in steps:
        if start == indices.shape[1]:
            break
        parts.append(indices[:, start : start + rows * columns])
        start += rows * columns
    if start != indices.shape[1] or not parts:
        raise ConfigError(f"{indices.shape[1]} tokens do not fill the first of the grids {tuple(steps)}.")
    return [part.unflatten(1, size) for part, size in zip(parts, steps, strict=False)]


def resize_area(x: Tensor, size: Grid) -> Tensor:
    """(B, d, H, W) to (B, d, *size): the mean over each cell."""
    if x.shape[-2:] == size:
        return x
    if x.device.type == "mps":  # knows only sizes that divide
        return resize_area(x.cpu(), size).to(x.device)
    return F.interpolate(x, size, mode="area")


class MultiScaleQuantizer(Quantizer):
    """Base: the code of a map is the sum of a step for each grid of tokens, coarse to fine.

    A kind of its own says what a grid's tokens add (`step`) and how a sum is shown to the next grid (`shown_at`).
    Every method takes `scales` for an image of another size than the constructor's.
    """

    def __init__(self, dim: int, scales: Sequence[Scale]) -> None:
        super().__init__()
        self.dim, self.scales = dim, grids(scales)

    def step(self, indices: Tensor, number: int, steps: tuple[Grid, ...]) -> Tensor:
        """(B, h, w, ...) indices of scale `number` to what they add, (B, d, H, W)."""
        raise NotImplementedError

    def shown_at(self, total: Tensor, size: Grid) -> Tensor:
        """A sum, (B, d, H, W), as a generator reads it before it draws the grid of this size."""
        raise NotImplementedError

    def grids_of(self, scales: Sequence[Scale] | None) -> tuple[Grid, ...]:
        """The given scales, or the constructor's."""
        return self.scales if scales is None else grids(scales)

    def check_map(self, z: Tensor, steps: tuple[Grid, ...], training: bool | None = None) -> None:
        """ConfigError unless z is (B, d, H, W) of the last grid's size."""
        self.check_latents(z, training)
        if z.ndim != 4 or z.shape[1] != self.dim or tuple(z.shape[-2:]) != steps[-1]:
            raise ConfigError(f"These scales take (B, {self.dim}, {steps[-1][0]}, {steps[-1][1]}) latents, "
                              f"not {tuple(z.shape)}; give the scales of this size.")

    def indices_to_codes(self, indices: Tensor, scales: Sequence[Scale] | None = None) -> Tensor:
        """(B, L, ...) indices to (B, d, H, W), the sum of all steps; the first scales' alone give the sum so far."""
        return self.partial_sums(indices, scales)[-1]

    def partial_sums(self, indices: Tensor, scales: Sequence[Scale] | None = None) -> list[Tensor]:
        """(B, L, ...) indices, or those of the first scales, to the sum after each scale, (B, d, H, W)."""
        total, sums = None, []
        for number, part in enumerate(split_scales(indices, self.grids_of(scales))):
            total = self.add_scale(total, part, number, scales)
            sums.append(total)
        return sums

    def add_scale(self, total: Tensor | None, indices: Tensor, number: int,
                  scales: Sequence[Scale] | None = None) -> Tensor:
        """The sum before scale `number` (None before the first) and that scale's indices to the sum after it.

        indices: (B, h, w, ...).
        """
        step = self.step(self.checked_indices(indices), number, self.grids_of(scales))
        return step if total is None else total + step

    def next_scale_input(self, total: Tensor, number: int, scales: Sequence[Scale] | None = None) -> Tensor:
        """The sum after scale `number`, (B, d, H, W), as a generator reads it for the next: (B, d, h, w).

        After the last scale it is the sum itself.
        """
        steps = self.grids_of(scales)
        return self.shown_at(total, steps[number + 1]) if number + 1 < len(steps) else total

    def teacher_inputs(self, indices: Tensor, scales: Sequence[Scale] | None = None) -> Tensor:
        """(B, L, ...) indices to what a generator reads before each later scale: (B, L - cells of the first, d)."""
        sums = self.partial_sums(indices, scales)
        shown = [self.next_scale_input(total, number, scales).flatten(2) for number, total in enumerate(sums[:-1])]
        return torch.cat([sums[0].new_zeros(len(indices), self.dim, 0), *shown], 2).transpose(1, 2)
