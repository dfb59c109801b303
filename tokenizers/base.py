"""What every tokenizer and quantizer speaks: `Tokens`, `Latents`, `TokenLayout`, `Quantized`, `Tokenizer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.hub import fingerprint


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of one image stand, and how many values each can take.

    scales: the grids, coarse to fine, as (rows, columns). One entry for an ordinary grid, ten for VAR;
        a one-dimensional tokenizer of L tokens has ((1, L),).
    vocab: words in the codebook of each group; its length is the number of groups.
    """

    scales: tuple[tuple[int, int], ...]
    vocab: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.scales or any(len(s) != 2 or min(s) < 1 for s in self.scales):
            raise ConfigError(f"A token layout needs grids of at least 1x1, not {self.scales}.")
        if not self.vocab or min(self.vocab) < 1:
            raise ConfigError(f"A token layout needs vocabularies of at least one word, not {self.vocab}.")

    @property
    def length(self) -> int:
        """Positions over all scales, L."""
        return sum(rows * columns for rows, columns in self.scales)

    @property
    def groups(self) -> int:
        """Indices at each position, G."""
        return len(self.vocab)

    @property
    def bits(self) -> float:
        """Bits of one image's tokens when every index is equally likely."""
        return self.length * sum(math.log2(v) for v in self.vocab)


@dataclass(frozen=True)
class Latents:
    """Continuous latents of a batch of images.

    values: (B, C, h, w), shifted and scaled to about unit variance, as diffusion models take them.
    height, width: of the true images in pixels, before any padding.
    """

    values: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class Tokens:
    """The discrete form of a batch of images.

    indices: (B, L, G) int64; scale after scale, each row by row; group fastest.
    layout: the layout that all images of the batch share.
    height, width: of the true images in pixels, before any padding.
    """

    indices: Tensor
    layout: TokenLayout
    height: int
    width: int

    def __post_init__(self) -> None:
        expected = (self.layout.length, self.layout.groups)
        if self.indices.ndim != 3 or tuple(self.indices.shape[1:]) != expected:
            raise ConfigError(f"Indices of shape (B, {expected[0]}, {expected[1]}) fit this layout, "
                              f"not {tuple(self.indices.shape)}.")

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __getitem__(self, item: int) -> Tokens:
        """One image of the batch, as a batch of one."""
        return replace(self, indices=self.indices[item : item + 1 or None])

    def grids(self) -> list[Tensor]:
        """The indices of each scale as (B, rows, columns, G)."""
        sizes = [rows * columns for rows, columns in self.layout.scales]
        parts = self.indices.split(sizes, dim=1)
        return [p.unflatten(1, scale) for p, scale in zip(parts, self.layout.scales, strict=True)]


class Quantized(NamedTuple):
    """What a quantizer returns.

    z_q: quantized latent, the shape of the input; gradients pass straight through to it.
    indices: int64, (B, ...) or (B, ..., G) for G groups.
    loss: scalar that training adds to its own (commitment, entropy, ...); zero in eval mode.
    """

    z_q: Tensor
    indices: Tensor
    loss: Tensor


class Tokenizer(nn.Module):
    """Images to tokens and back.

    A tokenizer implements `layout`, `encode` and `decode`, and states the four facts below.
    Images are float RGB, (B, 3, H, W), in [0, 1], of any size from 1x1 up.
    """

    #: pixels per token along each axis
    downsample: int
    #: whether a token depends on, and a pixel is drawn from, a bounded neighbourhood only;
    #: group norm over space, global statistics and attention make a network non-local
    is_local: bool = False
    #: for a local network, how far in pixels information travels in `encode` and in `decode`
    halo: int = 0
    #: the explicit constant that streams carry; 0 for a model that vtc does not ship
    model_id: int = 0
    #: names of the sub-modules and tensors that decoding a stream reads, as prefixes of state-dict keys
    decoding_prefixes: tuple[str, ...] = ("",)
    #: static entropy-coding tables, int32 (T, K): one row for all tokens, a row a group, or a row a scale and group;
    #: each row adds up to a power of two. None where nothing was counted: indices are then packed.
    token_frequencies: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("token_frequencies", None)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        # A model without tables takes those of the file that it is loaded from.
        table = state_dict.get(f"{prefix}token_frequencies")
        if table is not None and self.token_frequencies is None:
            self.token_frequencies = torch.empty_like(table)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def layout(self, height: int, width: int) -> TokenLayout:
        """The tokens of a height x width image."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tokens:
        """The tokens of images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """Images in [0, 1] of the true size; `generator` feeds decoders that draw noise."""
        raise NotImplementedError

    @property
    def codewords(self) -> Tensor | None:
        """(K, d): the vectors that the indices name, where each position has one index into one codebook; else None.

        A learned prior and a concealer know the words of any codebook by these.
        """
        return getattr(getattr(self, "quantizer", None), "codewords", None)

    @property
    def stages(self) -> Literal["scales", "groups"] | None:
        """What goes from coarse to fine, so that the first ones are a coarser image: the scales, or the groups of a
        position (residual levels). None where the tokens have no such order.
        """
        return None

    def decode_stages(self, tokens: Tokens, count: int) -> Tensor:
        """Images as `decode` gives them, of the first `count` scales or groups; the others are not looked at."""
        raise ConfigError(f"The tokens of {type(self).__name__} have no order from coarse to fine.")

    def fingerprint(self) -> bytes:
        """Eight bytes that change when any tensor that decoding reads changes; see `vtc.hub.fingerprint`."""
        return fingerprint(self, self.decoding_prefixes)

    def bits_per_pixel(self, height: int, width: int) -> float:
        """Rate of uniform indices, without container and entropy coding."""
        return self.layout(height, width).bits / (height * width)
