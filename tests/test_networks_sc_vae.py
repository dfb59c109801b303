"""SC-VAE against its upstream fixture, its head against the plain form, and its tiles and slices."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.fixtures import Fixture, diffusers_case
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.scale_consistent_vae import AutoencoderKL, ScaleConsistentVAE, doubled_conv

#: the published form of the head
partitioned = import_module("scripts.bench_sc_vae_head").partitioned

FIXTURES = needs_shared("fixtures", "scvae")
#: of the fixture's JSON
TOLERANCE: dict[str, Any] = dict(atol=1e-5, rtol=1e-4)


def small(**changes) -> ScaleConsistentVAE:
    torch.manual_seed(0)
    config: dict[str, Any] = dict(down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4, sample_size=32,
                                  up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 16))
    return ScaleConsistentVAE(**{**config, **changes}).eval()


@FIXTURES
@torch.no_grad()
def test_student_and_teacher_equal_upstream():
    fixture = Fixture("scvae/scvae_tiny")
    student = ScaleConsistentVAE(**fixture.config, stride=2).eval()
    student.load_state_dict(fixture.weights("student_sd."))
    posterior = student.encode(fixture["x"]).latent_dist
    torch.testing.assert_close(posterior.mean, fixture["student.mean"], **TOLERANCE)
    torch.testing.assert_close(posterior.logvar, fixture["student.logvar"], **TOLERANCE)
    sample, features = student.decode_with_features(fixture["student.z"])
    torch.testing.assert_close(sample, fixture["student.sample_partitioned"], **TOLERANCE)
    torch.testing.assert_close(student.decode(fixture["student.z"]).sample, sample, atol=0, rtol=0)
    torch.testing.assert_close(features, fixture["student.intermediate"], **TOLERANCE)

    centered = ScaleConsistentVAE(**fixture.config, stride=2, alignment="centered").eval()
    centered.load_state_dict(student.state_dict())
    torch.testing.assert_close(centered.decode(fixture["student.z"]).sample, fixture["student.sample_full"],
                               **TOLERANCE)

    teacher = ScaleConsistentVAE(**fixture.config, stride=1).eval()
    teacher.load_state_dict({**student.state_dict(), **fixture.weights("teacher_sd.")})  # the encoders are equal
    torch.testing.assert_close(teacher.encode(fixture["x"]).latent_dist.mean, fixture["teacher.z"], **TOLERANCE)
    sample, features = teacher.decode_with_features(fixture["teacher.z"])
    torch.testing.assert_close(sample, fixture["teacher.sample"], **TOLERANCE)
    torch.testing.assert_close(features, fixture["teacher.intermediate"], **TOLERANCE)


@FIXTURES
@pytest.mark.parametrize("name", ["autoencoderkl_sd_tiny", "autoencoderkl_flux_tiny"])
@torch.no_grad()
def test_stride_one_is_diffusers_autoencoder(name):
    fixture = Fixture(f"scvae/{name}")
    model = ScaleConsistentVAE(**diffusers_case(name)["config"], stride=1).eval()
    model.load_state_dict(fixture.weights())
    posterior = model.encode(fixture["x"]).latent_dist
    torch.testing.assert_close(posterior.mean, fixture["mean"], **TOLERANCE)
    torch.testing.assert_close(model.decode(fixture["z"]).sample, fixture["y"], **TOLERANCE)
    with pytest.warns(RuntimeWarning, match="ScaleConsistentVAE is not local"):
        model.enable_tiling()
    torch.testing.assert_close(model.encode(fixture["x"]).latent_dist.mode(), fixture["z_tiled"], **TOLERANCE)
    torch.testing.assert_close(model.decode(fixture["z"]).sample, fixture["y_tiled"], **TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (2, 2), (8, 10)])
def test_the_head_equals_the_partitioned_and_the_plain_form(height, width):
    features = torch.randn(2, 5, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64)
    plain = F.conv2d(F.interpolate(features, scale_factor=2.0), weight, bias, padding=1)
    for alignment, expected in (("centered", plain), ("upstream", partitioned(features, weight, bias))):
        output = doubled_conv(features, weight, bias, alignment)
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
        ours = torch.autograd.grad(output.square().sum(), (features, weight))
        theirs = torch.autograd.grad(expected.square().sum(), (features, weight), retain_graph=True)
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_the_head_works_on_one_pixel_and_odd_sizes():
    weight, bias = torch.randn(3, 5, 3, 3), torch.randn(3)
    for size in ((1, 1), (3, 1), (5, 7)):
        features = torch.randn(1, 5, *size)
        plain = F.conv2d(F.interpolate(features, scale_factor=2.0), weight, bias, padding=1)
        torch.testing.assert_close(doubled_conv(features, weight, bias, "centered"), plain, atol=1e-5, rtol=0)
        shifted = doubled_conv(features, weight, bias, "upstream")
        torch.testing.assert_close(shifted[..., 1:, 1:], plain[..., :-1, :-1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_slices_equal_the_batch():
    model = small()
    images = torch.rand(3, 3, 32, 24) * 2 - 1
    z = model.encode(images).latent_dist.mode()
    sample = model.decode(z).sample
    assert sample.shape == images.shape
    model.enable_slicing()
    torch.testing.assert_close(model.encode(images).latent_dist.mode(), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(z).sample, sample, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["upstream", "centered"])
def test_tiles_are_the_decoded_parts_blended(alignment):
    model = small(alignment=alignment)
    z = torch.randn(1, 4, 6, 10)
    whole = model.decode(z).sample
    with pytest.warns(RuntimeWarning, match="ScaleConsistentVAE is not local"):
        model.enable_tiling(tile=128)
    assert model.tiling_error(z) == 0  # all in one tile
    with pytest.warns(RuntimeWarning, match="ScaleConsistentVAE is not local"):
        model.enable_tiling(tile=32, overlap=0.5)  # 4 latents, 2 in common
    tiled = model.decode(z).sample
    assert tiled.shape == whole.shape
    left, right = (model.decoder(model.post_quant_conv(z[..., :4, x : x + 4])) for x in (0, 2))
    torch.testing.assert_close(tiled[..., :16, :16], left[..., :16, :16])
    ramp = torch.arange(16) / 16
    torch.testing.assert_close(tiled[..., :16, 16:32],
                               left[..., :16, 16:] * (1 - ramp) + right[..., :16, :16] * ramp, atol=1e-6, rtol=0)
    assert model.tiling_error(z) == pytest.approx(float((tiled - whole).abs().max()))
    images = torch.rand(1, 3, 48, 80)
    assert model.encode(images).latent_dist.mode().shape == (1, 4, 6, 10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_latent_of_one_value_a_group_is_finite(stride, training):
    model = small(block_out_channels=(32, 32, 32), norm_num_groups=32, stride=stride).train(training)
    assert not model.is_local
    side = model.downsample
    images = (torch.rand(1, 3, side, side) * 2 - 1).requires_grad_(True)
    posterior = model.encode(images).latent_dist
    assert posterior.mean.shape[-2:] == (1, 1)
    sample = model.decode(posterior.mode()).sample
    assert sample.shape == images.shape and sample.isfinite().all()
    sample.square().sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()


@torch.no_grad()
def test_tiles_are_turned_off_again():
    model = small()
    z = torch.randn(1, 4, 6, 10)
    whole = model.decode(z).sample
    with pytest.warns(RuntimeWarning, match="not local"):
        model.enable_tiling(tile=32)
    assert not torch.equal(model.decode(z).sample, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.disable_tiling()
    assert torch.equal(model.decode(z).sample, whole)


def test_wrong_settings_say_so():
    with pytest.raises(ConfigError, match="stride"):
        small(stride=3)
    with pytest.raises(ConfigError, match="alignment"):
        small(alignment="left")
    model = small()
    with pytest.raises(ConfigError, match="multiple of 8"):
        model.enable_tiling(tile=30)
    for tile, overlap in ((32, 0.4), (8, 0.99), (32, 1.0), (32, -0.25)):
        with pytest.raises(ConfigError, match="whole latents"):
            model.enable_tiling(tile=tile, overlap=overlap)


def test_weights_of_autoencoderkl_load_both_ways(tmp_path):
    config: dict[str, Any] = dict(down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                                  up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16))
    torch.manual_seed(0)
    AutoencoderKL(**config).save_pretrained(tmp_path / "plain")
    model = ScaleConsistentVAE.from_pretrained(tmp_path / "plain", alignment="centered")
    assert model.config.stride == 2 and model.decoder.alignment == "centered"
    model.save_pretrained(tmp_path / "ours")
    again = ScaleConsistentVAE.from_pretrained(tmp_path / "ours")
    z = torch.randn(1, 4, 3, 2)
    assert again.config.alignment == "centered"
    assert torch.equal(again.decode(z).sample, model.decode(z).sample)
    assert AutoencoderKL.from_pretrained(tmp_path / "plain").state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_gradient_checkpointing_changes_nothing():
    model = small().train()
    z = torch.randn(1, 4, 2, 2)
    expected = model.decode(z).sample
    model.enable_gradient_checkpointing()
    with torch.enable_grad():
        output = model.decode(z).sample
        output.sum().backward()
    torch.testing.assert_close(output, expected)
    assert model.decoder.conv_out.weight.grad is not None
