"""From logits to tokens: guidance, temperature, top-k, top-p, and seeds that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.errors import ConfigError

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. top_k 0 and top_p 0 leave every word; top_k 1 takes the best.

    Words are removed first by top_k, then by top_p (the fewest words whose probabilities add up to at least top_p
    stay), and what is left is drawn at its share.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 <= self.top_p <= 1):
            raise ConfigError(f"Sampling takes a temperature above 0, a top_k from 0 and a top_p from 0 to 1, "
                              f"not {self}.")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) logits to the distribution that is drawn from, float32."""
        logits = logits.float() / self.temperature
        limited = 0 < self.top_k < logits.shape[-1]
        if limited:
            best, order = logits.topk(self.top_k)
            if not 0 < self.top_p < 1:
                return logits.masked_fill(logits < best[..., -1:], -torch.inf).softmax(-1)
            ordered, order = best.flip(-1), order.flip(-1)  # what top_k has removed need not be sorted
        elif 0 < self.top_p < 1:
            ordered, order = logits.sort(-1)
        else:
            return logits.softmax(-1)
        remove = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
        remove[..., -1] = False
        kept = ordered.masked_fill(remove, -torch.inf).softmax(-1)
        return torch.zeros_like(logits).scatter(-1, order, kept)

    def __call__(self, logits: Tensor, generators: Generators = None) -> Tensor:
        """(B, ..., V) logits to (B, ...) words.

        generators: one for the batch, or one for each of its images: then an image does not depend on its neighbours.
        """
        if self.top_k == 1:
            return logits.argmax(-1)
        p = self.probabilities(logits)
        if generators is None or isinstance(generators, torch.Generator):
            return _draw(p, generators)
        if len(generators) != len(p):
            raise ConfigError(f"{len(generators)} random generators do not fit a batch of {len(p)}.")
        return torch.stack([_draw(row, generator) for row, generator in zip(p, generators, strict=True)])


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    rows = p.reshape(-1, p.shape[-1])
    return torch.multinomial(rows, 1, replacement=True, generator=generator).view(p.shape[:-1])


def seeded(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """A random generator for each image."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = unconditional + w * (conditional - unconditional).

    weight: w at the last step; 1 is no guidance, and then only the conditional half runs.
    ramp: w grows linearly from 1 at the first step, as VAR's, whose `cfg` is weight - 1; else it is constant.
    """

    weight: float = 1.0
    ramp: bool = False

    @property
    def active(self) -> bool:
        """Whether an unconditional half is needed."""
        return self.weight != 1

    def at(self, step: int, steps: int) -> float:
        """w at a step."""
        if not self.ramp:
            return self.weight
        return 1 + (self.weight - 1) * (step / (steps - 1) if steps > 1 else 1.0)

    def __call__(self, logits: Tensor, step: int, steps: int) -> Tensor:
        """(2 B, ...) logits, conditional half first, to (B, ...); (B, ...) stay where guidance is off."""
        if not self.active:
            return logits
        conditional, unconditional = logits.chunk(2)
        w = self.at(step, steps)
        return w * conditional - (w - 1) * unconditional
