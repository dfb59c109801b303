"""Prepared models compute what they did; patches of cells are one token and come apart again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kv_models import SIDES
from vtc.errors import ConfigError
from vtc.generators.inference import PreparedLinear, can_pack, prepare
from vtc.generators.infinity import Infinity
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.llamagen import LlamaGen
from vtc.generators.patches import PatchedQuantizer, cells_of, fold, unfold
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.var import VAR
from vtc.hub import fingerprint
from vtc.tokenizers.infinity_vae import InfinityVAE

GREEDY = Sampling(top_k=1)
GRIDS = ((1, 1), (2, 3), (4, 5))


def var_logits(model: VAR) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(torch.tensor([1, 2]), torch.randn(2, sum(s * s for s in SIDES[1:]), 4))


@pytest.fixture
def model() -> VAR:
    torch.manual_seed(0)
    made = VAR(2, 64, 4, classes=5, codebook_size=16, code_dim=4, sides=SIDES)
    with torch.no_grad():
        for block in made.blocks:
            block.adaptive.weight.normal_(0, 0.1)  # type: ignore[union-attr,operator]
        made.head.weight.normal_(0, 0.3)
    return made


def test_a_prepared_model_computes_the_same_and_keeps_its_weights(model: VAR) -> None:
    before, weights, mark = var_logits(model), model.state_dict(), fingerprint(model, ("",))
    weights = {k: v.clone() for k, v in weights.items()}
    assert prepare(prepare(model)) is model
    torch.testing.assert_close(var_logits(model), before, rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[k], v) for k, v in weights.items())
    assert fingerprint(model, ("",)) == mark
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="before `prepare`"):
        model.permute_heads(torch.arange(4).expand(2, 4))


def test_bfloat16_changes_little_and_leaves_sums_and_logits_in_float32(model: VAR) -> None:
    before = var_logits(model)
    cache = KVCache(model.schedule())
    prepare(model, torch.bfloat16)
    after = var_logits(model)
    assert after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 0.03 * before.abs().max()
    model.step(None, torch.tensor([1]), model.modulation(torch.tensor([1])), cache, 0)
    assert cache.groups[0][0].k.read(torch.bfloat16).dtype == torch.bfloat16
    assert cache.nbytes() == model.schedule().kv_bytes(model.schedule().stored_tokens, 1, 2)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        prepare(model, torch.float16)


def test_a_layout_comes_undone_when_a_model_moves(model: VAR) -> None:
    before = var_logits(model)
    moved = prepare(model).double()
    weight = moved.head.weight
    assert weight.dtype == torch.float64
    torch.testing.assert_close(var_logits(moved.float()), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packs", [True, False])
def test_a_prepared_layer_is_the_layer(bias: bool, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if not packs:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer, x = nn.Linear(5, 7, bias=bias), torch.randn(3, 4, 5)
    for gelu in (False, True):
        ready = PreparedLinear(layer, torch.float32, gelu)
        assert ready.packed == (packs and can_pack(layer.weight))
        expected = nn.functional.gelu(layer(x), approximate="tanh") if gelu else layer(x)
        torch.testing.assert_close(ready(x), expected, rtol=1e-5, atol=1e-6)
    other = torch.randn(7)
    torch.testing.assert_close(PreparedLinear(layer, torch.float32)(x, other), x @ layer.weight.T + other)


def test_infinity_and_llamagen_are_prepared_too() -> None:
    torch.manual_seed(0)
    infinity = Infinity(2, 64, 4, bits=4, text_width=16, text_tokens=8, chunks=2).eval()
    text, mask = torch.randn(1, 3, 16), torch.ones(1, 3, dtype=torch.bool)
    codes = torch.randn(1, sum(s * s for s in SIDES) - 1, 4)
    raster = LlamaGen(2, 64, 4, 64, classes=5, codebook_size=16, side=4).eval()
    words = torch.randint(16, (1, 15))

    def outputs() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return infinity(text, mask, codes, [(s, s) for s in SIDES]), raster(torch.tensor([2]), words)

    before = outputs()
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.05)):
        prepare(infinity, dtype)
        prepare(raster, dtype)
        for new, old in zip(outputs(), before, strict=True):
            torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance * old.abs().max().item())
            assert dtype is None or not torch.equal(new, old)
    assert not any(type(m) is nn.Linear for net in (infinity, raster) for m in net.modules())


# ---- patches


def test_folding_is_pixel_unshuffle_of_every_grid() -> None:
    torch.manual_seed(0)
    cells = torch.randn(2, 4 * sum(h * w for h, w in GRIDS), 3)
    tokens = fold(cells, GRIDS, 2)
    assert torch.equal(unfold(tokens, GRIDS, 2), cells)
    start = 0
    for h, w in GRIDS:
        part = cells[:, 4 * start : 4 * (start + h * w)].transpose(1, 2).unflatten(2, (2 * h, 2 * w))
        expected = nn.functional.pixel_unshuffle(part, 2).flatten(2).transpose(1, 2)
        assert torch.equal(tokens[:, start : start + h * w], expected)
        start += h * w
    assert cells_of((1, (2, 3)), 2) == ((2, 2), (4, 6))
    with pytest.raises(ConfigError, match="do not fill"):
        fold(cells[:, 1:], GRIDS, 2)


def patched() -> tuple[Infinity, InfinityVAE, Tensor, Tensor]:
    """Infinity-8B's shape, small: tokens of 2 x 2 cells of 3 bits."""
    torch.manual_seed(0)
    model = Infinity(2, 64, 4, bits=12, text_width=16, text_tokens=8, chunks=2, patch=2)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.5)
    tokenizer = InfinityVAE(3, 32, (1, 1), 1, sides=(2, 4, 6))
    return model.eval(), tokenizer.eval(), torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool)


