"""IBQ against upstream's fixture and its definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantizer_checks import assert_codes, assert_grad, assert_loss, fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.index_backprop import IndexBackpropQuantizer


@needs_shared("fixtures")
def test_ibq():
    tensors, config = fixture("ibq")
    quantizer = IndexBackpropQuantizer(config["n_e"], config["e_dim"], config["beta"], entropy=0.05,
                                       temperature=config["entropy_temperature"])
    quantizer.load_state_dict({"codebook": tensors["codebook"]})
    z = tensors["input"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.indices.flatten(), tensors["indices"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_loss(out.loss, tensors["quant_loss"] + 0.05 * tensors["entropy_loss"])
    terms = quantizer.loss_terms(z)
    assert_loss(terms["soft_loss"] + terms["commitment"] + 0.25 * terms["codebook_loss"], tensors["quant_loss"])
    assert_loss(terms["per_sample_entropy"], tensors["sample_entropy"])
    assert_loss(terms["codebook_entropy"], tensors["avg_entropy"])
    ((out.z_q * tensors["cotangent"]).sum() + out.loss).backward()
    assert_grad(z.grad, tensors["grad_input"])
    assert_grad(quantizer.codebook.grad, tensors["grad_codebook"])


def test_gradient_is_that_of_the_one_hot_with_a_soft_backward(monkeypatch):
    monkeypatch.setattr("vtc.tokenizers.codeword_entropy.PIECE", 30)  # several pieces
    torch.manual_seed(0)
    quantizer = IndexBackpropQuantizer(9, 3).double()
    torch.nn.init.normal_(quantizer.codebook)
    z = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 3, 7, dtype=torch.float64)
    out = quantizer(z)
    ours = torch.autograd.grad(out.z_q, (z, quantizer.codebook), cotangent)

    soft = torch.einsum("bdn,kd->bnk", z, quantizer.codebook).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 9)
    mixture = torch.einsum("bnk,kd->bdn", hard - soft.detach() + soft, quantizer.codebook)
    torch.testing.assert_close(out.z_q, mixture)
    torch.testing.assert_close(ours, torch.autograd.grad(mixture, (z, quantizer.codebook), cotangent))
    assert (ours[1].abs().amax(1) > 0).all()  # every codeword learns


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_codes_and_indices_round_trip(size, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    quantizer = IndexBackpropQuantizer(size, dim).eval()
    out = quantizer(torch.randn(2, dim, 3, 2, generator=generator))
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    assert out.loss == 0
    # A codeword is its own best match only among words of one length.
    quantizer.codebook.data = F.normalize(torch.randn(size, dim + 1, generator=generator), dim=1)
    quantizer.dim = dim + 1
    indices = torch.randint(size, (2, 4), generator=generator)
    assert torch.equal(quantizer(quantizer.indices_to_codes(indices)).indices, indices)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError):
        IndexBackpropQuantizer(0, 4)
    with pytest.raises(ConfigError, match="latents"):
        IndexBackpropQuantizer(4, 4)(torch.zeros(1, 3, 2))
