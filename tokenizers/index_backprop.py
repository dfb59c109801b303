"""Index backpropagation quantization: every codeword learns at every step. Shi et al., IBQ (2412.02692)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.codeword_entropy import codeword_entropies, row_pieces
from vtc.tokenizers.quantizer import Quantizer


class _SelectCodeword(torch.autograd.Function):
    """Forward: the codeword of each index. Backward: as if softmax(z E^T), not its arg max, had mixed the codewords.

    The soft mixture is worked through piece by piece on the way back; no N x K table is kept.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(z, codebook, indices)
        return codebook[indices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, codebook, indices = ctx.saved_tensors
        (grad,) = grads
        grad_z = torch.empty_like(z)
        grad_codebook = torch.zeros_like(codebook).index_add_(0, indices, grad)
        with torch.autocast(z.device.type, enabled=False):
            for piece in row_pieces(len(z), len(codebook)):
                soft = (z[piece] @ codebook.T).softmax(1)
                to_logits = grad[piece] @ codebook.T
                to_logits.sub_((soft * to_logits).sum(1, keepdim=True)).mul_(soft)
                grad_z[piece] = to_logits @ codebook
                grad_codebook.addmm_(to_logits.T, z[piece])
        return grad_z, grad_codebook, None


def best_codeword(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the row of `codebook` (K, d) with the largest inner product, for each row of `z` (N, d)."""
    return torch.cat([(z[piece] @ codebook.T).argmax(1) for piece in row_pieces(len(z), len(codebook))])


class IndexBackpropQuantizer(Quantizer):
    """The codeword of the largest inner product with z; gradients reach all codewords through the softmax.

    codebook_size, dim: K (1,024 to 262,144 in the paper) and d.
    beta: the loss is mean (q - z)^2 + mean (sg(e) - z)^2 + beta * mean (e - sg(z))^2, where q is the code with the
        gradient of the softmax and e the plain codeword.
    entropy: weight of sample entropy - codebook entropy of softmax(z E^T / temperature) (0.05 upstream).
    temperature: of the entropies alone.
    reduce_across_ranks: the codebook entropy is the one of all processes' batches together.
    """

    def __init__(self, codebook_size: int, dim: int, beta: float = 0.25, entropy: float = 0.0,
                 temperature: float = 0.01, reduce_across_ranks: bool = True) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1 or temperature <= 0:
            raise ConfigError("IBQ needs at least one word, one dimension and a positive temperature.")
        self.codebook_size, self.dim = codebook_size, dim
        self.beta, self.entropy, self.temperature = beta, entropy, temperature
        self.reduce_across_ranks = reduce_across_ranks
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of the index."""
        return (self.codebook_size,)

    @property
    def loss_weights(self) -> dict[str, float]:
        """1 and 1, `beta`, `entropy` for the two entropies."""
        return {"soft_loss": 1.0, "commitment": 1.0, "codebook_loss": self.beta,
                "per_sample_entropy": self.entropy, "codebook_entropy": -self.entropy}

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ...)."""
        self.check_latents(z)
        flat, codebook, flat_indices = self._choose(z)
        indices = flat_indices.view(z.shape[0], *z.shape[2:])
        if not self.training:
            return Quantized(self._lookup(indices).to(z.dtype), indices, z.new_zeros(()))
        codes = _SelectCodeword.apply(flat, codebook, flat_indices)
        z_q = codes.view(z.shape[0], *z.shape[2:], self.dim).movedim(-1, 1).to(z.dtype)
        terms = self._terms(flat, codebook, flat_indices, codes, self.entropy != 0)
        return Quantized(z_q, indices, self.weighted(terms))

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Unweighted, in either mode: soft_loss, commitment, codebook_loss and the two entropies."""
        self.check_latents(z, training=True)
        flat, codebook, indices = self._choose(z)
        return self._terms(flat, codebook, indices, _SelectCodeword.apply(flat, codebook, indices))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ...) indices to (B, d, ...) codewords."""
        return self._lookup(self.checked_indices(indices))

    def _lookup(self, indices: Tensor) -> Tensor:
        return self.codebook[indices].movedim(-1, 1)

    def _choose(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, d) latents, (K, d) codebook of the same wide type, (N,) indices."""
        flat = z.movedim(1, -1).reshape(-1, self.dim)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        codebook = self.codebook.to(flat.dtype)
        with torch.autocast(z.device.type, enabled=False):
            return flat, codebook, best_codeword(flat.detach(), codebook.detach())

    def _terms(self, flat: Tensor, codebook: Tensor, indices: Tensor, codes: Tensor,
               entropies: bool = True) -> dict[str, Tensor]:
        plain = codebook[indices]
        terms = {"soft_loss": F.mse_loss(codes, flat), "commitment": F.mse_loss(flat, plain.detach()),
                 "codebook_loss": F.mse_loss(plain, flat.detach())}
        if entropies:
            terms["per_sample_entropy"], terms["codebook_entropy"] = codeword_entropies(
                flat / self.temperature, codebook, reduce_across_ranks=self.reduce_across_ranks)
        return terms
