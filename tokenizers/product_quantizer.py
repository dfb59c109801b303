"""Product quantization: groups of channels, each with a quantizer of its own.

Jégou et al. (TPAMI 2011); in a learned image codec: McQuic (2203.10897).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.quantizer import Quantizer
from vtc.tokenizers.scales import MultiScaleQuantizer


class QuantizerOfQuantizers(Quantizer):
    """What product and residual quantizers share: members, and whose the columns of (B, ..., G) indices are.

    A member may be of any kind but a multi-scale one, whose tokens belong to no single position. It has one column, or
    as many as it has groups.
    """

    grouped_indices = True

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        for member in self.quantizers:
            if not isinstance(member, Quantizer) or isinstance(member, MultiScaleQuantizer):
                raise ConfigError("The members are quantizers whose tokens belong to one position each, not "
                                  f"{type(member).__name__}.")
        if not len(self.quantizers):
            raise ConfigError("A quantizer of quantizers needs at least one.")

    @property
    def members(self) -> list[Quantizer]:
        """The quantizers, in order."""
        return [member for member in self.quantizers if isinstance(member, Quantizer)]

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of each index, member after member."""
        return tuple(words for member in self.members for words in member.vocab)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Those of member n, as "n.name", over the number of members: the loss is the mean of theirs."""
        count = len(self.members)
        return {f"{n}.{name}": weight / count for n, member in enumerate(self.members)
                for name, weight in member.loss_weights.items()}


def columns(member: Quantizer, indices: Tensor) -> Tensor:
    """A member's indices as (B, ..., its groups)."""
    return indices if member.grouped_indices else indices[..., None]


def codes_of(member: Quantizer, indices: Tensor) -> Tensor:
    """A member's columns, (B, ..., its groups), to its codes."""
    return member.indices_to_codes(indices if member.grouped_indices else indices[..., 0])


def start_member(member: Quantizer, latents: Tensor, generator: torch.Generator | None) -> None:
    """`start_from` of a member that has it."""
    start = getattr(member, "start_from", None)
    if start is not None:
        start(latents, generator)


class ProductQuantizer(QuantizerOfQuantizers):
    """Consecutive groups of channels go to one quantizer each; G indices a position, one a quantizer or more.

        ProductQuantizer(VectorQuantizer(256, 8) for _ in range(4))    # 32 channels, 32 bits a position

    quantizers: their `dim`s add up to the latent's channels. The loss is the mean of theirs, so its scale does not
        depend on their number.
    """

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        super().__init__(quantizers)
        self.dims = [member.dim for member in self.members]
        self.dim = sum(self.dims)

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ..., G)."""
        self.check_latents(z)
        parts: list[Quantized] = [q(part) for q, part in zip(self.members, z.split(self.dims, 1), strict=True)]
        indices = [columns(q, part.indices) for q, part in zip(self.members, parts, strict=True)]
        return Quantized(torch.cat([p.z_q for p in parts], 1), torch.cat(indices, -1),
                         torch.stack([p.loss for p in parts]).mean())

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Unweighted, in either mode: those of member n as "n.name"."""
        self.check_latents(z, training=True)
        return {f"{n}.{name}": term for n, (q, part) in enumerate(zip(self.members, z.split(self.dims, 1), strict=True))
                for name, term in q.loss_terms(part).items()}

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ..., G) indices to (B, d, ...) codes."""
        parts = self.checked_indices(indices).split([len(q.vocab) for q in self.members], -1)
        return torch.cat([codes_of(q, part) for q, part in zip(self.members, parts, strict=True)], 1)

    @torch.no_grad()
    def start_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the codebooks to K-means centres of their channels of (N, d) latents; a member without one stays."""
        for member, part in zip(self.members, latents.split(self.dims, 1), strict=True):
            start_member(member, part, generator)
