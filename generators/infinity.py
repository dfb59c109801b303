"""Infinity: next-scale prediction of bits from a text. Han et al. (2412.04431).

    text (T, C_text)  norm -> attentive pool -> c (B, C)        norm -> MLP -> keys and values of cross attention
    scale 1:  c + start                                         one token
    scale k:  word(sum of codes of scales 1 ... k-1 at this size)       h_k w_k tokens, all at once
              + level
                |
              depth x  x += gamma1 * attention(norm(x) * (1 + scale1) + shift1)      positions by rotation
                       x += cross_attention(norm(x), text)
                       x += gamma2 * mlp(norm(x) * (1 + scale2) + shift2)
                |
              norm (two vectors from c), linear -> 2 logits for each of d bits: a classifier of 2^d words

All scales lie in one frame: the cell (i, j) of an h x w grid has the position (round(i H/h), round(j W/w)) of the H x W
grid that ends the one-megapixel schedule of its shape, also where a smaller picture is drawn. So stored keys stay right
whatever is dropped. Text, c, and what they become in each layer are computed once for a generation.

Infinity-8B's tokenizer has cells half as large, and the transformer reads and draws 2 x 2 of them as one token
(`vtc.generators.patches`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.generators.blocks import Attend, FeedForward, Projection, SelfAttention, dense_attention, modulate
from vtc.generators.generate import Scale, draw_scales
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.schedule import Grid, Schedule
from vtc.generators.patches import PatchedQuantizer, cells_of, fold, unfold
from vtc.generators.rotary import rotate_pairs, rotation
from vtc.generators.sampling import Generators, Guidance, Sampling
from vtc.hub import PretrainedMixin
from vtc.tokenizers.base import TokenLayout, Tokens
from vtc.tokenizers.infinity_vae import InfinityVAE

#: height / width of a picture -> sides (h, w) of its thirteen grids at one megapixel; wider pictures by symmetry
_TALL: dict[float, tuple[Grid, ...]] = {
    1.000: ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16), (20, 20), (24, 24), (32, 32), (40, 40),
            (48, 48), (64, 64)),
    1.250: ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36),
            (55, 44), (70, 56)),
    1.333: ((1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36),
            (60, 45), (72, 54)),
    1.500: ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32),
            (63, 42), (78, 52)),
    1.750: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32),
            (70, 40), (84, 48)),
    2.000: ((1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30),
            (74, 37), (90, 45)),
    2.500: ((1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26),
            (80, 32), (100, 40)),
    3.000: ((1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24),
            (90, 30), (111, 37)),
}
INFINITY_SCALES: dict[float, tuple[Grid, ...]] = _TALL | {
    1 / ratio: tuple((w, h) for h, w in grids) for ratio, grids in _TALL.items() if ratio != 1}
#: how many of the thirteen grids a size in megapixels uses
SCALES_OF_SIZE = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

PUBLISHED_SAMPLING = Sampling(temperature=0.5, top_p=0.97)
PUBLISHED_GUIDANCE = Guidance(3.0)


def scales_for(height_to_width: float = 1.0, size: str = "1M") -> tuple[Grid, ...]:
    """The grids for a picture of about this shape: of the published shapes the nearest, by their logarithms' ratio."""
    if size not in SCALES_OF_SIZE or not 0 < height_to_width < math.inf:
        raise ConfigError(f"A size is one of {', '.join(SCALES_OF_SIZE)} and a shape above 0, not {size} and "
                          f"{height_to_width}.")
    nearest = min(INFINITY_SCALES, key=lambda ratio: max(ratio / height_to_width, height_to_width / ratio))
    return INFINITY_SCALES[nearest][: SCALES_OF_SIZE[size]]


def frame_of(scales: Sequence[Grid]) -> Grid:
    """The grid whose positions all cells take: the last one at one megapixel, else the scales' own last."""
    for grids in INFINITY_SCALES.values():
        if tuple(scales) == grids[: len(scales)] and len(scales) in SCALES_OF_SIZE.values():
            return grids[-1]
    return scales[-1]


