"""The loop that draws a pyramid of tokens scale by scale, for every next-scale model, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.sampling import Generators, Guidance, Sampling
from vtc.tokenizers.scales import Grid, split_scales

#: one scale of a model whose condition is settled: codes so far, (2 B | B, n, d) or None, cache and step to logits
NextScaleStep = Callable[[Tensor | None, KVCache, int], Tensor]


class Pyramid(Protocol):
    """What a loop needs of a `MultiScaleQuantizer`, or of a `PatchedQuantizer` around one."""

    def add_scale(self, total: Tensor | None, indices: Tensor, number: int, scales: Sequence[Grid]) -> Tensor:
        """The sum of codes after a scale: (B, d, H, W)."""

    def next_scale_input(self, total: Tensor, number: int, scales: Sequence[Grid]) -> Tensor:
        """That sum as the generator reads it for the next scale: (B, d, h, w)."""


@dataclass(frozen=True)
class Scale:
    """What a callback hears after each scale.

    number: from 0. indices: (B, n, ...) of this scale. total: (B, d, H, W), the sum of codes so far; the tokenizer's
    `reconstruct` makes a preview of it. logits: (B, n, ..., V) after guidance. cache: as it stands.
    """

    number: int
    indices: Tensor
    total: Tensor
    logits: Tensor
    cache: KVCache


def draw_scales(step: NextScaleStep, quantizer: Pyramid, scales: Sequence[Grid], batch: int, cache: KVCache,
                sampling: Sampling, guidance: Guidance, generators: Generators = None,
                given: tuple[Tensor, Tensor] | None = None,
                callback: Callable[[Scale], None] | None = None) -> tuple[Tensor, Tensor]:
    """(B, L, ...) indices, and the (B, d, H, W) sum of their codes.

    given: indices (B, L, ...) and where they hold, (B, L) bool, or like the indices: those are taken, not drawn
        (inpainting).
    """
    total: Tensor | None = None
    codes: Tensor | None = None
    drawn: list[Tensor] = []
    parts = _given_parts(given, scales, batch)
    for number, grid in enumerate(scales):
        both = codes.repeat(2, 1, 1) if codes is not None and guidance.active else codes
        logits = guidance(step(both, cache, number), number, len(scales))
        indices = sampling(logits, generators)
        if parts is not None:
            words, held = parts[number]
            indices = torch.where(held[(..., *(None,) * (indices.ndim - held.ndim))], words, indices)
        total = quantizer.add_scale(total, indices.unflatten(1, grid), number, scales)
        if number + 1 < len(scales):
            codes = quantizer.next_scale_input(total, number, scales).flatten(2).transpose(1, 2)
        drawn.append(indices)
        if callback is not None:
            callback(Scale(number, indices, total, logits, cache))
    if total is None:
        raise ConfigError("There are no scales to draw.")
    return torch.cat(drawn, 1), total


def _given_parts(given: tuple[Tensor, Tensor] | None, scales: Sequence[Grid], batch: int,
                 ) -> list[tuple[Tensor, Tensor]] | None:
    if given is None:
        return None
    words, held = given
    if held.shape not in (words.shape, words.shape[:2]) or len(words) != batch:
        raise ConfigError(f"Given tokens are (B, L, ...) indices and a (B, L) mask of {batch} images, not "
                          f"{tuple(words.shape)} and {tuple(held.shape)}.")
    if (total := sum(h * w for h, w in scales)) != held.shape[1]:
        raise ConfigError(f"{held.shape[1]} given tokens do not fit scales of {total}.")
    return [(w.flatten(1, 2), h.flatten(1, 2)) for w, h in
            zip(split_scales(words, scales), split_scales(held, scales), strict=True)]
