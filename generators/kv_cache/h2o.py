"""Heavy hitters: the tokens that attention has dwelt on so far, and the newest. Zhang et al., H2O (2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.policy import Candidates, KVPolicy, check_budget
from vtc.generators.kv_cache.schedule import Schedule


@dataclass(frozen=True)
class H2O(KVPolicy):
    """The score of a token is the attention it has received from all steps since its own.

    tokens: the budget; `recent` of it, a share, for the newest tokens.
    queries: a step's attention is read from so many of its queries, evenly spaced. From all of them, as published, it
        would cost more than the attention itself. decay: old scores are multiplied by it at each step.
    """

    tokens: int
    recent: float = 0.5
    queries: int = 32
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_budget(self.tokens, 1, "the tokens that stay")
        if not (0 <= self.recent <= 1 and self.queries >= 1 and 0 <= self.decay <= 1):
            raise ConfigError(f"H2O takes shares from 0 to 1 and at least one query, not {self}.")

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        return min(self.tokens, schedule.starts[step + 1])

    def stored(self, candidates: Candidates) -> Tensor | None:
        queries = candidates.spaced_queries(self.queries)
        # Each query stands for as many as it was chosen from.
        received = candidates.attention(queries).sum(2) * (candidates.q.shape[2] / len(queries))
        old = 0.0 if candidates.scores is None else candidates.scores * self.decay
        candidates.scores = old + received
        if candidates.count <= self.tokens:
            return None
        newest = candidates.nowhere()
        newest[..., candidates.count - round(self.recent * self.tokens) :] = True
        return candidates.top(candidates.scores, self.tokens, newest)
