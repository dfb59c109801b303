"""Patches of a tokenizer's cells as one token of a generator, as Infinity-8B reads 2 x 2 cells of 14 bits as 56.

    cells  (B, p^2 L, d)   every grid (p h) x (p w), row by row
    tokens (B, L, d p^2)   every grid h x w; number c p^2 + p i + j of a token is number c of its cell (i, j)

The order inside a token is that of torch's `pixel_unshuffle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.scales import Grid, MultiScaleQuantizer, Scale, grids


def cells_of(scales: Sequence[Scale], patch: int) -> tuple[Grid, ...]:
    """A generator's grids to the tokenizer's, `patch` times as fine along each side."""
    return tuple((patch * rows, patch * columns) for rows, columns in grids(scales))


def fold(cells: Tensor, scales: Sequence[Grid], patch: int) -> Tensor:
    """(B, p^2 L, d) of the tokenizer's cells, scale after scale, to (B, L, d p^2) of the generator's `scales`."""
    parts = zip(_split(cells, scales, patch * patch), scales, strict=True)
    return torch.cat([part.unflatten(1, (rows, patch, columns, patch)).permute(0, 1, 3, 5, 2, 4).flatten(3)
                      .flatten(1, 2) for part, (rows, columns) in parts], 1)


def unfold(tokens: Tensor, scales: Sequence[Grid], patch: int) -> Tensor:
    """`fold` undone: (B, L, d p^2) to (B, p^2 L, d)."""
    parts = zip(_split(tokens, scales, 1), scales, strict=True)
    return torch.cat([part.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns)).permute(0, 1, 4, 2, 5, 3)
                      .flatten(1, 4) for part, (rows, columns) in parts], 1)


def _split(x: Tensor, scales: Sequence[Grid], cells: int) -> tuple[Tensor, ...]:
    sizes = [cells * rows * columns for rows, columns in scales]
    if x.shape[1] != sum(sizes):
        raise ConfigError(f"{x.shape[1]} cells do not fill grids of {sum(sizes)}.")
    return x.split(sizes, 1)


@dataclass(frozen=True)
class PatchedQuantizer:
    """A tokenizer's quantizer as a generator of patches sees it; `scales` are the generator's."""

    quantizer: MultiScaleQuantizer
    patch: int

    def add_scale(self, total: Tensor | None, indices: Tensor, number: int, scales: Sequence[Scale]) -> Tensor:
        """The sum so far, (B, d, p H, p W), and a scale's (B, h, w, G p^2) indices to the sum after it."""
        size = (indices.shape[1], indices.shape[2])
        cells = unfold(indices.flatten(1, 2), (size,), self.patch).unflatten(1, cells_of((size,), self.patch)[0])
        return self.quantizer.add_scale(total, cells, number, cells_of(scales, self.patch))

    def next_scale_input(self, total: Tensor, number: int, scales: Sequence[Scale]) -> Tensor:
        """The sum after a scale as the generator reads it for the next one: (B, d p^2, h, w)."""
        shown = self.quantizer.next_scale_input(total, number, cells_of(scales, self.patch))
        return torch.nn.functional.pixel_unshuffle(shown, self.patch)
