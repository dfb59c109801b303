"""Vector quantization: each latent vector becomes the index of its nearest codeword.

van den Oord et al., "Neural Discrete Representation Learning" (1711.00937). Two ways to learn the codewords:
`VectorQuantizer` follows the latents by moving average (its appendix A), `GradientVectorQuantizer` trains them by
gradient, as taming's VQGAN, LlamaGen and TiTok do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.codeword_entropy import codeword_entropies
from vtc.tokenizers.kmeans import kmeans
from vtc.tokenizers.quantizer import Quantizer, on_sphere
from vtc.tokenizers.ranks import from_first_rank, sum_over_ranks
from vtc.tokenizers.straight_through import straight_through

#: distances held at a time; 64 MiB of float32
MAX_DISTANCES = 1 << 24


def nearest_codeword(z: Tensor, codebook: Tensor, chunk: int = 16384) -> Tensor:
    """Index of the nearest row of `codebook` (K, d), in squared L2, for each row of `z` (N, d); lowest index on ties.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every e: one GEMM a chunk, never N x K at once.
    Autocast does not touch it: a bfloat16 product would choose other words while training than while encoding.
    """
    with torch.autocast(z.device.type, enabled=False):
        half_norms = 0.5 * codebook.pow(2).sum(1)
        rows = max(1, min(chunk, MAX_DISTANCES // len(codebook)))
        return torch.cat([(part @ codebook.T).neg_().add_(half_norms).argmin(1) for part in z.split(rows)])


def check_averages(decay: float, dead_below: float, smoothing: float = 0.0) -> None:
    """Raises ConfigError for moving averages that cannot be."""
    if not 0 <= decay <= 1 or not 0 <= dead_below <= 1 or not smoothing >= 0:
        raise ConfigError("Moving averages take a decay and a dead_below from 0 to 1 and a smoothing of at least 0, "
                          f"not {decay}, {dead_below} and {smoothing}.")


class NearestCodeword(Quantizer):
    """What both kinds share: (B, d, ...) latents to the nearest of K codewords and back.

    With `normalize`, latents and codewords are projected on the unit sphere before they are compared, and the
    projected codeword is the code (Yu et al., ViT-VQGAN, 2110.04627).
    """

    codebook: Tensor

    def __init__(self, codebook_size: int, dim: int, normalize: bool) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ConfigError(f"A codebook needs at least one word and one dimension, not {codebook_size} x {dim}.")
        self.codebook_size, self.dim, self.normalize = codebook_size, dim, normalize

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of the index."""
        return (self.codebook_size,)

    @property
    def codewords(self) -> Tensor:
        """(K, d): the codebook, on the unit sphere where `normalize` says so."""
        return F.normalize(self.codebook, dim=1) if self.normalize else self.codebook

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ...) indices to (B, d, ...) codewords."""
        return self._lookup(self.checked_indices(indices))

    def _lookup(self, indices: Tensor) -> Tensor:
        codes = self.codebook[indices]
        return (F.normalize(codes, dim=-1) if self.normalize else codes).movedim(-1, 1)

    def start_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the codebook to the K-means centres of (N, d) latents."""
        latents = latents.float()
        centres = kmeans(F.normalize(latents, dim=1) if self.normalize else latents, self.codebook_size,
                         start="random", iterations=10, generator=generator).centres
        centres = from_first_rank(centres.to(self.codebook.device).contiguous())
        self._set_codebook(F.normalize(centres, dim=1) if self.normalize else centres)

    @torch.no_grad()
    def _set_codebook(self, codebook: Tensor) -> None:
        self.codebook.copy_(codebook)

    def _flat(self, z: Tensor) -> Tensor:
        """(B, d, ...) to (N, d), float32 or float64, on the sphere if asked for."""
        flat = z.movedim(1, -1).reshape(-1, self.dim)
        if self.normalize:
            return on_sphere(flat)
        return flat if flat.dtype == torch.float64 else flat.float()

    def _choose(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(N, d) latents to the (K, d) codewords in their type, and the (N,) indices of the nearest."""
        codewords = self.codewords.to(flat.dtype)
        return codewords, nearest_codeword(flat.detach(), codewords.detach())

    def _unflat(self, flat: Tensor, z: Tensor) -> Tensor:
        """(N, d) back to the shape and type of z."""
        return flat.view(z.shape[0], *z.shape[2:], self.dim).movedim(-1, 1).to(z.dtype)


class VectorQuantizer(NearestCodeword):
    """Nearest codeword out of K, in d dimensions, with a codebook that follows the latents by moving average.

    codebook_size: K.
    dim: d.
    commitment: weight of mean (z - sg(e))^2 in the loss.
    decay: of the moving averages of counts and sums.
    dead_below: a codeword used less than this share of the mean usage is moved onto a latent of the batch; 0: never.
    normalize: latents and codewords live on the unit sphere.
    smoothing: added to each count before sums are divided by counts (taming: 1e-5); 0: plain means.

    In a data-parallel run counts and sums are those of all processes.
    """

    ema_counts: Tensor
    ema_sums: Tensor

    def __init__(self, codebook_size: int, dim: int, commitment: float = 0.25, decay: float = 0.99,
                 dead_below: float = 0.03, normalize: bool = False, smoothing: float = 0.0) -> None:
        super().__init__(codebook_size, dim, normalize)
        check_averages(decay, dead_below, smoothing)
        self.commitment, self.decay, self.dead_below, self.smoothing = commitment, decay, dead_below, smoothing
        codebook = torch.randn(codebook_size, dim)
        self.register_buffer("codebook", F.normalize(codebook, dim=1) if normalize else codebook)
        # Training state: a finished model does not need it, so it is not saved with the weights.
        self.register_buffer("ema_counts", torch.ones(codebook_size), persistent=False)
        self.register_buffer("ema_sums", self.codebook.clone(), persistent=False)

    @property
    def loss_weights(self) -> dict[str, float]:
        """`commitment`."""
        return {"commitment": self.commitment}

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ...)."""
        self.check_latents(z)
        flat = self._flat(z)
        codewords, flat_indices = self._choose(flat)
        indices = flat_indices.view(z.shape[0], *z.shape[2:])
        if not self.training:
            return Quantized(self._lookup(indices).to(z.dtype), indices, z.new_zeros(()))
        codes = codewords[flat_indices]
        self._follow(flat.detach(), flat_indices)
        return Quantized(self._unflat(straight_through(flat, codes), z), indices,
                         self.weighted({"commitment": F.mse_loss(flat, codes)}))

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Unweighted, in either mode: commitment."""
        self.check_latents(z, training=True)
        flat = self._flat(z)
        codewords, indices = self._choose(flat)
        return {"commitment": F.mse_loss(flat, codewords[indices])}

    @torch.no_grad()
    def _set_codebook(self, codebook: Tensor) -> None:
        super()._set_codebook(codebook)
        self.ema_counts.fill_(1.0)
        self.ema_sums.copy_(self.codebook)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A loaded codebook brings no averages along: they start at it, or the next step of training would lose it.
        super()._load_from_state_dict(*args, **kwargs)
        self._set_codebook(self.codebook)

    @torch.no_grad()
    def _follow(self, latents: Tensor, indices: Tensor) -> None:
        if self.ema_sums.dtype in (torch.float16, torch.bfloat16):  # a model was cast, but averages need digits
            self.ema_counts, self.ema_sums = self.ema_counts.float(), self.ema_sums.float()
        counts = sum_over_ranks(torch.bincount(indices, minlength=self.codebook_size).to(self.ema_counts))
        latents = latents.to(self.ema_sums)
        sums = sum_over_ranks(torch.zeros_like(self.ema_sums).index_add_(0, indices, latents))
        self.ema_counts.lerp_(counts, 1 - self.decay)
        self.ema_sums.lerp_(sums, 1 - self.decay)
        mean_count = self.ema_counts.mean()
        dead = self.ema_counts < self.dead_below * mean_count
        if dead.any():
            chosen = from_first_rank(latents[torch.randint(len(latents), (int(dead.sum()),))])
            self.ema_counts[dead] = mean_count
            self.ema_sums[dead] = chosen * mean_count
        counts = self.ema_counts.clamp(min=1e-8)
        if self.smoothing:
            total = self.ema_counts.sum()
            counts = (self.ema_counts + self.smoothing) / (total + self.codebook_size * self.smoothing) * total
        means = self.ema_sums / counts[:, None]
        self.codebook.copy_(F.normalize(means, dim=1) if self.normalize else means)


class GradientVectorQuantizer(NearestCodeword):
    """Nearest codeword out of K, in d dimensions, with a codebook that the optimizer trains.

    beta: the loss is mean (sg(z) - e)^2 + beta * mean (z - sg(e))^2.
    legacy: beta stands at the first term instead of the second, as the published VQGAN weights were trained.
    normalize: latents and codewords live on the unit sphere (LlamaGen, TiTok).
    entropy: weight of sample entropy - codebook entropy of softmax(-|z - e|^2 / temperature) (LlamaGen: 0.1 or 0).
    dead_below: before a step, a codeword whose moving average of counts is below this share of the mean is moved onto
        a latent of the batch; 0: never. The optimizer's own averages for it are left to fade.
    decay: of that moving average.
    reduce_across_ranks: the codebook entropy is the one of all processes' batches together. Counts always are.
    """

    ema_counts: Tensor

    def __init__(self, codebook_size: int, dim: int, beta: float = 0.25, legacy: bool = False, normalize: bool = False,
                 entropy: float = 0.0, temperature: float = 0.01, dead_below: float = 0.0,
                 decay: float = 0.99, reduce_across_ranks: bool = True) -> None:
        super().__init__(codebook_size, dim, normalize)
        check_averages(decay, dead_below)
        if temperature <= 0:
            raise ConfigError(f"The temperature must be positive, not {temperature}.")
        self.beta, self.legacy, self.entropy, self.temperature = beta, legacy, entropy, temperature
        self.dead_below, self.decay, self.reduce_across_ranks = dead_below, decay, reduce_across_ranks
        codebook = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(F.normalize(codebook, dim=1) if normalize else codebook)
        self.register_buffer("ema_counts", torch.ones(codebook_size), persistent=False)

    @property
    def loss_weights(self) -> dict[str, float]:
        """1 and `beta`, or the other way round with `legacy`; `entropy` for the two entropies."""
        first, second = (self.beta, 1.0) if self.legacy else (1.0, self.beta)
        return {"codebook_loss": first, "commitment": second,
                "per_sample_entropy": self.entropy, "codebook_entropy": -self.entropy}

    def forward(self, z: Tensor) -> Quantized:
        """z: (B, d, ...) float. Indices are (B, ...)."""
        self.check_latents(z)
        flat = self._flat(z)
        if self.training and self.dead_below:
            self._revive(flat.detach())
        codewords, flat_indices = self._choose(flat)
        indices = flat_indices.view(z.shape[0], *z.shape[2:])
        if not self.training:
            return Quantized(self._lookup(indices).to(z.dtype), indices, z.new_zeros(()))
        codes = codewords[flat_indices]
        if self.dead_below:
            counts = sum_over_ranks(torch.bincount(flat_indices, minlength=self.codebook_size).to(self.ema_counts))
            self.ema_counts.lerp_(counts, 1 - self.decay)
        loss = self.weighted(self._terms(flat, codewords, codes, self.entropy != 0))
        return Quantized(self._unflat(straight_through(flat, codes), z), indices, loss)

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Unweighted, in either mode: codebook_loss, commitment and the two entropies."""
        self.check_latents(z, training=True)
        flat = self._flat(z)
        codewords, indices = self._choose(flat)
        return self._terms(flat, codewords, codewords[indices])

    def _terms(self, flat: Tensor, codewords: Tensor, codes: Tensor, entropies: bool = True) -> dict[str, Tensor]:
        terms = {"codebook_loss": F.mse_loss(codes, flat.detach()), "commitment": F.mse_loss(flat, codes.detach())}
        if entropies:
            # -|z - e|^2 without |z|^2, which a softmax over the codewords does not see
            bias = -codewords.square().sum(1) / self.temperature
            terms["per_sample_entropy"], terms["codebook_entropy"] = codeword_entropies(
                flat * (2 / self.temperature), codewords, bias, reduce_across_ranks=self.reduce_across_ranks)
        return terms

    @torch.no_grad()
    def _set_codebook(self, codebook: Tensor) -> None:
        super()._set_codebook(codebook)
        self.ema_counts.fill_(1.0)

    @torch.no_grad()
    def _revive(self, latents: Tensor) -> None:
        mean_count = self.ema_counts.mean()
        dead = self.ema_counts < self.dead_below * mean_count
        if dead.any():
            chosen = latents[torch.randint(len(latents), (int(dead.sum()),), device=latents.device)]
            self.codebook[dead] = from_first_rank(chosen).to(self.codebook.dtype)
            self.ema_counts[dead] = mean_count
