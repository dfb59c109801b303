"""LFQ, GroupLFQ and the closed form of their entropy, against upstream's fixtures and the plain softmax form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.quantizer_checks import assert_codes, assert_grad, assert_loss, fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.bits import (
    bit_entropies,
    mean_code_probabilities,
    pack_bits,
    pack_tokens,
    unpack_bits,
    unpack_tokens,
)
from vtc.tokenizers.lookup_free import LFQ, GroupLFQ, annealed_entropy_weight
from vtc.tokenizers.wetok import WeTok


def plain_entropies(logits: Tensor, eps: float = 0.0, guard: str = "add") -> tuple[Tensor, Tensor]:
    """The definition: a softmax over all 2^d codes. (g, d, N) logits to (g,) and (g,)."""
    bits = logits.shape[1]
    codes = 2.0 * ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1).to(logits) - 1
    scores = torch.einsum("gdn,kd->gnk", logits / 2, codes)
    p, log_p = scores.softmax(-1), scores.log_softmax(-1)
    mean = p.mean(1)
    log_mean = mean.clamp(min=eps).log() if guard == "clamp" else (mean + eps).log()
    return -(p * log_p).sum(-1).mean(-1), -(mean * log_mean).sum(-1)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize(("eps", "guard"), [(0.0, "add"), (1e-3, "add"), (1e-2, "clamp")])
def test_closed_form_equals_the_softmax_over_all_codes(bits, eps, guard):
    torch.manual_seed(bits)
    logits = torch.randn(3, bits, 17, dtype=torch.float64).mul_(3).requires_grad_()
    weights = torch.randn(2, 3, dtype=torch.float64)
    values, grads = [], []
    for form in (bit_entropies, plain_entropies):
        per_sample, of_codes = form(logits, eps, guard)
        values.append((per_sample, of_codes))
        grads.append(torch.autograd.grad((weights[0] * per_sample + weights[1] * of_codes).sum(), logits)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_closed_form_passes_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bit_entropies(x, 1e-5), logits)


def test_pieces_make_no_difference(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 50, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        total = torch.stack(bit_entropies(logits)).sum()
        return total, torch.autograd.grad(total, logits)[0]

    whole = run()
    monkeypatch.setattr("vtc.tokenizers.bits.TABLE_SIZE", 64)  # eight columns: pieces of eight samples
    torch.testing.assert_close(run(), whole, rtol=1e-12, atol=1e-14)


def test_extreme_latents_and_half_precision_stay_finite():
    # 4 u / T of the largest fp16 latent is far beyond fp16.
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        values = torch.tensor([0.0, 1e-4, -3.0, 60000.0, -0.01], dtype=dtype)
        z = values.repeat(8).reshape(1, 8, 5).requires_grad_()
        quantizer = GroupLFQ(2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            out = quantizer(z)
            loss = out.loss - 0.25 * quantizer.loss_terms(z)["commitment"]
        assert out.z_q.dtype == dtype
        assert loss.isfinite()
        grad = torch.autograd.grad(loss, z)[0]
        assert grad.isfinite().all()


def test_half_precision_loses_nothing_but_the_rounding_of_the_latent():
    torch.manual_seed(0)
    z = torch.randn(2, 16, 5, 5).mul_(0.02).bfloat16()
    quantizer = GroupLFQ(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(z)
    high = quantizer(z.float())
    assert torch.equal(low.loss, high.loss)
    assert torch.equal(low.indices, high.indices)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_bits_and_indices_round_trip(data):
    bits = data.draw(st.integers(1, 62))
    order = data.draw(st.sampled_from(["lsb_first", "msb_first"]))
    indices = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=20)))
    unpacked = unpack_bits(indices, bits, order)
    assert torch.equal(pack_bits(unpacked, order), indices)
    first = [i >> (0 if order == "lsb_first" else bits - 1) & 1 for i in indices.tolist()]
    assert unpacked[..., 0].tolist() == [bool(b) for b in first]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_tokens_of_any_cut_round_trip(data):
    cut = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5)))
    order = data.draw(st.sampled_from(["lsb_first", "msb_first"]))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=2))
    bits = torch.rand(2, sum(cut), *shape) > 0.5
    indices = pack_tokens(bits, cut, order)
    assert indices.shape == (2, *shape, len(cut))
    assert torch.equal(unpack_tokens(indices, cut, order), bits)
    start = 0
    for g, n in enumerate(cut):  # each token is its own channels
        part = bits[:, start : start + n].movedim(1, -1)
        assert torch.equal(indices[..., g], pack_bits(part, order))
        start += n


@given(groups=st.integers(1, 5), bits=st.integers(1, 9), order=st.sampled_from(["lsb_first", "msb_first"]),
       seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_codes_and_indices_round_trip(groups, bits, order, seed):
    quantizer = GroupLFQ(groups, bits, bit_order=order).eval()
    indices = torch.randint(2**bits, (2, 3, 4, groups), generator=torch.Generator().manual_seed(seed))
    codes = quantizer.indices_to_codes(indices)
    assert codes.shape == (2, groups * bits, 3, 4)
    out = quantizer(codes * 0.3)
    assert torch.equal(out.indices, indices)
    assert torch.equal(out.z_q, codes)
    assert out.loss == 0


def test_zero_is_minus_one_and_the_first_channel_is_the_stated_bit():
    z = torch.tensor([0.5, 0.0, -0.5, 0.0]).view(1, 4, 1)
    for quantizer, index in ((LFQ(4), 1), (LFQ(4, bit_order="msb_first"), 8)):
        out = quantizer(z)
        assert out.z_q.flatten().tolist() == [1, -1, -1, -1]
        assert out.indices.tolist() == [[[index]]]


def test_straight_through_is_exact_and_passes_gradients_unchanged():
    torch.manual_seed(0)
    z = torch.randn(2, 8, 4, 4).mul_(37).bfloat16().requires_grad_()
    quantizer = GroupLFQ(1, 8, entropy=0, commitment=0)
    out = quantizer(z)
    assert torch.equal(out.z_q.float(), quantizer.indices_to_codes(out.indices))
    cotangent = torch.randn(2, 8, 4, 4).bfloat16()
    assert torch.equal(torch.autograd.grad(out.z_q, z, cotangent)[0], cotangent)


@pytest.mark.parametrize("name", ["wetok_gq_g2_d4", "wetok_gq_g4_d8"])
@needs_shared("fixtures")
def test_wetok_group_quantization(name):
    tensors, config = fixture(name)
    quantizer = GroupLFQ(config["groups"], config["bits_per_group"])
    z = tensors["input"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.indices, tensors["indices_bhwg"])
    assert torch.equal(out.indices.flatten(), tensors["indices"])
    for group in range(config["groups"]):
        assert torch.equal(out.indices[..., group].flatten(), tensors[f"gfq_indices_{group}"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_codes(quantizer.indices_to_codes(out.indices), tensors["decoded_codes_bhwc"].permute(0, 3, 1, 2))
    terms = quantizer.loss_terms(z)
    for term in ("per_sample_entropy", "codebook_entropy", "commitment"):
        assert_loss(terms[term], tensors[term])
    spread = terms["per_sample_entropy"] - terms["codebook_entropy"]
    assert_loss(spread, tensors["entropy_aux_loss"])
    assert_grad(torch.autograd.grad(terms["commitment"], z, retain_graph=True)[0], tensors["grad_commitment"])
    total = (out.z_q * tensors["cotangent"]).sum() + out.loss
    assert_grad(torch.autograd.grad(total, z, retain_graph=True)[0], tensors["grad_total"])
    # The fixture's float32 softmax is itself up to 2.3e-6 from a float64 run of the same formula, so only its own order
    # of operations meets its 1e-7 (compat="upstream", below): 5e-6 here, and a test compares with the truth at 1e-12.
    torch.testing.assert_close(torch.autograd.grad(spread, z)[0], tensors["grad_entropy_aux"], rtol=1e-4, atol=5e-6)
    quantizer.eval()
    out = quantizer(z)
    assert_codes(out.z_q, tensors["eval_quantized"])
    assert_loss(out.loss, tensors["eval_entropy_aux_loss"])


@needs_shared("fixtures")
@pytest.mark.parametrize("name", ["wetok_gq_g2_d4", "wetok_gq_g4_d8"])
def test_wetok_step_to_the_fixtures_own_tolerance(name):
    tensors, config = fixture(name)
    quantizer = GroupLFQ(config["groups"], config["bits_per_group"], compat="upstream").train()
    z = tensors["input"].requires_grad_()
    terms, out = quantizer.loss_terms(z), quantizer(z)
    for term in ("per_sample_entropy", "codebook_entropy", "commitment"):
        assert_loss(terms[term], tensors[term])
    spread = terms["per_sample_entropy"] - terms["codebook_entropy"]
    assert_grad(torch.autograd.grad(spread, z)[0], tensors["grad_entropy_aux"])
    total = (out.z_q * tensors["cotangent"]).sum() + out.loss
    assert_grad(torch.autograd.grad(total, z)[0], tensors["grad_total"])


@needs_shared("fixtures")
def test_lucidrains_step_to_the_fixtures_own_tolerance():
    tensors, _ = fixture("lucidrains_lfq_g4_d8")
    quantizer = GroupLFQ(4, 8, codebook_entropy="per_group", guard="clamp", bit_order="msb_first", compat="upstream")
    z = tensors["input"].requires_grad_()
    out = quantizer.train()(z)
    assert_loss(out.loss, tensors["aux_loss"])
    assert_grad(torch.autograd.grad(out.loss, z)[0], tensors["grad_input"])


@pytest.mark.parametrize("codebook_entropy", ["pooled", "per_group"])
def test_the_published_form_and_the_closed_form_are_one(codebook_entropy):
    torch.manual_seed(0)
    z = (0.05 * torch.randn(2, 12, 3, 5, dtype=torch.float64)).requires_grad_()
    values, grads = [], []
    for compat in (None, "upstream"):
        quantizer = GroupLFQ(3, 4, codebook_entropy=codebook_entropy, eps=1e-5, compat=compat)
        loss = quantizer(z).loss
        values.append(loss.detach())
        grads.append(torch.autograd.grad(loss, z)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-11)
    with pytest.raises(ConfigError, match="compat"):
        GroupLFQ(3, 4, compat="downstream")


@pytest.mark.parametrize("guard", ["add", "clamp"])
def test_the_published_form_is_finite_without_eps_and_takes_rows(guard):
    """Most of 16 codes have a mean probability of 0 in float32, whose logarithm must not show."""
    z = torch.full((2, 8), 3.0, requires_grad=True)
    losses = []
    for compat in (None, "upstream"):
        terms = GroupLFQ(2, 4, eps=0, guard=guard, compat=compat).loss_terms(z)
        spread = terms["per_sample_entropy"] - terms["codebook_entropy"]
        assert torch.autograd.grad(spread, z)[0].isfinite().all()
        losses.append(spread.detach())
    assert losses[0].abs() < 1e-6 and losses[1].abs() < 1e-6


def test_wetok_hands_the_form_of_the_loss_to_its_quantizer():
    model = WeTok(32, (1, 1), 1, groups=2, bits_per_group=4, compat="upstream")
    assert model.quantizer.compat == model.to_generative().quantizer.compat == "upstream"
    assert WeTok(32, (1, 1), 1, groups=2, bits_per_group=4).quantizer.compat is None


def test_without_entropy_any_number_of_bits_trains():
    z = torch.randn(2, 40, 3, requires_grad=True)
    out = LFQ(40, entropy=0)(z)
    torch.testing.assert_close(out.loss, 0.25 * (z - z.sign()).square().mean())


@needs_shared("fixtures")
def test_wetok_gradient_is_the_one_of_the_definition():
    tensors, config = fixture("wetok_gq_g2_d4")
    groups, bits = config["groups"], config["bits_per_group"]
    z = tensors["input"].double().requires_grad_()
    terms = GroupLFQ(groups, bits).loss_terms(z)
    rows = z.reshape(2, groups, bits, -1).permute(2, 1, 0, 3).reshape(1, bits, -1)
    per_sample, of_codes = plain_entropies(rows * 400, 1e-5)
    ours = torch.autograd.grad(terms["per_sample_entropy"] - terms["codebook_entropy"], z)[0]
    truth = torch.autograd.grad((per_sample - of_codes).sum(), z)[0]
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(tensors["grad_entropy_aux"].double(), truth, rtol=1e-4, atol=5e-6)


@needs_shared("fixtures")
def test_open_magvit2_factorised_tokens():
    tensors, config = fixture("magvit2_lfq_factorised_6_8")
    quantizer = LFQ(config["bits"], token_bits=tuple(config["factorized_bits"]))
    assert quantizer.vocab == (64, 256)
    out = quantizer(tensors["input"])
    assert torch.equal(out.indices[..., 0].flatten(), tensors["indices_pre"])
    assert torch.equal(out.indices[..., 1].flatten(), tensors["indices_post"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_codes(quantizer.indices_to_codes(out.indices), tensors["quantized"])


@needs_shared("fixtures")
def test_lucidrains_lfq():
    tensors, _ = fixture("lucidrains_lfq_g4_d8")
    quantizer = GroupLFQ(4, 8, codebook_entropy="per_group", guard="clamp", bit_order="msb_first")
    z = tensors["input"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.indices, tensors["indices"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_loss(out.loss, tensors["aux_loss"])
    terms = quantizer.loss_terms(z)
    assert_loss(terms["per_sample_entropy"], tensors["per_sample_entropy"])
    assert_loss(terms["codebook_entropy"], tensors["batch_entropy"])
    assert_loss(terms["commitment"], tensors["commitment"])
    # Upstream clamps the probabilities of single samples at 1e-5 too, which does not factorise over bits.
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], tensors["grad_input"], rtol=1e-4, atol=6e-6)


def test_histogram_counts_hard_codes():
    torch.manual_seed(0)
    ones = torch.rand(2, 5, 40) > 0.4
    histogram = mean_code_probabilities(torch.where(ones, 1e4, -1e4))
    for group in range(2):
        counts = torch.bincount(pack_bits(ones[group].T, "lsb_first"), minlength=32)
        assert torch.equal((histogram[group] * 40).round().long(), counts)


def test_eighteen_bits_and_their_gradient():
    torch.manual_seed(0)
    z = torch.randn(1, 18, 8, 8).mul_(0.01).requires_grad_()
    terms = LFQ(18, eps=0).loss_terms(z)
    terms["codebook_entropy"].backward()
    assert 0 < terms["codebook_entropy"] < 18 * 0.6932
    assert terms["codebook_entropy"] >= terms["per_sample_entropy"]  # concavity of the entropy
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().max() > 0


def test_annealing_goes_down_to_the_weight_and_stays():
    assert annealed_entropy_weight(0) == pytest.approx(0.4)
    assert annealed_entropy_weight(1000) == pytest.approx(0.25)
    assert annealed_entropy_weight(2000) == annealed_entropy_weight(10**6) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="step"):
        annealed_entropy_weight(0, over=0)


def test_a_changed_weight_counts_from_the_next_step():
    quantizer, z = GroupLFQ(2, 4), torch.randn(2, 8, 3)
    terms = quantizer.loss_terms(z)
    for step in (0, 500, 3000):
        quantizer.entropy = weight = annealed_entropy_weight(step)
        spread = terms["per_sample_entropy"] - terms["codebook_entropy"]
        torch.testing.assert_close(quantizer(z).loss, weight * spread + 0.25 * terms["commitment"])


@pytest.mark.parametrize("settings", [
    dict(groups=0, bits=8), dict(groups=1, bits=8, bit_order="big"), dict(groups=1, bits=8, token_bits=(4, 5)),
    dict(groups=1, bits=63), dict(groups=1, bits=8, codebook_entropy="none"), dict(groups=1, bits=8, temperature=0),
    dict(groups=1, bits=8, guard="foo"), dict(groups=1, bits=8, eps=-1e-5)])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        GroupLFQ(**settings)


def test_wrong_latents_and_impossible_histograms_are_refused():
    with pytest.raises(ConfigError, match="latents"):
        LFQ(8)(torch.zeros(1, 7, 2, 2))
    with pytest.raises(ConfigError, match="split the bits"):
        LFQ(32)(torch.zeros(1, 32, 2, 2))
    assert LFQ(32).eval()(torch.zeros(1, 32, 2, 2)).indices.shape == (1, 2, 2, 1)
