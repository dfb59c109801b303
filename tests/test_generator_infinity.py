"""Infinity against upstream's outputs: teacher forcing, greedy bits at every scale, the cache; and its schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.fixtures import Fixture
from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, ModelError
from vtc.generators.generate import Scale
from vtc.generators.infinity import INFINITY_SCALES, Infinity, frame_of, scales_for
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.rotary import rotate_pairs, rotation
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.upstream import from_state_dict
from vtc.tokenizers.infinity_vae import InfinityVAE

needs_fixture = needs_shared("fixtures", "infinity_tiny.safetensors")
SCALES = scales_for(1.0, "0.06M")
GREEDY = Sampling(top_k=1, temperature=0.5)
NAMES = sorted(path.stem for path in (SHARED / "fixtures").glob("infinity_tiny*.safetensors"))


@pytest.fixture(scope="module", params=NAMES)
def found(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(request.param)


@pytest.fixture(scope="module")
def scales(found: Fixture) -> tuple[tuple[int, int], ...]:
    return tuple((rows, columns) for _, rows, columns in found.config["scale_schedule"])


@pytest.fixture(scope="module")
def model(found: Fixture) -> Infinity:
    first_alone = bool(found.config["add_lvl_embeding_only_first_block"])
    return from_state_dict(found.weights("model."), level_every_chunk=not first_alone)


@pytest.fixture(scope="module")
def text(found: Fixture) -> tuple[Tensor, Tensor]:
    """The texts, which the fixture has one after the other, padded."""
    ends = found["text.cu_seqlens_k"].tolist()
    parts = [found["text.kv_compact"][a:b].float() for a, b in pairwise(ends)]
    mask = torch.arange(max(map(len, parts))) < torch.tensor([[len(part)] for part in parts])
    return pad_sequence(parts, batch_first=True), mask


def tokenizer(bits: int = 8) -> InfinityVAE:
    torch.manual_seed(0)
    return InfinityVAE(bits, 32, (1, 1), 1, sides=(1, 2, 4, 6, 8, 12, 16)).eval()


@needs_fixture
def test_greedy_generation_equals_upstream(found: Fixture, model: Infinity, text: tuple[Tensor, Tensor],
                                           scales: tuple[tuple[int, int], ...]) -> None:
    heard: list[Scale] = []
    facts, cache = found.config, KVCache(model.schedule(scales))
    weights = facts["cfg"] if isinstance(facts["cfg"], list) else [facts["cfg"]] * len(scales)
    tau = facts["tau"]
    tokens, images = model.generate(*text, tokenizer(facts["d_vae"]), scales, Sampling(tau, facts["top_k"]),
                                    Guidance(weights=tuple(weights), layer=facts["cfg_insertion_layer"][0]), cache,
                                    callback=heard.append)
    for i, scale in enumerate(heard):
        logits = scale.logits.flatten(1, 2) / tau
        torch.testing.assert_close(logits, found[f"greedy.logits_cfg_{i}"].float(), rtol=0, atol=2e-3)
        assert torch.equal(scale.indices.unflatten(1, scales[i]), found[f"greedy.bits_{i}"][:, 0].long())
    torch.testing.assert_close(heard[-1].total, found["greedy.summed_codes"].float(), rtol=0, atol=1e-3)
    stored = model.schedule(scales).stored_tokens
    assert cache.kept(0) == [stored] * model.heads
    for key in (k for k in found.tensors if k.startswith("greedy.cache_")):
        kind, layer = key[len("greedy.cache_")], int(key.rpartition("block")[2])
        buffer = getattr(cache.groups[layer][0], kind)
        torch.testing.assert_close(buffer.read(torch.float32), found[key][:, :, :stored].float(), rtol=0, atol=2e-3)
    assert tokens.indices.shape == (len(text[0]), model.schedule(scales).all_tokens, facts["d_vae"])
    assert images.shape[1:] == (3, 2 * scales[-1][0], 2 * scales[-1][1])


@needs_fixture
def test_teacher_forcing_equals_upstream(found: Fixture, model: Infinity, text: tuple[Tensor, Tensor],
                                         scales: tuple[tuple[int, int], ...]) -> None:
    bits = torch.cat([found[f"greedy.bits_{i}"][:, 0].long().flatten(1, 2) for i in range(len(scales))], 1)
    with torch.no_grad():
        logits = model(*text, tokenizer(model.bits).quantizer.teacher_inputs(bits, scales), scales)
    torch.testing.assert_close(logits.flatten(2), found["tf.logits"].float(), rtol=0, atol=2e-3)


@needs_fixture
def test_generation_equals_teacher_forcing_without_guidance(model: Infinity, text: tuple[Tensor, Tensor]) -> None:
    logits: list[Tensor] = []
    tok = tokenizer(model.bits)
    tokens, _ = model.generate(*text, tok, SCALES, GREEDY, Guidance(), callback=lambda s: logits.append(s.logits))
    with torch.no_grad():
        forced = model(*text, tok.quantizer.teacher_inputs(tokens.indices, SCALES), SCALES)
    torch.testing.assert_close(torch.cat(logits, 1), forced, rtol=1e-5, atol=2e-5)


@needs_fixture
def test_upstreams_position_bug_is_there_when_asked_for(model: Infinity, text: tuple[Tensor, Tensor]) -> None:
    seen: dict[str | None, list[Tensor]] = {None: [], "upstream": []}
    for compat, heard in seen.items():
        model.generate(*text, tokenizer(model.bits), SCALES, GREEDY, compat=compat,
                       callback=lambda s, heard=heard: heard.append(s.logits))  # type: ignore[misc]
    assert torch.equal(seen[None][0], seen["upstream"][0])
    assert not torch.allclose(seen[None][1], seen["upstream"][1], atol=1e-3)
    with pytest.raises(ConfigError, match="compat is None"):
        model.generate(*text, tokenizer(model.bits), SCALES, compat="x")


@needs_fixture
def test_a_text_that_cannot_be_and_a_tokenizer_that_does_not_fit(model: Infinity, text: tuple[Tensor, Tensor]) -> None:
    features, mask = text
    with pytest.raises(ConfigError, match="Text features are"):
        model.generate(features[..., :5], mask, tokenizer(model.bits), SCALES)
    with pytest.raises(ConfigError, match="at least one token"):
        model.generate(features, torch.zeros_like(mask), tokenizer(model.bits), SCALES)
    with pytest.raises(ConfigError, match=f"at most {len(model.no_text)} tokens"):
        model.generate(features.repeat(1, 20, 1), mask.repeat(1, 20), tokenizer(model.bits), SCALES)
    with pytest.raises(ConfigError, match=f"draws {model.bits} single bits"):
        model.generate(features, mask, InfinityVAE(model.bits, 32, (1, 1), 1, (1, 2), (model.bits,)), SCALES)


@needs_fixture
def test_checkpoints_are_strict(found: Fixture) -> None:
    weights = found.weights("model.")
    with pytest.raises(ModelError, match=r"lacks text_norm\.weight|key text_norm\.weight is missing"):
        from_state_dict({k: v for k, v in weights.items() if k != "text_norm.weight"})
    with pytest.raises(ModelError, match="left over odd"):
        from_state_dict(weights | {"odd": torch.zeros(1)})


def test_schedules_by_shape_and_size() -> None:
    assert [h * w for h, w in scales_for()] == [1, 4, 16, 36, 64, 144, 256, 400, 576, 1024, 1600, 2304, 4096]
    assert scales_for(0.5) == tuple((w, h) for h, w in scales_for(2.0))
    assert scales_for(1.4, "0.25M")[-1] == (36, 27)
    assert all(len(grids) == 13 for grids in INFINITY_SCALES.values())
    assert len(INFINITY_SCALES) == 15
    assert frame_of(SCALES) == (64, 64)
    assert frame_of(((1, 1), (3, 5))) == (3, 5)
    with pytest.raises(ConfigError, match="A size is one of"):
        scales_for(1.0, "2M")


def test_rotation_depends_on_the_distance_alone() -> None:
    cos, sin = rotation(((1, 1), (4, 4)), (4, 4), 16)
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    turned = rotate_pairs(torch.stack([q, k])[None, :, None].expand(1, 2, 17, 16), cos, sin)[0]
    products = turned[0] @ turned[1].T  # of q at one place with k at another
    grid = products[1:, 1:].view(4, 4, 4, 4)
    torch.testing.assert_close(grid[1, 1, 2, 3], grid[0, 0, 1, 2])
    torch.testing.assert_close(grid[3, 2, 1, 2], grid[2, 1, 0, 1])
    assert abs(grid[0, 0, 0, 1] - grid[0, 0, 1, 0]) > 1e-3
