"""Rotary positions in two dimensions (RoPE2d), as Infinity and LlamaGen have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.generators.kv_cache.schedule import Grid


def rotation(scales: Sequence[Grid], frame: Grid, head_dim: int,
             device: torch.device | str = "cpu", base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, head_dim / 2) of the cells of all scales, laid over the `frame` grid.

    The first half of the pairs turns with the row, the second with the column; the speeds are RoPE's for half a head.
    """
    half = head_dim // 2
    speed = 1.0 / base ** (torch.arange(0, half, 2, device=device).float() / half)
    angles = []
    for size in scales:
        rows, columns = (torch.round(torch.arange(n, device=device) * (whole / n)) for n, whole in
                         zip(size, frame, strict=True))
        angles.append(torch.cat([(rows[:, None] * speed)[:, None].expand(-1, size[1], -1),
                                 (columns[:, None] * speed).expand(size[0], -1, -1)], -1).flatten(0, 1))
    angle = torch.cat(angles)
    return angle.cos(), angle.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2 j, 2 j + 1) of (B, H, n, D) by (n, D / 2) angles."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
