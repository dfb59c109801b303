"""What a key-value cache policy is: which tokens a step may see, and which stay for later steps.

A policy is a dataclass of hyper-parameters in a file of its own. It sees one layer's head group at a time, as
`Candidates`, and answers with indices into them; the cache does the rest. docs/adding-a-kv-policy.md goes through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.schedule import Schedule

#: heads of a layer that are kept alike: a slice where they are neighbours, else their numbers
Heads = slice | Tensor


@dataclass
class Candidates:
    """The keys that a head group could attend to at a step: those stored before, then the step's own.

    q: (B, h, m, D) the step's queries, exactly as attention uses them (after norm and rotation).
    k, v: (B, h, n, D).
    tokens: (1 | B, 1 | h, n) int64, the number of each key's token in the schedule.
    new: how many of the n belong to this step; they are the last ones.
    scores: (B, h, n) numbers that the policy has set before and wants to keep beside the keys; None until it does.
        A new token's are 0.
    heads: which heads of the layer these are. batch_halves: average over the two halves of the batch (guidance).
    """

    schedule: Schedule
    layer: int
    step: int
    heads: Heads
    q: Tensor
    k: Tensor
    v: Tensor
    tokens: Tensor
    new: int
    scores: Tensor | None = None
    batch_halves: bool = False

    @property
    def count(self) -> int:
        """Keys, n."""
        return self.k.shape[2]

    @property
    def last(self) -> bool:
        """Whether no later step exists."""
        return self.step == self.schedule.steps - 1

    @property
    def steps(self) -> Tensor:
        """The step of each key, in the shape of `tokens`."""
        return self.schedule.step_of(self.tokens)

    def attention(self, queries: Tensor | None = None) -> Tensor:
        """Softmax attention of some of the step's queries, given by number, or of all: (B, h, len(queries), n) float32.

        Costs memory and time in proportion to the queries: take few.
        """
        q = self.q if queries is None else self.q.index_select(2, queries)
        logits = (q * self.schedule.softmax_scale) @ self.k.transpose(2, 3)
        return logits.float().softmax(-1)

    def spaced_queries(self, count: int) -> Tensor:
        """Numbers of `count` queries, or all there are, spaced evenly over the step's sequence."""
        total = self.q.shape[2]
        return torch.linspace(0, total - 1, min(count, total), device=self.q.device).round().long()

    def centre_queries(self, count: int) -> Tensor:
        """Numbers of the middles of as many patches as a square grid of at most `count` has, over the step's map.

        A map with fewer rows or columns than that grid gives its last `count` queries.
        """
        rows, columns = self.schedule.sizes[self.step]
        grid, total = math.isqrt(count), self.q.shape[2]
        if rows * columns != total or min(rows, columns) < grid:
            return torch.arange(max(0, total - count), total, device=self.q.device)
        y, x = (((torch.arange(grid) + 0.5) * (n / grid) - 0.5).round().long() for n in (rows, columns))
        return (y[:, None] * columns + x).flatten().to(self.q.device)

    def among_new(self, queries: Tensor) -> Tensor:
        """(n,) bool: which keys are the own ones of these queries of the step."""
        mark = torch.zeros(self.count, dtype=torch.bool, device=self.q.device)
        mark[self.count - self.new + queries] = True
        return mark

    def top(self, scores: Tensor, count: int, always: Tensor | None = None) -> Tensor:
        """Indices (B, h, count), ascending, of the largest of the (B, h, n) scores; `always` (bool) come first.

        Where there are no more than `count` keys, all. Raises ConfigError where `always` alone is too many; on a CPU
        alone, for elsewhere the question would wait for the device at every step.
        """
        if self.batch_halves:
            scores = scores.unflatten(0, (2, -1)).mean(0).repeat(2, 1, 1)
        if always is not None:
            if always.device.type == "cpu" and (most := int(always.sum(-1).max())) > count:
                raise ConfigError(f"A budget of {count} tokens cannot hold the {most} that must stay.")
            scores = scores.masked_fill(always, float("inf"))
        return scores.topk(min(count, self.count), dim=-1).indices.sort(-1).values

    def nowhere(self) -> Tensor:
        """(B, h, n) bool, all False: to mark what must stay."""
        return torch.zeros(self.k.shape[:3], dtype=torch.bool, device=self.k.device)


@dataclass(frozen=True)
class Merged:
    """Keys and values that are no selection but made from several: what `attended` may return."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class KVPolicy:
    """Base of all policies. Budgets are tokens per head."""

    #: a policy that never drops a token: memory is then allocated once
    keeps_all: ClassVar[bool] = False

    @classmethod
    def from_ratio(cls, schedule: Schedule, ratio: float, of: Literal["stored", "all"] = "stored",
                   **settings: Any) -> Self:
        """With a budget of `ratio` of a model's tokens (`budget_from_ratio`), and other fields.

        ConfigError where the policy has no budget of tokens.
        """
        if "tokens" not in {f.name for f in fields(cls)}:
            raise ConfigError(f"{cls.__name__} has no budget of tokens that could be a share of them.")
        return cls(**{"tokens": budget_from_ratio(schedule, ratio, of)} | settings)

    def check(self, schedule: Schedule) -> None:
        """Raise ConfigError, saying why, where the policy has no meaning for such a model or does not fit it."""

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        """The most tokens that a head of the layer keeps after the step."""
        return schedule.starts[step + 1]

    def heads(self, schedule: Schedule, layer: int) -> list[Heads]:
        """The head groups of a layer: inside one, all heads keep equally many tokens."""
        return [slice(0, schedule.heads)]

    def attended(self, candidates: Candidates) -> Tensor | Merged | None:
        """Indices of the keys that this step's queries see, (m,) or (B | 1, h | 1, m); None: all."""
        return None

    def stored(self, candidates: Candidates) -> Tensor | None:
        """Indices of the keys that stay for later steps, likewise, of those that were attended; never asked last."""
        return None


def as_heads(numbers: list[int]) -> Heads:
    """Of ascending numbers; of neighbours a slice, which copies nothing (`permute_heads` makes them neighbours)."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers)


def check_budget(tokens: int, least: int, why: str) -> None:
    """Raise ConfigError where a budget has no room for what always stays."""
    if tokens < least:
        raise ConfigError(f"A budget of {tokens} tokens is too small: {why} need {least}.")


def budget_from_ratio(schedule: Schedule, ratio: float, of: Literal["stored", "all"] = "stored") -> int:
    """Tokens that are `ratio` of a model's tokens before the last step ("stored"), or of all.

    Papers mean different things by ten per cent: ScaleKV's is of the stored tokens, HACK's of all keys of a step.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"A budget is a share of the tokens above 0 and up to 1, not {ratio}.")
    total = schedule.stored_tokens if of == "stored" else schedule.all_tokens
    return max(1, round(ratio * total))
