"""What the transformers of VAR and Infinity share: attention of cosines through a cache, and the feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError

#: attends a layer's (B, H, n, D) queries, keys and values: a cache's `attend`, or dense attention in training
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Projection(nn.Linear):
    """A linear layer whose bias the caller gives, since it is made of parameters that have names of their own."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head attention; the attention itself is the caller's `attend`, so that a cache can stand between.

    l2: queries and keys are normalised, and queries multiplied by a learned factor a head, at most 100. Otherwise
        queries are multiplied by 0.25 / sqrt(D), as VAR does. Either way the softmax has no factor of its own.
    """

    def __init__(self, width: int, heads: int, l2: bool) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"A width of {width} does not divide into {heads} heads.")
        self.heads, self.head_dim, self.l2 = heads, width // heads, l2
        self.qkv = Projection(width, 3 * width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        if l2:
            self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))

    def forward(self, x: Tensor, attend: Attend, layer: int,
                rotate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, n, C) to the same; `rotate` is applied to queries and keys, (B, H, n, D), as Infinity's positions are."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(x, bias).unflatten(2, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
        if self.l2:
            q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=math.log(100)).exp().to(q.dtype)
            k = F.normalize(k, dim=-1)
        else:
            q = q * (0.25 / math.sqrt(self.head_dim))
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return self.proj(attend(q, k, v, layer).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def permute_heads(self, order: Tensor) -> None:
        """Renumber the heads, new head i being old head order[i]: the same function, with heads of a kind in a row."""
        if not isinstance(self.qkv, nn.Linear):
            raise ConfigError("The heads of a prepared model stay as they are: renumber them before `prepare`.")
        rows = (order[:, None] * self.head_dim + torch.arange(self.head_dim, device=order.device)).flatten()
        self.qkv.weight.copy_(self.qkv.weight.unflatten(0, (3, -1))[:, rows].flatten(0, 1))
        self.q_bias.copy_(self.q_bias[rows])
        self.v_bias.copy_(self.v_bias[rows])
        self.proj.weight.copy_(self.proj.weight[:, rows])
        if self.l2:
            self.log_scale.copy_(self.log_scale[:, order])


class FeedForward(nn.Sequential):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def dense_attention(mask: Tensor | None = None, softmax_scale: float = 1.0) -> Attend:
    """Attention without a cache, for training: `mask` says which keys a query sees, (n, n) bool."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)

    return attend


def attention_by_scale(sizes: Sequence[int], softmax_scale: float = 1.0, together: int = 160) -> Attend:
    """Attention without a cache, for training, where each scale sees itself and those before it: all scales at once.

    sizes: tokens of the scales. No scale is compared with later ones, and a call without a mask may take the fastest
    kernel: with VAR's ten scales 64 % of the products of a masked square. The first scales, up to `together` tokens,
    are too small for that and share one masked call.
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    first = max([end for end in ends if end <= together], default=ends[0])
    step = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))[:first]
    starts = [first] + [end for end in ends if end > first]
    seen = step[:, None] >= step

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        nonlocal seen
        seen = seen.to(q.device)  # the first layer moves it for all
        mask = seen if first > sizes[0] else None
        parts = [F.scaled_dot_product_attention(q[:, :, :first], k[:, :, :first], v[:, :, :first], attn_mask=mask,
                                                scale=softmax_scale)]
        for start, end in pairwise(starts):
            parts.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end],
                                                        scale=softmax_scale))
        return torch.cat(parts, 2)

    return attend


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without weights, then x * (1 + scale) + shift: adaptive layer norm."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
