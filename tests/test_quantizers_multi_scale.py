"""VAR's multi-scale residual VQ and Infinity's multi-scale BSQ, against fixtures and the sums written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.quantizer_checks import assert_grad, assert_loss, fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.multi_scale_binary import INFINITY_1M, MultiScaleBinaryQuantizer
from vtc.tokenizers.multi_scale_residual import VAR_256, VAR_512, MultiScaleResidualQuantizer, Phi, phi_of_scale
from vtc.tokenizers.scales import grids, split_scales


def upstream(name: str, prefix: str, dim: int) -> tuple[MultiScaleResidualQuantizer, dict[str, Tensor], Tensor]:
    """Quantizer with a fixture's weights, the fixture, and its indices as (B, L)."""
    tensors, config = fixture(name)
    quantizer = MultiScaleResidualQuantizer(config["vocab_size"], dim, config["v_patch_nums"], config["beta"],
                                            config["using_znorm"], config["share_quant_resi"], config["quant_resi"])
    state = {"codebook": tensors[f"{prefix}embedding.weight"]}
    for i in range(config["share_quant_resi"]):
        for kind in ("weight", "bias"):
            state[f"phi.{i}.{kind}"] = tensors[f"{prefix}quant_resi.qresi_ls.{i}.{kind}"]
    quantizer.load_state_dict(state)
    indices = torch.cat([tensors[f"indices_scale{s}"] for s in range(len(quantizer.scales))], 1)
    return quantizer, tensors, indices


@pytest.mark.parametrize(("name", "prefix"), [("var_quant_10scale", "sd."), ("var_vqvae_tiny", "sd.quantize.")])
@needs_shared("fixtures")
def test_var(name, prefix):
    quantizer, tensors, indices = upstream(name, prefix, 8)
    z = tensors["latent"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.indices, indices)
    assert_loss(out.loss, tensors["vq_loss"])
    sums = quantizer.partial_sums(indices)
    for found, expected in ((out.z_q, "f_hat"), (quantizer.indices_to_codes(indices), "f_hat"),
                            (quantizer.teacher_inputs(indices), "var_input"),
                            *((total, f"f_hat_upto_scale{s}") for s, total in enumerate(sums)),
                            *((quantizer.next_scale_input(total, s), f"next_input_after_scale{s}")
                              for s, total in enumerate(sums))):
        if expected in tensors:
            torch.testing.assert_close(found, tensors[expected], rtol=0, atol=2e-6)
    if "grad_vq_loss_wrt_latent" in tensors:
        out.loss.backward()
        assert_grad(z.grad, tensors["grad_vq_loss_wrt_latent"])
        assert_grad(quantizer.codebook.grad, tensors["grad_vq_loss_wrt_codebook"])


def test_phis_of_ten_scales_are_those_of_float64():
    assert [phi_of_scale(s, 10, 4) for s in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_of_scale(s, 10, 10) for s in range(10)] == list(range(10))
    assert [phi_of_scale(s, 5, 1) for s in range(5)] == [0] * 5
    assert phi_of_scale(0, 1, 4) == 0


