"""VAR against upstream's outputs: teacher forcing, greedy and sampled generation, the cache, and its own promises."""

from __future__ import annotations

import json
import math
import re
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fixtures import Fixture
from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, ModelError
from vtc.generators.generate import Scale
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.generators.upstream import from_state_dict
from vtc.generators.var import VAR
from vtc.tokenizers.upstream import from_state_dict as tokenizer_from_state_dict
from vtc.tokenizers.var_vqvae import VARVQVAE

pytestmark = needs_shared("fixtures", "var_tiny.safetensors")
LABELS = torch.tensor([3, 7])
GREEDY = Sampling(top_k=1)
NAMES = sorted(path.stem for path in (SHARED / "fixtures").glob("var_tiny*.safetensors"))


def fixture(name: str) -> Fixture:
    """A file of the family; its facts are in a JSON of its own, or in the one for all."""
    found = Fixture(name)
    found.facts = found.facts or Fixture("var_tiny").facts
    return found


def guidance_of(found: Fixture) -> Guidance:
    """Of the greedy pictures, as the notes tell it."""
    return Guidance(1 + float(re.search(r"cfg=([0-9.]+)", found.facts["notes"])[1]), ramp=True)  # type: ignore[index]


def labels_of(found: Fixture) -> Tensor:
    """Likewise."""
    return torch.tensor(json.loads(re.search(r"label=(\[[0-9, ]+\])", found.facts["notes"])[1]))  # type: ignore[index]


def rule_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tokenizer's weights by the rule that the fixture states, for upstream's keys."""
    def one(name: str, shape: torch.Size) -> Tensor:
        noise = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(tuple(shape))
        base, s = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
        if len(shape) == 1 and name.endswith(".weight"):
            base, s = 1.0, 0.1
        elif name.endswith(".bias"):
            s = 0.05
        elif name == "quantize.embedding.weight":
            s = 1.0
        return torch.from_numpy((base + s * noise.astype(np.float32)).astype(np.float32))
    return {name: one(name, shape) for name, shape in shapes.items()}


@lru_cache
def tokenizer_of(name: str) -> VARVQVAE:
    """The fixture's quantizer, and a network around it by its rule."""
    found = fixture(name)
    facts, weights = found.config, found.weights("vae.quantize.")
    sides = tuple(facts["patch_nums"])
    small = VARVQVAE(facts["vocab_size"], facts["Cvae"], facts["vae_ch"], tuple(facts["ch_mult"]), sides=sides)
    small.quantizer.codebook.data.copy_(weights["embedding.weight"])
    for i, phi in enumerate(small.quantizer.phi):
        phi.weight.data.copy_(weights[f"quant_resi.qresi_ls.{i}.weight"])
        phi.bias.data.copy_(weights[f"quant_resi.qresi_ls.{i}.bias"])
    upstream = {k.replace(".phi.", ".quant_resi.qresi_ls.").replace("quantizer.", "quantize.")
                .replace("quantize.codebook", "quantize.embedding.weight"): v.shape
                for k, v in small.state_dict().items() if k != "token_frequencies"}
    return tokenizer_from_state_dict(rule_weights(upstream), "var", sides=sides).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tokenizer() -> VARVQVAE:
    return tokenizer_of("var_tiny")


def model_of(name: str) -> tuple[Fixture, VAR]:
    found = fixture(name)
    has_l2 = "var.blocks.0.attn.scale_mul_1H11" in found.tensors
    settings: dict[str, Any] = {} if has_l2 else {"heads": found.config["num_heads"]}
    return found, from_state_dict(found.weights("var."), **settings)


names = pytest.mark.parametrize("name", NAMES)


@names
def test_teacher_forcing_equals_upstream(name: str) -> None:
    found, model = model_of(name)
    assert (model.depth, model.heads, model.sides) == (found.config["depth"], found.config["num_heads"],
                                                       tuple(found.config["patch_nums"]))
    with torch.no_grad():
        logits = model(found["tf.labels"], found["tf.x_BLCv_wo_first_l"])
    torch.testing.assert_close(logits, found["tf.logits"], rtol=1e-4, atol=1e-4)
    indices = torch.cat([found[f"tf.gt_idx_{i}"] for i in range(len(model.sides))], 1)
    torch.testing.assert_close(tokenizer_of(name).quantizer.teacher_inputs(indices), found["tf.x_BLCv_wo_first_l"],
                               rtol=0, atol=1e-5)


