"""Whole scales, head by head: HeatKV (2605.14877).

A calibration says how much attention each head pays to each earlier scale. At every step the heads that care least for
a scale lose their keys of it, as many heads as bring the mean within the budget. Nothing is scored at run time, and
what stays is made of whole scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.policy import Candidates, Heads, KVPolicy
from vtc.generators.kv_cache.schedule import Schedule


@dataclass(frozen=True)
class HeatKV(KVPolicy):
    """Budget: `tokens` per head, the mean over all layers and heads after each step.

    attention: (layer, head, scale) the mean attention that the head pays to the scale, from a calibration.
    protected: scales at the start that nobody loses.
    """

    attention: tuple[tuple[tuple[float, ...], ...], ...]
    tokens: int
    protected: int = 3

    def __post_init__(self) -> None:
        if self.protected < 0:
            raise ConfigError(f"HeatKV protects a number of scales from 0 up, not {self.protected}.")

    @cached_property
    def ranks(self) -> Tensor:
        """(layers, heads, scales) int64: for each scale, how many heads care less for it."""
        scores = torch.tensor(self.attention, dtype=torch.float64)
        return scores.flatten(0, 1).argsort(dim=0, stable=True).argsort(0).view_as(scores)

    def check(self, schedule: Schedule) -> None:
        if schedule.raster:
            raise ConfigError("HeatKV drops whole scales, and a raster model has none.")
        shape = (schedule.layers, schedule.heads, schedule.steps)
        if tuple(self.ranks.shape) != shape:
            raise ConfigError(f"HeatKV's calibration is of {tuple(self.ranks.shape)} layers, heads and scales, and the "
                              f"model has {shape}: calibrate on this model.")
        if self.tokens < (least := schedule.starts[min(self.protected, schedule.steps)]):
            raise ConfigError(f"A budget of {self.tokens} tokens is too small: the first {self.protected} scales have "
                              f"{least}.")

    def losers(self, schedule: Schedule, step: int) -> int:
        """How many heads lose each unprotected scale after the step."""
        seen, safe = schedule.starts[step + 1], schedule.starts[min(self.protected, step + 1)]
        if seen <= self.tokens:
            return 0
        return min(schedule.layers * schedule.heads,
                   math.ceil(schedule.layers * schedule.heads * (seen - self.tokens) / (seen - safe)))

    def heads(self, schedule: Schedule, layer: int) -> list[Heads]:
        return [slice(head, head + 1) for head in range(schedule.heads)]

    def stored(self, candidates: Candidates) -> Tensor | None:
        step, heads = candidates.step, candidates.heads
        assert isinstance(heads, slice)
        kept = self.ranks[candidates.layer, heads.start] >= self.losers(candidates.schedule, step)
        kept[: self.protected] = True
        if kept[: step + 1].all():
            return None
        return kept.to(candidates.k.device)[candidates.steps[0, 0]].nonzero()[:, 0]
