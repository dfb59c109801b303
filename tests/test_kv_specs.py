"""Policies in one word: what it says, what becomes of it, and what is refused at once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kv_models import MODELS, Tiny
from tests.shared import ROOT
from vtc.errors import ConfigError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.calibration import Calibration
from vtc.generators.kv_cache.full import Full
from vtc.generators.kv_cache.h2o import H2O
from vtc.generators.kv_cache.hack import HACK
from vtc.generators.kv_cache.heatkv import HeatKV
from vtc.generators.kv_cache.scalekv import ScaleKV
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.kv_cache.sliding import SlidingScales, StreamingLLM
from vtc.generators.kv_cache.snapkv import PyramidKV, SnapKV
from vtc.generators.kv_cache.specs import POLICIES, STORAGES, Budget, PolicySpec, parse_policy, parse_storage
from vtc.generators.kv_cache.storage import MixedPrecision
from vtc.generators.kv_cache.wrappers import AdaptiveHeads, AtIntervals

VAR_256 = Schedule(tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), 4, 8, 16)


def calibration(schedule: Schedule) -> Calibration:
    shape = (schedule.layers, schedule.heads)
    g = torch.Generator().manual_seed(0)
    return Calibration(torch.rand(shape, generator=g) + 0.1, torch.rand(shape[0], schedule.steps, generator=g),
                       torch.rand(*shape, schedule.steps, generator=g), schedule.sizes, "", 1)


def built(text: str, schedule: Schedule = VAR_256) -> tuple[Any, Any]:
    return parse_policy(text).build(schedule, calibration(schedule))


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tiny]:
    return {name: make() for name, make in MODELS.items()}


@pytest.mark.parametrize(("text", "policy"), [
    ("full", Full()), ("sliding:3", SlidingScales(3)), ("sliding:2,condensed=1", SlidingScales(2, 1)),
    ("streaming:0.3", StreamingLLM(127)), ("streaming:50t,sinks=8", StreamingLLM(50, 8)), ("h2o:0.5", H2O(212)),
    ("H2O:127t , recent = 0.25,decay=0.9", H2O(127, 0.25, decay=0.9)), ("snapkv:.1,window=9", SnapKV(42, 9)),
    ("pyramidkv:0.3,beta=10", PyramidKV(127, beta=10)), ("h2o:1", Full()), ("pyramidkv:9999t", Full())])
def test_words_of_policies_that_need_no_calibration(text: str, policy: object) -> None:
    assert parse_policy(text).build(VAR_256) == (policy, None)


def test_words_of_policies_that_need_one() -> None:
    known = calibration(VAR_256)
    assert built("hack:0.3")[0] == HACK(known.contextual(), 127)
    assert built("hack:127t,attention=0.5,share=0.25,merge=false,queries=8")[0] == HACK(
        known.contextual(0.25), 127, 340, queries=8, merge=False)
    assert built("hack,attention=100t")[0] == HACK(known.contextual(), None, 100)
    assert built("scalekv:0.1")[0] == ScaleKV(known.drafters(), 42)
    assert built("scalekv:0.1,compat=upstream,drafters=3,pool=3")[0] == ScaleKV(
        known.drafters(3), 42, pool=3, compat="upstream")
    heat = built("heatkv:0.3,protected=2")[0]
    assert isinstance(heat, HeatKV) and (heat.tokens, heat.protected) == (127, 2)
    ada = built("adakv:0.3,groups=2")[0]
    assert isinstance(ada, AdaptiveHeads) and ada.policy == SnapKV(127)
    assert max(len(set(layer)) for layer in ada.tokens) == 2
    assert 126 <= sum(map(sum, ada.tokens)) / 32 <= 127


def test_an_interval_stays_within_the_budget() -> None:
    raster = Schedule(((1, 1),) * 64, 2, 4, 8, raster=True, columns=8)
    policy, _ = built("h2o:20t,interval=8,recent=0.25", raster)
    assert policy == AtIntervals(H2O(13, 0.25), 8)
    assert max(policy.budget(raster, 0, step) for step in range(63)) == 20
    assert built("h2o:20t,interval=1", raster)[0] == H2O(20)
    for word, why in (("h2o:20t,interval=21", "up to the budget, here 20"), ("h2o:20t,interval=0", "from 1 token")):
        with pytest.raises(ConfigError, match=why):
            built(word, raster)
    with pytest.raises(ConfigError, match="whole scales at once"):
        built("h2o:127t,interval=8")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.8, 0.95])
def test_hack_wastes_nothing_of_a_large_budget(share: float) -> None:
    policy = built(f"hack:{share}")[0]
    budgets = [policy.of_kind(policy.tokens, kind, VAR_256, 424) for kind in (True, False)]
    assert share * 424 - 2 <= sum(budgets) / 2 <= share * 424 + 0.5
    assert budgets[0] >= int(share * 424 / 3)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("model", MODELS)
def test_every_name_builds_for_every_model_or_says_why(name: str, model: str, tiny: dict[str, Tiny]) -> None:
    schedule = tiny[model].schedule
    word = name + {"sliding": ":2", "full": "", "snapkv": ":0.6,window=4", "pyramidkv": ":0.6,window=4",
                   "scalekv": ":0.6,window=4", "adakv": ":0.6,window=4"}.get(name, ":0.6")
    if model == "llamagen" and name in ("sliding", "hack", "scalekv", "heatkv"):
        with pytest.raises(ConfigError, match="raster model has none"):
            built(word, schedule)
        return
    cache = KVCache(schedule, *built(word + "+int8", schedule))
    tiny[model].run(cache)
    kept = [k for layer in range(schedule.layers) for k in cache.kept(layer)]
    if name != "sliding":
        assert sum(kept) / len(kept) <= (1 if name == "full" else 0.6) * schedule.stored_tokens + 0.5
    halves = tiny[model].run(KVCache(schedule))[:, :1].shape[0] * (2 if model == "infinity" else 1)
    exact = 2 * sum(kept) * halves * (schedule.head_dim + 2)
    growth = 1.5 if model == "llamagen" else 1  # token by token, memory grows by half
    assert exact <= cache.nbytes() <= growth * exact


@pytest.mark.parametrize(("word", "storage"), [
    ("full+bf16", torch.bfloat16), ("full+bfloat16", torch.bfloat16), ("full+fp16", torch.float16),
    ("full+FP32", torch.float32), ("full+int8", "int8"), ("full+int4", "int4"), ("full+mixed", MixedPrecision()),
    ("full", None)])
def test_storages(word: str, storage: object) -> None:
    assert parse_policy(word).build(VAR_256)[1] == storage


def test_the_storage_may_stand_beside_the_word() -> None:
    assert parse_policy("h2o:0.3", "int8") == parse_policy("h2o:0.3+int8") == parse_policy("h2o:0.3+int8", "int8")
    assert parse_policy("full+bf16", "bfloat16").storage == "bf16"
    assert parse_storage(" ZipVL ") == "mixed"
    with pytest.raises(ConfigError, match="say it once"):
        parse_policy("h2o:0.3+int8", "int4")


@pytest.mark.parametrize(("text", "why"), [
    ("", "There is no cache policy '': there are full, sliding, streaming, h2o"), ("lru:0.3", "no cache policy 'lru'"),
    ("full:0.3", "full takes no amount"), ("h2o", "which share of the stored tokens"), ("h2o:", "A budget is a share"),
    ("hack", "which share of the stored tokens"), ("sliding", "how many of the newest scales"),
    ("sliding:0.3", "a number of scales"), ("sliding:0", "a number of scales"), ("sliding:2t", "a number of scales"),
    ("h2o:1.5", "A budget is a share"), ("h2o:0", "A budget is a share"), ("h2o:0t", "A budget is a share"),
    ("h2o:-0.3", "A budget is a share"), ("h2o:nan", "A budget is a share"), ("h2o:12", "A budget is a share"),
    ("h2o:0.3,colour=3", "no option 'colour=3': it takes recent=, queries=, decay="),
    ("full,x=1", "no option 'x=1': it takes none"), ("h2o:0.3,recent", "no option 'recent'"),
    ("h2o:0.3,queries=many", "queries is a number"), ("hack:0.3,merge=perhaps", "merge is true or false"),
    ("hack:0.3,attention=3", "A budget is a share"), ("h2o:0.3,decay=1,decay=1", "says an option twice"),
    ("h2o:0.3+int3", "stored as one of float32, bf16, fp16, int8, int4, mixed, not 'int3'"),
    ("h2o:0.3+", "stored as one of"), ("h2o:0.3+int8+int4", "stored as one of")])
def test_mistakes_say_what_there_is(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_policy(text)


@pytest.mark.parametrize(("text", "why"), [
    ("streaming:3t", "too small"), ("snapkv:0.01", "too small"), ("h2o:0.3,recent=7", "shares from 0 to 1"),
    ("hack:3t", "no room for the first"), ("scalekv:0.5,compat=x", "compat None or"), ("heatkv:0.01", "too small")])
def test_numbers_that_do_not_fit_a_model(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        built(text)


@pytest.mark.parametrize("name", [n for n, kind in POLICIES.items() if kind.calibrated])
def test_what_needs_a_calibration_says_so(name: str) -> None:
    assert parse_policy(f"{name}:0.5").needs_calibration
    with pytest.raises(ConfigError, match=r"none of this model: make one by scripts/calibrate_kv\.py"):
        parse_policy(f"{name}:0.5").build(VAR_256)


def test_the_options_are_the_policies_own() -> None:
    classes: dict[str, Any] = {"full": Full, "sliding": SlidingScales, "streaming": StreamingLLM, "h2o": H2O,
                               "snapkv": SnapKV, "pyramidkv": PyramidKV, "hack": HACK, "scalekv": ScaleKV,
                               "heatkv": HeatKV, "adakv": SnapKV}
    own = {"hack": {"share"}, "scalekv": {"drafters"}, "adakv": {"groups"}} | {
        name: {"interval"} for name in ("streaming", "h2o", "snapkv", "pyramidkv")}
    for name, kind in POLICIES.items():
        assert set(kind.options) - own.get(name, set()) <= {f.name for f in fields(classes[name])}, name


names = st.sampled_from(sorted(set(POLICIES) - {"full", "sliding"}))


@given(names, st.one_of(st.integers(1, 999).map(lambda n: Budget(n, "tokens")),
                        st.integers(1, 1000).map(lambda n: Budget(n / 1000, "share"))),
       st.sampled_from([None, *STORAGES]))
def test_a_spec_and_its_word_are_the_same(name: str, budget: Budget, storage: str | None) -> None:
    spec = PolicySpec(name, budget, (), storage)
    assert parse_policy(str(spec)) == spec


def test_options_come_back_too() -> None:
    for text in ("hack:0.3,attention=0.5,merge=false+int8", "sliding:2,condensed=1", "full", "h2o:5t,recent=0.25+bf16"):
        assert str(parse_policy(text)) == text


@given(st.text(st.sampled_from("hacko2:0.3t,+=int8 sliding"), max_size=20))
def test_any_text_is_a_spec_or_a_sentence(text: str) -> None:
    try:
        spec = parse_policy(text)
    except ConfigError as error:
        assert str(error).endswith(".")
    else:
        assert parse_policy(str(spec)) == spec


def test_reading_a_word_imports_no_torch() -> None:
    code = ("import sys; from vtc.generators.kv_cache.specs import parse_policy; parse_policy('hack:0.3+int8'); "
            "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
