"""Binary spherical quantization: signs of a latent on the unit sphere. Zhao et al., BSQ-ViT (2406.07548).

The codes are the corners of the cube inside the sphere, {-1, +1}^d / sqrt(d). Bits of unit-norm latents with
d in the hundreds are never certain, so the codebook entropy is taken over sub-groups of bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.bits import BitOrder, bit_entropies, check_bit_order, check_token_bits, pack_tokens, unpack_tokens
from vtc.tokenizers.straight_through import straight_through


class BinarySphericalQuantizer(nn.Module):
    """Signs of d channels over sqrt(d).

    dim: d.
    group_bits: bits of each sub-group that the codebook entropy has a histogram of; their entropies are added up.
        9 in BSQ-ViT, 1 in Infinity. It does not touch the indices.
    commitment: weight of the mean over positions of |z - sg(q)|^2, summed over channels.
    entropy: weight of sample entropy - diversity * codebook entropy (nats); upstream's zeta / inv_temperature.
    temperature: T in softmax(2 <z, c> / T). The sample entropy is exact and takes O(d), so upstream's two ways to
        compute it, "group" and "analytical", are one here.
    normalize: project z on the unit sphere first. Off for a caller that has done so.
    token_bits: bits of each index; default one index a sub-group, or all bits in one where a sub-group is one bit.
    bit_order: of the indices; "msb_first" in BSQ-ViT and Infinity.
    reduce_across_ranks: the codebook entropy is the one of all processes' batches together.
    """

    def __init__(self, dim: int, group_bits: int = 9, commitment: float = 0.25, entropy: float = 0.1,
                 diversity: float = 1.0, temperature: float = 1.0, normalize: bool = True,
                 token_bits: tuple[int, ...] | None = None, bit_order: BitOrder = "msb_first",
                 reduce_across_ranks: bool = True) -> None:
        super().__init__()
        if group_bits < 1 or dim < 1 or dim % group_bits:
            raise ConfigError(f"{dim} channels do not divide into sub-groups of {group_bits} bits.")
        if temperature <= 0:
            raise ConfigError(f"The temperature must be positive, not {temperature}.")
        check_bit_order(bit_order)
        self.dim, self.group_bits = dim, group_bits
        self.commitment, self.entropy, self.diversity = commitment, entropy, diversity
        self.temperature, self.normalize = temperature, normalize
        self.bit_order: BitOrder = bit_order
        if token_bits is None:
            token_bits = (dim,) if group_bits == 1 else (group_bits,) * (dim // group_bits)
        self.token_bits = tuple(token_bits)
        self.reduce_across_ranks = reduce_across_ranks
        check_token_bits(self.token_bits, dim)

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of each index."""
        return tuple(1 << n for n in self.token_bits)

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Codes are -1/sqrt(d) and 1/sqrt(d) (a zero becomes negative); indices (B, ..., G)."""
        z = self._on_sphere(z)
        ones = z > 0
        codes = self._codes(ones).to(z.dtype)
        indices = pack_tokens(ones, self.token_bits, self.bit_order)
        if not self.training:
            return Quantized(codes, indices, z.new_zeros(()))
        terms = self._terms(z, ones)
        spread = terms["per_sample_entropy"] - self.diversity * terms["codebook_entropy"]
        loss = self.entropy * spread + self.commitment * terms["commitment"]
        return Quantized(straight_through(z, codes), indices, loss)

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """The unweighted terms of the loss, in any mode: per_sample_entropy, codebook_entropy, commitment."""
        z = self._on_sphere(z)
        return self._terms(z, z > 0)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ..., G) indices to (B, d, ...) codes on the unit sphere, float32."""
        return self._codes(unpack_tokens(indices, self.token_bits, self.bit_order))

    def entropy_logits(self, z: Tensor) -> Tensor:
        """(B, d, ...) latents on the sphere to (sub-groups, group_bits, samples) logits of each bit being one."""
        wide = z if z.dtype == torch.float64 else z.float()
        rows = wide.reshape(z.shape[0], self.dim // self.group_bits, self.group_bits, -1).permute(1, 2, 0, 3)
        # Flipping one bit moves 2 <z, c> / T by 4 z / (sqrt(d) T).
        return rows.reshape(rows.shape[0], self.group_bits, -1) * (4 / (math.sqrt(self.dim) * self.temperature))

    def _codes(self, ones: Tensor) -> Tensor:
        corner = 1 / math.sqrt(self.dim)
        return torch.where(ones, corner, -corner)

    def _on_sphere(self, z: Tensor) -> Tensor:
        if z.ndim < 2 or z.shape[1] != self.dim:
            raise ConfigError(f"This quantizer takes (B, {self.dim}, ...) latents, not {tuple(z.shape)}.")
        if not self.normalize:
            return z
        # In half precision the squares overflow and the epsilon of the norm underflows.
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1).to(z.dtype)

    def _terms(self, z: Tensor, ones: Tensor) -> dict[str, Tensor]:
        wide = z if z.dtype == torch.float64 else z.float()
        per_sample, of_codes = bit_entropies(self.entropy_logits(z), reduce_across_ranks=self.reduce_across_ranks)
        commitment = (wide - self._codes(ones)).square().sum(1).mean()
        return {"per_sample_entropy": per_sample.sum(), "codebook_entropy": of_codes.sum(), "commitment": commitment}
