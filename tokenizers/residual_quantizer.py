"""Residual quantization: each stage codes what the stages before it have left.

Zeghidour et al., SoundStream (2107.03312), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.product_quantizer import QuantizerOfQuantizers, codes_of, columns, start_member
from vtc.tokenizers.quantizer import Quantizer, checked_indices
from vtc.tokenizers.straight_through import straight_through


class ResidualQuantizer(QuantizerOfQuantizers):
    """A chain of quantizers; the code is the sum of theirs, and a prefix of the chain is a coarser code.

        ResidualQuantizer(VectorQuantizer(256, 32) for _ in range(4))    # 32 channels, 32 bits a position

    quantizers: of one `dim`. The loss is the mean of theirs. Codes of signs (LFQ, BSQ, FSQ) do not shrink from stage to
        stage as learned words do: such a stage serves as the first one, or where its codes are as large as the rest.
    """

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        super().__init__(quantizers)
        if len({member.dim for member in self.members}) != 1:
            raise ConfigError("A residual quantizer needs quantizers of one dimension.")
        self.dim = self.members[0].dim

    def forward(self, z: Tensor, stages: int | None = None) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ..., G).

        stages: use only so many; drawn at random while training, it makes every prefix a good code. Stages that
            are not used get no gradient and no update.
        """
        self.check_latents(z)
        residual = z if z.dtype == torch.float64 else z.float()
        codes, indices, losses = torch.zeros_like(residual), list[Tensor](), list[Tensor]()
        for quantizer in self._first(stages):
            part: Quantized = quantizer(residual)
            residual = residual - part.z_q.detach()
            codes = codes + part.z_q.detach()
            indices.append(columns(quantizer, part.indices))
            losses.append(part.loss)
        z_q = straight_through(z, codes) if self.training else codes.to(z.dtype)
        return Quantized(z_q, torch.cat(indices, -1), torch.stack(losses).mean())

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Unweighted, in either mode, of all stages: those of stage n as "n.name"."""
        self.check_latents(z, training=True)
        return {f"{n}.{name}": term for n, (quantizer, residual) in enumerate(self._residuals(z))
                for name, term in quantizer.loss_terms(residual).items()}

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ..., G) indices, or those of the first stages alone, to (B, d, ...) codes."""
        widths = [len(quantizer.vocab) for quantizer in self.members]
        ends = list(accumulate(widths))
        if indices.ndim < 2 or indices.shape[-1] not in ends:
            raise ConfigError(f"The indices of the first stages are (B, ..., G) with G of {ends}, not "
                              f"{tuple(indices.shape)}.")
        stages = ends.index(indices.shape[-1]) + 1
        parts = checked_indices(indices, self.vocab[: indices.shape[-1]], True).split(widths[:stages], -1)
        return reduce(torch.add, (codes_of(q, part) for q, part in zip(self._first(stages), parts, strict=True)))

    @torch.no_grad()
    def start_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set every codebook, stage after stage, to the K-means centres of what is left of (N, d) latents."""
        for quantizer, residual in self._residuals(latents):
            start_member(quantizer, residual, generator)  # before it codes what the next one gets

    def _residuals(self, z: Tensor) -> Iterator[tuple[Quantizer, Tensor]]:
        """Each stage and what it is given; no stage learns."""
        residual = z if z.dtype == torch.float64 else z.float()
        for quantizer in self.members:
            yield quantizer, residual
            training = quantizer.training
            residual = residual - quantizer.eval()(residual).z_q.detach()
            quantizer.train(training)

    def _first(self, stages: int | None) -> list[Quantizer]:
        count = len(self.members) if stages is None else stages
        if not 1 <= count <= len(self.members):
            raise ConfigError(f"This quantizer has 1 to {len(self.members)} stages, not {count}.")
        return self.members[:count]