@names
def test_greedy_generation_equals_upstream(name: str) -> None:
    found, model = model_of(name)
    cache = KVCache(model.schedule())
    heard: list[Scale] = []
    tokens, images = model.generate(labels_of(found), tokenizer_of(name), GREEDY, guidance_of(found), cache,
                                    callback=heard.append)
    for i, scale in enumerate(heard):
        torch.testing.assert_close(scale.logits, found[f"greedy.logits_cfg_{i}"], rtol=1e-4, atol=1e-4)
        assert torch.equal(scale.indices, found[f"greedy.idx_{i}"])
        torch.testing.assert_close(scale.total, found[f"greedy.f_hat_{i}"], rtol=0, atol=1e-4)
    stored = model.schedule().stored_tokens
    for key in (k for k in found.tensors if k.startswith("greedy.cache_")):
        kind, layer = key[len("greedy.cache_")], int(key.rpartition("block")[2])
        buffer = getattr(cache.groups[layer][0], kind)
        torch.testing.assert_close(buffer.read(torch.float32), found[key][:, :, :stored], rtol=1e-4, atol=1e-4)
    picture = next(k for k in found.tensors if k.startswith("greedy.img_"))
    every = int(picture.rpartition("sub")[2])
    torch.testing.assert_close(images[:, :, ::every, ::every], found[picture], rtol=0, atol=2e-3)
    assert torch.equal(tokens.indices[..., 0], drawn(found, "greedy", model))


def drawn(found: Fixture, prefix: str, model: VAR) -> Tensor:
    return torch.cat([found[f"{prefix}.idx_{i}"] for i in range(len(model.sides))], 1)


@names
def test_sampling_with_one_generator_is_upstreams_stream(name: str) -> None:
    found, model = model_of(name)
    labels, tok = labels_of(found), tokenizer_of(name)
    prefixes = {k.rpartition(".idx_")[0] for k in found.tensors if ".idx_" in k}
    assert {p for p in prefixes if p.startswith("sampled")} and len(prefixes) > 2
    for prefix in prefixes:
        if sampled := re.fullmatch(r"sampled_seed(\d+)_k(\d+)_p([0-9.]+)", prefix):
            seed, top_k, top_p = int(sampled[1]), int(sampled[2]), float(sampled[3])
            tokens, _ = model.generate(labels, tok, Sampling(top_k=top_k, top_p=top_p), guidance_of(found),
                                       generators=torch.Generator().manual_seed(seed))
            assert torch.equal(tokens.indices[..., 0], drawn(found, prefix, model))
        if greedy := re.fullmatch(r"greedy_cfg([0-9.]+)", prefix):
            tokens, _ = model.generate(labels, tok, GREEDY, Guidance(1 + float(greedy[1]), ramp=True))
            assert torch.equal(tokens.indices[..., 0], drawn(found, prefix, model))


def test_generation_equals_teacher_forcing_without_guidance(tokenizer: VARVQVAE) -> None:
    _, model = model_of("var_tiny")
    logits: list[Tensor] = []
    tokens, _ = model.generate(LABELS, tokenizer, GREEDY, Guidance(), callback=lambda s: logits.append(s.logits))
    with torch.no_grad():
        forced = model(LABELS, tokenizer.quantizer.teacher_inputs(tokens.indices[..., 0]))
    torch.testing.assert_close(torch.cat(logits, 1), forced, rtol=1e-5, atol=1e-5)


def test_the_full_cache_stores_all_but_the_last_scale_and_says_its_bytes(tokenizer: VARVQVAE) -> None:
    _, model = model_of("var_tiny")
    cache = KVCache(model.schedule())
    model.generate(LABELS, tokenizer, GREEDY, cache=cache)
    assert cache.kept(0) == [14, 14]
    assert cache.nbytes() == model.schedule().kv_bytes(14, batch=4, bytes_per_number=4) == 2 * 2 * 64 * 14 * 4 * 4
    # The last scale joins what one layer has stored with its own 16 tokens, for that layer's attention.
    assert cache.peak_nbytes() == cache.nbytes() + 2 * 64 * (14 + 16) * 4 * 4