def test_schedules_have_their_published_lengths():
    for scales, tokens in ((VAR_256, 680), (VAR_512, 2240), (INFINITY_1M, 10521)):
        assert sum(h * w for h, w in grids(scales)) == tokens


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scales", [[(1, 2), (3, 3), (4, 6)], [5], [2, 2, 3, 3]])
def test_var_steps_written_out(normalize, scales):
    torch.manual_seed(0)
    quantizer = MultiScaleResidualQuantizer(20, 3, scales, normalize=normalize, phis=2, phi_share=0.3).double()
    torch.nn.init.normal_(quantizer.codebook)
    size = grids(scales)[-1]
    z = torch.randn(2, 3, *size, dtype=torch.float64)
    out = quantizer(z)
    kernels = [(p.weight, p.bias) for p in quantizer.phi if isinstance(p, Phi)]
    rest, total, start, losses = z.clone(), torch.zeros_like(z), 0, []
    for s, (h, w) in enumerate(grids(scales)):
        small = F.adaptive_avg_pool2d(rest, (h, w)).permute(0, 2, 3, 1).reshape(-1, 3)
        if normalize:
            indices = torch.cosine_similarity(small[:, None], quantizer.codebook[None], dim=2).argmax(1)
        else:
            indices = torch.cdist(small, quantizer.codebook).argmin(1)
        indices = indices.view(2, h * w)
        assert torch.equal(out.indices[:, start : start + h * w], indices)
        start += h * w
        codes = quantizer.codebook[indices].transpose(1, 2).view(2, 3, h, w)
        up = F.interpolate(codes, size=size, mode="bicubic") if s < len(scales) - 1 else codes
        step = 0.7 * up + 0.3 * F.conv2d(up, *kernels[phi_of_scale(s, len(scales), 2)], padding=1)
        rest, total = rest - step, total + step
        losses.append(1.25 * (total - z).square().mean())
    torch.testing.assert_close(out.z_q, total)
    torch.testing.assert_close(out.loss, sum(losses) / len(losses))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_var_round_trip_and_step_by_step(sides, phis, seed):
    torch.manual_seed(seed)
    quantizer = MultiScaleResidualQuantizer(16, 4, sides, phis=phis).eval()
    torch.nn.init.normal_(quantizer.codebook)
    out = quantizer(torch.randn(2, 4, sides[-1], sides[-1]))
    torch.testing.assert_close(quantizer.indices_to_codes(out.indices), out.z_q, rtol=0, atol=1e-5)
    total = None
    for number, part in enumerate(split_scales(out.indices, quantizer.scales)):
        total = quantizer.add_scale(total, part, number)
        seen = sum(h * w for h, w in quantizer.scales[: number + 1])
        torch.testing.assert_close(quantizer.indices_to_codes(out.indices[:, :seen]), total)
    assert total is not None and torch.equal(total, quantizer.indices_to_codes(out.indices))


def test_scales_may_change_from_call_to_call():
    torch.manual_seed(0)
    quantizer = MultiScaleResidualQuantizer(16, 4).eval()
    other: list[tuple[int, int]] = [(1, 1), (2, 3), (5, 7)]
    out = quantizer(torch.randn(1, 4, 5, 7), scales=other)
    assert out.indices.shape == (1, 1 + 6 + 35)
    torch.testing.assert_close(quantizer.indices_to_codes(out.indices, other), out.z_q)
    assert quantizer.teacher_inputs(out.indices, other).shape == (1, 6 + 35, 4)


def test_var_gradients_reach_latent_codebook_and_phi():
    torch.manual_seed(0)
    quantizer = MultiScaleResidualQuantizer(16, 4, (1, 2, 4))
    z, cotangent = torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4)
    assert torch.equal(torch.autograd.grad(quantizer(z).z_q, z, cotangent)[0], cotangent)
    quantizer(z).loss.backward()
    for tensor in (z, *(p for name, p in quantizer.named_parameters() if name[:5] not in ("phi.1", "phi.2"))):
        assert tensor.grad is not None and tensor.grad.abs().max() > 0


@needs_shared("fixtures")
def test_infinity_sums_codes_of_its_bits():
    tensors, config = fixture("infinity_tiny")
    scales = [(h, w) for _, h, w in config["scale_schedule"]]
    quantizer = MultiScaleBinaryQuantizer(config["d_vae"], scales, token_bits=(1,) * config["d_vae"])
    bits = [tensors[f"greedy.bits_{s}"][:, 0].flatten(1, 2).long() for s in range(len(scales))]
    indices = torch.cat(bits, 1)
    expected = tensors["greedy.summed_codes"]
    torch.testing.assert_close(quantizer.indices_to_codes(indices), expected.view(2, 8, 16, 16), rtol=0, atol=1e-5)
    assert torch.equal(quantizer.bits(indices), indices.bool())