class CrossAttention(nn.Module):
    """Attention of tokens, or of one learned query a head (`pool`), to text. No rotation, the usual 1/sqrt(D)."""

    def __init__(self, width: int, text_width: int, heads: int, pool: bool) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"A width of {width} does not divide into the {heads} heads that read the text.")
        self.heads, self.head_dim = heads, width // heads
        self.kv = Projection(text_width, 2 * width)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.q = None if pool else nn.Linear(width, width)
        if pool:
            self.query = nn.Parameter(torch.randn(1, heads, self.head_dim) / self.head_dim**0.5)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C_text) to keys and values (B, H, T, D)."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = self.kv(text, bias).unflatten(2, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return kv[0], kv[1]

    def forward(self, x: Tensor | None, keys_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """(B, n, C), or None for a pool, to (B, n, C); mask: (B, T) bool, True where there is text."""
        k, v = keys_values
        q = (self.query.expand(len(k), -1, -1)[:, :, None] if self.q is None else
             self.q(x).unflatten(2, (self.heads, self.head_dim)).transpose(1, 2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, cross attention to the text, feed-forward."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        self.attention = SelfAttention(width, heads, l2=True)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross_attention = CrossAttention(width, width, heads, pool=False)
        self.mlp = FeedForward(width, -(-round(width * mlp_ratio) // 256) * 256)

    def forward(self, x: Tensor, shared: Tensor, text: tuple[Tensor, Tensor], mask: Tensor, attend: Attend, layer: int,
                rotate: Callable[[Tensor], Tensor]) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.offsets + shared).unbind(2)
        x = x + gamma1 * self.attention(modulate(x, scale1, shift1), attend, layer, rotate)
        x = x + self.cross_attention(self.cross_norm(x), text, mask)
        return x + gamma2 * self.mlp(modulate(x, scale2, shift2))


@dataclass(frozen=True)
class TextCondition:
    """What a text becomes, once for a generation.

    start: (B, 1, C), the first token. shared: (B, 1, 6, C) and head: (B, 1, 2, C), modulations.
    keys_values: for each layer's cross attention. mask: (B, T).
    """

    start: Tensor
    shared: Tensor
    head: Tensor
    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor


class Infinity(nn.Module, PretrainedMixin):
    """Text-conditional generator of bits; the defaults are Infinity-2B's.

    Infinity-8B: depth=40, width=3584, heads=28, bits=56, patch=2, with a tokenizer of 14 bits and twice the sides.

    depth, width, heads, mlp_ratio: of the transformer. bits: of a token, those of all its cells together.
    patch: side of the square of the tokenizer's cells that are one token.
    text_width, text_tokens: of the text features (T5-XL: 2048, 512). levels: of the table of scale embeddings.
    pool_heads: of the pooling of the text; default one for each 128 of `text_width`, 64 above a width of 4096.
    chunks: groups of blocks, each of which adds the scale's embedding where `level_every_chunk`; else the first alone.
    """

    def __init__(self, depth: int = 32, width: int = 2048, heads: int = 16, mlp_ratio: float = 4.0, bits: int = 32,
                 text_width: int = 2048, text_tokens: int = 512, levels: int = 15, pool_heads: int | None = None,
                 chunks: int = 8, level_every_chunk: bool = False, patch: int = 1) -> None:
        super().__init__()
        if depth % chunks:
            raise ConfigError(f"{depth} blocks do not make {chunks} chunks of equal size.")
        if patch < 1 or bits % patch**2:
            raise ConfigError(f"{bits} bits of a token do not divide among {patch} x {patch} cells.")
        self.patch = patch
        self.depth, self.width, self.heads, self.bits, self.text_width = depth, width, heads, bits, text_width
        self.chunk, self.level_every_chunk = depth // chunks, level_every_chunk
        pool_heads = pool_heads or max(1, text_width // (64 if width > 4096 else 128))
        self.text_norm = nn.RMSNorm(text_width, eps=1e-6)
        self.text_pool = CrossAttention(width, text_width, pool_heads, pool=True)
        self.text_mlp = FeedForward(text_width, width)
        self.text_mlp[2] = nn.Linear(width, width)
        self.no_text = nn.Parameter(torch.randn(text_tokens, text_width) / text_width**0.5)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.word = nn.Linear(bits, width)
        self.level = nn.Embedding(levels, width)
        self.shared_adaptive = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.head_adaptive = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * bits)

    def schedule(self, scales: Sequence[Grid]) -> Schedule:
        """What a cache needs to know."""
        return Schedule(tuple(scales), self.depth, self.heads, self.width // self.heads)

    def condition(self, text: Tensor, mask: Tensor) -> TextCondition:
        """(B, T, C_text) features and where they are text, (B, T) bool, to what the transformer reads."""
        self._check_text(text, mask)
        text = self.text_norm(text)
        c = self.text_pool(None, self.text_pool.keys_values(text), mask)[:, 0]
        for_cross = self.text_mlp(text)
        return TextCondition(c[:, None] + self.start, self.shared_adaptive(F.silu(c)).unflatten(1, (1, 6, self.width)),
                             self.head_adaptive(F.silu(c)).unflatten(1, (1, 2, self.width)),
                             [block.cross_attention.keys_values(for_cross) for block in self._blocks()], mask)

    def guided(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The text, then as many learned tokens of no text: (2 B, T, C_text) and (2 B, T)."""
        self._check_text(text, mask)
        if text.shape[1] > len(self.no_text):
            raise ConfigError(f"A text has at most {len(self.no_text)} tokens, not {text.shape[1]}.")
        return torch.cat([text, self.no_text[: text.shape[1]].expand_as(text)]), mask.repeat(2, 1)

    def logits(self, x: Tensor, level: Tensor, condition: TextCondition, attend: Attend,
               rotate: Callable[[Tensor], Tensor],
               after: Callable[[Tensor, int], Tensor] = lambda x, layer: x) -> Tensor:
        """(B, n, C) inputs and the embeddings of their scales, (n, C), to (B, n, d, 2) float32 logits.

        after: of each block's output and its number, what the next one reads.
        """
        for layer, block in enumerate(self._blocks()):
            if layer == 0 or (self.level_every_chunk and layer % self.chunk == 0):
                x = x + level
            x = after(block(x, condition.shared, condition.keys_values[layer], condition.mask, attend, layer, rotate),
                      layer)
        scale, shift = condition.head.unbind(2)
        return self.head(modulate(x, scale, shift)).float().unflatten(2, (self.bits, 2))

    def forward(self, text: Tensor, mask: Tensor, codes: Tensor, scales: Sequence[Grid]) -> Tensor:
        """Teacher forcing, all scales at once: (B, L, d, 2) logits.

        codes: (B, L - 1, d), a quantizer's `teacher_inputs`, or those of its `self_correction`, of the grids
            `cells_of(scales, patch)` and folded by `vtc.generators.patches.fold` where cells come in patches.
        """
        condition = self.condition(text, mask)
        x = torch.cat([condition.start, self.word(codes)], 1)
        sizes = torch.tensor([h * w for h, w in scales], device=x.device)
        step = torch.repeat_interleave(sizes)
        cos, sin = rotation(scales, frame_of(scales), self.width // self.heads, x.device)
        return self.logits(x, self.level(step), condition, dense_attention(step[:, None] >= step),
                           lambda t: rotate_pairs(t, cos, sin))

    @torch.no_grad()
    def generate(self, text: Tensor, mask: Tensor, tokenizer: InfinityVAE, scales: Sequence[Grid] | None = None,
                 sampling: Sampling = PUBLISHED_SAMPLING, guidance: Guidance = PUBLISHED_GUIDANCE,
                 cache: KVCache | None = None, generators: Generators = None,
                 given: tuple[Tensor, Tensor] | None = None, callback: Callable[[Scale], None] | None = None,
                 compat: str | None = None) -> tuple[Tokens, Tensor]:
        """(B, T, C_text) text features to tokens, and images (B, 3, H, W) in [0, 1].

        scales: from `scales_for`; default a square megapixel. cache: a new one of `schedule(scales)`, with any policy.
        given: of the tokenizer's cells, as its `encode` with `cells_of(scales, patch)` gives them, and which hold.
        compat: "upstream" gives every scale the positions that begin at the first scale's, as upstream does at
            inference where its fused norm is off (scales are then not told apart by position); None, the right ones.
        Raises ConfigError where tokenizer, text or cache do not fit.
        """
        if compat not in (None, "upstream"):
            raise ConfigError(f'compat is None or "upstream", not {compat!r}.')
        if tokenizer.vocab != (2,) * (bits := self.bits // self.patch**2):
            raise ConfigError(f"This Infinity draws {bits} single bits a cell, and the tokenizer's indices have "
                              f"{tokenizer.vocab} words: make it with token_bits of 1.")
        if -guidance.layer > self.depth:
            raise ConfigError(f"Guidance at the block {-guidance.layer} from the end needs as many, not {self.depth}.")
        scales = scales_for() if scales is None else tuple(scales)
        cells = cells_of(scales, self.patch)
        if len(scales) > self.level.num_embeddings:
            raise ConfigError(f"This Infinity knows {self.level.num_embeddings} scales, not {len(scales)}.")
        schedule = self.schedule(scales)
        cache = KVCache(schedule) if cache is None else cache
        text = text.to(self.start.dtype)
        condition = self.condition(*(self.guided(text, mask) if guidance.active else (text, mask)))
        cos, sin = rotation(scales, frame_of(scales), schedule.head_dim, text.device)

        def step(codes: Tensor | None, cache: KVCache, number: int) -> Tensor:
            x = condition.start if codes is None else self.word(codes.to(self.start.dtype))
            first = 0 if compat == "upstream" else schedule.starts[number]
            here = slice(first, first + schedule.tokens(number))
            return self.logits(x, self.level.weight[number], condition,
                               lambda q, k, v, layer: cache.attend(q, k, v, layer, number),
                               lambda t: rotate_pairs(t, cos[here], sin[here]),
                               lambda x, layer: guidance.within(x, layer, self.depth, number, schedule.steps))

        if given is not None and self.patch > 1:
            given = self._folded(*given, scales)
        indices, total = draw_scales(step, PatchedQuantizer(tokenizer.quantizer, self.patch), scales, len(text), cache,
                                     sampling, guidance, generators, given, callback)
        height, width = (side * tokenizer.downsample for side in cells[-1])
        tokens = Tokens(unfold(indices, scales, self.patch), TokenLayout(cells, tokenizer.vocab), height, width)
        return tokens, tokenizer.reconstruct(total).clamp(0, 1)

    @torch.no_grad()
    def permute_heads(self, order: Tensor) -> None:
        """Renumber each layer's heads by order, (depth, heads): the same function, with heads of a kind in a row."""
        for block, of_layer in zip(self._blocks(), order, strict=True):
            block.attention.permute_heads(of_layer)

    def _folded(self, words: Tensor, held: Tensor, scales: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Given cells as tokens: (B, p^2 L, d) bits and (B, p^2 L) bool to (B, L, bits) each."""
        if words.shape[:2] != held.shape:
            raise ConfigError(f"Given cells are (B, L, d) bits and a (B, L) mask, not {tuple(words.shape)} and "
                              f"{tuple(held.shape)}.")
        return fold(words, scales, self.patch), fold(held[..., None].expand_as(words), scales, self.patch)

    def _check_text(self, text: Tensor, mask: Tensor) -> None:
        if text.ndim != 3 or text.shape[2] != self.text_width or mask.shape != text.shape[:2] or not mask.any(1).all():
            raise ConfigError(f"Text features are (B, T, {self.text_width}) with a (B, T) mask of at least one token "
                              f"each, not {tuple(text.shape)} and {tuple(mask.shape)}.")

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))
