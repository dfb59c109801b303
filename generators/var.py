"""VAR: next-scale prediction over the token pyramid of its tokenizer. Tian et al. (2404.02905).

    class -> c (B, C)
    scale 1:  c + start                                   one token
    scale k:  word(sum of scales 1 ... k-1 at this size)  h_k w_k tokens, all at once
              + position + level
                |
              depth x  x += gamma1 * attention(norm(x) * (1 + scale1) + shift1)      sees scales 1 ... k
                       x += gamma2 * mlp(norm(x) * (1 + scale2) + shift2)            six vectors from c
                |
              norm (two vectors from c), linear -> V logits a token

Guidance runs conditional and unconditional halves in one batch. c never changes during a generation, so the six vectors
of each block are computed once, not once a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.generators.blocks import Attend, FeedForward, SelfAttention, attention_by_scale, modulate
from vtc.generators.generate import Scale, draw_scales
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.sampling import Generators, Guidance, Sampling, check_labels
from vtc.hub import PretrainedMixin
from vtc.tokenizers.base import TokenLayout, Tokens
from vtc.tokenizers.layers import MultiScaleTokenizer
from vtc.tokenizers.multi_scale_residual import VAR_256
from vtc.tokenizers.scales import MultiScaleQuantizer

#: the vectors that modulate each block, (B, 1, 6, C), and those of the head, (B, 1, 2, C)
Modulation = tuple[list[Tensor], Tensor]

#: how upstream measures FID
PUBLISHED_SAMPLING = Sampling(top_k=900, top_p=0.96)
PUBLISHED_GUIDANCE = Guidance(2.5, ramp=True)


class Block(nn.Module):
    """Attention and feed-forward, each within adaptive layer norm."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, shared: bool, l2: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, l2)
        self.mlp = FeedForward(width, round(width * mlp_ratio))
        self.adaptive = None if shared else nn.Linear(width, 6 * width)
        if shared:
            self.offsets = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def damp(self, depth: int) -> None:
        """Of a fresh block, one of `depth`: the residual branches start small, and their gates at almost nothing."""
        for layer in (self.attention.proj, cast(nn.Linear, self.mlp[2])):
            layer.weight.mul_((2 * depth) ** -0.5)
        vectors = self.offsets[0, 0] if self.adaptive is None else self.adaptive.weight.unflatten(0, (6, -1))
        gates, rest = vectors[:2], vectors[2:]
        gates.mul_(1e-5)
        rest.mul_(0.5)

    def forward(self, x: Tensor, modulation: Tensor, attend: Attend, layer: int) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x = x + gamma1 * self.attention(modulate(x, scale1, shift1), attend, layer)
        return x + gamma2 * self.mlp(modulate(x, scale2, shift2))


