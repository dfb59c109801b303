"""Two kinds of heads, two ways to forget: HACK, head-aware cache compression for VAR (2504.09261, AAAI-26).

A *contextual* head's queries all look at the same few tokens (vertical stripes in the attention map); a *structural*
head's look at their own places in every scale (diagonals). The variance of each key's attention over the queries,
summed over the keys, tells them apart; the kind belongs to the model, not to the picture, so it is found once
(`vtc.generators.kv_cache.calibration`). Contextual heads then live with a fraction of what structural ones need.

    contextual   the keys with the most attention, of all scales; at the last step the rest is merged into them
    structural   the first two scales, the newest, and of those between the keys with the most attention

There is no published code. The classes' sizes, the split of the budget, what is merged how, and what happens where the
newest scale alone is over budget are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.policy import Candidates, Heads, KVPolicy, Merged, as_heads, budget_from_ratio
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.kv_cache.storage import gather


@dataclass(frozen=True)
class HACK(KVPolicy):
    """Budgets are means over all heads, in tokens; None: no limit of that kind.

    contextual: the numbers of each layer's contextual heads, from a calibration; the others are structural.
    tokens: what is stored for later steps.
    attention: what a step attends to, its own keys included; the rest is dropped before the attention, which saves
        time too. HACK's published rates are of this kind: 1 - rho of the last step's keys.
    contextual_share: a contextual head's budget over the mean; structural heads get what that leaves, and where it is
        more than all there is, as at small scales, the contextual ones get the rest.
    queries: attention is read from so many of a step's queries, evenly spaced.
    initial: scales at the start that structural heads never drop.
    merge: at the last step contextual heads average what they drop into what they keep.
    """

    contextual: tuple[tuple[int, ...], ...]
    tokens: int | None = None
    attention: int | None = None
    contextual_share: float = 1 / 3
    queries: int = 32
    initial: int = 2
    merge: bool = True

    def __post_init__(self) -> None:
        if self.tokens is None and self.attention is None:
            raise ConfigError("HACK needs a budget: tokens that are stored, or that a step attends to.")
        if not 0 < self.contextual_share <= 1 or self.queries < 1 or self.initial < 0:
            raise ConfigError(f"HACK takes a contextual share up to 1, at least one query, and initial scales from 0, "
                              f"not {self.contextual_share}, {self.queries} and {self.initial}.")

    @classmethod
    def from_ratio(cls, schedule: Schedule, ratio: float, of: Literal["stored", "all"] = "stored",
                   **settings: Any) -> Self:
        """of: "stored" is a budget of what stays, "all" one of what a step attends to, as in the paper's rates."""
        kind = "tokens" if of == "stored" else "attention"
        return cls(**{kind: budget_from_ratio(schedule, ratio, of)} | settings)

    def check(self, schedule: Schedule) -> None:
        if schedule.raster:
            raise ConfigError("HACK tells heads apart by how they see scales, and a raster model has none.")
        if len(self.contextual) != schedule.layers or any(not 0 <= h < schedule.heads for hs in self.contextual
                                                          for h in hs):
            raise ConfigError(f"HACK's heads do not fit {schedule.layers} layers of {schedule.heads} heads: calibrate "
                              "on this model.")
        least = schedule.starts[min(self.initial, schedule.steps)] + 1
        for budget in (self.tokens, self.attention):
            if budget is not None and self.of_kind(budget, False, schedule, schedule.all_tokens) < least:
                raise ConfigError(f"A mean budget of {budget} tokens leaves structural heads no room for the first "
                                  f"{self.initial} scales, {least - 1} tokens.")

    def of_kind(self, mean: int, contextual: bool, schedule: Schedule, seen: int) -> int:
        """A head's budget when the mean over all heads is `mean` and there are `seen` tokens."""
        if seen <= mean:
            return seen
        total = schedule.layers * schedule.heads
        count = sum(map(len, self.contextual))
        of_contextual = max(1, int(self.contextual_share * mean))
        if count in (0, total):
            return mean
        of_structural = int((mean * total - of_contextual * count) / (total - count))
        if of_structural > seen:
            of_contextual, of_structural = (mean * total - seen * (total - count)) // count, seen
        return of_contextual if contextual else of_structural

    def heads(self, schedule: Schedule, layer: int) -> list[Heads]:
        contextual = sorted(self.contextual[layer])
        structural = [h for h in range(schedule.heads) if h not in contextual]
        return [as_heads(kind) for kind in (contextual, structural) if kind]

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        seen = schedule.starts[step + 1]
        contextual = len(self.contextual[layer]) == schedule.heads  # all of this layer's
        return min(self.of_kind(b, contextual, schedule, seen) for b in (self.tokens, self.attention) if b is not None)

    def attended(self, candidates: Candidates) -> Tensor | Merged | None:
        chosen = self._choose(candidates, self.attention)
        if chosen is None or not (candidates.last and self.merge and self._is_contextual(candidates)):
            return chosen
        return merge_into(candidates.k, candidates.v, chosen)

    def stored(self, candidates: Candidates) -> Tensor | None:
        return self._choose(candidates, self.tokens)

    def _choose(self, candidates: Candidates, mean: int | None) -> Tensor | None:
        if mean is None:
            return None
        contextual = self._is_contextual(candidates)
        budget = self.of_kind(mean, contextual, candidates.schedule,
                              candidates.schedule.starts[candidates.step + 1])
        if candidates.count <= budget:
            return None
        scores = candidates.attention(candidates.spaced_queries(self.queries)).sum(2)
        if contextual:
            return candidates.top(scores, budget)
        return structural_choice(candidates, scores, budget, self.initial)

    def _is_contextual(self, candidates: Candidates) -> bool:
        heads = candidates.heads
        first = heads.start if isinstance(heads, slice) else int(heads[0])
        return first in self.contextual[candidates.layer]


def structural_choice(candidates: Candidates, scores: Tensor, budget: int, initial: int) -> Tensor:
    """Indices (B, h, budget): the first `initial` scales, the newest, and the best of those between.

    Where the newest does not fit beside the first, its own best. scores: (B, h, n).
    """
    schedule, step, steps = candidates.schedule, candidates.step, candidates.steps.expand_as(scores)
    first, newest = steps < initial, steps == step
    if schedule.starts[min(initial, step + 1)] + (candidates.new if step >= initial else 0) <= budget:
        return candidates.top(scores, budget, first | newest)
    return candidates.top(scores.masked_fill(~newest, -torch.inf), budget, first)


def merge_into(k: Tensor, v: Tensor, kept: Tensor) -> Merged:
    """Each dropped pair joins the kept one whose key is most like its own; the joined ones are averaged.

    k, v: (B, h, n, D). kept: (B, h, m) indices.
    """
    dropped = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device).scatter(2, kept, False)
    nearest = (k @ gather(k, kept).transpose(2, 3)).argmax(-1)
    weight = dropped.float()[..., None]  # sums of many in float32, whatever the keys are
    into = nearest[..., None].expand_as(k)
    counts = 1 + weight.new_zeros(*kept.shape, 1).scatter_add(2, nearest[..., None], weight)

    def joined(x: Tensor) -> Tensor:
        return (gather(x, kept).float().scatter_add(2, into, x * weight) / counts).to(x.dtype)

    return Merged(joined(k), joined(v))
