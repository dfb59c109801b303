"""Small deterministic tokenizers, one for each kind of token layout that streams can carry. No weights are learned.

Their numbers are whole multiples of powers of two, so their fingerprints are the same everywhere.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def skewed_table(vocab: int, total: int = 2**20, first: int = 0) -> Tensor:
    """(K,) int32 that adds up to `total`: word `first` is the likeliest, each next one about 3/4 as likely."""
    weights = torch.tensor([3**i * 4 ** (vocab - i) for i in range(min(vocab, 12))], dtype=torch.float64)
    table = torch.ones(vocab, dtype=torch.float64)
    table[: len(weights)] += (weights / weights.sum() * (total - vocab)).floor()
    table[0] += total - table.sum()
    return table.roll(first).int()


def colours(levels: int) -> Tensor:
    """(levels^3, 3) colours, evenly spaced in [0, 1] from black to white in multiples of 1/16."""
    steps = (torch.arange(levels) * 16 // (levels - 1)) / 16
    return torch.cartesian_prod(steps, steps, steps)


def nearest(pixels: Tensor, codebook: Tensor) -> Tensor:
    """(B, 3, h, w) to the index (B, h, w) of the nearest colour."""
    return torch.cdist(pixels.flatten(2).transpose(1, 2), codebook).argmin(-1).unflatten(1, pixels.shape[-2:])


def block_means(images: Tensor, stride: int) -> Tensor:
    """(B, 3, H, W) to the mean colour of each stride x stride block; edges are replicated."""
    height, width = images.shape[-2:]
    return F.avg_pool2d(F.pad(images, (0, -width % stride, 0, -height % stride), mode="replicate"), stride)


class TinyGrid(Tokenizer):
    """A local vector quantizer: the nearest of 64 colours for each 16x16 block; one table for all."""

    downsample = 16
    is_local = True
    halo = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", colours(4))
        self.token_frequencies = skewed_table(64)[None]

    @property
    def codewords(self) -> Tensor:
        return self.get_buffer("codebook")

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((-(-height // 16), -(-width // 16)),), (64,))

    def encode(self, images: Tensor) -> Tokens:
        indices = nearest(block_means(images, 16), self.get_buffer("codebook")).flatten(1)[..., None]
        return Tokens(indices, self.layout(*images.shape[-2:]), *images.shape[-2:])

    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        (grid,) = tokens.grids()
        pixels = self.get_buffer("codebook")[grid[..., 0]].permute(0, 3, 1, 2)
        pixels = pixels.repeat_interleave(16, -1).repeat_interleave(16, -2)
        return pixels[..., : tokens.height, : tokens.width]


class TinyGroups(Tokenizer):
    """Lookup-free, a group for each colour channel: signs of two thresholds and of two gradients; a table a group.

    The third group has one bit less than the others, so the vocabularies differ.
    """

    downsample = 8
    is_local = True
    halo = 0
    model_id = 77

    def __init__(self) -> None:
        super().__init__()
        tables = [skewed_table(v, first=g) for g, v in enumerate((16, 16, 8))]
        self.token_frequencies = torch.stack([F.pad(t, (0, 16 - len(t))) for t in tables])

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((-(-height // 8), -(-width // 8)),), (16, 16, 8))

    def encode(self, images: Tensor) -> Tokens:
        m = block_means(images, 8)  # (B, 3, h, w)
        fine = F.interpolate(block_means(images, 4), (2 * m.shape[-2], 2 * m.shape[-1]))  # halves of each block
        left, top = fine[..., ::2, ::2] > fine[..., ::2, 1::2], fine[..., ::2, ::2] > fine[..., 1::2, ::2]
        bits = torch.stack((m > 0.5, (m * 2) % 1 > 0.5, left, top), -1).long()
        indices = (bits * torch.tensor([1, 2, 4, 8])).sum(-1).permute(0, 2, 3, 1)
        indices[..., 2] %= 8
        return Tokens(indices.flatten(1, 2), self.layout(*images.shape[-2:]), *images.shape[-2:])

    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        (grid,) = tokens.grids()
        pixels = ((grid % 2) * 0.5 + (grid // 2 % 2) * 0.25 + 0.125).permute(0, 3, 1, 2)
        pixels = pixels.repeat_interleave(8, -1).repeat_interleave(8, -2)
        return pixels[..., : tokens.height, : tokens.width]


class TinyScales(Tokenizer):
    """Like VAR: ten grids over the whole image whatever its size, each quantizes what the coarser ones left.

    32 words, a table a scale.
    """

    downsample = 16

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.cat([colours(3) - 0.5, colours(2)[:5] / 8]))  # 27 + 5 words
        self.token_frequencies = torch.stack([skewed_table(32, first=3 * s) for s in range(len(VAR_SCALES))])

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(tuple((s, s) for s in VAR_SCALES), (32,))

    def encode(self, images: Tensor) -> Tokens:
        rest, parts = F.interpolate(images, (16, 16), mode="area") - 0.5, []
        for s in VAR_SCALES:
            parts.append(nearest(F.interpolate(rest, (s, s), mode="area"), self.get_buffer("codebook")))
            rest = rest - self.drawn(parts[-1])
        indices = torch.cat([p.flatten(1) for p in parts], 1)[..., None]
        return Tokens(indices, self.layout(*images.shape[-2:]), *images.shape[-2:])

    def drawn(self, grid: Tensor) -> Tensor:
        return F.interpolate(self.get_buffer("codebook")[grid].permute(0, 3, 1, 2), (16, 16))

    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        return self.decode_stages(tokens, len(VAR_SCALES))

    @property
    def stages(self) -> Literal["scales"]:
        return "scales"

    def decode_stages(self, tokens: Tokens, count: int) -> Tensor:
        total = torch.stack([self.drawn(grid[..., 0]) for grid in tokens.grids()[:count]]).sum(0)
        return F.interpolate(total + 0.5, (tokens.height, tokens.width)).clamp(0, 1)


class TinyLevels(Tokenizer):
    """Residual levels: three groups on one grid, each a colour of 27 that is a third as bright; a table a group."""

    downsample = 8

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", colours(3) - 0.5)
        self.token_frequencies = torch.stack([skewed_table(27, first=9 * g) for g in range(3)])

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((-(-height // 8), -(-width // 8)),), (27, 27, 27))

    def encode(self, images: Tensor) -> Tokens:
        rest, levels = block_means(images, 8) - 0.5, []
        for level in range(3):
            levels.append(nearest(rest * 3**level, self.get_buffer("codebook")))
            rest = rest - self.get_buffer("codebook")[levels[-1]].permute(0, 3, 1, 2) / 3**level
        return Tokens(torch.stack(levels, -1).flatten(1, 2), self.layout(*images.shape[-2:]), *images.shape[-2:])

    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        return self.decode_stages(tokens, 3)

    @property
    def stages(self) -> Literal["groups"]:
        return "groups"

    def decode_stages(self, tokens: Tokens, count: int) -> Tensor:
        (grid,) = tokens.grids()
        total = torch.stack([self.get_buffer("codebook")[grid[..., g]] / 3**g for g in range(count)]).sum(0)
        pixels = (total + 0.5).permute(0, 3, 1, 2).repeat_interleave(8, -1).repeat_interleave(8, -2)
        return pixels[..., : tokens.height, : tokens.width].clamp(0, 1)


class TinySequence(Tokenizer):
    """One-dimensional: 24 tokens for any image, each the brightness of a band, of 37 words; no tables."""

    downsample = 16

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((1, 24),), (37,))

    def encode(self, images: Tensor) -> Tokens:
        bands = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), (24, 1)).flatten(1)
        return Tokens((bands * 36).round().long()[..., None], self.layout(*images.shape[-2:]), *images.shape[-2:])

    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        bands = tokens.indices[:, :, 0].float()[:, None, :, None] / 36
        return F.interpolate(bands, (tokens.height, tokens.width)).expand(-1, 3, -1, -1)


TINY_TOKENIZERS: dict[str, type[Tokenizer]] = {
    "grid": TinyGrid, "groups": TinyGroups, "scales": TinyScales, "sequence": TinySequence}