class VAR(nn.Module, PretrainedMixin):
    """Class-conditional generator; the defaults are VAR-d16 at 256 px.

    depth, width, heads, mlp_ratio: of the transformer; upstream's depth d has width 64 d and d heads.
    classes: labels 0 ... classes - 1; the label `classes` means no class, for guidance.
    codebook_size, code_dim: V and d of the tokenizer.
    sides: of the square grids, as (rows, columns) or one number.
    shared_modulation: one adaptive linear layer for all blocks (upstream's `shared_aln`, its 512 px model).
    l2_attention: attention of cosines (the released models).
    """

    def __init__(self, depth: int = 16, width: int = 1024, heads: int = 16, mlp_ratio: float = 4.0,
                 classes: int = 1000, codebook_size: int = 4096, code_dim: int = 32, sides: Sequence[int] = VAR_256,
                 shared_modulation: bool = False, l2_attention: bool = True) -> None:
        super().__init__()
        self.sides, self.width, self.heads, self.depth = tuple(sides), width, heads, depth
        self.classes, self.codebook_size, self.code_dim = classes, codebook_size, code_dim
        tokens = sum(s * s for s in self.sides)
        self.word = nn.Linear(code_dim, width)
        self.class_embedding = nn.Embedding(classes + 1, width)
        self.start = nn.Parameter(torch.empty(1, self.sides[0] ** 2, width))
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.level = nn.Embedding(len(self.sides), width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, shared_modulation, l2_attention)
                                    for _ in range(depth))
        self.shared_adaptive = nn.Linear(width, 6 * width) if shared_modulation else None
        self.head_adaptive = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, codebook_size)
        self.reset_parameters()

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Upstream's start: truncated normals, a damped residual, head and modulation near zero."""
        std = (1 / self.width / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for tensor in (self.start, self.position):
            nn.init.trunc_normal_(tensor, std=std)
        for block in self._blocks():
            block.damp(self.depth)
        self.head_adaptive.weight.mul_(0.5)
        self.head.weight.mul_(0.02)

    def schedule(self) -> Schedule:
        """What a cache needs to know."""
        return Schedule(tuple((s, s) for s in self.sides), self.depth, self.heads, self.width // self.heads)

    def modulation(self, labels: Tensor) -> Modulation:
        """What the labels, (B,) int64, do to each block and to the head."""
        c = nn.functional.silu(self.class_embedding(labels))
        shape = (1, 6, self.width)
        if self.shared_adaptive is None:
            blocks = [cast(nn.Linear, block.adaptive)(c).unflatten(1, shape) for block in self._blocks()]
        else:
            shared = self.shared_adaptive(c).unflatten(1, shape)
            blocks = [shared + block.offsets for block in self._blocks()]
        return blocks, self.head_adaptive(c).unflatten(1, (1, 2, self.width))

    def embed_step(self, codes: Tensor | None, labels: Tensor, step: int) -> Tensor:
        """The input of a scale, (B, n, C): the label for the first one, the sum of codes so far, (B, n, d), later."""
        first = sum(s * s for s in self.sides[:step])
        place = self.position[:, first : first + self.sides[step] ** 2] + self.level.weight[step]
        if step == 0:
            return self.class_embedding(labels)[:, None] + self.start + place
        if codes is None or codes.shape[1:] != (place.shape[1], self.code_dim):
            raise ConfigError(f"Scale {step + 1} reads codes of shape (B, {place.shape[1]}, {self.code_dim}).")
        return self.word(codes.to(self.start.dtype)) + place

    def logits(self, x: Tensor, modulation: Modulation, attend: Attend) -> Tensor:
        """(B, n, C) inputs to (B, n, V) float32 logits."""
        blocks, head = modulation
        for layer, block in enumerate(self.blocks):
            x = block(x, blocks[layer], attend, layer)
        scale, shift = head.unbind(2)
        return self.head(modulate(x, scale, shift)).float()

    def forward(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Teacher forcing, all scales at once: (B, L, V) logits.

        labels: (B,) int64. codes: (B, L - first scale, d), a quantizer's `teacher_inputs`; those of the first scales
        alone give the same logits of these scales, for no scale sees a later one.
        """
        sizes = [s * s for s in self.sides]
        ends = [sum(sizes[1 : i + 1]) for i in range(len(sizes))]
        if codes.shape[1] not in ends:
            raise ConfigError(f"{codes.shape[1]} codes are not those of whole scales; the later ones have {sizes[1:]}.")
        count = ends.index(codes.shape[1]) + 1
        later = codes.split(sizes[1:count], 1)
        x = torch.cat([self.embed_step(None if i == 0 else later[i - 1], labels, i) for i in range(count)], 1)
        return self.logits(x, self.modulation(labels), attention_by_scale(sizes[:count]))

    def step(self, codes: Tensor | None, labels: Tensor, modulation: Modulation, cache: KVCache, step: int) -> Tensor:
        """One scale of a generation: logits (B, n, V). `modulation` is that of the labels."""
        return self.logits(self.embed_step(codes, labels, step), modulation,
                           lambda q, k, v, layer: cache.attend(q, k, v, layer, step))

    @torch.no_grad()
    def generate(self, labels: Tensor, tokenizer: MultiScaleTokenizer, sampling: Sampling = PUBLISHED_SAMPLING,
                 guidance: Guidance = PUBLISHED_GUIDANCE, cache: KVCache | None = None, generators: Generators = None,
                 given: tuple[Tensor, Tensor] | None = None,
                 callback: Callable[[Scale], None] | None = None) -> tuple[Tokens, Tensor]:
        """(B,) labels to tokens, and images (B, 3, H, W) in [0, 1].

        tokenizer: whose words the model predicts. cache: a new one of `schedule()`, with any policy; default `Full`.
        generators, given, callback: of `draw_scales`. Raises ConfigError where tokenizer, labels or cache do not fit.
        """
        self.check_tokenizer(tokenizer)
        self.check_labels(labels)
        guidance.check_at_logits()
        cache = KVCache(self.schedule()) if cache is None else cache
        both = torch.cat([labels, torch.full_like(labels, self.classes)]) if guidance.active else labels
        modulation = self.modulation(both)
        quantizer = cast(MultiScaleQuantizer, tokenizer.quantizer)
        indices, total = draw_scales(lambda codes, cache, step: self.step(codes, both, modulation, cache, step),
                                     quantizer, self.schedule().sizes, len(labels), cache, sampling, guidance,
                                     generators, given, callback)
        side = self.sides[-1] * tokenizer.downsample
        tokens = Tokens(indices[..., None], TokenLayout(self.schedule().sizes, tokenizer.vocab), side, side)
        return tokens, tokenizer.reconstruct(total).clamp(0, 1)

    def check_labels(self, labels: Tensor) -> None:
        """Raise ConfigError unless labels are (B,) classes, or the number that means none."""
        check_labels(labels, self.classes)

    def check_tokenizer(self, tokenizer: MultiScaleTokenizer) -> None:
        """Raise ConfigError unless the model's words are the tokenizer's."""
        theirs = (tokenizer.vocab, tokenizer.quantizer.dim)
        if theirs != ((self.codebook_size,), self.code_dim):
            raise ConfigError(f"This VAR draws {self.codebook_size} words of {self.code_dim} dimensions, and the "
                              f"tokenizer has {theirs[0]} of {theirs[1]}.")

    @torch.no_grad()
    def permute_heads(self, order: Tensor) -> None:
        """Renumber each layer's heads by order, (depth, heads): the same function, with heads of a kind in a row."""
        for block, of_layer in zip(self._blocks(), order, strict=True):
            block.attention.permute_heads(of_layer)
