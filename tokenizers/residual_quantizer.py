"""Residual quantization: each stage codes what the stages before it have left.

Zeghidour et al., SoundStream (2107.03312), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.straight_through import straight_through


class ResidualQuantizer(nn.Module):
    """A chain of quantizers; the code is the sum of theirs, and a prefix of the chain is a coarser code.

        ResidualQuantizer(VectorQuantizer(256, 32) for _ in range(4))    # 32 channels, 32 bits a position

    quantizers: of one `dim` and of (B, ...) indices. The loss is the mean of theirs.
    """

    def __init__(self, quantizers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        if len({q.dim for q in self._members}) != 1:
            raise ConfigError("A residual quantizer needs at least one quantizer, and all of one dimension.")
        self.dim = int(self._members[0].dim)

    @property
    def _members(self) -> list[Any]:
        return list(self.quantizers)

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of each stage's index."""
        return tuple(q.codebook_size for q in self._members)

    def forward(self, z: Tensor, stages: int | None = None) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ..., G).

        stages: use only so many; drawn at random while training, it makes every prefix a good code. Stages that
            are not used get no gradient and no update.
        """
        residual = z if z.dtype == torch.float64 else z.float()
        codes, indices, losses = torch.zeros_like(residual), list[Tensor](), list[Tensor]()
        for quantizer in self._first(stages):
            part: Quantized = quantizer(residual)
            residual = residual - part.z_q.detach()
            codes = codes + part.z_q.detach()
            indices.append(part.indices)
            losses.append(part.loss)
        z_q = straight_through(z, codes) if self.training else codes.to(z.dtype)
        return Quantized(z_q, torch.stack(indices, -1), torch.stack(losses).mean())

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ..., G) indices, or those of the first stages alone, to (B, d, ...) codes."""
        pairs = zip(self._first(indices.shape[-1]), indices.unbind(-1), strict=True)
        return reduce(torch.add, (quantizer.indices_to_codes(stage) for quantizer, stage in pairs))

    @torch.no_grad()
    def start_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set every codebook, stage after stage, to the K-means centres of what is left of (N, d) latents."""
        training = self.training
        self.eval()
        for quantizer in self._members:
            quantizer.start_from(latents, generator)
            latents = latents - quantizer(latents).z_q
        self.train(training)

    def _first(self, stages: int | None) -> list[Any]:
        count = len(self.quantizers) if stages is None else stages
        if not 1 <= count <= len(self.quantizers):
            raise ConfigError(f"This quantizer has 1 to {len(self.quantizers)} stages, not {count}.")
        return self._members[:count]
