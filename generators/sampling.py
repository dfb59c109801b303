"""From logits to tokens: guidance, temperature, top-k, top-p, and seeds that do not depend on the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.errors import ConfigError, ModelError

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
        if not (0 < self.temperature < math.inf and self.top_k >= 0 and self.top_k == int(self.top_k)
                and 0 <= self.top_p <= 1):
            raise ConfigError(f"Sampling takes a temperature above 0, a whole top_k from 0 and a top_p from 0 to 1, "
                              f"not {self}.")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) logits to the distribution that is drawn from, float32. ModelError where a logit is no number."""
        logits = _numbers(logits).float()
        if self.temperature != 1:  # the best word's logit first set to 0, which no temperature makes infinite
            logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)
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
        ModelError where a logit is no number.
        """
        if self.top_k == 1:
            return _numbers(logits).argmax(-1)
        p = self.probabilities(logits)
        if generators is None or isinstance(generators, torch.Generator):
            return _draw(p, generators)
        if len(generators) != len(p):
            raise ConfigError(f"{len(generators)} random generators do not fit a batch of {len(p)}.")
        return torch.stack([_draw(row, generator) for row, generator in zip(p, generators, strict=True)])


def _numbers(logits: Tensor) -> Tensor:
    """The logits themselves. ModelError for NaN and the like, over which a GPU's draw would end the process.

    Single words of -inf are forbidden words and fine.
    """
    if not logits.is_meta and not logits.amax(-1).isfinite().all():
        raise ModelError("The model's logits are not numbers: its weights are damaged, or too large for this type.")
    return logits


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    rows = p.reshape(-1, p.shape[-1])
    return torch.multinomial(rows, 1, replacement=True, generator=generator).view(p.shape[:-1])


def seeded(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """A random generator for each image."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ConfigError unless labels are (B,) whole numbers of classes, or the number that means none."""
    if (labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.min() < 0
            or labels.max() > classes):
        raise ConfigError(f"Labels are (B,) numbers from 0 to {classes - 1} ({classes}: no class).")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = unconditional + w * (conditional - unconditional).

    weight: w at the last step; 1 is no guidance, and then only the conditional half runs.
    ramp: w grows linearly from 1 at the first step, as VAR's, whose `cfg` is weight - 1; else it is constant.
    weights: w at each step, scale or raster token, in place of both.
    layer: 0 guides the logits; -i the output of the i-th block from the end, after which the conditional half goes on
        alone (Infinity's `cfg_insertion_layer`, and its alone).
    """

    weight: float = 1.0
    ramp: bool = False
    weights: tuple[float, ...] = ()
    layer: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))  # JSON knows no tuples
        if not all(math.isfinite(w) for w in (self.weight, *self.weights)):
            raise ConfigError(f"A weight of guidance is a finite number, not {self.weights or self.weight}.")
        if self.layer > 0:
            raise ConfigError(f"Guidance is at the logits, 0, or at a block from the end, -1 ..., not {self.layer}.")

    @property
    def active(self) -> bool:
        """Whether an unconditional half is needed."""
        return any(w != 1 for w in self.weights or (self.weight,))

    def at(self, step: int, steps: int) -> float:
        """w at a step. ConfigError where there are not as many weights as steps."""
        if self.weights:
            if len(self.weights) != steps:
                raise ConfigError(f"{len(self.weights)} weights of guidance do not fit {steps} steps.")
            return self.weights[step]
        if not self.ramp:
            return self.weight
        return 1 + (self.weight - 1) * (step / (steps - 1) if steps > 1 else 1.0)

    def __call__(self, logits: Tensor, step: int, steps: int) -> Tensor:
        """(2 B, ...) logits, conditional half first, to (B, ...); (B, ...) stay where guidance is off."""
        if not self.active:
            return logits
        conditional, unconditional = logits.chunk(2)
        w = self.at(step, steps)
        if self.layer:
            return conditional  # both halves have been guided within
        return w * conditional - (w - 1) * unconditional

    def within(self, x: Tensor, layer: int, layers: int, step: int, steps: int) -> Tensor:
        """(2 B, n, C) after block number `layer` of `layers`, guided there if that is the one; else as it came."""
        if not self.active or layer - layers != self.layer:
            return x
        conditional, unconditional = x.chunk(2)
        w = self.at(step, steps)
        return x if w == 1 else (w * conditional - (w - 1) * unconditional).repeat(2, 1, 1)

    def check_at_logits(self) -> None:
        """Raise ConfigError where guidance is within: for models that know it at the logits alone."""
        if self.layer:
            raise ConfigError("Guidance at a block is Infinity's; this model is guided at the logits, layer 0.")
