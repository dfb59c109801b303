"""LlamaGen: one token after the other, line by line. Sun et al., "Autoregressive Model Beats Diffusion" (2406.06525).

    class (1 token), then tokens 1 ... n-1 of the grid
      |
    depth x  x += attention(norm(x))        causal; positions by rotation in two dimensions
             x += down(silu(gate(norm(x))) * up(norm(x)))
      |
    norm, linear -> V logits of the next token

The class token has no position. Upstream multiplies its queries and keys by the zeros of an empty table row, so every
token gives it the logit 0; the published weights were trained so, and it is the default here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.generators.blocks import Attend, dense_attention
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.rotary import rotate_pairs, rotation
from vtc.generators.sampling import Generators, Guidance, Sampling, check_labels
from vtc.hub import PretrainedMixin
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens

PUBLISHED_SAMPLING = Sampling(top_k=2000)
PUBLISHED_GUIDANCE = Guidance(2.0)


class Attention(nn.Module):
    """Causal multi-head attention without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, attend: Attend, layer: int, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        return self.proj(attend(q, k, v, layer).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a root-mean-square norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention, self.mlp = Attention(width, heads), GatedFeedForward(width, hidden)

    def forward(self, x: Tensor, attend: Attend, layer: int, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attend, layer, cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class LlamaGen(nn.Module, PretrainedMixin):
    """Class-conditional raster generator; the defaults are LlamaGen-B at 256 px.

    depth, width, heads: of the transformer. hidden: of the feed-forward; default two thirds of 4 C, up to a multiple
        of 256.
    classes: labels 0 ... classes - 1; the label `classes` means no class, for guidance.
    codebook_size: V of the tokenizer. side: of the square token grid.
    zero_class_key: the class token's queries and keys are zero, as upstream; False: they are not rotated.
    rope_base: of the rotation.
    """

    def __init__(self, depth: int = 12, width: int = 768, heads: int = 12, hidden: int | None = None,
                 classes: int = 1000, codebook_size: int = 16384, side: int = 16, zero_class_key: bool = True,
                 rope_base: float = 10000.0) -> None:
        super().__init__()
        if width % heads or width // heads % 4:
            raise ConfigError(f"A width of {width} does not divide into {heads} heads of a multiple of 4 dimensions.")
        self.depth, self.width, self.heads, self.side = depth, width, heads, side
        self.classes, self.codebook_size = classes, codebook_size
        self.zero_class_key, self.rope_base = zero_class_key, rope_base
        hidden = hidden or -(-(8 * width // 3) // 256) * 256
        self.class_embedding = nn.Embedding(classes + 1, width)
        self.word = nn.Embedding(codebook_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, codebook_size, bias=False)
        for module in self.modules():  # upstream's start
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.side**2

    def schedule(self) -> Schedule:
        """What a cache needs to know: the class, then every token but the last, which nothing reads."""
        return Schedule(((1, 1),) * self.tokens, self.depth, self.heads, self.width // self.heads,
                        (self.width // self.heads) ** -0.5, raster=True, columns=self.side)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, D / 2) of the class token and of all tokens but the last."""
        grid = (self.side, self.side)
        cos, sin = rotation((grid,), grid, self.width // self.heads, self.class_embedding.weight.device, self.rope_base)
        first = torch.zeros_like(cos[:1]) if self.zero_class_key else torch.ones_like(cos[:1])
        return torch.cat([first, cos[:-1]]), torch.cat([torch.zeros_like(sin[:1]), sin[:-1]])

    def logits(self, x: Tensor, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, n, C) inputs and their rotations, (n, D / 2), to (B, n, V) float32 logits of what comes next."""
        for layer, block in enumerate(cast(list[Block], list(self.blocks))):
            x = block(x, attend, layer, cos, sin)
        return self.head(self.norm(x)).float()

    def forward(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Teacher forcing: (B,) labels and (B, n - 1) tokens, or fewer, to the logits of the next, (B, n, V)."""
        x = torch.cat([self.class_embedding(labels)[:, None], self.word(indices)], 1)
        count = x.shape[1]
        cos, sin = (t[:count] for t in self.positions())
        causal = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        return self.logits(x, dense_attention(causal, self.schedule().softmax_scale), cos, sin)

    def extend(self, x: Tensor, cache: KVCache, first: int, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The inputs number first ... first + n - 1, (B, n, C), on top of what is cached: (B, n, V) logits."""
        cos, sin = (t[first : first + x.shape[1]] for t in positions)
        return self.logits(x, lambda q, k, v, layer: cache.attend(q, k, v, layer, first), cos, sin)

    @torch.no_grad()
    def generate(self, labels: Tensor, tokenizer: Tokenizer, sampling: Sampling = PUBLISHED_SAMPLING,
                 guidance: Guidance = PUBLISHED_GUIDANCE, cache: KVCache | None = None, generators: Generators = None,
                 given: tuple[Tensor, Tensor] | None = None,
                 callback: Callable[[int, Tensor], None] | None = None) -> tuple[Tokens, Tensor]:
        """(B,) labels to tokens, and images (B, 3, H, W) in [0, 1].

        tokenizer: one grid of one index, with this model's words. cache: a new one of `schedule()`, with any policy.
        given: indices (B, n) and where they hold, (B, n) bool. callback: hears each token's number and (B,) words.
        Raises ConfigError where tokenizer, labels or cache do not fit.
        """
        layout = self.check_tokenizer(tokenizer)
        self.check_labels(labels)
        guidance.check_at_logits()
        cache = KVCache(self.schedule()) if cache is None else cache
        both = torch.cat([labels, torch.full_like(labels, self.classes)]) if guidance.active else labels
        if given is not None and not given[0].shape == given[1].shape == (len(labels), self.tokens):
            raise ConfigError(f"Given tokens are ({len(labels)}, {self.tokens}) indices and a mask like them.")
        if given is not None and ((held := given[0][given[1]]) < 0).logical_or(held >= self.codebook_size).any():
            raise ConfigError(f"Given tokens are words from 0 to {self.codebook_size - 1}.")
        x, positions = self.class_embedding(both)[:, None], self.positions()
        drawn = []
        for number in range(self.tokens):
            logits = guidance(self.extend(x, cache, number, positions), number, self.tokens)
            words = sampling(logits[:, -1], generators)
            if given is not None:
                words = torch.where(given[1][:, number], given[0][:, number], words)
            drawn.append(words)
            if callback is not None:
                callback(number, words)
            x = self.word(words.repeat(2) if guidance.active else words)[:, None]
        side = self.side * tokenizer.downsample
        tokens = Tokens(torch.stack(drawn, 1)[..., None], layout, side, side)
        return tokens, tokenizer.decode(tokens)

    def check_labels(self, labels: Tensor) -> None:
        """Raise ConfigError unless labels are (B,) classes, or the number that means none."""
        check_labels(labels, self.classes)

    def check_tokenizer(self, tokenizer: Tokenizer) -> TokenLayout:
        """The layout of an image; ConfigError unless the tokenizer gives such a grid of this model's words."""
        side = self.side * tokenizer.downsample
        layout = tokenizer.layout(side, side)
        if layout != (mine := TokenLayout(((self.side, self.side),), (self.codebook_size,))):
            raise ConfigError(f"This generator draws {mine}, and the tokenizer has {layout}.")
        return layout
