"""Concealer: fills in tokens that were lost on the way, from the tokens around them. Our own design.

"Extreme Image Compression using Fine-tuned VQGANs" (Mao et al., 2307.08265) predicts lost indices with a transformer
that slides over the grid; its code is not published, and neither are layers or widths. What is here is not theirs:

    codeword of each token, or [lost]  (h, w, d)  -> linear -> width
      5 x   + depthwise 3x3             neighbours, and where the position is
            + attention in 8x8 windows, moved by 4 in every other block
            + MLP
    norm, linear -> f, one vector a lost position;   p(word) = softmax over words of f . g(codeword) + b(codeword)

Words are known by their codewords alone, g and b are a small network of them: so one concealer serves every codebook
of the tokenizer's dimension, the large one and all that are clustered from it. Attention looks in windows and knows
relative places only: any grid can be filled in, and a large one is filled in tile by tile in bounded memory.

What the decoder gets for a lost position is by default not a word but the mean of the codewords under p
(`conceal_codes`): where the words disagree, the picture is better off between them. `conceal` gives words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vtc.errors import ConfigError, FileError, ModelError
from vtc.files import write_file
from vtc.hub import stored_tensors

#: the name of the file in a model's folder, beside model.safetensors
CONCEALER = "concealer.safetensors"
FORMAT = "vtc concealer 1"

#: positions of a tile that are filled in, along each axis, and positions around it that are looked at. Both are
#: multiples of two windows, so windows fall alike in a tile and in the whole grid.
TILE, HALO = 64, 16


class WindowAttention(nn.Module):
    """Multi-head attention among the positions of each window, with a learned bias for each relative place.

    shift: how far the windows are moved up and left.
    """

    places: Tensor

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, (2 * window - 1) ** 2))
        y, x = (t.flatten() for t in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
        rows, columns = y[:, None] - y + window - 1, x[:, None] - x + window - 1
        self.register_buffer("places", rows * (2 * window - 1) + columns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) in and out."""
        rows, columns, width = x.shape[1:]
        q, k, v = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))  # (B, windows, heads, n, C / heads)
        inside = self._split(x.new_ones(1, rows, columns, self.heads)).movedim(-1, -2)  # 0 beyond the grid's edge
        bias = self.bias[:, self.places].to(q.dtype) + (inside - 1) * 1e4  # (1, windows, heads, n, n)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5 + bias).softmax(-1)
        return self.proj(self._join(weights @ v, rows, columns))

    def _split(self, x: Tensor) -> Tensor:
        """(B, h, w, heads * c) to (B, windows, heads, window * window, c), zeros beyond the edges."""
        rows, columns = x.shape[1:3]
        s, n = self.shift, self.window
        x = F.pad(x, (0, 0, s, -(columns + s) % n, s, -(rows + s) % n))
        x = x.unflatten(3, (self.heads, -1)).unflatten(2, (-1, n)).unflatten(1, (-1, n))
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)

    def _join(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse of `_split`, without what was beyond the edges."""
        s, n = self.shift, self.window
        x = x.unflatten(1, (-(-(rows + s) // n), -(-(columns + s) // n))).unflatten(4, (n, n))
        x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x[:, s : s + rows, s : s + columns]


class Block(nn.Module):
    """Neighbours, window attention, MLP; each is added to what comes in."""

    def __init__(self, width: int, heads: int, window: int, shift: int, mlp_ratio: int) -> None:
        super().__init__()
        self.neighbours = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU("tanh"),
                                 nn.Linear(mlp_ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) in and out."""
        x = x + self.neighbours(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Concealer(nn.Module):
    """A bidirectional masked-token transformer over grids of codewords.

    dim: of the codewords. width, depth, heads, window, mlp_ratio: of the transformer. key: where f and g meet.
    temperature, gain: what logits are divided by for the mean codeword, and what it is multiplied with. Above and below
        one the decoder paints lost places more calmly, which LPIPS prefers; the bundled ones were chosen on hold-out.
    """

    def __init__(self, dim: int = 32, width: int = 192, depth: int = 5, heads: int = 6, window: int = 8,
                 mlp_ratio: int = 3, key: int = 64, temperature: float = 1.0, gain: float = 1.0) -> None:
        super().__init__()
        self.config = {"dim": dim, "width": width, "depth": depth, "heads": heads, "window": window,
                       "mlp_ratio": mlp_ratio, "key": key}
        self.temperature, self.gain = temperature, gain
        self.embed = nn.Linear(dim, width)
        self.lost = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads, window, i % 2 * (window // 2), mlp_ratio) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, key)
        self.words = nn.Sequential(nn.Linear(dim, 2 * key), nn.GELU("tanh"), nn.Linear(2 * key, key + 1))
        self.words_linear = nn.Linear(dim, key, bias=False)

    def forward(self, codes: Tensor, lost: Tensor, codebook: Tensor) -> Tensor:
        """Logits (N, S) over the words of `codebook` (S, d) for the N lost positions, in the order of `codes[lost]`.

        codes: (B, h, w, d) codewords; those of lost positions are not looked at. lost: (B, h, w) bool.
        """
        x = torch.where(lost[..., None], self.lost, self.embed(codes))
        for block in self.blocks:
            x = block(x)
        features = self.head(self.norm(x[lost]))
        words = self.words(codebook)
        keys = words[:, :-1] + self.words_linear(codebook)
        return features @ keys.T * features.shape[1] ** -0.5 + words[:, -1]

    def mean_codes(self, logits: Tensor, codebook: Tensor) -> Tensor:
        """(N, S) logits to (N, d) what the decoder gets for a lost position."""
        return self.gain * ((logits.float() / self.temperature).softmax(1) @ codebook)

    @torch.no_grad()
    def conceal(self, indices: Tensor, lost: Tensor, grid: tuple[int, int], codebook: Tensor) -> Tensor:
        """Indices (B, L) with the lost ones replaced by the likeliest words.

        indices: (B, L) int64 of grids of (rows, columns), row by row; what is lost is not read.
        lost: (B, L) bool. codebook: (S, d).
        Raises ModelError for codewords of another dimension, ConfigError for shapes that contradict each other.
        """
        return self._fill(indices, lost, grid, codebook)[0].flatten(1)

    @torch.no_grad()
    def conceal_codes(self, indices: Tensor, lost: Tensor, grid: tuple[int, int], codebook: Tensor) -> Tensor:
        """Codewords (B, L, d): of what was received its own, of what was lost the mean over the words it may have been.

        Arguments and errors as of `conceal`.
        """
        return self._fill(indices, lost, grid, codebook)[1].flatten(1, 2)

    def _fill(self, indices: Tensor, lost: Tensor, grid: tuple[int, int], codebook: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w) indices and (B, h, w, d) codes."""
        if codebook.ndim != 2 or codebook.shape[1] != self.config["dim"]:
            raise ModelError(f"The concealer is for codewords of {self.config['dim']} dimensions, and the codebook is "
                             f"{tuple(codebook.shape)}; train one for this model with scripts/train_concealer.py.")
        length = grid[0] * grid[1]
        if indices.ndim != 2 or indices.shape[1] != length or lost.shape != indices.shape:
            raise ConfigError(f"Indices {tuple(indices.shape)} and marks {tuple(lost.shape)} of what is lost must be "
                              f"(B, {length}) for a grid of {grid[0]}x{grid[1]}.")
        origin, device = indices.device, self.lost.device
        words, unknown = codebook.to(device, torch.float32), lost.to(device).unflatten(1, grid)
        filled = indices.to(device).unflatten(1, grid).masked_fill(unknown, 0)
        codes = words[filled]
        for inner, outer in _tiles(grid):
            if not unknown[inner].any():
                continue
            own = torch.zeros_like(unknown)  # lost, and not in the halo
            own[inner] = unknown[inner]
            logits = self(codes[outer], unknown[outer], words)[own[outer][unknown[outer]]]
            filled[own], codes[own] = logits.argmax(1), self.mean_codes(logits, words)  # unknown still to other tiles
        return filled.to(origin), codes.to(origin)

    def save(self, path: str | Path, base: str = "") -> None:
        """One safetensors file: float16 tensors, the configuration as metadata. FileError.

        base: fingerprint in hexadecimal of the tokenizer that it was trained for, for information.
        """
        config = {**self.config, "temperature": self.temperature, "gain": self.gain}
        metadata = {"format": FORMAT, "base": base, "config": json.dumps(config)}
        write_file(path, save(stored_tensors(self), metadata))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote, in eval mode. FileError where there is no such file, ModelError where it is another."""
        if not Path(path).is_file():
            raise FileError(f"There is no file {path}.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as safetensors ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise ModelError(f"{path} is no concealer: its format is {metadata.get('format')!r}.")
        try:
            model = cls(**json.loads(metadata["config"]))
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"The concealer {path} is damaged: {' '.join(str(error).split())}") from error
        return model.eval()


def _tiles(grid: tuple[int, int]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """(a tile's own positions, those and the halo around them), as slices of (B, rows, columns)."""
    spans = [[(slice(i, min(i + TILE, side)), slice(max(0, i - HALO), min(i + TILE + HALO, side)))
              for i in range(0, side, TILE)] for side in grid]
    for rows, columns in product(*spans):
        yield (slice(None), rows[0], columns[0]), (slice(None), rows[1], columns[1])
