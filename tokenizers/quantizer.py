"""What every quantizer is: latents to codes and indices, indices to codes, a loss of named terms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError


class Quantizer(nn.Module):
    """Base of all quantizers.

        out = quantizer(z)                          # (B, d, ...) latents to Quantized(z_q, indices, loss)
        quantizer.indices_to_codes(out.indices)     # out.z_q again
        quantizer.loss_terms(z)                     # {"commitment": ..., "codebook_entropy": ...}, unweighted
        CodebookStatistics(quantizer.vocab)         # usage and perplexity

    The loss of a training step is the sum of loss_weights[name] * loss_terms(z)[name]; in eval mode it is zero. The
    weights are attributes of the quantizer that a training loop may change from step to step.
    A batch of no latents is fine in eval mode only: a training step has nothing to learn from it.
    """

    #: d, channels of the latents
    dim: int
    #: whether indices are (B, ..., G) with G indices a position, even for G = 1, or (B, ...)
    grouped_indices: bool = False

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of each index."""
        raise NotImplementedError

    @property
    def loss_weights(self) -> dict[str, float]:
        """By which each term of `loss_terms` counts in the loss; a term that is to grow has a negative weight."""
        return {}

    def loss_terms(self, z: Tensor) -> dict[str, Tensor]:
        """The unweighted terms of the loss as scalars with gradients, in either mode; it changes no state.

        In a data-parallel run, all processes call it together.
        """
        self.check_latents(z, training=True)
        return {}

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices to (B, d, ...) codes. ConfigError for an index that has no word."""
        raise NotImplementedError

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss; terms of weight 0 may be missing."""
        return reduce(torch.add, [weight * terms[name] for name, weight in self.loss_weights.items() if name in terms])

    def check_latents(self, z: Tensor, training: bool | None = None) -> None:
        """ConfigError unless z is (B, d, ...) float, and not empty while training."""
        if z.ndim < 2 or z.shape[1] != self.dim:
            raise ConfigError(f"This quantizer takes (B, {self.dim}, ...) latents, not {tuple(z.shape)}.")
        if not z.is_floating_point():
            raise ConfigError(f"This quantizer takes latents of a floating-point type, not {z.dtype}.")
        if not z.numel() and (self.training if training is None else training):
            raise ConfigError(f"A training step needs at least one latent; these, {tuple(z.shape)}, are none.")

    def checked_indices(self, indices: Tensor) -> Tensor:
        """The indices as int64; ConfigError where their type, shape or range is none of this quantizer's."""
        return checked_indices(indices, self.vocab, self.grouped_indices)


def checked_indices(indices: Tensor, vocab: Sequence[int], grouped: bool) -> Tensor:
    """Indices, (B, ..., G) if `grouped` or else (B, ...), as int64; ConfigError for what is no index of `vocab`."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ConfigError(f"Indices are integers, not {indices.dtype}.")
    if grouped and (indices.ndim < 2 or indices.shape[-1] != len(vocab)):
        raise ConfigError(f"This quantizer takes (B, ..., {len(vocab)}) indices, not {tuple(indices.shape)}.")
    if not indices.ndim:
        raise ConfigError("Indices are (B, ...); this one has no batch.")
    indices = indices.long()
    if not indices.numel():
        return indices
    rows = indices.reshape(-1, len(vocab) if len(set(vocab)) > 1 else 1)
    extremes = torch.stack([rows.amin(0), rows.amax(0)], 1).tolist()  # one wait for the device, whatever the groups
    for (lowest, highest), words in zip(extremes, vocab, strict=False):
        if lowest < 0 or highest >= words:
            raise ConfigError(f"Index {lowest if lowest < 0 else highest} lies outside of 0 ... {words - 1}.")
    return indices


def on_sphere(z: Tensor) -> Tensor:
    """(N, d, ...) vectors to unit length, in float32 (float64 for float64): in float16 their squares would overflow.

    The gradient is that of z / max(|z|, 1e-4), so that a latent of zeros does not throw the whole step away (torch and
    the published code have 1e-12: a gradient of 1e12, infinite in float16).
    """
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1, eps=1e-4)
