"""Lookup-free quantization: the code of a latent vector is the vector of its signs; there is no codebook to learn.

LFQ: Yu et al., "Language Model Beats Diffusion" (MAGVIT-v2, 2310.05737); factorised tokens: Open-MAGVIT2 (2409.04410).
GroupLFQ: the group-wise quantization of WeTok (2508.05599): g groups of d' consecutive channels, each a code of d'
bits, so that g d' bits per position cost no more than g histograms of 2^d' codes, or one that all groups share.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.bits import (
    BitOrder,
    LogGuard,
    bit_entropies,
    check_bit_order,
    check_guard,
    check_token_bits,
    guarded_log,
    pack_tokens,
    unpack_tokens,
)
from vtc.tokenizers.quantizer import Quantizer
from vtc.tokenizers.straight_through import straight_through


def annealed_entropy_weight(step: int, weight: float = 0.1, boost: float = 3.0, over: int = 2000) -> float:
    """Entropy weight of a training step: (1 + boost) * weight at step 0, linearly down to `weight` at step `over`.

    Large codebooks start to be used when the entropy term rules at first (MAGVIT-v2). A training loop assigns it:
    `quantizer.entropy = annealed_entropy_weight(step)`.
    """
    if over < 1:
        raise ConfigError(f"The entropy weight goes down over at least one step, not {over}.")
    return weight * (1 + boost * max(0.0, 1 - step / over))


class GroupLFQ(Quantizer):
    """Signs of g groups of d' consecutive channels, an index a group.

    groups, bits: g and d'. Latents have g * d' channels.
    commitment: weight of the mean of (u - sg(q))^2.
    entropy: weight of sample entropy - diversity * codebook entropy; may be changed while training, see
        `annealed_entropy_weight`. Entropies are in nats.
    temperature: T in softmax(2 <u, c> / T) over the codes c.
    codebook_entropy: "pooled": one histogram that all groups share, as WeTok's published code and checkpoints;
        "per_group": a histogram a group and the mean of their entropies, as its paper and lucidrains' LFQ.
    eps, guard: in the logarithm of the codebook entropy; 1e-5 in the published recipes, "add" in WeTok and
        Open-MAGVIT2, "clamp" in lucidrains' LFQ; eps 0 is the exact entropy.
    bit_order: of the indices; "lsb_first" in WeTok and Open-MAGVIT2, "msb_first" in lucidrains' LFQ.
    token_bits: bits of each index where tokens are cut otherwise than groups (Open-MAGVIT2: 18 bits as 6 + 12).
    reduce_across_ranks: the codebook entropy is the one of all processes' batches together, not of each alone.
    compat: None, the default, is the closed form of `bits.py`; "upstream" takes the entropies by a softmax over all
        2^d' codes in the published code's order of operations, a rank at a time. The two are one function and differ by
        rounding: float32 gradients by a few 1e-6, so a comparison with upstream's own numbers to the last digits needs
        "upstream". It is slow and large, and the farther one from the true gradient. (With guard="clamp" it also clamps
        the probabilities of single samples, as lucidrains' LFQ does, which the closed form cannot.)

    There is no state: nothing of it stands in a state dict.
    """

    grouped_indices = True

    def __init__(self, groups: int, bits: int, commitment: float = 0.25, entropy: float = 0.1, diversity: float = 1.0,
                 temperature: float = 0.01, codebook_entropy: Literal["pooled", "per_group"] = "pooled",
                 eps: float = 1e-5, guard: LogGuard = "add", bit_order: BitOrder = "lsb_first",
                 token_bits: tuple[int, ...] | None = None, reduce_across_ranks: bool = True,
                 compat: Literal["upstream"] | None = None) -> None:
        super().__init__()
        if groups < 1 or bits < 1:
            raise ConfigError(f"GroupLFQ needs at least one group of at least one bit, not {groups} of {bits}.")
        if codebook_entropy not in ("pooled", "per_group"):
            raise ConfigError(f"codebook_entropy is 'pooled' or 'per_group', not {codebook_entropy!r}.")
        if temperature <= 0:
            raise ConfigError(f"The temperature must be positive, not {temperature}.")
        if compat not in (None, "upstream"):
            raise ConfigError(f"compat is None or 'upstream', not {compat!r}.")
        check_bit_order(bit_order)
        check_guard(eps, guard)
        self.groups, self.bits, self.dim = groups, bits, groups * bits
        self.commitment, self.entropy, self.diversity = commitment, entropy, diversity
        self.temperature, self.codebook_entropy, self.eps = temperature, codebook_entropy, eps
        self.guard: LogGuard = guard
        self.bit_order: BitOrder = bit_order
        self.token_bits = (bits,) * groups if token_bits is None else tuple(token_bits)
        self.reduce_across_ranks, self.compat = reduce_across_ranks, compat
        check_token_bits(self.token_bits, self.dim)

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
        """z: (B, g d', ...) float. Codes are -1 and +1 (a zero becomes -1); indices are (B, ..., G)."""
        self.check_latents(z)
        ones = z > 0
        codes = torch.where(ones, 1.0, -1.0).to(z.dtype)
        indices = pack_tokens(ones, self.token_bits, self.bit_order)
        if not self.training:
            return Quantized(codes, indices, z.new_zeros(()))
        return Quantized(straight_through(z, codes), indices, self.weighted(self._terms(z, codes, self.entropy != 0)))

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Unweighted, in either mode: per_sample_entropy, codebook_entropy, commitment."""
        self.check_latents(z, training=True)
        return self._terms(z, torch.where(z > 0, 1.0, -1.0).to(z.dtype))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ..., G) indices to (B, g d', ...) codes of -1 and +1, float32."""
        ones = unpack_tokens(self.checked_indices(indices), self.token_bits, self.bit_order)
        return torch.where(ones, 1.0, -1.0)

    def _terms(self, z: Tensor, codes: Tensor, entropies: bool = True) -> dict[str, Tensor]:
        wide = z if z.dtype == torch.float64 else z.float()
        commitment = F.mse_loss(wide, codes.to(wide.dtype))
        if not entropies:
            return {"commitment": commitment}
        rows = wide.reshape(z.shape[0], self.groups, self.bits, -1)  # B, g, d', positions
        if self.codebook_entropy == "pooled":
            rows = rows.permute(2, 1, 0, 3).reshape(1, self.bits, -1)
        else:
            rows = rows.permute(1, 2, 0, 3).reshape(self.groups, self.bits, -1)
        if self.compat == "upstream":
            per_sample, of_codes = self._entropies_by_softmax(wide.reshape(z.shape[0], self.dim, -1))
        else:  # flipping one bit moves 2 <u, c> / T by 4 u / T
            per_sample, of_codes = bit_entropies(rows * (4 / self.temperature), self.eps, self.guard,
                                                 self.reduce_across_ranks)
        return {"per_sample_entropy": per_sample.mean(), "codebook_entropy": of_codes.mean(),
                "commitment": commitment}

    def _entropies_by_softmax(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, g d', positions) latents to each group's sample entropy and each histogram's codebook entropy."""
        numbers = torch.arange(1 << self.bits, device=z.device)[:, None]
        codes = torch.where(unpack_tokens(numbers, (self.bits,), self.bit_order), 1.0, -1.0).to(z.dtype)
        rows = z.transpose(1, 2).unflatten(-1, (self.groups, self.bits))  # B, positions, g, d'
        logits = 2 * torch.einsum("...d,jd->...j", rows, codes) / self.temperature
        p = logits.softmax(-1)
        mean = p.mean((0, 1, 2) if self.codebook_entropy == "pooled" else (0, 1))
        log_p = guarded_log(p, self.eps, "clamp")[0] if self.guard == "clamp" else (logits + self.eps).log_softmax(-1)
        return -(p * log_p).sum(-1).mean((0, 1)), -(mean * guarded_log(mean, self.eps, self.guard)[0]).sum(-1)


class LFQ(GroupLFQ):
    """Signs of all channels as one code of `bits` bits; `token_bits` cuts its index into factors.

    The other arguments are those of GroupLFQ. 24 bits is the most that the codebook entropy is computed for.
    """

    def __init__(self, bits: int, commitment: float = 0.25, entropy: float = 0.1, diversity: float = 1.0,
                 temperature: float = 0.01, eps: float = 1e-5, guard: LogGuard = "add",
                 bit_order: BitOrder = "lsb_first", token_bits: tuple[int, ...] | None = None,
                 reduce_across_ranks: bool = True, compat: Literal["upstream"] | None = None) -> None:
        super().__init__(1, bits, commitment, entropy, diversity, temperature, "pooled", eps, guard, bit_order,
                         token_bits, reduce_across_ranks, compat)
