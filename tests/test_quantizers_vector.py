"""VQ by moving average and by gradient, against upstream's fixtures, and what a codebook must survive."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.quantizer_checks import assert_codes, assert_grad, assert_loss, fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.codeword_entropy import codeword_entropies
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer, VectorQuantizer, nearest_codeword


@needs_shared("fixtures")
def test_taming_with_beta_on_the_legacy_term():
    tensors, config = fixture("taming_vq_legacy")
    quantizer = GradientVectorQuantizer(config["n_e"], config["e_dim"], config["beta"], legacy=True)
    quantizer.load_state_dict({"codebook": tensors["codebook"]})
    z = tensors["input"].requires_grad_()
    out = quantizer(z)
    out.loss.backward()
    assert torch.equal(out.indices, tensors["indices"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_loss(out.loss, tensors["loss"])
    assert_grad(z.grad, tensors["grad_input"])
    assert_grad(quantizer.codebook.grad, tensors["grad_codebook"])


def test_right_beta_stands_at_the_commitment():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    grads = {}
    for legacy in (False, True):
        quantizer = GradientVectorQuantizer(8, 4, 0.25, legacy=legacy)
        quantizer.load_state_dict({"codebook": torch.randn(8, 4, generator=torch.Generator().manual_seed(1))})
        loss = quantizer(z).loss
        terms = quantizer.loss_terms(z)
        assert_loss(terms["codebook_loss"] * 1.25, loss)  # the two terms have one value
        grads[legacy] = torch.autograd.grad(loss, (z, quantizer.codebook))
    torch.testing.assert_close(grads[False][0] * 4, grads[True][0])
    torch.testing.assert_close(grads[False][1], grads[True][1] * 4)


@needs_shared("fixtures")
def test_taming_moving_average():
    tensors, config = fixture("taming_vq_ema")
    quantizer = VectorQuantizer(config["n"], config["dim"], config["beta"], config["decay"], dead_below=0,
                                smoothing=config["eps"])
    quantizer.codebook.copy_(tensors["codebook_before"])
    quantizer.ema_counts.copy_(tensors["cluster_size_before"])
    quantizer.ema_sums.copy_(tensors["embed_avg_before"])
    out = quantizer(tensors["input"])
    assert torch.equal(out.indices.flatten(), tensors["indices"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_loss(out.loss, tensors["loss"])
    torch.testing.assert_close(quantizer.ema_counts, tensors["cluster_size_after"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantizer.ema_sums, tensors["embed_avg_after"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantizer.codebook, tensors["codebook_after"], rtol=1e-5, atol=1e-6)


@needs_shared("fixtures")
def test_titok_on_the_sphere():
    tensors, config = fixture("titok_vq_l2")
    quantizer = GradientVectorQuantizer(config["codebook_size"], config["token_size"], config["commitment_cost"],
                                        normalize=True)
    quantizer.load_state_dict({"codebook": tensors["codebook"]})
    z = tensors["input"].requires_grad_()
    out = quantizer(z)
    out.loss.backward()
    assert torch.equal(out.indices, tensors["indices"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_loss(out.loss, tensors["quantizer_loss"])
    terms = quantizer.loss_terms(z)
    assert_loss(terms["codebook_loss"], tensors["codebook_loss"])
    assert_loss(quantizer.beta * terms["commitment"], tensors["commitment_loss"])
    assert_grad(z.grad, tensors["grad_input"])
    assert_grad(quantizer.codebook.grad, tensors["grad_codebook"])


@needs_shared("fixtures")
def test_llamagen_with_entropy():
    tensors, config = fixture("llamagen_vq")
    quantizer = GradientVectorQuantizer(config["codebook_size"], config["dim"], config["beta"],
                                        normalize=config["l2_norm"], entropy=config["entropy_loss_ratio"])
    quantizer.load_state_dict({"codebook": tensors["codebook"]})
    z = tensors["input"].requires_grad_()
    out = quantizer(z)
    out.loss.backward()
    assert torch.equal(out.indices.flatten(), tensors["indices"])
    assert_codes(out.z_q, tensors["quantized"])
    terms = quantizer.loss_terms(z)
    assert_loss(terms["codebook_loss"], tensors["vq_loss"])
    assert_loss(quantizer.beta * terms["commitment"], tensors["commit_loss"])
    assert_loss(quantizer.entropy * (terms["per_sample_entropy"] - terms["codebook_entropy"]), tensors["entropy_loss"])
    assert_loss(out.loss, tensors["vq_loss"] + tensors["commit_loss"] + tensors["entropy_loss"])
    assert_grad(z.grad, tensors["grad_input"])
    assert_grad(quantizer.codebook.grad, tensors["grad_codebook"])


def plain_codeword_entropies(z: Tensor, codewords: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition, all probabilities at once."""
    log_p = (z @ codewords.T + bias).log_softmax(1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(1).mean(), -(mean * (mean + eps).log()).sum()


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_codeword_entropies_and_gradients_are_those_of_the_definition(monkeypatch, eps):
    monkeypatch.setattr("vtc.tokenizers.codeword_entropy.PIECE", 40)  # several pieces
    torch.manual_seed(0)
    shapes = ((21, 3), (9, 3), (9,))
    z, codewords, bias = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    results = []
    for form in (codeword_entropies, plain_codeword_entropies):
        per_sample, of_codes = form(z, codewords, bias, eps)
        grads = torch.autograd.grad(per_sample - 0.7 * of_codes, (z, codewords, bias))
        results.append([per_sample, of_codes, *grads])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_nearest_codeword_is_the_one_of_all_distances_even_under_autocast():
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 16), torch.randn(64, 16)
    expected = torch.cdist(z.double(), codebook.double()).argmin(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codeword(z, codebook, chunk=64), expected)
    assert nearest_codeword(torch.zeros(1, 2), torch.ones(3, 2)).item() == 0  # the lowest index on ties


