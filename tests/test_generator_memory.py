"""What estimate_memory says beside what torch's allocator counts while the same pictures are drawn on the CPU.

The truth is the allocator's: the most bytes of tensors that were allocated at once during `generate`, whatever made
them, and the weights. Bound: 10 % of it, beside the buffer of a few dozen KiB that the CPU's attention has for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.tiny_generators import SIDES, TINY_GENERATORS, tiny_var
from vtc.errors import ConfigError
from vtc.generators.inference import prepare
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.specs import parse_policy
from vtc.generators.llamagen import LlamaGen
from vtc.generators.memory import LiveBytes, MemoryEstimate, estimate_memory, stand_in
from vtc.generators.pretrained import LoadedGenerator
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.generators.speculative import generate_speculatively
from vtc.generators.var import VAR
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.var_vqvae import VARVQVAE


def allocated(work: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had given out at once during the work, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    now = peak = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def wide_var() -> LoadedGenerator:
    """Wide enough that what is estimated is some MiB."""
    torch.manual_seed(0)
    tokenizer = VARVQVAE(256, 8, 32, (1, 1, 1), 1, SIDES, attention=False, mid_attention=False).eval()
    model = VAR(2, 128, 4, classes=5, codebook_size=256, code_dim=8, sides=SIDES).eval()
    return LoadedGenerator(model, tokenizer, tiny_var().config)


CASES = [("var", "full", 4, None, {}), ("var", "hack:0.6,attention=0.6", 4, None, {}),
         ("var", "h2o:0.5+int8", 6, None, {}), ("var", "heatkv:0.6+bf16", 4, None, {}),
         ("var", "sliding:2", 8, torch.bfloat16, {}), ("var", "adakv:0.7,window=4", 4, None, {"top_p": 0.9}),
         ("var", "snapkv:0.6,window=4+mixed", 4, None, {}), ("infinity", "h2o:0.3", 2, None, {}),
         ("llamagen", "full", 4, None, {}), ("llamagen", "streaming:0.5", 4, None, {}),
         ("llamagen", "h2o:0.5,interval=3", 4, None, {})]


@pytest.mark.parametrize(("kind", "word", "batch", "dtype", "draw"), CASES)
def test_an_estimate_is_within_ten_per_cent_of_the_truth(kind: str, word: str, batch: int, dtype: torch.dtype | None,
                                                         draw: dict[str, Any]) -> None:
    generator = wide_var() if kind == "var" else TINY_GENERATORS[kind]()
    spec, sampling = parse_policy(word), Sampling(**draw) if draw else None
    estimate = estimate_memory(generator, batch, spec, sampling, dtype=dtype, text_tokens=5)
    condition: Any = torch.zeros(batch, dtype=torch.int64)
    if kind == "infinity":
        condition = (torch.randn(batch, 5, 16), torch.ones(batch, 5, dtype=torch.bool))
    if dtype is not None:
        prepare(generator.model, dtype)
    weights = sum(t.nbytes for part in (generator.model, generator.tokenizer, generator.draft) if part is not None
                  for t in part.state_dict().values())
    assert estimate.weights == weights
    schedule = generator.schedule()
    policy = spec.build(schedule, stand_in(schedule))
    cache = KVCache(schedule, *policy)

    def draw_pictures() -> None:
        generator.generate(condition, cache, sampling, generators=seeded(range(batch)))

    truth = allocated(draw_pictures)
    assert estimate.cache == cache.peak_nbytes()
    assert abs(estimate.cache + estimate.activations - truth) <= 0.1 * truth + 2**17
    assert abs(estimate.total - (truth + weights)) <= 0.1 * (truth + weights)


def test_an_estimate_of_speculative_decoding_holds_both_caches() -> None:
    torch.manual_seed(0)
    tokenizer = LocalVQ(512, 8, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), thin=4).eval()
    target, draft = (LlamaGen(depth, 512, 4, 64, classes=5, codebook_size=512, side=8).eval() for depth in (3, 2))
    generator = LoadedGenerator(target, tokenizer, draft=draft)
    full = parse_policy("full")
    estimate = estimate_memory(generator, 1, full, Sampling(), Guidance(2.0), ahead=3)
    plain = estimate_memory(generator, 1, full, Sampling(), Guidance(2.0))
    # 63 tokens, 512 numbers of keys and of values, two layers of the draft, two halves, four bytes
    assert estimate.cache - plain.cache == pytest.approx(63 * 512 * 2 * 2 * 2 * 4, rel=0.01)
    truth = allocated(lambda: generate_speculatively(target, draft, 1, tokenizer, 3, Sampling(), Guidance(2.0),
                                                     torch.Generator().manual_seed(0)))
    assert estimate.cache + estimate.activations == pytest.approx(truth, rel=0.1)


def test_live_bytes_are_those_alive() -> None:
    weight = torch.ones(100)  # from outside: not counted, nor are views of it
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a * 2
        c = weight[10:] if weight.numel() else b
        assert live.now == live.peak == 8000
        del b
        assert (live.now, live.peak) == (4000, 8000)
        d = a.view(10, 100)
        del a
        assert live.now == 4000
        del d
        assert (live.now, len(c)) == (0, 90)
    assert live.peak == 8000


def test_an_estimate_needs_neither_weights_nor_a_calibration() -> None:
    generator = tiny_var()
    small, large = (estimate_memory(generator, n, parse_policy("scalekv:0.6,window=4"), guidance=Guidance(1.0))
                    for n in (1, 4))
    assert large.weights == small.weights
    assert large.cache == 4 * small.cache
    assert str(MemoryEstimate(2**20, 2**19, 0)) == ("weights 1.0 MiB, cache 0.5 MiB, activations 0.0 MiB, "
                                                    "total 1.5 MiB")
    with pytest.raises(ConfigError, match="raster model has none"):
        estimate_memory(TINY_GENERATORS["llamagen"](), 1, parse_policy("heatkv:0.5"))
