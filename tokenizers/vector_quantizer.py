"""Vector quantization: each latent vector becomes the index of its nearest codeword.

van den Oord et al., "Neural Discrete Representation Learning" (1711.00937); EMA codebook as in its appendix A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.tokenizers.base import Quantized


def nearest_codeword(z: Tensor, codebook: Tensor, chunk: int = 16384) -> Tensor:
    """Index of the nearest row of `codebook` (K, d), in squared L2, for each row of `z` (N, d); lowest index on ties.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every e: one GEMM a chunk, never N x K at once.
    """
    half_norms = 0.5 * codebook.pow(2).sum(1)
    return torch.cat([(half_norms - part @ codebook.T).argmin(1) for part in z.split(chunk)])


@torch.no_grad()
def kmeans(points: Tensor, clusters: int, iterations: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """Lloyd's algorithm: (N, d) points to (clusters, d) centres; an empty cluster restarts at a random point."""
    pick = torch.randperm(len(points), generator=generator)[:clusters]
    if len(pick) < clusters:
        pick = torch.randint(len(points), (clusters,), generator=generator)
    centres = points[pick].clone()
    for _ in range(iterations):
        labels = nearest_codeword(points, centres)
        counts = torch.bincount(labels, minlength=clusters).to(points)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        again = torch.randint(len(points), (clusters,), generator=generator)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], points[again])
    return centres


class VectorQuantizer(nn.Module):
    """Nearest codeword out of K, in d dimensions, with a codebook that follows the latents by moving average.

    codebook_size: K.
    dim: d.
    commitment: weight of mean (z - sg(e))^2 in the loss.
    decay: of the moving averages of counts and sums.
    dead_below: a codeword used less than this share of the mean usage is moved onto a latent of the batch.
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor

    def __init__(self, codebook_size: int, dim: int, commitment: float = 0.25, decay: float = 0.99,
                 dead_below: float = 0.03) -> None:
        super().__init__()
        self.codebook_size, self.dim = codebook_size, dim
        self.commitment, self.decay, self.dead_below = commitment, decay, dead_below
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        # Training state: a finished model does not need it, so it is not saved with the weights.
        self.register_buffer("ema_counts", torch.ones(codebook_size), persistent=False)
        self.register_buffer("ema_sums", self.codebook.clone(), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ...)."""
        flat = z.movedim(1, -1).reshape(-1, self.dim).float()
        flat_indices = nearest_codeword(flat.detach(), self.codebook)
        indices = flat_indices.view(z.shape[0], *z.shape[2:])
        codes = self.indices_to_codes(indices).to(z.dtype)
        if not self.training:
            return Quantized(codes, indices, z.new_zeros(()))
        self._follow(flat.detach(), flat_indices)
        loss = self.commitment * F.mse_loss(z, codes.detach())
        return Quantized(z + (codes - z).detach(), indices, loss)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ...) indices to (B, d, ...) codewords."""
        return self.codebook[indices].movedim(-1, 1)

    def start_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the codebook to the K-means centres of (N, d) latents."""
        self._set_codebook(kmeans(latents.float(), self.codebook_size, generator=generator))

    @torch.no_grad()
    def _set_codebook(self, codebook: Tensor) -> None:
        self.codebook.copy_(codebook)
        self.ema_counts.fill_(1.0)
        self.ema_sums.copy_(codebook)

    @torch.no_grad()
    def _follow(self, latents: Tensor, indices: Tensor) -> None:
        counts = torch.bincount(indices, minlength=self.codebook_size).float()
        sums = torch.zeros_like(self.ema_sums).index_add_(0, indices, latents)
        self.ema_counts.lerp_(counts, 1 - self.decay)
        self.ema_sums.lerp_(sums, 1 - self.decay)
        mean_count = self.ema_counts.mean()
        dead = self.ema_counts < self.dead_below * mean_count
        if dead.any():
            chosen = latents[torch.randint(len(latents), (int(dead.sum()),))]
            self.ema_counts[dead] = mean_count
            self.ema_sums[dead] = chosen * mean_count
        self.codebook.copy_(self.ema_sums / self.ema_counts.clamp(min=1e-8)[:, None])