@pytest.mark.parametrize("token_bits", [None, (1,) * 8, (3, 5)])
def test_infinity_steps_written_out(token_bits):
    torch.manual_seed(0)
    scales = [(1, 1), (2, 3), (4, 6)]
    quantizer = MultiScaleBinaryQuantizer(8, scales, token_bits=token_bits).eval()
    z = torch.randn(2, 8, 4, 6)
    out = quantizer(z)
    rest, total, bits = z.clone(), torch.zeros_like(z), []
    for h, w in scales:
        positive = F.adaptive_avg_pool2d(rest, (h, w)) > 0
        step = F.interpolate((2.0 * positive - 1) / 8**0.5, size=(4, 6), mode="bilinear")
        rest, total = rest - step, total + step
        bits.append(positive.flatten(2).transpose(1, 2))
    assert torch.equal(quantizer.bits(out.indices), torch.cat(bits, 1))
    torch.testing.assert_close(out.z_q, total)
    torch.testing.assert_close(quantizer.indices_to_codes(out.indices), out.z_q)
    assert out.indices.shape == (2, 31, len(quantizer.vocab))


def test_infinity_trains():
    torch.manual_seed(0)
    quantizer = MultiScaleBinaryQuantizer(8, (1, 2, 4))
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    out = quantizer(z)
    for scalar in (out.z_q.square().sum(), out.loss):
        grad = torch.autograd.grad(scalar, z, retain_graph=True)[0]
        assert grad.isfinite().all() and grad.abs().max() > 0


def test_self_correction_without_noise_is_the_encoding():
    torch.manual_seed(0)
    quantizer = MultiScaleBinaryQuantizer(8, (1, 2, 4)).eval()
    z = torch.randn(2, 8, 4, 4)
    inputs, targets = quantizer.self_correction(z, strength=0.0)
    indices = quantizer(z).indices
    assert torch.equal(targets, indices)
    torch.testing.assert_close(inputs, quantizer.teacher_inputs(indices))


def test_self_correction_flips_bits_and_the_next_targets_mend_them():
    quantizer = MultiScaleBinaryQuantizer(8, (1, 2, 4, 4, 4)).eval()
    z = 0.5 * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs, targets = quantizer.self_correction(z, 1.0, noisy_scales=1, generator=torch.Generator().manual_seed(1))
    clean = quantizer(z).indices
    again = quantizer.self_correction(z, 1.0, noisy_scales=1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(inputs, again[0]) and torch.equal(targets, again[1])
    assert torch.equal(targets[:, :1], clean[:, :1])  # the first target does not know of the flip yet
    assert not torch.equal(targets[:, 1:], clean[:, 1:])
    flipped_sum = inputs[:, :4].transpose(1, 2).view(2, 8, 2, 2)  # what scale 2x2 reads: codes of the flipped 1x1
    true_sum = quantizer.teacher_inputs(clean)[:, :4].transpose(1, 2).view(2, 8, 2, 2)
    wrong = flipped_sum != true_sum
    assert wrong.any()
    # Targets of the next scale are the signs of what the flipped sum left over.
    rest = z - F.interpolate(flipped_sum[..., :1, :1], size=(4, 4), mode="nearest")
    expected = (F.adaptive_avg_pool2d(rest, 2) > 0).flatten(2).transpose(1, 2)
    assert torch.equal(quantizer.bits(targets)[:, 1:5], expected)


def test_wrong_shapes_are_refused():
    quantizer = MultiScaleResidualQuantizer(8, 4, (1, 2))
    with pytest.raises(ConfigError, match="latents"):
        quantizer(torch.zeros(1, 4, 3, 3))
    with pytest.raises(ConfigError, match="do not fill"):
        quantizer.indices_to_codes(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ConfigError):
        MultiScaleResidualQuantizer(8, 4, ())
    with pytest.raises(ConfigError):
        MultiScaleResidualQuantizer(0, 4)
    with pytest.raises(ConfigError):
        MultiScaleBinaryQuantizer(8, (1, 2)).self_correction(torch.zeros(1, 8, 2, 2), strength=2)