def test_patches_generate_what_teacher_forcing_predicts() -> None:
    model, tokenizer, text, mask = patched()
    scales = ((1, 1), (2, 2), (3, 3))
    heard: list[Any] = []
    tokens, images = model.generate(text, mask, tokenizer, scales, GREEDY, Guidance(), callback=heard.append)
    assert tokens.indices.shape == (2, 4 * 14, 3)
    assert tokens.layout.scales == ((2, 2), (4, 4), (6, 6))
    assert images.shape == (2, 3, 12, 12)
    torch.testing.assert_close(tokenizer.decode(tokens).clamp(0, 1), images)
    torch.testing.assert_close(heard[-1].total, tokenizer.codes(tokens))
    inputs = tokenizer.quantizer.teacher_inputs(tokens.indices, tokens.layout.scales)
    codes = fold(inputs, scales[1:], 2)
    with torch.no_grad():
        forced = model(text, mask, codes, scales)
    torch.testing.assert_close(torch.cat([s.logits for s in heard], 1), forced, rtol=1e-5, atol=1e-5)
    assert torch.equal(unfold(forced.argmax(-1), scales, 2), tokens.indices)


def test_given_cells_stay_where_patches_are_drawn() -> None:
    model, tokenizer, text, mask = patched()
    scales = ((1, 1), (2, 2), (3, 3))
    words = torch.randint(2, (2, 56, 3))
    held = torch.rand(2, 56) < 0.5
    tokens, _ = model.generate(text, mask, tokenizer, scales, GREEDY, given=(words, held))
    assert torch.equal(tokens.indices[held], words[held])
    assert not torch.equal(tokens.indices, words)
    with pytest.raises(ConfigError, match="Given cells are"):
        model.generate(text, mask, tokenizer, scales, GREEDY, given=(words, held[:, 1:]))


def test_patches_must_divide_the_bits_and_fit_the_tokenizer() -> None:
    with pytest.raises(ConfigError, match="do not divide among"):
        Infinity(2, 64, 4, bits=10, text_width=16, chunks=2, patch=2)
    model, _, text, mask = patched()
    with pytest.raises(ConfigError, match="draws 3 single bits a cell"):
        model.generate(text, mask, InfinityVAE(12, 32, (1, 1), 1, sides=(1, 2, 3)).eval(), ((1, 1), (2, 2), (3, 3)))


def test_the_patched_quantizer_sums_what_the_tokenizers_own_does() -> None:
    _, tokenizer, _, _ = patched()
    scales, cells = ((1, 1), (2, 2), (3, 3)), ((2, 2), (4, 4), (6, 6))
    bits = torch.randint(2, (1, 56, 3))
    folded = fold(bits, scales, 2)
    quantizer, total = PatchedQuantizer(tokenizer.quantizer, 2), None
    for number, part in enumerate(folded.split([1, 4, 9], 1)):
        total = quantizer.add_scale(total, part.unflatten(1, scales[number]), number, scales)
        torch.testing.assert_close(total, tokenizer.quantizer.partial_sums(bits, cells)[number])
