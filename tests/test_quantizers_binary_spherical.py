"""BSQ against upstream's fixture and the plain softmax form."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.quantizer_checks import assert_codes, assert_grad, assert_loss, fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer
from vtc.tokenizers.bits import mean_code_probabilities


@needs_shared("fixtures")
def test_bsq_with_groups_of_nine():
    tensors, config = fixture("bsq_18_g9_group")
    settings = dict(commitment=config["beta"], entropy=config["zeta"], normalize=False)  # the fixture's z is unit-norm
    quantizer = BinarySphericalQuantizer(config["embed_dim"], config["group_size"], **settings)
    z = tensors["input_unit_norm"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.indices, tensors["group_indices"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_loss(out.loss, tensors["loss"])
    assert_grad(torch.autograd.grad(out.loss, z)[0], tensors["grad_input"])
    terms = quantizer.loss_terms(z)
    assert_loss(terms["per_sample_entropy"], tensors["per_sample_entropy"])
    assert_loss(terms["codebook_entropy"], tensors["codebook_entropy"])
    whole = BinarySphericalQuantizer(18, 9, token_bits=(18,), **settings)
    assert torch.equal(whole(z).indices[..., 0], tensors["indices"])

    histogram = mean_code_probabilities(quantizer.entropy_logits(z))  # first bit least significant
    reversed_bits = histogram.view(2, *[2] * 9).permute(0, *range(9, 0, -1)).reshape(2, 512)
    torch.testing.assert_close(reversed_bits, tensors["avg_prob"], rtol=1e-5, atol=1e-8)


def loss_bit_by_bit(z: Tensor, weight: float, commitment: float) -> dict[str, Tensor]:
    """Upstream's loss with persample_entropy_compute="analytical": (B, d, H, W) unit-norm z, temperature 1.

    Each bit has two probabilities, sigmoid(-+ 4 z / sqrt(d)), and so has their mean over the batch: (d, 2).
    """
    dim = z.shape[1]
    scores = torch.stack([-2 * z / dim**0.5, 2 * z / dim**0.5], -1)  # 2 <z, c> of the two ends of each axis
    p = scores.softmax(-1)
    mean = p.mean((0, 2, 3))
    per_sample = -(p * (p + 1e-8).log()).sum((1, 4)).mean()
    of_codes = -(mean * (mean + 1e-8).log()).sum()
    codes = torch.where(z > 0, 1.0, -1.0).to(z) / dim**0.5
    distance = (z - codes).square().sum(1).mean()
    return {"per_sample_entropy": per_sample, "codebook_entropy": of_codes, "commitment": distance, "mean": mean,
            "loss": commitment * distance + weight * (per_sample - of_codes)}


@needs_shared("fixtures")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bsq_with_a_codebook_entropy_of_single_bits(dtype):
    """The group fixture's latents and arguments, with upstream's "analytical" entropies instead of "group"."""
    tensors, config = fixture("bsq_18_g9_group")
    quantizer = BinarySphericalQuantizer(config["embed_dim"], config["group_size"], commitment=config["beta"],
                                         entropy=config["zeta"], normalize=False, codebook_entropy="bit")
    z = tensors["input_unit_norm"].to(dtype).requires_grad_()
    out, terms = quantizer(z), quantizer.loss_terms(z)
    assert torch.equal(out.indices, tensors["group_indices"])
    expected = loss_bit_by_bit(z, config["zeta"], config["beta"])
    for name in ("per_sample_entropy", "codebook_entropy", "commitment"):
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-6, atol=1e-7)
        ours, theirs = (torch.autograd.grad(t[name], z, retain_graph=True)[0] for t in (terms, expected))
        assert theirs.abs().max() > 1e-4
        assert_grad(ours, theirs)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=1e-6, atol=1e-7)
    assert_grad(torch.autograd.grad(out.loss, z)[0], torch.autograd.grad(expected["loss"], z)[0])
    histogram = mean_code_probabilities(quantizer.entropy_logits(z))
    torch.testing.assert_close(histogram, expected["mean"].detach(), rtol=1e-6, atol=1e-7)


def test_histograms_of_bits_do_not_see_that_bits_go_together():
    torch.manual_seed(0)
    z = torch.randn(64, 1, 5).repeat(1, 6, 1)  # six bits that are always equal
    group, bit = (BinarySphericalQuantizer(6, 3, temperature=0.01, codebook_entropy=kind).loss_terms(z)
                  for kind in ("group", "bit"))
    torch.testing.assert_close(group["per_sample_entropy"], bit["per_sample_entropy"])
    torch.testing.assert_close(bit["codebook_entropy"] / 6, torch.tensor(2.0).log(), rtol=0.01, atol=0)
    torch.testing.assert_close(group["codebook_entropy"] / 2, torch.tensor(2.0).log(), rtol=0.01, atol=0)


def test_entropies_are_those_of_a_softmax_over_the_corners():
    torch.manual_seed(0)
    z = F.normalize(torch.randn(3, 8, 5, dtype=torch.float64), dim=1)
    quantizer = BinarySphericalQuantizer(8, 4, temperature=0.05)
    corners = 2.0 * ((torch.arange(16)[:, None] >> torch.arange(4)) & 1) - 1
    scores = 2 / 0.05 * torch.einsum("bgcn,kc->gbnk", z.view(3, 2, 4, 5), corners.double() / 8**0.5)
    p = scores.softmax(-1)
    mean = p.mean((1, 2))
    terms = quantizer.loss_terms(z)
    torch.testing.assert_close(terms["per_sample_entropy"], -(p * p.log()).sum((0, 3)).mean())
    torch.testing.assert_close(terms["codebook_entropy"], -(mean * mean.log()).sum())


def test_infinity_counts_each_bit_by_itself():
    torch.manual_seed(0)
    z = torch.randn(2, 32, 4, 4)
    quantizer = BinarySphericalQuantizer(32, group_bits=1, temperature=0.01)
    assert quantizer.vocab == (2**32,)
    p = torch.sigmoid(400 * F.normalize(z.double(), dim=1) / 32**0.5).mean((0, 2, 3))
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).sum()
    torch.testing.assert_close(quantizer.loss_terms(z)["codebook_entropy"].double(), expected, rtol=1e-5, atol=0)


@given(st.sampled_from([(18, 9), (8, 1), (36, 6)]), st.sampled_from(["lsb_first", "msb_first"]), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_codes_and_indices_round_trip(shape, order, seed):
    dim, group_bits = shape
    quantizer = BinarySphericalQuantizer(dim, group_bits, bit_order=order).eval()
    z = torch.randn(2, dim, 3, 2, generator=torch.Generator().manual_seed(seed))
    out = quantizer(z)
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    assert torch.equal(out.z_q > 0, z > 0)
    torch.testing.assert_close(out.z_q.norm(dim=1), torch.ones(2, 3, 2))
    assert torch.equal(quantizer(out.z_q).indices, out.indices)


def test_half_precision_neither_overflows_nor_divides_by_zero():
    quantizer = BinarySphericalQuantizer(8, group_bits=4).train()
    for scale in (0.0, 1.0, 1e4):
        z = torch.full((1, 8, 2, 2), scale, dtype=torch.float16, requires_grad=True)
        out = quantizer(z)
        assert out.loss.isfinite() and out.z_q.isfinite().all()
        assert torch.autograd.grad(out.z_q.sum() + out.loss, z)[0].isfinite().all()


def test_bits_are_the_signs_of_the_latent_however_small():
    z = torch.tensor([3e4, 6e-8, -6e-8, 0.0], dtype=torch.float16).view(1, 4, 1)  # 6e-8 / 3e4 is 0 in float16
    out = BinarySphericalQuantizer(4, 4)(z)
    assert out.indices.flatten().tolist() == [0b1100]
    assert (out.z_q > 0).flatten().tolist() == [True, True, False, False]


def test_gradient_goes_through_the_projection():
    z = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 6, 3, dtype=torch.float64)
    quantizer = BinarySphericalQuantizer(6, 3)
    ours = torch.autograd.grad(quantizer(z).z_q, z, cotangent)[0]
    assert torch.equal(ours, torch.autograd.grad(F.normalize(z, dim=1), z, cotangent)[0])


def test_the_published_gradient_is_the_one_of_signs_that_are_then_divided():
    z = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 6, 3, dtype=torch.float64)
    quantizer = BinarySphericalQuantizer(6, 3, compat="upstream")
    unit = F.normalize(z, dim=1)
    published = (unit + (torch.where(unit > 0, 1.0, -1.0) - unit).detach()) / 6**0.5
    out = quantizer(z)
    torch.testing.assert_close(out.z_q, published, rtol=0, atol=1e-7)  # codes are float32
    assert torch.equal(out.z_q, quantizer.indices_to_codes(out.indices).double())
    ours, theirs = (torch.autograd.grad(codes, z, cotangent)[0] for codes in (out.z_q, published))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_loss_passes_finite_differences():
    torch.manual_seed(0)
    z = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: BinarySphericalQuantizer(6, 3)(x).loss, z)


def test_wrong_settings_are_refused():
    for wrong in (dict(dim=18, group_bits=4), dict(dim=8, group_bits=8, token_bits=(3, 3)),
                  dict(dim=8, group_bits=8, temperature=0), dict(dim=8, group_bits=8, bit_order="little"),
                  dict(dim=8, group_bits=8, codebook_entropy="pooled"),
                  dict(dim=8, group_bits=8, compat="downstream")):
        with pytest.raises(ConfigError):
            BinarySphericalQuantizer(**wrong)
    with pytest.raises(ConfigError, match="latents"):
        BinarySphericalQuantizer(9)(torch.zeros(1, 8))
