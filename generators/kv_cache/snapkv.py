"""The tokens that a window of recent queries attends to, in one budget or one a layer: SnapKV and PyramidKV."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.policy import Candidates, KVPolicy, check_budget
from vtc.generators.kv_cache.schedule import Schedule


@dataclass(frozen=True)
class SnapKV(KVPolicy):
    """Li et al. (2404.14469), with the window spread over the map: the middles of its patches, not the last queries.

    tokens: the budget, window included. window: queries that judge, whose own keys always stay.
    pool: scores are averaged over so many neighbours along the sequence.
    """

    tokens: int
    window: int = 16
    pool: int = 5

    def __post_init__(self) -> None:
        check_budget(self.tokens, self.window, "the keys of the window")
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise ConfigError(f"A window has at least one query and a pool is odd, not {self}.")

    def layer_tokens(self, schedule: Schedule, layer: int) -> int:
        """The budget of a layer."""
        return self.tokens

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        return min(self.layer_tokens(schedule, layer), schedule.starts[step + 1])

    def stored(self, candidates: Candidates) -> Tensor | None:
        budget = self.layer_tokens(candidates.schedule, candidates.layer)
        if candidates.count <= budget:
            return None
        window = candidates.centre_queries(self.window)
        received = candidates.attention(window).mean(2)
        pooled = F.avg_pool1d(received, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False)
        return candidates.top(pooled, budget, candidates.among_new(window).expand_as(pooled))


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly from the first layer to the last. Cai et al. (2406.02069).

    tokens: the mean over the layers; where that is all there is to store, no layer drops any.
    beta: the last layer gets the window and (tokens - window) / beta more.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.beta < math.inf:
            raise ConfigError(f"PyramidKV's beta is a number from 1 up, not {self.beta}.")

    def layer_tokens(self, schedule: Schedule, layer: int) -> int:
        if self.tokens >= schedule.stored_tokens:
            return self.tokens
        free = self.tokens - self.window
        least = free / self.beta
        most = 2 * free - least
        place = layer / (schedule.layers - 1) if schedule.layers > 1 else 0.5
        return self.window + int(most - (most - least) * place)
