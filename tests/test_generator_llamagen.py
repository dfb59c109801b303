"""LlamaGen against upstream's outputs, and speculative decoding, whose distribution must be the target's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from tests.fixtures import Fixture
from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, ModelError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.llamagen import LlamaGen
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.generators.speculative import generate_speculatively, judge
from vtc.generators.upstream import from_state_dict
from vtc.tokenizers.local_vq import LocalVQ

needs_fixture = needs_shared("fixtures", "llamagen_tiny.safetensors")
GREEDY = Sampling(top_k=1)


def tokenizer(words: int) -> LocalVQ:
    torch.manual_seed(0)
    return LocalVQ(words, 8, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), thin=4).eval()


NAMES = sorted(path.stem for path in (SHARED / "fixtures").glob("llamagen_tiny*.safetensors"))


@pytest.fixture(scope="module", params=NAMES)
def found(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(request.param)


@pytest.fixture(scope="module")
def model(found: Fixture) -> LlamaGen:
    facts = found.config
    return from_state_dict(found.weights("model."), heads=facts["n_head"], side=math.isqrt(facts["block_size"]),
                           rope_base=facts.get("rope_base", 10000.0))


@needs_fixture
def test_greedy_generation_equals_upstream(found: Fixture, model: LlamaGen) -> None:
    weights = [name[len("greedy_cfg") : -len(".seq")] for name in found.tensors if name.endswith(".seq")]
    assert len(weights) > 1
    tok = tokenizer(model.codebook_size)
    for weight in weights:
        cache = KVCache(model.schedule())
        tokens, images = model.generate(found["cond"].long(), tok, GREEDY, Guidance(float(weight)), cache)
        assert torch.equal(tokens.indices[..., 0], found[f"greedy_cfg{weight}.seq"].long())
        assert images.shape == (len(found["cond"]), 3, 16 * model.side, 16 * model.side)
        for key in (k for k in found.tensors if k.startswith(f"greedy_cfg{weight}.cache_")):
            kind, layer = key.partition("cache_")[2][0], int(key.rpartition("layer")[2])
            read = getattr(cache.groups[layer][0], kind).read(torch.float32)
            torch.testing.assert_close(read, found[key][:, :, : model.tokens - 1], rtol=1e-4, atol=1e-4)
        assert not cache.groups[0][0].k.read(torch.float32)[:, :, 0].any()  # the class token's is zero, as upstream


@needs_fixture
def test_teacher_forcing_equals_upstream(found: Fixture, model: LlamaGen) -> None:
    words = found[next(k for k in ("greedy_cfg2.seq", *found.tensors) if k in found.tensors and k.endswith(".seq"))]
    with torch.no_grad():
        logits = model(found["cond"].long(), words[:, :-1].long())
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
    with pytest.raises(ModelError, match="does not tell LlamaGen's side"):
        from_state_dict(weights, heads=4)
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
    target, draft, guidance, count = tiny(1, 2), tiny(2, 1), Guidance(1.7), 250
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


P = torch.tensor([[0.40, 0.05, 0.25, 0.0, 0.30], [0.1, 0.2, 0.3, 0.4, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
Q = torch.tensor([[0.10, 0.30, 0.25, 0.2, 0.15], [0.4, 0.3, 0.2, 0.1, 0.0]])


def fit(rule: Callable[..., tuple[int, int]], count: int = 4000) -> float:
    """The least p of three chi-square tests: of the first word, and of the later ones where they are reached."""
    g = torch.Generator().manual_seed(5)
    seen = torch.zeros(3, 5)
    for _ in range(count):
        proposals = [int(torch.multinomial(q, 1, generator=g)) for q in Q]
        kept, word = rule(proposals, list(Q), P, g)
        for place, x in enumerate([*proposals[:kept], word]):
            seen[place, x] += 1
    least = 1.0
    for row, p in zip(seen, P, strict=True):
        if row[p == 0].any():
            return 0.0
        wanted = p[p > 0] / p.sum() * row.sum()
        least = min(least, chisquare(row[p > 0], wanted * (row[p > 0].sum() / wanted.sum())).pvalue)
    return least


def changed(accept: Callable[..., float], rest: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[int, int]]:
    """The rule with another chance to keep a word, or with another distribution after a refusal."""

    def rule(proposals: list[int], guesses: list[Tensor], p: Tensor, g: torch.Generator) -> tuple[int, int]:
        for kept, (x, q) in enumerate(zip(proposals, guesses, strict=True)):
            if float(torch.rand((), generator=g)) >= accept(float(p[kept, x]), float(q[x])):
                return kept, int(torch.multinomial(rest(p[kept], q), 1, generator=g))
        return len(proposals), int(torch.multinomial(p[-1], 1, generator=g))

    return rule


def ratio(p: float, q: float) -> float:
    return min(1, p / q)


def leftover(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


def test_the_rule_is_exact_and_the_test_would_notice_another() -> None:
    assert fit(judge) > 1e-3
    assert fit(changed(ratio, leftover)) > 1e-3  # the same, written twice
    for name, other in {"keeps too much": changed(lambda p, q: min(1, 1.25 * p / q), leftover),
                        "keeps too little": changed(lambda p, q: 0.75 * ratio(p, q), leftover),
                        "forgets q": changed(lambda p, q: p, leftover), "forgets p": changed(lambda p, q: 1, leftover),
                        "upside down": changed(lambda p, q: ratio(q, p + 1e-9), leftover),
                        "refused from the target": changed(ratio, lambda p, q: p),
                        "refused from the distance": changed(ratio, lambda p, q: (p - q).abs())}.items():
        assert fit(other) < 1e-4, name


def test_a_refusal_by_rounding_alone_still_draws_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.tensor([0.5, 0.5])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0))
    kept, word = judge([0], [q], torch.stack([q * (1 - 1e-6), q]))  # p - q is nowhere above 0
    assert kept == 0 and word in (0, 1)


@pytest.mark.parametrize("ahead", [1, 2, 7])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0), Guidance(4.0, ramp=True)])
def test_greedy_speculation_is_greedy_decoding(ahead: int, guidance: Guidance) -> None:
    target, draft, tok = tiny(1, 2), tiny(2, 1), tokenizer(3)
    for label in range(3):
        plain, images = target.generate(torch.tensor([label]), tok, GREEDY, guidance)
        result = generate_speculatively(target, draft, label, tok, ahead, GREEDY, guidance)
        assert torch.equal(result.tokens.indices, plain.indices)
        torch.testing.assert_close(result.images, images)
        assert result.passes + result.accepted == 4


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
    for strange in (-1, 3):
        words[0, 2] = strange
        with pytest.raises(ConfigError, match="words from 0 to 2"):
            model.generate(torch.tensor([1]), tok, given=(words, held))
