"""Finite scalar quantization: each channel is squashed into a few integers. Mentzer et al., FSQ (2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.bits import BitOrder, check_bit_order
from vtc.tokenizers.quantizer import Quantizer
from vtc.tokenizers.straight_through import straight_through


class FiniteScalarQuantizer(Quantizer):
    """Channel c becomes one of levels[c] values in [-1, 1]; all channels together make one index. No loss, no state.

    levels: at least 2 each; (8, 8, 8, 5, 5, 5), 64,000 codes, in Cosmos DI and for "2^16" in the paper.
    eps: tanh spans (levels - 1) (1 + eps), so that the outermost values can be reached; 2 levels need more than 0.
    bit_order: the channel that counts ones is the first ("lsb_first": the paper, Cosmos, lucidrains) or the last.

    An even number L of levels has no middle: the values are -L/2 ... L/2 - 1 over L/2, and the input is shifted so
    that zero still falls on zero.
    """

    def __init__(self, levels: Sequence[int], eps: float = 1e-3, bit_order: BitOrder = "lsb_first") -> None:
        super().__init__()
        check_bit_order(bit_order)
        if not levels or min(levels) < 2:
            raise ConfigError(f"FSQ needs at least two levels a channel, not {levels}.")
        if not 0 <= eps < math.inf or (not eps and min(levels) == 2):
            raise ConfigError(f"FSQ's eps is at least 0, and more where a channel has two levels, not {eps}.")
        self.levels, self.dim, self.codebook_size = tuple(levels), len(levels), math.prod(levels)
        if self.codebook_size >= 2**63:
            raise ConfigError(f"{self.codebook_size} codes do not fit an index; use fewer channels.")
        self.bit_order: BitOrder = bit_order
        lower = [self.levels[:c] if bit_order == "lsb_first" else self.levels[c + 1 :] for c in range(self.dim)]
        self.places = [math.prod(channels) for channels in lower]
        self.steps = [n // 2 for n in self.levels]
        self.spans = [(n - 1) * (1 + eps) / 2 for n in self.levels]
        self.offsets = [0.5 if n % 2 == 0 else 0.0 for n in self.levels]
        self.shifts = [math.atanh(offset / span) for offset, span in zip(self.offsets, self.spans, strict=True)]

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of the index."""
        return (self.codebook_size,)

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Codes lie in [-1, 1]; indices are (B, ...); the loss is zero."""
        self.check_latents(z)
        wide = z if z.dtype == torch.float64 else z.float()  # bfloat16 would blur where one level ends
        steps = self._per_channel(self.steps, wide)
        bounded = torch.tanh(wide + self._per_channel(self.shifts, wide)) * self._per_channel(self.spans, wide)
        bounded = bounded - self._per_channel(self.offsets, wide)
        # Where eps times the levels reaches 1, the span ends nearer to a level that is missing: clamped.
        highest = self._per_channel([n - 1 for n in self.levels], wide)
        digits = (bounded.detach().round() + steps).clamp(min=0).minimum(highest)
        positions = digits.nan_to_num(0).long()  # an index even where the codes are no numbers
        indices = (positions * self._per_channel(self.places, positions)).sum(1)
        codes = straight_through(bounded / steps, (digits - steps) / steps)
        return Quantized(codes.to(z.dtype), indices, z.new_zeros(()))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ...) indices to (B, d, ...) codes, float32."""
        indices = self.checked_indices(indices)[:, None]
        steps, levels, places = (self._per_channel(v, indices) for v in (self.steps, self.levels, self.places))
        return (indices // places % levels - steps) / steps

    def _per_channel(self, values: Sequence[float], like: Tensor) -> Tensor:
        """d numbers as (d, 1, ...) to meet (B, d, ...), in `like`'s type: never rounded by `model.half()`."""
        return torch.tensor(values, device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 2))