@given(st.sampled_from([VectorQuantizer, GradientVectorQuantizer]), st.booleans(), st.integers(1, 30),
       st.integers(1, 6), st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_codes_and_indices_round_trip(kind, normalize, size, dim, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    quantizer = kind(size, dim, normalize=normalize).eval()
    out = quantizer(torch.randn(2, dim, *shape, generator=generator))
    assert out.indices.shape == (2, *shape)
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    indices = torch.randint(size, (2, *shape), generator=generator)
    codes = quantizer.indices_to_codes(indices)
    # Its own word again, or one that float32 cannot tell from it: in one dimension the sphere has two points.
    torch.testing.assert_close(quantizer(codes).z_q, codes, rtol=0, atol=1e-3)
    assert out.loss == 0


def test_a_codeword_is_its_own_index():
    torch.manual_seed(0)
    for quantizer in (VectorQuantizer(500, 8).eval(), GradientVectorQuantizer(500, 8, normalize=True).eval()):
        indices = torch.randint(500, (2, 9, 9))
        assert torch.equal(quantizer(quantizer.indices_to_codes(indices)).indices, indices)


@pytest.mark.parametrize("kind", [VectorQuantizer, GradientVectorQuantizer])
@pytest.mark.parametrize("normalize", [False, True])
def test_straight_through_gradient(kind, normalize):
    torch.manual_seed(0)
    z, cotangent = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5)
    out = kind(8, 4, normalize=normalize)(z)
    expected = torch.autograd.grad(F.normalize(z, dim=1) if normalize else z, z, cotangent)[0]
    torch.testing.assert_close(torch.autograd.grad(out.z_q, z, cotangent)[0], expected, rtol=1e-6, atol=1e-7)


def test_moving_average_by_hand():
    quantizer = VectorQuantizer(2, 1, decay=0.75, dead_below=0)
    quantizer._set_codebook(torch.tensor([[0.0], [10.0]]))
    quantizer(torch.tensor([[[1.0, 2.0, 9.0]]]))
    # counts 0.75 * 1 + 0.25 * (2, 1); sums 0.75 * (0, 10) + 0.25 * (3, 9)
    assert quantizer.ema_counts.tolist() == [1.25, 1.0]
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[0.75 / 1.25], [9.75]]))


@pytest.mark.parametrize("kind", [VectorQuantizer, GradientVectorQuantizer])
@pytest.mark.parametrize("normalize", [False, True])
def test_dead_codewords_come_back_to_life(kind, normalize):
    torch.manual_seed(0)
    quantizer = kind(16, 4, dead_below=0.1, normalize=normalize)
    far = torch.full((16, 4), 50.0) + torch.arange(16)[:, None]
    quantizer._set_codebook(F.normalize(far, dim=1) if normalize else far)
    z = torch.randn(4, 4, 64)
    for _ in range(400):
        indices = quantizer(z).indices
    assert len(indices.unique()) >= 14


def test_a_learned_codebook_is_not_reset_unless_asked():
    quantizer = GradientVectorQuantizer(16, 4)
    before = quantizer.codebook.detach().clone()
    for _ in range(3):
        quantizer(torch.randn(2, 4, 8))
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("kind", [VectorQuantizer, GradientVectorQuantizer])
def test_start_from_finds_the_clusters(kind):
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = (centres[:, None] + 0.01 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    quantizer = kind(3, 2)
    quantizer.start_from(points, generator)
    assert torch.cdist(centres, quantizer.codewords).amin(1).max() < 0.05


def test_only_the_codebook_is_saved():
    assert list(VectorQuantizer(4, 2).state_dict()) == ["codebook"]
    assert list(GradientVectorQuantizer(4, 2).state_dict()) == ["codebook"]
    assert not list(VectorQuantizer(4, 2).parameters())


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError):
        VectorQuantizer(0, 4)
    with pytest.raises(ConfigError):
        GradientVectorQuantizer(4, 4, temperature=0)
    with pytest.raises(ConfigError, match="latents"):
        VectorQuantizer(4, 4)(torch.zeros(1, 3, 2))
