"""LlamaGen against upstream's outputs, and speculative decoding, whose distribution must be the target's."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from tests.fixtures import Fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError, ModelError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.llamagen import LlamaGen
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.generators.speculative import generate_speculatively
from vtc.generators.upstream import from_state_dict
from vtc.tokenizers.local_vq import LocalVQ

needs_fixture = needs_shared("fixtures", "llamagen_tiny.safetensors")
GREEDY = Sampling(top_k=1)


def tokenizer(words: int) -> LocalVQ:
    torch.manual_seed(0)
    return LocalVQ(words, 8, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), thin=4).eval()


@pytest.fixture(scope="module")
def found() -> Fixture:
    return Fixture("llamagen_tiny")


@pytest.fixture(scope="module")
def model(found: Fixture) -> LlamaGen:
    return from_state_dict(found.weights("model."), heads=4, side=4)


@needs_fixture
@pytest.mark.parametrize("weight", [1, 2])
def test_greedy_generation_equals_upstream(weight: int, found: Fixture, model: LlamaGen) -> None:
    cache = KVCache(model.schedule())
    tokens, images = model.generate(found["cond"].long(), tokenizer(64), GREEDY, Guidance(weight), cache)
    assert torch.equal(tokens.indices[..., 0], found[f"greedy_cfg{weight}.seq"].long())
    assert images.shape == (2, 3, 64, 64)
    if weight == 2:
        for layer in range(2):
            for kind, buffer in (("k", cache.groups[layer][0].k), ("v", cache.groups[layer][0].v)):
                expected = found[f"greedy_cfg2.cache_{kind}_layer{layer}"][:, :, :15]
                torch.testing.assert_close(buffer.read(torch.float32), expected, rtol=1e-4, atol=1e-4)
        assert not cache.groups[0][0].k.read(torch.float32)[:, :, 0].any()  # the class token's key is zero, as upstream


@needs_fixture
def test_teacher_forcing_equals_upstream(found: Fixture, model: LlamaGen) -> None:
    with torch.no_grad():
        logits = model(found["cond"].long(), found["greedy_cfg2.seq"][:, :-1].long())
    torch.testing.assert_close(logits, found["tf.logits"], rtol=1e-4, atol=1e-4)


@needs_fixture
def test_several_inputs_at_once_equal_one_after_the_other(found: Fixture, model: LlamaGen) -> None:
    labels, words = found["cond"].long(), found["greedy_cfg2.seq"][:, :-1].long()
    cache, positions = KVCache(model.schedule()), model.positions()
    x = torch.cat([model.class_embedding(labels)[:, None], model.word(words)], 1)
    with torch.no_grad():
        parts = [model.extend(x[:, a:b], cache, a, positions) for a, b in ((0, 3), (3, 4), (4, 9))]
        cache.truncate(5)
        parts[2] = parts[2][:, :1]
        parts += [model.extend(x[:, a:b], cache, a, positions) for a, b in ((5, 12), (12, 16))]
        torch.testing.assert_close(torch.cat(parts, 1), model(labels, words), rtol=1e-4, atol=1e-5)


@needs_fixture
def test_checkpoints_are_strict_and_misfits_are_named(found: Fixture, model: LlamaGen) -> None:
    weights = found.weights("model.")
    with pytest.raises(ModelError, match=r"lacks norm\.weight"):
        from_state_dict({k: v for k, v in weights.items() if k != "norm.weight"}, heads=4, side=4)
    with pytest.raises(ConfigError, match="This generator draws"):
        model.generate(found["cond"].long(), tokenizer(32))
    with pytest.raises(ConfigError, match="Labels are"):
        model.generate(torch.tensor([-1]), tokenizer(64))


def tiny(seed: int, depth: int) -> LlamaGen:
    torch.manual_seed(seed)
    model = LlamaGen(depth, 16, 2, 32, classes=3, codebook_size=3, side=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.ndim > 1 else 1)
    return model.eval()


def distribution(model: LlamaGen, label: int, sampling: Sampling, guidance: Guidance) -> Tensor:
    """The exact probability of each of the 3^4 token grids, by teacher forcing."""
    grids = torch.cartesian_prod(*[torch.arange(3)] * 4)
    label_rows = torch.full((len(grids),), label)
    with torch.no_grad():
        conditional = model(label_rows, grids[:, :3])
        both = torch.cat([conditional, model(torch.full_like(label_rows, model.classes), grids[:, :3])])
        logits = torch.stack([guidance(both[:, i], i, 4) for i in range(4)], 1)
    p = sampling.probabilities(logits).gather(2, grids[..., None])[..., 0]
    return p.double().prod(1)


@pytest.mark.parametrize(("ahead", "sampling"), [(1, Sampling()), (3, Sampling(0.8, top_k=2)),
                                                 (5, Sampling(top_p=0.9))])
def test_speculative_decoding_has_the_targets_distribution(ahead: int, sampling: Sampling) -> None:
    target, draft, guidance, count = tiny(1, 2), tiny(2, 1), Guidance(1.7), 400
    expected = distribution(target, 1, sampling, guidance) * count
    assert expected.sum() == pytest.approx(count, rel=1e-5)
    seen = torch.zeros(81)
    generator = torch.Generator().manual_seed(3)
    tok = tokenizer(3)
    accepted = proposed = 0
    for _ in range(count):
        result = generate_speculatively(target, draft, 1, tok, ahead, sampling, guidance, generator)
        seen[(result.tokens.indices[0, :, 0] * torch.tensor([27, 9, 3, 1])).sum()] += 1
        accepted, proposed = accepted + result.accepted, proposed + result.proposed
    assert not seen[expected == 0].any()
    # Cells of fewer than five expected draws go together, as the test needs.
    large = expected >= 5
    observed = [*seen[large].tolist(), seen[~large].sum().item()]
    wanted = [*expected[large].tolist(), expected[~large].sum().item()]
    pairs = [(o, w) for o, w in zip(observed, wanted, strict=True) if w > 0]
    scale = sum(o for o, _ in pairs) / sum(w for _, w in pairs)
    assert chisquare([o for o, _ in pairs], [w * scale for _, w in pairs]).pvalue > 1e-3
    assert 0 < accepted < proposed


def test_a_draft_equal_to_the_target_is_always_right() -> None:
    target, tok = tiny(1, 2), tokenizer(3)
    result = generate_speculatively(target, target, 0, tok, 3, generator=torch.Generator().manual_seed(0))
    assert result.accepted == result.proposed == 3
    assert result.passes == 1
    assert result.tokens_per_pass == 4
    with pytest.raises(ConfigError, match="same grid"):
        generate_speculatively(target, LlamaGen(1, 16, 2, 32, classes=3, codebook_size=5, side=2), 0, tok)


def test_seeds_and_given_tokens() -> None:
    model, tok = tiny(1, 2), tokenizer(3)
    together, _ = model.generate(torch.tensor([0, 1]), tok, Sampling(), generators=seeded([3, 4]))
    alone, _ = model.generate(torch.tensor([1]), tok, Sampling(), generators=seeded([4]))
    assert torch.equal(together.indices[1:], alone.indices)
    words, held = torch.tensor([[2, 0, 1, 2]]), torch.tensor([[True, False, True, False]])
    tokens, _ = model.generate(torch.tensor([1]), tok, Sampling(), given=(words, held))
    assert torch.equal(tokens.indices[..., 0][held], words[held])