@pytest.mark.parametrize(("storage", "tolerance", "share"), [(torch.bfloat16, 0.05, 0.5), ("int8", 0.05, 0.265625)])
def test_storage_takes_fewer_bytes_and_changes_little(storage: Any, tolerance: float, share: float,
                                                      tokenizer: VARVQVAE) -> None:
    _, model = model_of("var_tiny")
    logits: dict[Any, list[Tensor]] = {None: [], storage: []}
    nbytes = {}
    indices = torch.cat([fixture("var_tiny")[f"tf.gt_idx_{i}"] for i in range(4)], 1)
    held = torch.ones(2, 30, dtype=torch.bool)
    for kind, heard in logits.items():
        cache = KVCache(model.schedule(), storage=kind)
        model.generate(LABELS, tokenizer, GREEDY, Guidance(), cache, given=(indices, held),
                       callback=lambda s, heard=heard: heard.append(s.logits))  # type: ignore[misc]
        nbytes[kind] = cache.nbytes()
    full, small = torch.cat(logits[None], 1), torch.cat(logits[storage], 1)
    assert 0 < (full - small).abs().max() < tolerance * full.abs().max()
    assert nbytes[storage] == nbytes[None] * share


def test_an_image_depends_on_its_seed_and_not_on_its_batch(tokenizer: VARVQVAE) -> None:
    _, model = model_of("var_tiny")
    labels, sampling = torch.tensor([1, 2, 3]), Sampling(top_k=30)
    together, _ = model.generate(labels, tokenizer, sampling, generators=seeded([5, 6, 7]))
    alone, _ = model.generate(labels[1:2], tokenizer, sampling, generators=seeded([6]))
    assert torch.equal(together.indices[1:2], alone.indices)
    other, _ = model.generate(labels[1:2], tokenizer, sampling, generators=seeded([8]))
    assert not torch.equal(other.indices, alone.indices)


def test_given_tokens_stay_and_the_rest_is_drawn(tokenizer: VARVQVAE) -> None:
    _, model = model_of("var_tiny")
    words = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(1))
    held = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) < 0.5
    tokens, _ = model.generate(LABELS, tokenizer, GREEDY, given=(words, held))
    assert torch.equal(tokens.indices[..., 0][held], words[held])
    assert not torch.equal(tokens.indices[..., 0][~held], words[~held])
    with pytest.raises(ConfigError, match="29 given tokens do not fit"):
        model.generate(LABELS, tokenizer, GREEDY, given=(words[:, :29], held[:, :29]))


def test_renumbered_heads_compute_the_same() -> None:
    found, model = model_of("var_tiny")
    model.permute_heads(torch.tensor([[1, 0], [1, 0]]))
    with torch.no_grad():
        logits = model(found["tf.labels"], found["tf.x_BLCv_wo_first_l"])
    torch.testing.assert_close(logits, found["tf.logits"], rtol=1e-4, atol=1e-4)


def test_a_saved_model_comes_back(tmp_path: Any) -> None:
    model = VAR(2, 32, 2, classes=4, codebook_size=16, code_dim=4, sides=(1, 2))
    model.half().float().save_pretrained(tmp_path)
    again = VAR.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_checkpoints_are_strict_and_strangers_are_named(tokenizer: VARVQVAE) -> None:
    weights = Fixture("var_tiny").weights("var.")
    with pytest.raises(ModelError, match=r"lacks blocks\.1\.mlp\.0\.weight"):
        from_state_dict({k: v for k, v in weights.items() if k != "blocks.1.ffn.fc1.weight"})
    with pytest.raises(ModelError, match="left over stranger"):
        from_state_dict(weights | {"stranger": torch.zeros(1)})
    with pytest.raises(ModelError, match="none of the known"):
        from_state_dict({"x": torch.zeros(1)})
    _, model = model_of("var_tiny")
    with pytest.raises(ConfigError, match="draws 64 words of 8 dimensions"):
        model.generate(LABELS, VARVQVAE(32, 8, 32, sides=(1, 2, 3, 4)))
    with pytest.raises(ConfigError, match="Labels are"):
        model.generate(torch.tensor([11]), tokenizer)


@needs_shared("fixtures", "var_d16_statedict_shapes.json")
def test_the_layout_of_the_published_checkpoint() -> None:
    shapes = json.loads((SHARED / "fixtures" / "var_d16_statedict_shapes.json").read_text())["var_d16"]
    with torch.device("meta"):
        ours = VAR()
    from vtc.generators.upstream import FAMILIES

    tensors = {k: torch.zeros(1).expand(shape) for k, (shape, _) in shapes.items()}
    tensors["lvl_1L"] = torch.repeat_interleave(torch.arange(10), torch.tensor([s * s for s in ours.sides]))[None]
    mapped, config = FAMILIES["var"](tensors)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert config == {"depth": 16, "width": 1024, "heads": 16, "mlp_ratio": 4.0, "classes": 1000, "codebook_size": 4096,
                      "code_dim": 32, "sides": list(ours.sides), "shared_modulation": False, "l2_attention": True}
