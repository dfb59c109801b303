"""Policies made of policies: another one for each layer, another budget for each head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.policy import Candidates, Heads, KVPolicy, Merged
from vtc.generators.kv_cache.schedule import Schedule


@dataclass(frozen=True)
class PerLayer(KVPolicy):
    """policies: one for each layer."""

    policies: tuple[KVPolicy, ...]

    def check(self, schedule: Schedule) -> None:
        if len(self.policies) != schedule.layers:
            raise ConfigError(f"{len(self.policies)} policies do not fit {schedule.layers} layers.")
        for policy in self.policies:
            policy.check(schedule)

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        return self.policies[layer].budget(schedule, layer, step)

    def heads(self, schedule: Schedule, layer: int) -> list[Heads]:
        return self.policies[layer].heads(schedule, layer)

    def attended(self, candidates: Candidates) -> Tensor | Merged | None:
        return self.policies[candidates.layer].attended(candidates)

    def stored(self, candidates: Candidates) -> Tensor | None:
        return self.policies[candidates.layer].stored(candidates)


@dataclass(frozen=True)
class AdaptiveHeads(KVPolicy):
    """One policy with budgets that differ by head: heads that spread their attention get more.

    policy: one with a budget `tokens` and one group of heads (H2O, SnapKV, StreamingLLM).
    tokens: for each layer and head, as `head_budgets` gives them; heads of equal budgets are one group.
    """

    policy: KVPolicy
    tokens: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not hasattr(self.policy, "tokens"):
            raise ConfigError(f"{type(self.policy).__name__} has no budget of tokens that heads could differ in.")
        for budget in {b for layer in self.tokens for b in layer}:
            self._with(budget)  # a budget that is too small says so here

    def _with(self, tokens: int) -> KVPolicy:
        return replace(cast(Any, self.policy), tokens=tokens)

    def check(self, schedule: Schedule) -> None:
        if len(self.tokens) != schedule.layers or any(len(layer) != schedule.heads for layer in self.tokens):
            raise ConfigError(f"Budgets for {len(self.tokens)} layers do not fit {schedule.layers} layers of "
                              f"{schedule.heads} heads.")
        self.policy.check(schedule)
        if len(self.policy.heads(schedule, 0)) != 1:
            raise ConfigError(f"{type(self.policy).__name__} has groups of heads of its own, so their budgets are not "
                              "adapted to heads.")

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        return max(self._with(b).budget(schedule, layer, step) for b in set(self.tokens[layer]))

    def heads(self, schedule: Schedule, layer: int) -> list[Heads]:
        budgets = torch.tensor(self.tokens[layer])
        return [(budgets == b).nonzero()[:, 0] for b in sorted(set(self.tokens[layer]))]

    def stored(self, candidates: Candidates) -> Tensor | None:
        heads = candidates.heads
        first = heads.start if isinstance(heads, slice) else int(heads[0])
        return self._with(self.tokens[candidates.layer][first]).stored(candidates)


def head_budgets(need: Tensor, tokens: int, least: int, groups: int = 4) -> tuple[tuple[int, ...], ...]:
    """Budgets for (layers, heads) needs, in at most `groups` sizes a layer, `tokens` on average over all heads or less.

    need: any number above 0 that says how much a head should get, such as HACK's variance of a calibration. A budget is
    `least` and a share of the rest in proportion to the mean need of the head's group; the groups of a layer are its
    heads in order of need, cut into equal parts.
    """
    if need.ndim != 2 or not (need > 0).all() or groups < 1 or tokens < least:
        raise ConfigError("Head budgets need positive (layers, heads) needs, at least one group, and a mean of at "
                          f"least {least} tokens, not {tokens}.")
    ranks = need.argsort(1).argsort(1)
    group = ranks * groups // need.shape[1]
    levels = torch.stack([torch.stack([row[g == i].mean() if (g == i).any() else row.mean() for i in range(groups)])
                          for row, g in zip(need.double(), group, strict=True)])
    shares = levels.gather(1, group)
    return tuple(tuple(row) for row in (least + (tokens - least) * shares / shares.mean()).int().tolist())
