"""Tiny generators with random weights for the cache's tests, and every policy there is, ready for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.generators.inference import prepare
from vtc.generators.infinity import Infinity
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.full import Full
from vtc.generators.kv_cache.h2o import H2O
from vtc.generators.kv_cache.hack import HACK
from vtc.generators.kv_cache.heatkv import HeatKV
from vtc.generators.kv_cache.policy import KVPolicy
from vtc.generators.kv_cache.scalekv import ScaleKV
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.kv_cache.sliding import SlidingScales, StreamingLLM
from vtc.generators.kv_cache.snapkv import PyramidKV, SnapKV
from vtc.generators.kv_cache.wrappers import AdaptiveHeads, AtIntervals, PerLayer, head_budgets
from vtc.generators.llamagen import LlamaGen
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.var import VAR

SIDES = (1, 2, 3, 4, 6)


@dataclass
class Tiny:
    """A model, its schedule, and `run(cache)` -> (logits of all tokens, with everything else fixed)."""

    schedule: Schedule
    run: Callable[[KVCache], Tensor]


def _louder(model: Any) -> Any:
    """Random weights large enough that attention is far from uniform, so that what is dropped matters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "log_scale" not in name:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    return model.eval()


def prepared_var(dtype: torch.dtype) -> Tiny:
    """`tiny_var`, prepared for generation in another type."""
    return tiny_var(lambda model: prepare(model, dtype))


def tiny_var(finish: Callable[[VAR], VAR] = lambda model: model) -> Tiny:
    torch.manual_seed(0)
    model = finish(_louder(VAR(3, 32, 4, classes=5, codebook_size=16, code_dim=8, sides=SIDES)))
    labels = torch.tensor([1, 2, 5, 5])
    codes = [None, *(torch.randn(2, s * s, 8).repeat(2, 1, 1) for s in SIDES[1:])]

    def run(cache: KVCache) -> Tensor:
        with torch.no_grad():
            modulation = model.modulation(labels)
            return torch.cat([model.step(c, labels, modulation, cache, i) for i, c in enumerate(codes)], 1)

    return Tiny(model.schedule(), run)


def tiny_infinity() -> Tiny:
    torch.manual_seed(0)
    from vtc.tokenizers.infinity_vae import InfinityVAE

    model = _louder(Infinity(2, 32, 4, bits=4, text_width=16, text_tokens=6, pool_heads=2, chunks=1))
    tokenizer = InfinityVAE(4, 32, (1, 1), 1, sides=SIDES).eval()
    text, mask = torch.randn(1, 3, 16), torch.ones(1, 3, dtype=torch.bool)
    scales = tuple((s, s) for s in SIDES)
    bits = torch.randint(2, (1, sum(s * s for s in SIDES), 4))

    def run(cache: KVCache) -> Tensor:
        heard: list[Tensor] = []
        model.generate(text, mask, tokenizer, scales, Sampling(top_k=1), Guidance(2.0), cache,
                       given=(bits, torch.ones(bits.shape[:2], dtype=torch.bool)),
                       callback=lambda s: heard.append(s.logits.flatten(2)))
        return torch.cat(heard, 1)

    return Tiny(model.schedule(scales), run)


def tiny_llamagen() -> Tiny:
    torch.manual_seed(0)
    model = _louder(LlamaGen(2, 32, 4, 32, classes=5, codebook_size=16, side=6))
    x = torch.randn(2, 36, 32)

    def run(cache: KVCache) -> Tensor:
        positions = model.positions()
        with torch.no_grad():
            return torch.cat([model.extend(x[:, i : i + 1], cache, i, positions) for i in range(36)], 1)

    return Tiny(model.schedule(), run)


MODELS: dict[str, Callable[[], Tiny]] = {"var": tiny_var, "infinity": tiny_infinity, "llamagen": tiny_llamagen}


def _contextual(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    return tuple((layer % 2, 2) for layer in range(schedule.layers))


def _heat(schedule: Schedule) -> tuple[tuple[tuple[float, ...], ...], ...]:
    values = torch.rand(schedule.layers, schedule.heads, schedule.steps, generator=torch.Generator().manual_seed(0))
    return tuple(tuple(tuple(row) for row in layer) for layer in values.tolist())


def _drafters(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    return tuple((0,) if step % 2 else () for step in range(schedule.steps))


def _needs(schedule: Schedule) -> Tensor:
    return torch.rand(schedule.layers, schedule.heads, generator=torch.Generator().manual_seed(1)) + 0.1


def _head_budgets(schedule: Schedule, tokens: int) -> tuple[tuple[int, ...], ...]:
    return head_budgets(_needs(schedule), tokens, 5, 2, schedule.stored_tokens)


#: name -> a policy with a budget of so many tokens (a mean, where heads differ)
POLICIES: dict[str, Callable[[Schedule, int], KVPolicy]] = {
    "full": lambda s, b: Full(),
    "sliding": lambda s, b: SlidingScales(2 if b < s.stored_tokens else s.steps, 1),
    "streaming": lambda s, b: StreamingLLM(b, 4),
    "h2o": lambda s, b: H2O(b, queries=8),
    "snapkv": lambda s, b: SnapKV(b, window=4),
    "pyramidkv": lambda s, b: PyramidKV(b, window=4),
    "hack": lambda s, b: HACK(_contextual(s), tokens=b, contextual_share=0.5),
    "hack-attention": lambda s, b: HACK(_contextual(s), attention=b if b < s.stored_tokens else s.all_tokens,
                                        contextual_share=0.5),
    "hack-both": lambda s, b: HACK(_contextual(s), tokens=b, attention=b + 8 if b < s.stored_tokens else s.all_tokens,
                                   contextual_share=0.5),
    "scalekv": lambda s, b: ScaleKV(_drafters(s), b, window=4),
    "scalekv-line": lambda s, b: ScaleKV(_drafters(s), b, b, 1, window=4),
    "scalekv-upstream": lambda s, b: ScaleKV(_drafters(s), b, window=4, compat="upstream"),
    "heatkv": lambda s, b: HeatKV(_heat(s), b, protected=2),
    "per-layer": lambda s, b: PerLayer((StreamingLLM(b, 4), *(H2O(b, queries=8) for _ in range(s.layers - 1)))),
    "per-layer-ratios": lambda s, b: PerLayer.from_ratios(SnapKV, s, [b / s.stored_tokens] * s.layers, window=4),
    "adaptive": lambda s, b: AdaptiveHeads(SnapKV(b, window=4), _head_budgets(s, b)),
    "composed": lambda s, b: PerLayer((AdaptiveHeads(H2O(b, queries=8), _head_budgets(s, b)),
                                       *(StreamingLLM(b, 4) for _ in range(s.layers - 1)))),
    "intervals": lambda s, b: AtIntervals(H2O(b - 3 if b < s.stored_tokens else b), 4),
}
#: these need scales
PYRAMIDS_ONLY = ("sliding", "hack", "hack-attention", "hack-both", "scalekv", "scalekv-line", "scalekv-upstream",
                 "heatkv")
#: and these single tokens
RASTER_ONLY = ("intervals",)
#: every model with every policy that has a meaning for it
PAIRS = [(model, policy) for model in MODELS for policy in POLICIES
         if policy not in (PYRAMIDS_ONLY if model == "llamagen" else RASTER_ONLY)]
