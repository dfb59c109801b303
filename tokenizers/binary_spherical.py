"""Binary spherical quantization: signs of a latent on the unit sphere. Zhao et al., BSQ-ViT (2406.07548).

The codes are the corners of the cube inside the sphere, {-1, +1}^d / sqrt(d). Bits of unit-norm latents with
d in the hundreds are never certain, so the codebook entropy is taken over sub-groups of bits, or bit by bit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.bits import BitOrder, bit_entropies, check_bit_order, check_token_bits, pack_tokens, unpack_tokens
from vtc.tokenizers.quantizer import Quantizer, on_sphere
from vtc.tokenizers.straight_through import straight_through


class BinarySphericalQuantizer(Quantizer):
    """Signs of d channels over sqrt(d).

    dim: d.
    group_bits: bits of each sub-group; 9 in BSQ-ViT. It cuts the index into tokens, unless `token_bits` does, and the
        histogram of codebook_entropy="group".
    commitment: weight of the mean over positions of |z - sg(q)|^2, summed over channels.
    entropy: weight of sample entropy - diversity * codebook entropy (nats); upstream's zeta / inv_temperature.
    temperature: T in softmax(2 <z, c> / T); the inverse of upstream's inv_temperature.
    normalize: project z on the unit sphere first. Off for a caller that has done so.
    token_bits: bits of each index; default one index a sub-group, or all bits in one where a sub-group is one bit.
    bit_order: of the indices; "msb_first" in BSQ-ViT and Infinity.
    reduce_across_ranks: the codebook entropy is the one of all processes' batches together.
    codebook_entropy: "group": of a histogram of 2^group_bits codes a sub-group, added up over sub-groups, as upstream
        with persample_entropy_compute="group"; "bit": of two probabilities a bit, added up over bits, as upstream with
        "analytical", whose per-bit probabilities replace those of the sub-groups (BSQ-ViT's default, and Infinity's).
        The former is at most the latter; they agree if bits are independent. The sample entropy is the same in both.
    compat: None, the default: gradients of the codes reach the projected latent as they are, as in Infinity;
        "upstream": over sqrt(d), as in BSQ-ViT, whose straight-through step comes before that division.
    """

    grouped_indices = True

    def __init__(self, dim: int, group_bits: int = 9, commitment: float = 0.25, entropy: float = 0.1,
                 diversity: float = 1.0, temperature: float = 1.0, normalize: bool = True,
                 token_bits: tuple[int, ...] | None = None, bit_order: BitOrder = "msb_first",
                 reduce_across_ranks: bool = True, codebook_entropy: Literal["group", "bit"] = "group",
                 compat: Literal["upstream"] | None = None) -> None:
        super().__init__()
        if group_bits < 1 or dim < 1 or dim % group_bits:
            raise ConfigError(f"{dim} channels do not divide into sub-groups of {group_bits} bits.")
        if temperature <= 0:
            raise ConfigError(f"The temperature must be positive, not {temperature}.")
        if codebook_entropy not in ("group", "bit"):
            raise ConfigError(f"codebook_entropy is 'group' or 'bit', not {codebook_entropy!r}.")
        if compat not in (None, "upstream"):
            raise ConfigError(f"compat is None or 'upstream', not {compat!r}.")
        check_bit_order(bit_order)
        self.dim, self.group_bits = dim, group_bits
        self.commitment, self.entropy, self.diversity = commitment, entropy, diversity
        self.temperature, self.normalize = temperature, normalize
        self.bit_order: BitOrder = bit_order
        if token_bits is None:
            token_bits = (dim,) if group_bits == 1 else (group_bits,) * (dim // group_bits)
        self.token_bits = tuple(token_bits)
        self.reduce_across_ranks, self.codebook_entropy = reduce_across_ranks, codebook_entropy
        self.compat = compat
        check_token_bits(self.token_bits, dim)

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of each index."""
        return tuple(1 << n for n in self.token_bits)

    @property
    def loss_weights(self) -> dict[str, float]:
        """`entropy` for the two entropies, `commitment`."""
        return {"per_sample_entropy": self.entropy, "codebook_entropy": -self.entropy * self.diversity,
                "commitment": self.commitment}

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Codes are -1/sqrt(d) and 1/sqrt(d) (a zero becomes negative); indices (B, ..., G)."""
        self.check_latents(z)
        ones = z > 0
        codes = self._codes(ones)
        indices = pack_tokens(ones, self.token_bits, self.bit_order)
        if not self.training:
            return Quantized(codes.to(z.dtype), indices, z.new_zeros(()))
        on_sphere = self._on_sphere(z)
        loss = self.weighted(self._terms(on_sphere, ones, self.entropy != 0))
        source = on_sphere / math.sqrt(self.dim) if self.compat == "upstream" else on_sphere
        return Quantized(straight_through(source, codes).to(z.dtype), indices, loss)

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Unweighted, in either mode: per_sample_entropy, codebook_entropy, commitment."""
        self.check_latents(z, training=True)
        return self._terms(self._on_sphere(z), z > 0)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ..., G) indices to (B, d, ...) codes on the unit sphere, float32."""
        return self._codes(unpack_tokens(self.checked_indices(indices), self.token_bits, self.bit_order))

    def entropy_logits(self, z: Tensor) -> Tensor:
        """(B, d, ...) latents on the sphere to (histograms, bits of each, samples) logits of each bit being one."""
        wide = z if z.dtype == torch.float64 else z.float()
        bits = self.group_bits if self.codebook_entropy == "group" else 1
        rows = wide.reshape(z.shape[0], self.dim // bits, bits, -1).permute(1, 2, 0, 3)
        # Flipping one bit moves 2 <z, c> / T by 4 z / (sqrt(d) T).
        return rows.reshape(rows.shape[0], bits, -1) * (4 / (math.sqrt(self.dim) * self.temperature))

    def _codes(self, ones: Tensor) -> Tensor:
        corner = 1 / math.sqrt(self.dim)
        return torch.where(ones, corner, -corner)

    def _on_sphere(self, z: Tensor) -> Tensor:
        if self.normalize:
            return on_sphere(z)
        return z if z.dtype == torch.float64 else z.float()

    def _terms(self, z: Tensor, ones: Tensor, entropies: bool = True) -> dict[str, Tensor]:
        commitment = (z - self._codes(ones)).square().sum(1).mean()
        if not entropies:
            return {"commitment": commitment}
        per_sample, of_codes = bit_entropies(self.entropy_logits(z), reduce_across_ranks=self.reduce_across_ranks)
        return {"per_sample_entropy": per_sample.sum(), "codebook_entropy": of_codes.sum(), "commitment": commitment}
