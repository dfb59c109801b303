"""The first and the newest scales, or the first and the newest tokens: policies that look at no key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.policy import Candidates, KVPolicy, check_budget
from vtc.generators.kv_cache.schedule import Schedule


@dataclass(frozen=True)
class SlidingScales(KVPolicy):
    """The newest `recent` scales stay, and the first `condensed` ones (AMS-KV's two kinds, 2511.16047)."""

    recent: int = 2
    condensed: int = 0

    def __post_init__(self) -> None:
        if self.recent < 1 or self.condensed < 0:
            raise ConfigError(f"SlidingScales keeps at least the newest scale, not {self}.")

    def check(self, schedule: Schedule) -> None:
        if schedule.raster:
            raise ConfigError("SlidingScales keeps whole scales, and a raster model has none: take StreamingLLM.")

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        first = max(0, step + 1 - self.recent)
        return schedule.starts[step + 1] - schedule.starts[first] + schedule.starts[min(first, self.condensed)]

    def stored(self, candidates: Candidates) -> Tensor | None:
        steps = candidates.steps[0, 0]
        return ((steps < self.condensed) | (steps > candidates.step - self.recent)).nonzero()[:, 0]


@dataclass(frozen=True)
class StreamingLLM(KVPolicy):
    """The first `sinks` tokens and the newest ones, `tokens` in all. Xiao et al. (2309.17453)."""

    tokens: int
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ConfigError(f"StreamingLLM keeps a number of sinks from 0 up, not {self.sinks}.")
        check_budget(self.tokens, self.sinks + 1, f"{self.sinks} sinks and the newest token")

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        return min(self.tokens, schedule.starts[step + 1])

    def stored(self, candidates: Candidates) -> Tensor | None:
        if candidates.count <= self.tokens:
            return None
        places = torch.arange(candidates.count, device=candidates.k.device)
        return torch.cat([places[: self.sinks], places[candidates.count - (self.tokens - self.sinks) :]])
