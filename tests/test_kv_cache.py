"""Every policy over every model: budgets, duplicates, bytes, nothing lost at full budget; and the references."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fixtures import Fixture
from tests.kv_models import MODELS, PAIRS, POLICIES, PYRAMIDS_ONLY, RASTER_ONLY, Tiny, prepared_var
from tests.shared import needs_shared
from vtc.errors import ConfigError, FileError, ModelError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.calibration import Calibration, Recorder
from vtc.generators.kv_cache.full import Full
from vtc.generators.kv_cache.h2o import H2O
from vtc.generators.kv_cache.hack import HACK, merge_into, structural_choice
from vtc.generators.kv_cache.heatkv import HeatKV
from vtc.generators.kv_cache.policy import Candidates, budget_from_ratio
from vtc.generators.kv_cache.scalekv import ScaleKV, pooled_on_maps, upstream_selection, upstream_window
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.kv_cache.sliding import SlidingScales, StreamingLLM
from vtc.generators.kv_cache.snapkv import PyramidKV, SnapKV
from vtc.generators.kv_cache.storage import MixedBuffer, MixedPrecision, TokenBuffer
from vtc.generators.kv_cache.wrappers import AdaptiveHeads, AtIntervals, PerLayer, head_budgets


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tiny]:
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def full_logits(tiny: dict[str, Tiny]) -> dict[str, Tensor]:
    return {name: model.run(KVCache(model.schedule)) for name, model in tiny.items()}


def watched(cache: KVCache) -> list[tuple[int, int, list[int]]]:
    """Makes the cache tell (layer, step, tokens of each head) after each call; no head may have a token twice."""
    heard: list[tuple[int, int, list[int]]] = []
    attend = cache.attend

    def listening(q: Tensor, k: Tensor, v: Tensor, layer: int, step: int) -> Tensor:
        out = attend(q, k, v, layer, step)
        for group in cache.groups[layer]:
            if group.tokens is not None:
                assert group.tokens.shape[-1] == group.k.length == group.v.length
                assert (group.tokens.diff(dim=-1) > 0).all()  # ascending, so no duplicates
                assert group.tokens.max() < cache.schedule.starts[step + 1]
        heard.append((layer, step, cache.kept(layer)))
        if not (cache.schedule.raster or cache.policy.keeps_all or cache.storage):  # nothing is allocated beyond need
            numbers = sum(k for i in range(cache.schedule.layers) for k in cache.kept(i)) * k.shape[0] * k.shape[3]
            assert cache.nbytes() == 2 * numbers * k.element_size()
        assert cache.peak_nbytes() >= cache.nbytes()
        return out

    cache.attend = listening  # type: ignore[method-assign]
    return heard


cases = pytest.mark.parametrize(("model", "policy"), PAIRS)


@cases
@pytest.mark.parametrize("halves", [False, True])
def test_no_head_ever_keeps_more_than_its_budget(model: str, policy: str, halves: bool, tiny: dict[str, Tiny],
                                                 full_logits: dict[str, Tensor]) -> None:
    schedule = tiny[model].schedule
    mean = 15
    cache = KVCache(schedule, POLICIES[policy](schedule, mean), batch_halves=halves)
    heard = watched(cache)
    logits = tiny[model].run(cache)
    assert len(heard) == schedule.steps * schedule.layers
    for layer, step, kept in heard:
        if step < schedule.steps - 1:
            assert max(kept) <= cache.policy.budget(schedule, layer, step)
    if policy != "full":
        assert sum(sum(cache.kept(i)) for i in range(schedule.layers)) < schedule.stored_tokens * schedule.layers * 4
        assert not torch.allclose(logits, full_logits[model], atol=1e-3)  # what was dropped mattered
    if policy not in ("full", "sliding"):
        for step in range(schedule.steps - 1):
            kept_at = [k for layer, s, kept in heard if s == step for k in kept]
            assert sum(kept_at) / len(kept_at) <= (mean + 8 if policy == "hack-attention" else mean)
    width = schedule.head_dim * 4 * logits.shape[0] * (1 if model == "llamagen" else 2 if model == "infinity" else 1)
    needed = sum(2 * width * k for i in range(schedule.layers) for k in cache.kept(i))
    assert needed <= cache.nbytes() <= needed * (1.5 if policy == "intervals" else 1)
    if halves and policy not in ("full", "sliding", "streaming", "heatkv", "per-layer", "composed", "scalekv-upstream"):
        tokens = cache.groups[-1][0].tokens
        assert tokens is not None
        assert torch.equal(*tokens.chunk(2)) or tokens.shape[0] == 1


@cases
def test_a_budget_of_everything_changes_nothing(model: str, policy: str, tiny: dict[str, Tiny],
                                                full_logits: dict[str, Tensor]) -> None:
    schedule = tiny[model].schedule
    cache = KVCache(schedule, POLICIES[policy](schedule, schedule.stored_tokens))
    torch.testing.assert_close(tiny[model].run(cache), full_logits[model], rtol=1e-5, atol=1e-5)
    assert cache.kept(0) == [schedule.stored_tokens] * 4


@pytest.mark.parametrize("policy", PYRAMIDS_ONLY)
def test_policies_of_scales_refuse_a_raster_model_and_say_why(policy: str, tiny: dict[str, Tiny]) -> None:
    with pytest.raises(ConfigError, match="raster model has none"):
        KVCache(tiny["llamagen"].schedule, POLICIES[policy](tiny["var"].schedule, 15))


@pytest.mark.parametrize("policy", RASTER_ONLY)
@pytest.mark.parametrize("model", ["var", "infinity"])
def test_policies_of_single_tokens_refuse_scales_and_say_why(model: str, policy: str, tiny: dict[str, Tiny]) -> None:
    with pytest.raises(ConfigError, match="draws whole scales at once"):
        KVCache(tiny[model].schedule, POLICIES[policy](tiny[model].schedule, 15))


@pytest.fixture(scope="module")
def plainly(tiny: dict[str, Tiny]) -> Callable[[str, str], tuple[KVCache, Tensor]]:
    """A model with a policy and nothing else, each pair run once."""
    return lru_cache(maxsize=None)(lambda model, policy: ran(tiny[model], policy, None))


def ran(model: Tiny, policy: str, storage: Any) -> tuple[KVCache, Tensor]:
    cache = KVCache(model.schedule, POLICIES[policy](model.schedule, 15), storage)
    watched(cache)
    return cache, model.run(cache)


@cases
@pytest.mark.parametrize("storage", [torch.bfloat16, "int8", "int4", MixedPrecision(0.25, coarse="int8")])
def test_storage_goes_with_every_policy_and_model(model: str, policy: str, storage: Any, tiny: dict[str, Tiny],
                                                  plainly: Callable[[str, str], tuple[KVCache, Tensor]],
                                                  full_logits: dict[str, Tensor]) -> None:
    exact, a = plainly(model, policy)
    small, b = ran(tiny[model], policy, storage)
    schedule, head, vectors = small.schedule, small.schedule.head_dim, 2 * len(a)
    vectors *= {"var": 1, "infinity": 2, "llamagen": 1}[model]  # Infinity gives logits after guidance: half the batch
    kept = [k for layer in range(schedule.layers) for k in small.kept(layer)]
    assert kept == [k for layer in range(schedule.layers) for k in exact.kept(layer)]
    if isinstance(storage, MixedPrecision):
        fine = [max(1, round(storage.share * k)) for k in kept]
        needed = sum(4 * head * f + (head + 2) * (k - f) for k, f in zip(kept, fine, strict=True))
    else:
        needed = sum(kept) * {torch.bfloat16: 2 * head, "int8": head + 2, "int4": head // 2 + 2}[storage]
    if policy == "intervals" and not isinstance(storage, MixedPrecision):  # has room for what comes until it drops
        assert needed * vectors <= small.nbytes() <= needed * vectors * 1.5
    else:
        assert small.nbytes() == needed * vectors
    assert small.peak_nbytes() >= small.nbytes()
    assert b.isfinite().all()
    # Which tokens stay may change with rounding, where attention decides; where it does not, the change is small.
    if policy in ("full", "sliding", "streaming", "heatkv"):
        assert 0 < (a - b).abs().mean() < (0.4 if storage == "int4" else 0.15) * full_logits[model].std()


@pytest.mark.parametrize("storage", [None, MixedPrecision()])
def test_a_batch_is_its_pictures_one_by_one(storage: Any) -> None:
    schedule = Schedule(((1, 1), (2, 2), (3, 3), (4, 4), (5, 5)), 2, 4, 8)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 4, 55, 8, generator=g)  # of two pictures, for two layers
    for name, make in POLICIES.items():
        if name in RASTER_ONLY:
            continue

        def run(rows: list[int], make: Any = make) -> Tensor:
            cache = KVCache(schedule, make(schedule, 15), storage)
            out = []
            for step in range(5):
                here = slice(schedule.starts[step], schedule.starts[step + 1])
                out.append(torch.stack([cache.attend(q[rows, layer, :, here], k[rows, layer, :, here],
                                                     v[rows, layer, :, here], layer, step) for layer in range(2)]))
            return torch.cat(out, 3)

        together = run([0, 1])
        for row in range(2):
            torch.testing.assert_close(run([row])[:, 0], together[:, row], rtol=1e-5, atol=1e-5, msg=name)


def test_a_storage_that_is_none_is_refused(tiny: dict[str, Tiny]) -> None:
    schedule = tiny["var"].schedule
    strange: tuple[Any, ...] = ("bf16", "int3", torch.int32, 8)
    for storage in strange:
        with pytest.raises(ConfigError, match="stored in a float type of torch"):
            KVCache(schedule, storage=storage)
    with pytest.raises(ConfigError, match="stored in a float type of torch"):
        MixedPrecision(coarse="int2")  # type: ignore[arg-type]
    odd = Schedule(((1, 1), (2, 2)), 1, 1, 5)
    KVCache(odd, storage="int8")
    halved: tuple[Any, ...] = ("int4", MixedPrecision())
    for storage in halved:
        with pytest.raises(ConfigError, match="5 dimensions a head are odd"):
            KVCache(odd, storage=storage)
    with pytest.raises(ConfigError, match="batch of 3 is no two halves"):
        x = torch.zeros(3, 4, 1, 8)
        KVCache(schedule, batch_halves=True).attend(x, x, x, 0, 0)


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o", "hack", "heatkv", "scalekv"])
def test_mixed_precision_goes_with_any_policy(policy: str, tiny: dict[str, Tiny]) -> None:
    schedule = tiny["var"].schedule
    exact = KVCache(schedule, POLICIES[policy](schedule, 15))
    logits = tiny["var"].run(exact)
    errors = []
    for storage in (MixedPrecision(0.25), MixedPrecision(0.25, coarse="int8"), MixedPrecision(0.25, coarse=None)):
        cache = KVCache(schedule, POLICIES[policy](schedule, 15), storage)
        heard = watched(cache)
        errors.append((tiny["var"].run(cache) - logits).abs().mean().item())
        assert len(heard) == schedule.steps * schedule.layers
        assert cache.kept(0) == exact.kept(0)
        head = schedule.head_dim
        fine = [max(1, round(0.25 * k)) for i in range(schedule.layers) for k in cache.kept(i)]
        coarse = [k - f for k, f in zip((k for i in range(3) for k in cache.kept(i)), fine, strict=True)]
        per_token = {"int4": head // 2 + 2, "int8": head + 2, None: 4 * head}[storage.coarse]  # type: ignore[index]
        assert cache.nbytes() == 2 * 4 * (sum(fine) * 4 * head + sum(coarse) * per_token)
    assert errors[0] > errors[1] > errors[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in RASTER_ONLY])
@pytest.mark.parametrize("storage", [None, "int8", MixedPrecision(0.25)])
def test_every_policy_runs_in_bfloat16(policy: str, storage: Any, tiny: dict[str, Tiny]) -> None:
    model = prepared_var(torch.bfloat16)
    schedule = model.schedule
    exact, low = (KVCache(schedule, POLICIES[policy](schedule, 15), storage) for _ in range(2))
    a, b = tiny["var"].run(exact), model.run(low)
    assert [low.kept(i) for i in range(schedule.layers)] == [exact.kept(i) for i in range(schedule.layers)]
    assert b.isfinite().all()
    if isinstance(storage, MixedPrecision):  # the coarse part is as large, the fine one half
        kept = [k for i in range(schedule.layers) for k in low.kept(i)]
        fine = sum(max(1, round(0.25 * k)) for k in kept)
        head = schedule.head_dim
        assert low.nbytes() == 2 * 4 * (fine * 2 * head + (sum(kept) - fine) * (head // 2 + 2))
    else:
        assert low.nbytes() == (exact.nbytes() if storage else exact.nbytes() // 2)
    if policy in ("full", "sliding", "streaming", "heatkv"):  # these choose alike, whatever the rounding
        assert (a - b).abs().mean() < 0.15 * a.std()


def test_the_peak_counts_what_is_on_the_move() -> None:
    x = torch.randn(1, 1, 15, 1)
    cache = KVCache(Schedule(((1, 1), (2, 2), (3, 3), (1, 1)), 1, 1, 1), StreamingLLM(5, 1))
    for step, part in enumerate(x.split([1, 4, 9, 1], 2)):
        cache.attend(part, part, part, 0, step)
    # Third step: keys and values of 14 tokens each, and again the 5 old values on their way into the larger buffer;
    # as many when the 5 that stay are copied out. The last one joins 5 + 1 tokens for the attention: less.
    assert cache.peak_nbytes() == 4 * (14 + 14 + 5)


def candidates(q: Tensor, k: Tensor, sizes: tuple[tuple[int, int], ...], step: int, tokens: Tensor | None = None,
               **more: Any) -> Candidates:
    schedule = Schedule(sizes, 1, q.shape[1], q.shape[3], **more)
    tokens = torch.arange(k.shape[2])[None, None] if tokens is None else tokens
    return Candidates(schedule, 0, step, slice(0, q.shape[1]), q, k, k, tokens, q.shape[2])


# ---- references


@needs_shared("fixtures", "kv_spec_reference.safetensors")
def test_hack_against_the_reference() -> None:
    found = Fixture("kv_spec_reference")
    facts = found.facts["meta"]["hack"]
    sizes = tuple((round(n**0.5), round(n**0.5)) for n in facts["sizes"])
    a = found["A"]  # (layers, heads, queries, keys); as q k^T: q the unit vectors, k the logarithms
    q = torch.eye(a.shape[2]).expand(a.shape[0], a.shape[1], -1, -1)
    seen = candidates(q, a.clamp(min=1e-30).log().transpose(2, 3), sizes, len(sizes) - 1)
    torch.testing.assert_close(seen.attention(), a, rtol=0, atol=1e-6)
    assert torch.equal(seen.spaced_queries(facts["N_obs"]), found["hack.query_idx"])
    scores = seen.attention(seen.spaced_queries(facts["N_obs"])).sum(2)
    torch.testing.assert_close(scores, found["hack.score"], rtol=0, atol=1e-6)
    assert torch.equal(seen.top(found["hack.score"], facts["B_C"]), found["hack.kept_contextual"])
    initial = next(i for i in range(len(sizes)) if sum(facts["sizes"][:i]) == facts["N_init"])
    assert torch.equal(structural_choice(seen, found["hack.score"], facts["B_S"], initial),
                       found["hack.kept_structural"])
    layers, heads = a.shape[:2]
    nothing = torch.zeros(layers, len(sizes)), torch.zeros(layers, heads, len(sizes))
    flat = Calibration(found["hack.var"], *nothing, sizes, "", 1)
    expected = [tuple(row.nonzero()[:, 0].tolist()) for row in found["hack.is_contextual"].bool()]
    assert flat.contextual(facts["alpha"]) == tuple(expected)


@needs_shared("fixtures", "kv_spec_reference.safetensors")
def test_the_recorder_measures_the_references_statistics() -> None:
    found = Fixture("kv_spec_reference")
    facts, a = found.facts["meta"], found["A"]
    sizes = tuple((round(n**0.5), round(n**0.5)) for n in facts["hack"]["sizes"])
    q, last = torch.eye(a.shape[2]).expand(1, a.shape[1], -1, -1), len(sizes) - 1
    schedule = Schedule(sizes, a.shape[0], a.shape[1], a.shape[2])
    recorder = Recorder(history=facts["scalekv"]["K_prime"], guided=False)
    cache = KVCache(schedule, recorder)
    keys = a.clamp(min=1e-30).log().transpose(2, 3)[:, None]
    for layer in range(a.shape[0]):
        for step in range(len(sizes)):
            here = slice(schedule.starts[step], schedule.starts[step + 1])
            k = keys[layer][:, :, here]
            # Before the last step the queries are the reference's first ones, whatever they then attend to.
            cache.attend(q[:, :, : schedule.tokens(step)], k, k, layer, step)
    measured = recorder.calibration(nn.Linear(1, 1))
    torch.testing.assert_close(measured.variance, found["hack.var"], rtol=0, atol=1e-6)
    torch.testing.assert_close(measured.selectivity[:, last], found["scalekv.asi_layer"], rtol=0, atol=1e-6)
    # The attention of the last scale's queries to the last but one scale, which no other scale sees before.
    here = slice(schedule.starts[last - 1], schedule.starts[last])
    torch.testing.assert_close(measured.attention[..., last - 1], a[..., here].sum(3).mean(2), rtol=0, atol=1e-6)
    assert measured.attention.shape == (*a.shape[:2], len(sizes))
    assert not measured.attention[..., last].any()


@needs_shared("fixtures", "kv_spec_reference.safetensors")
def test_scalekv_against_the_reference() -> None:
    found = Fixture("kv_spec_reference")
    facts = found.facts["meta"]["scalekv"]
    index = found["scalekv.asi_LK"]
    # The reference's scales all have a history; ours have a first one without.
    layers, scales = index.shape
    padded = torch.cat([torch.zeros(layers, 1), index], 1)
    calibration = Calibration(torch.zeros(layers, 2), padded, torch.zeros(layers, 2, scales + 1),
                              ((1, 1),) * (scales + 1), "", 1)
    torch.testing.assert_close(calibration.standardised().float(), found["scalekv.z"], rtol=0, atol=1e-6)
    expected = [tuple(column.nonzero()[:, 0].tolist()) for column in found["scalekv.is_drafter"].bool().T]
    assert calibration.drafters(facts["N_d"]) == ((), *expected)
    # Scales of many tokens each, so that no limit but the budget's shows.
    schedule = Schedule(((100 * facts["B_uniform"], 1),) * (scales + 1), layers, 2, 4)
    policy = ScaleKV((*expected, ()), facts["B_uniform"], facts["B_r0"], facts["delta"])
    for b in facts["budgets"]:
        if b["n_drafter"]:
            drafter, refiner = policy.budgets(schedule, b["scale"])
            assert (drafter, refiner) == (int(b["drafter"]), b["refiner"])


@needs_shared("fixtures", "scalekv_select.safetensors")
def test_scalekv_compat_selects_what_upstream_selects() -> None:
    found = Fixture("scalekv_select")
    cases = {case["case"]: case for case in found.facts["cases"]}
    for name, case in cases.items():
        if name.startswith("window."):
            window = upstream_window(case["tokens"], case["start"] + case["tokens"], case.get("window", 16))
            assert torch.equal(window, found[name].flatten().long()), name
        else:
            kept = upstream_selection(found[f"{name}.q"].float(), found[f"{name}.k"].float(),
                                      upstream_window(case["query_len"], case["key_len"], case["window"]),
                                      case["max_capacity"], case["kernel_size"],
                                      "max" if case["pooling"] == "maxpool" else "average")
            assert torch.equal(kept, found[f"{name}.kept"].long()), name


@needs_shared("fixtures", "scalekv_select.json")
def test_budgets_solved_from_the_mean_are_the_released_ones() -> None:
    released = Fixture("scalekv_select").facts["released_budgets"]
    tokens = Fixture("scalekv_select").facts["scale_tokens"]
    for size, layers in (("2b", 32), ("8b", 40)):
        schedule = Schedule(tuple((n, 1) for n in tokens), layers, 2, 4)
        for label, facts in released[size].items():
            step = int(label.split()[1]) - 2  # "Scale 9" is what scale 9 finds: after the eighth, number 7
            drafters = tuple(tuple(facts["drafters"]) if i == step else () for i in range(len(tokens)))
            mean = round(facts["mean"])
            drafter, refiner = ScaleKV(drafters, mean).budgets(schedule, step)
            # Released drafters keep up to 4 % less than everything; ours everything, the refiners what that leaves.
            assert 0.96 * drafter <= facts["drafter_tokens"] <= drafter
            assert 0 <= facts["refiner_tokens"] - refiner <= 20
            count = len(facts["drafters"])
            assert mean - 1 <= (count * drafter + (layers - count) * refiner) / layers <= mean


def window_by_hand(tokens: int, keys: int, window: int) -> list[int]:
    """The released window: middles of patches where map and window are squares that fit, else the newest keys."""
    side, grid = int(tokens**0.5), int(window**0.5)
    if side * side != tokens or grid * grid != window or side < grid:
        return list(range(max(0, keys - window), keys))
    centre = [i * (side // grid) + (side // grid - 1) // 2 for i in range(grid)]
    return [keys - tokens + y * side + x for y in centre for x in centre]


@pytest.mark.parametrize(("sizes", "window", "budget", "pool"), [
    (((1, 1), (2, 2), (3, 3), (6, 6)), 9, 20, 3), (((2, 2), (4, 5)), 4, 9, 3), (((1, 1), (5, 5)), 6, 8, 1),
    (((1, 1), (2, 2), (3, 3), (3, 3)), 16, 18, 5),  # a map below the window, which reaches into older scales
    (((1, 1), (7, 7)), 16, 16, 5), (((2, 2), (4, 9)), 4, 30, 7)])
def test_scalekv_compat_at_other_shapes(sizes: Any, window: int, budget: int, pool: int) -> None:
    torch.manual_seed(0)
    schedule = Schedule(sizes, 1, 2, 8)
    tokens, keys, last = schedule.tokens(schedule.steps - 1), schedule.all_tokens, schedule.steps - 1
    q, k = torch.randn(2, 2, tokens, 8), torch.randn(2, 2, keys, 8)
    policy = ScaleKV(((),) * schedule.steps, budget, window=window, pool=pool, compat="upstream")
    kept = policy.stored(candidates(q, k, sizes, last))
    assert kept is not None and kept.shape == (2, 2, budget) and (kept.diff(dim=-1) > 0).all()
    own = window_by_hand(tokens, keys, window)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        total = [-math.inf if n in own else
                 sum(float(q[b, h, max(0, j - (keys - tokens))] @ k[b, h, n]) for j in own) for n in range(keys)]
        pooled = [max(total[max(0, n - pool // 2) : n + pool // 2 + 1]) for n in range(keys)]
        rest = sorted((pooled[n] for n in range(keys) if n not in own), reverse=True)[: budget - len(own)]
        chosen = kept[b, h].tolist()
        assert set(own) <= set(chosen)
        # Neighbours that share a maximum are equally good, so scores are compared, not numbers.
        assert sorted((pooled[n] for n in chosen if n not in own), reverse=True) == pytest.approx(rest, abs=1e-4)
    with pytest.raises(ConfigError, match="cannot hold"):
        upstream_selection(q, k, upstream_window(tokens, keys, window), 3, pool)


def test_refiners_keep_a_share_where_drafters_would_leave_them_their_windows() -> None:
    schedule = Schedule(((1, 1), (20, 20), (25, 1)), 6, 2, 4)
    drafters = ((), (4,), ())
    assert ScaleKV(drafters, 42).budgets(schedule, 1) == (42 * 6 - 5 * 22, 16 + 26 // 4)
    assert ScaleKV(drafters, 42, refiner_share=0).budgets(schedule, 1) == (42 * 6 - 5 * 16, 16)
    assert ScaleKV(drafters, 42, compat="upstream").budgets(schedule, 1) == (42 * 6 - 5 * 16, 16)
    with pytest.raises(ConfigError, match="refiner share"):
        ScaleKV(drafters, 42, refiner_share=1.5)


def test_heatkv_drops_the_slices_of_the_least_interested_heads() -> None:
    schedule = Schedule(((1, 1), (2, 2), (3, 3), (4, 4), (5, 5)), 1, 4, 2)
    scores = tuple(tuple(float((h * 3 + s * 2) % 4) for s in range(5)) for h in range(4))
    policy = HeatKV((scores,), 10, protected=2)
    cache = KVCache(schedule, policy)
    x = torch.randn(1, 4, 30, 2)
    for step in range(4):
        part = x[:, :, : schedule.tokens(step)]
        cache.attend(part, part, part, 0, step)
        if step == 2:  # 14 tokens, of which 5 are safe: ceil(4 * 4 / 9) = 2 heads lose the third scale
            assert policy.losers(schedule, 2) == 2
            order = sorted(range(4), key=lambda h: scores[h][2])
            assert [cache.kept(0)[h] for h in order] == [5, 5, 14, 14]
    assert sum(cache.kept(0)) / 4 <= 10


# ---- single parts


def test_hack_wastes_no_budget_while_structural_heads_have_all_there_is() -> None:
    schedule = Schedule(tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), 1, 4, 2)
    policy = HACK(((0, 1),), 127)  # contextual heads have 42 in the end, and structural ones 212
    budgets = [[policy.of_kind(127, kind, schedule, seen) for kind in (True, False)] for seen in schedule.starts[1:10]]
    assert budgets[:6] == [[seen, seen] for seen in schedule.starts[1:7]]
    assert budgets[6:] == [[2 * 127 - 155, 155], [42, 212], [42, 212]]
    cache, x = KVCache(schedule, policy), torch.randn(1, 4, 680, 2)
    heard = watched(cache)
    for step in range(10):
        part = x[:, :, schedule.starts[step] : schedule.starts[step + 1]]
        cache.attend(part, part, part, 0, step)
    assert [kept for _, _, kept in heard[:9]] == [[c, c, s, s] for c, s in budgets]


def test_h2o_scores_are_the_attention_received_so_far() -> None:
    torch.manual_seed(0)
    schedule = Schedule(((1, 1), (2, 2), (3, 3), (2, 2)), 1, 2, 4)
    cache = KVCache(schedule, H2O(100, queries=99))
    received = torch.zeros(1, 2, 18)
    keys = torch.zeros(1, 2, 0, 4)
    for step in range(3):
        q, k = torch.randn(2, 1, 2, schedule.tokens(step), 4)
        keys = torch.cat([keys, k], 2)
        cache.attend(q, k, k, 0, step)
        received[..., : keys.shape[2]] += (q @ keys.transpose(2, 3)).softmax(-1).sum(2)
    scores = cache.groups[0][0].scores
    assert scores is not None
    torch.testing.assert_close(scores, received[..., :14])


def test_merging_averages_what_is_alike_and_keeps_the_total() -> None:
    k = torch.tensor([[[[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.8], [1, 0.2]]]])
    v = torch.arange(5.0).view(1, 1, 5, 1).expand(-1, -1, -1, 2)
    merged = merge_into(k, v, torch.tensor([[[0, 1]]]))
    torch.testing.assert_close(merged.v[0, 0, :, 0], torch.tensor([(0 + 2 + 4) / 3, (1 + 3) / 2]))
    torch.testing.assert_close(merged.k[0, 0, 0], torch.tensor([2.9 / 3, 0.3 / 3]))


def test_pooling_on_maps_does_not_run_across_rows_or_scales() -> None:
    torch.manual_seed(0)
    sizes = ((1, 1), (2, 3), (4, 5))
    q, k = torch.randn(1, 1, 20, 2), torch.randn(1, 1, 27, 2)
    whole = candidates(q, k, sizes, 2)
    scores = torch.rand(1, 1, 27)
    pooled = pooled_on_maps(whole, scores, 3)
    grid = scores[0, 0, 7:].view(4, 5)
    assert pooled[0, 0, 0] == pytest.approx(scores[0, 0, 0])
    assert pooled[0, 0, 7 + 4].item() == pytest.approx(grid[:2, 3:].mean().item())
    assert pooled[0, 0, 7 + 6].item() == pytest.approx(grid[:3, :3].mean().item())
    some = torch.tensor([0, 2, 3, 7, 8, 13, 25])  # where tokens are missing, the mean is of those that are there
    part = candidates(q, k[:, :, some], sizes, 2, some[None, None])
    assert pooled_on_maps(part, scores[..., some], 3)[0, 0, 3].item() == pytest.approx(
        torch.stack([grid[0, 0], grid[0, 1], grid[1, 1]]).mean().item())


def test_budgets_from_ratios_say_of_what() -> None:
    schedule = Schedule(((1, 1), (3, 3), (9, 9)), 2, 4, 8)  # ten stored tokens of 91
    assert StreamingLLM.from_ratio(schedule, 0.5, sinks=1) == StreamingLLM(5, 1)
    assert H2O.from_ratio(schedule, 0.5, "all") == H2O(46)
    assert HACK.from_ratio(schedule, 0.5, contextual=((0,), ())) == HACK(((0,), ()), tokens=5)
    assert HACK.from_ratio(schedule, 0.5, "all", contextual=((0,), ())) == HACK(((0,), ()), attention=46)
    assert PerLayer.from_ratios(SnapKV, schedule, (0.8, 0.4), window=4) == PerLayer((SnapKV(8, 4), SnapKV(4, 4)))
    with pytest.raises(ConfigError, match="SlidingScales has no budget of tokens"):
        SlidingScales.from_ratio(schedule, 0.5)


def test_hack_gives_all_heads_the_mean_where_they_are_of_one_kind() -> None:
    schedule = Schedule(((1, 1), (3, 3), (5, 5), (9, 9)), 2, 2, 4)
    for contextual in (((0, 1), (0, 1)), ((), ())):
        policy = HACK(contextual, 20)
        assert [policy.budget(schedule, layer, 2) for layer in range(2)] == [20, 20]
        assert policy.of_kind(20, True, schedule, 35) == policy.of_kind(20, False, schedule, 35) == 20


def test_head_budgets_waste_nothing_above_what_there_is() -> None:
    need = torch.tensor([[1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 3.0, 9.0]])
    free = head_budgets(need, 50, 10)
    assert max(map(max, free)) > 100 and 49 <= sum(map(sum, free)) / 8 <= 50
    capped = head_budgets(need, 50, 10, most=100)
    assert max(map(max, capped)) == 100 and 49 <= sum(map(sum, capped)) / 8 <= 50
    assert all(c >= f or c == 100 for a, b in zip(capped, free, strict=True) for c, f in zip(a, b, strict=True))
    assert head_budgets(need, 120, 10, most=100) == ((100,) * 4,) * 2
    assert head_budgets(torch.ones(2, 3), 50, 10) == ((50,) * 3,) * 2


def test_a_policy_at_intervals_drops_what_the_other_one_would_then() -> None:
    schedule = Schedule(((1, 1),) * 20, 1, 1, 4, raster=True, columns=5)
    cache, x = KVCache(schedule, AtIntervals(StreamingLLM(6, 2), 4)), torch.randn(1, 1, 20, 4)
    heard = watched(cache)
    for step in range(20):
        part = x[:, :, step : step + 1]
        cache.attend(part, part, part, 0, step)
    counts = [kept[0] for _, _, kept in heard[:-1]]
    assert counts == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 6, 7, 8, 9, 6, 7, 8, 9]
    assert cache.groups[0][0].tokens is not None
    assert cache.groups[0][0].tokens[0, 0].tolist() == [0, 1, 12, 13, 14, 15, 16, 17, 18]
    assert cache.groups[0][0].k.nbytes <= 10 * 4 * 4  # room for nine, and the next one


def test_a_renumbered_model_has_a_renumbered_calibration(tiny: dict[str, Tiny]) -> None:
    from vtc.generators.var import VAR

    torch.manual_seed(0)
    model = VAR(3, 32, 4, classes=5, codebook_size=16, code_dim=8, sides=(1, 2, 3, 4, 6)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "log_scale" not in name:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    labels, codes = torch.tensor([1, 2]), [None, *(torch.randn(2, s * s, 8) for s in (2, 3, 4, 6))]

    @torch.no_grad()
    def run(policy: Any) -> Tensor:
        cache, modulation = KVCache(model.schedule(), policy), model.modulation(labels)
        return torch.cat([model.step(c, labels, modulation, cache, i) for i, c in enumerate(codes)], 1)

    recorder = Recorder(guided=False)
    run(recorder)
    before = recorder.calibration(model)
    policies = [lambda c: c.hack(15), lambda c: c.heatkv(15), lambda c: c.scalekv(20)]
    outputs = [run(make(before)) for make in policies]
    order = before.head_order()
    model.permute_heads(order)
    after = before.permuted(order, model)
    assert after.model != before.model
    groups = [heads for layer in range(3) for heads in after.hack(15).heads(model.schedule(), layer)]
    assert all(isinstance(heads, slice) for heads in groups)
    for make, output in zip(policies, outputs, strict=True):
        torch.testing.assert_close(run(make(after)), output, rtol=1e-4, atol=1e-4)


def test_pyramid_budgets_are_linear_and_have_the_mean() -> None:
    schedule = Schedule(((1, 1), (20, 20), (2, 2)), 9, 2, 4)
    policy = PyramidKV(216, window=16)
    assert PyramidKV(401).layer_tokens(schedule, 8) == 401  # all there is to store
    budgets = [policy.layer_tokens(schedule, layer) for layer in range(9)]
    assert budgets[0] == 16 + 390
    assert budgets[-1] == 16 + 10
    assert sum(budgets) / 9 == pytest.approx(216, abs=1)
    assert all(abs(2 * b - a - c) <= 1 for a, b, c in zip(budgets, budgets[1:], budgets[2:], strict=False))


def test_head_budgets_have_few_sizes_and_the_mean() -> None:
    need = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) + 0.1
    budgets = torch.tensor(head_budgets(need, 100, 20))
    assert max(len(set(row)) for row in budgets.tolist()) <= 4
    assert 99 <= budgets.float().mean() <= 100
    assert budgets.min() >= 20
    assert (budgets.gather(1, need.argsort(1)).diff(dim=1) >= 0).all()


def test_the_buffer_grows_takes_and_stores_small() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 4)
    buffer = TokenBuffer()
    for part in x.split([1, 4, 5], 2):
        buffer.append(part)
    assert torch.equal(buffer.read(torch.float32), x)
    buffer.take(torch.tensor([1, 4, 9]))
    assert torch.equal(buffer.read(torch.float32), x[:, :, [1, 4, 9]])
    assert buffer.nbytes == 2 * 3 * 3 * 4 * 4
    small = TokenBuffer("int8")
    small.append(x)
    error = (small.read(torch.float32) - x).abs()
    assert (error <= x.abs().amax(-1, keepdim=True) / 127 * 0.51).all()
    assert small.nbytes == 2 * 3 * 10 * (4 + 2)
    tiny = TokenBuffer("int4")
    tiny.append(x)
    error = (tiny.read(torch.float32) - x).abs()
    assert (error <= x.abs().amax(-1, keepdim=True) / 7 * 0.51).all()
    assert tiny.nbytes == 2 * 3 * 10 * (2 + 2)


def test_the_mixed_buffer_keeps_the_order_and_the_fine_tokens() -> None:
    torch.manual_seed(0)
    x, more = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 2, 4)
    fine = torch.tensor([[0, 5], [1, 2], [3, 4]]).expand(2, 3, 2)
    buffer = MixedBuffer(MixedPrecision(0.3, coarse="int8"))
    buffer.append(x)
    assert torch.equal(buffer.read(torch.float32), x)
    buffer.split(fine)
    read = buffer.read(torch.float32)
    at = fine[..., None].expand(2, 3, 2, 4)
    assert torch.equal(read.gather(2, at), x.gather(2, at))
    assert 0 < (read - x).abs().max() < 0.02
    assert buffer.nbytes == 2 * 3 * (2 * 16 + 4 * 6)
    buffer.append(more)
    assert torch.equal(buffer.read(torch.float32), torch.cat([read, more], 2))
    buffer.truncate(3)
    assert torch.equal(buffer.read(torch.float32), read[:, :, :3])


def test_a_budget_is_a_share_of_what_it_says() -> None:
    schedule = Schedule(((1, 1), (3, 3), (9, 9)), 1, 1, 1)
    assert budget_from_ratio(schedule, 0.5) == 5
    assert budget_from_ratio(schedule, 0.5, of="all") == 46
    with pytest.raises(ConfigError, match="above 0 and up to 1"):
        budget_from_ratio(schedule, 1.5)


@pytest.mark.parametrize("make", [
    lambda: StreamingLLM(3, 4), lambda: StreamingLLM(9, -3), lambda: SlidingScales(0),
    lambda: HeatKV((((1.0,),),), 9, -1), lambda: HACK(((0,),), 9, initial=-1), lambda: PyramidKV(32, beta=float("nan")),
    lambda: AtIntervals(StreamingLLM(9), 0), lambda: Full.from_ratio(Schedule(((1, 1), (2, 2)), 1, 1, 1), 0.5),
    lambda: H2O(0), lambda: H2O(5, recent=2), lambda: SnapKV(8),
    lambda: SnapKV(32, pool=4), lambda: PyramidKV(32, beta=0.5), lambda: HACK(((0,),)),
    lambda: HACK(((0,),), 9, contextual_share=0), lambda: ScaleKV(((),), 8), lambda: ScaleKV(((),), 32, pool=2),
    lambda: MixedPrecision(1.0), lambda: AdaptiveHeads(SlidingScales(), ((1,),)),
    lambda: AdaptiveHeads(SnapKV(20), ((20, 3),))])
def test_impossible_hyper_parameters_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_misfits_of_policy_and_model_are_refused(tiny: dict[str, Tiny]) -> None:
    schedule = tiny["var"].schedule
    for policy, why in ((HACK(((0,),), 20), "do not fit"), (HACK(((0,), (0,), (0,)), 3), "no room for the first"),
                        (ScaleKV(((),), 20), "do not fit"), (PerLayer((H2O(5),)), "1 policies do not fit"),
                        (AdaptiveHeads(H2O(5), ((5,),)), "do not fit"), (HeatKV((((1.0,),),), 20), "calibrate"),
                        (HeatKV((((1.0,) * 5,) * 4,) * 3, 2), "too small")):
        with pytest.raises(ConfigError, match=why):
            KVCache(schedule, policy)
    with pytest.raises(ConfigError, match="Step 0 has"):
        q = torch.zeros(1, 4, 2, 8)
        KVCache(schedule).attend(q, q, q, 0, 0)
    with pytest.raises(ConfigError, match="groups of heads of its own"):
        KVCache(schedule, AdaptiveHeads(HACK(((0,),) * 3, 20), ((20,) * 4,) * 3))
    used = KVCache(schedule)
    q = torch.zeros(1, 4, 1, 8)
    used.attend(q, q, q, 0, 0)
    with pytest.raises(ConfigError, match="holds a generation already"):
        used.attend(q, q, q, 0, 0)
    with pytest.raises(ConfigError, match="does not come back"):
        KVCache(schedule, StreamingLLM(9)).truncate(1)


# ---- calibration


def test_a_calibration_goes_with_its_model_only(tmp_path: Path, tiny: dict[str, Tiny]) -> None:
    recorder, model = Recorder(), nn.Linear(3, 3)
    tiny["var"].run(KVCache(tiny["var"].schedule, recorder))
    tiny["var"].run(KVCache(tiny["var"].schedule, recorder))
    measured = recorder.calibration(model)
    assert measured.samples == 4
    path = tmp_path / "a.kv.safetensors"
    measured.save(path)
    again = Calibration.load(path, model)
    assert again.sizes == tiny["var"].schedule.sizes
    assert all(torch.equal(getattr(again, n), getattr(measured, n)) for n in ("variance", "selectivity", "attention"))
    for policy in (again.hack(12), again.hack(attention=30), again.scalekv(20), again.heatkv(20)):
        tiny["var"].run(KVCache(tiny["var"].schedule, policy))
    with pytest.raises(ModelError, match="measured on another model"):
        Calibration.load(path, nn.Linear(3, 3))
    with pytest.raises(FileError, match="no file"):
        Calibration.load(tmp_path / "b", model)
    (tmp_path / "c").write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="cannot be read"):
        Calibration.load(tmp_path / "c", model)
    with pytest.raises(ConfigError, match="Nothing was recorded"):
        Recorder().calibration(model)
    with pytest.raises(ConfigError, match="raster"):
        KVCache(tiny["llamagen"].schedule, Recorder())


def test_recording_changes_nothing_and_its_attention_is_the_models(tiny: dict[str, Tiny],
                                                                   full_logits: dict[str, Tensor]) -> None:
    recorder = Recorder()
    logits = tiny["var"].run(KVCache(tiny["var"].schedule, recorder))
    assert torch.equal(logits, full_logits["var"])
    measured = recorder.calibration(nn.Linear(1, 1))
    assert (measured.attention[..., :-1] > 0).all()
    assert (measured.attention.sum(2) < 1).all()
    order = measured.head_order(0.5)
    contextual = measured.contextual(0.5)
    assert sum(map(len, contextual)) == 6
    for row, kind in zip(order.tolist(), contextual, strict=True):
        assert sorted(row) == [0, 1, 2, 3]
        assert tuple(row[: len(kind)]) == kind


def test_softmax_scale_is_that_of_the_attention() -> None:
    q, k = torch.randn(2, 1, 2, 4, 8)
    seen = candidates(q, k, ((2, 2),), 0, softmax_scale=8**-0.5)
    out = F.scaled_dot_product_attention(q, k, k)
    torch.testing.assert_close(seen.attention() @ k, out)
