"""Layers that draft and layers that refine: ScaleKV (2505.19602, NeurIPS 2025).

At each scale a layer is a *drafter*, which looks far and wide and keeps everything, or a *refiner*, which looks at its
own map and at few tokens before it, and keeps what balances the mean. The kind comes from the attention selectivity
index of a calibration. What stays is chosen by a window: the middles of the patches of a 4 x 4 grid over the map.

`compat="upstream"` scores as the released code does: raw products without softmax, maximum over neighbours in the
flattened sequence across rows and scales, windows off centre. The default scores by attention and averages over
neighbours on the map. One fault of the released code is out of a cache's reach: the queries it scores with lack bias,
norm, and rotation, while the keys have them. Here queries are those of the attention, in both forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.policy import Candidates, KVPolicy, check_budget
from vtc.generators.kv_cache.schedule import Schedule


@dataclass(frozen=True)
class ScaleKV(KVPolicy):
    """Budgets in tokens per head and layer.

    drafters: for each scale the numbers of the layers that draft, from a calibration.
    tokens: the mean over the layers, kept at every scale.
    refiner_start, refiner_step: None: refiners get what drafters that keep everything leave. Else the paper's line:
        refiner_start - refiner_step * k after scale k (from 0), and the drafters what that leaves.
    window: queries that judge, whose own keys always stay. pool: side of the neighbourhood that scores are pooled over.
    refiner_share: of what the mean budget has beyond the window, the least that refiners get before drafters keep
        everything. The released budgets go down to 0.29; without a least, a drafter among few layers leaves the others
        nothing but their windows.
    """

    drafters: tuple[tuple[int, ...], ...]
    tokens: int
    refiner_start: int | None = None
    refiner_step: int = 0
    window: int = 16
    pool: int = 5
    compat: Literal["upstream"] | None = None
    refiner_share: float = 0.25

    def __post_init__(self) -> None:
        check_budget(self.tokens, self.window, "the keys of the window")
        if not 0 <= self.refiner_share <= 1:
            raise ConfigError(f"ScaleKV's refiner share is from 0 to 1, not {self.refiner_share}.")
        if self.pool < 1 or self.pool % 2 == 0 or self.window < 1 or self.compat not in (None, "upstream"):
            raise ConfigError(f'ScaleKV takes an odd pool, a window and compat None or "upstream", not {self}.')

    def check(self, schedule: Schedule) -> None:
        if schedule.raster:
            raise ConfigError("ScaleKV tells layers apart by how they see scales, and a raster model has none.")
        if len(self.drafters) != schedule.steps or any(not 0 <= layer < schedule.layers for layers in self.drafters
                                                       for layer in layers):
            raise ConfigError(f"ScaleKV's drafters do not fit {schedule.steps} scales and {schedule.layers} layers: "
                              "calibrate on this model.")

    def budgets(self, schedule: Schedule, step: int) -> tuple[int, int]:
        """(a drafter's, a refiner's) tokens after a scale; their mean over the layers is at most `tokens`."""
        seen, layers, count = schedule.starts[step + 1], schedule.layers, len(self.drafters[step])
        if seen <= self.tokens or count == 0:
            return min(seen, self.tokens), min(seen, self.tokens)
        if count == layers:
            return self.tokens, self.tokens
        if self.refiner_start is None:
            least = 0 if self.compat else self.window + int(self.refiner_share * (self.tokens - self.window))
            refiner = max((self.tokens * layers - count * seen) // (layers - count), least)
        else:
            refiner = self.refiner_start - self.refiner_step * step
        refiner = min(max(refiner, self.window), self.tokens)
        return min(seen, (self.tokens * layers - (layers - count) * refiner) // count), refiner

    def budget(self, schedule: Schedule, layer: int, step: int) -> int:
        drafter, refiner = self.budgets(schedule, step)
        return drafter if layer in self.drafters[step] else refiner

    def stored(self, candidates: Candidates) -> Tensor | None:
        budget = self.budget(candidates.schedule, candidates.layer, candidates.step)
        if candidates.count <= budget:
            return None
        if self.compat == "upstream":
            window = upstream_window(candidates.new, candidates.count, self.window).to(candidates.k.device)
            return upstream_selection(candidates.q, candidates.k, window, budget, self.pool)
        window = candidates.centre_queries(self.window)
        scores = pooled_on_maps(candidates, candidates.attention(window).sum(2), self.pool)
        return candidates.top(scores, budget, candidates.among_new(window).expand_as(scores))


def pooled_on_maps(candidates: Candidates, scores: Tensor, side: int) -> Tensor:
    """(B, h, n) scores averaged over the side x side neighbours on each one's own map that are there.

    Neighbours are those of the picture: rows do not run into one another, nor scales.
    """
    schedule, seen = candidates.schedule, candidates.schedule.starts[candidates.step + 1]
    at = candidates.tokens.expand_as(scores)
    dense = torch.stack([scores.new_zeros(*scores.shape[:2], seen).scatter(2, at, scores),
                         scores.new_zeros(*scores.shape[:2], seen).scatter(2, at, 1.0)])
    pooled = [F.avg_pool2d(part.flatten(0, 1).unflatten(2, size), side, 1, side // 2).flatten(2) for part, size in
              zip(dense.split([h * w for h, w in schedule.sizes[: candidates.step + 1]], 3),
                  schedule.sizes[: candidates.step + 1], strict=True)]
    total, count = torch.cat(pooled, 2).unflatten(0, (2, -1)).gather(3, at.expand(2, *at.shape))
    return total / count


def upstream_window(tokens: int, keys: int, window: int) -> Tensor:
    """Numbers, among all `keys`, of the window's: the upper left middles of patches of whole cells.

    tokens: of the current scale, the last of the keys, whose map the released code takes for a square. Where it cannot
    be one, or the window is none, or the map is smaller than the window's grid, the most recent keys are the window.
    """
    side, grid = math.isqrt(tokens), math.isqrt(window)
    if side * side != tokens or grid * grid != window or side < grid:
        return torch.arange(max(0, keys - window), keys)
    at = torch.arange(grid) * (side // grid) + (side // grid - 1) // 2
    return (at[:, None] * side + at).flatten() + keys - tokens


def upstream_selection(q: Tensor, k: Tensor, window: Tensor, budget: int, pool: int,
                       pooling: Literal["max", "average"] = "max") -> Tensor:
    """The released `update_kv`: indices (B, h, budget), ascending, of (B, h, n, D) keys, the last m of them q's own.

    window: of `upstream_window`, which stays; for one of its keys that is older than the queries the first query
    stands in. The products' sum is pooled along the sequence, and the window's own keys count as minus infinity, which
    average pooling spreads to their neighbours. A budget below the window, where upstream ends in an error, is refused.
    """
    if budget < len(window):
        raise ConfigError(f"A budget of {budget} tokens cannot hold the {len(window)} of the window.")
    queries = (window - (k.shape[2] - q.shape[2])).clamp(min=0)
    scores = (q[:, :, queries] @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).sum(2)
    scores[:, :, window] = -torch.inf
    pools = F.max_pool1d if pooling == "max" else F.avg_pool1d
    scores = pools(scores, pool, 1, pool // 2)
    scores[:, :, window] = -torch.inf
    best = scores.topk(min(budget, k.shape[2]) - len(window), dim=-1).indices
    return torch.cat([best, window.expand(*best.shape[:2], -1)], -1).sort(-1).values
