"""Product quantization: groups of channels, each with a quantizer of its own.

Jégou et al. (TPAMI 2011); in a learned image codec: McQuic (2203.10897).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized


class ProductQuantizer(nn.Module):
    """Consecutive groups of channels go to one quantizer each; G quantizers, G indices a position.

        ProductQuantizer(VectorQuantizer(256, 8) for _ in range(4))    # 32 channels, 32 bits a position

    quantizers: of (B, ...) indices; their `dim`s add up to the latent's channels. The loss is the mean of theirs, so
        its scale does not depend on G.
    """

    def __init__(self, quantizers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        if not len(self.quantizers):
            raise ConfigError("A product quantizer needs at least one quantizer.")
        self.dims = [int(q.dim) for q in self._members]
        self.dim = sum(self.dims)

    @property
    def _members(self) -> list[Any]:
        return list(self.quantizers)

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of each index."""
        return tuple(q.codebook_size for q in self._members)

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ..., G)."""
        if z.ndim < 2 or z.shape[1] != self.dim:
            raise ConfigError(f"This quantizer takes (B, {self.dim}, ...) latents, not {tuple(z.shape)}.")
        parts: list[Quantized] = [q(part) for q, part in zip(self._members, z.split(self.dims, 1), strict=True)]
        return Quantized(torch.cat([p.z_q for p in parts], 1), torch.stack([p.indices for p in parts], -1),
                         torch.stack([p.loss for p in parts]).mean())

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ..., G) indices to (B, d, ...) codes."""
        pairs = zip(self._members, indices.unbind(-1), strict=True)
        return torch.cat([q.indices_to_codes(group) for q, group in pairs], 1)

    @torch.no_grad()
    def start_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set every codebook to the K-means centres of its channels of (N, d) latents."""
        for quantizer, part in zip(self._members, latents.split(self.dims, 1), strict=True):
            quantizer.start_from(part, generator)
