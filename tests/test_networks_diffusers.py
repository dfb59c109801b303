"""Adapters of diffusers' autoencoders: fixtures (tolerances are theirs), sizes, tiles, overflow, loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fixtures import Fixture, diffusers_case
from tests.shared import needs_shared
from vtc.errors import ConfigError, ModelError
from vtc.tokenizers.diffusers_adapters import (
    AUTOENCODERS,
    AutoencoderKL,
    DiffusersAutoencoder,
    DiffusersVQ,
    Latents,
    VQModel,
)
from vtc.tokenizers.layers import GroupNorm

FIXTURES = needs_shared("fixtures")
BLOCKS: dict[str, Any] = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                              block_out_channels=(8, 16), norm_num_groups=4)


@FIXTURES
@torch.no_grad()
def test_vqmodel_equals_diffusers():
    fixture = Fixture("diffusers_vqmodel_tiny")
    model = VQModel(**fixture.config)
    model.load_state_dict(fixture.weights())
    tokenizer = DiffusersVQ.from_vqmodel(model)
    latent = tokenizer.encode_latents(fixture["input"])
    torch.testing.assert_close(latent, fixture["latent"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.quantizer.train()(latent).loss, fixture["loss"], rtol=1e-4, atol=0)
    quantized = tokenizer.quantizer.eval()(latent)
    assert torch.equal(quantized.indices.flatten(), fixture["indices"])
    torch.testing.assert_close(quantized.z_q, fixture["quantized"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.decode_latents(quantized.z_q), fixture["reconstruction"], atol=2e-4, rtol=0)
    tokens = tokenizer.encode(fixture["input"] * 0.5 + 0.5)
    assert torch.equal(tokens.indices.flatten(), fixture["indices"])


@FIXTURES
@torch.no_grad()
def test_autoencoderkl_equals_diffusers():
    fixture = Fixture("diffusers_autoencoderkl_tiny")
    model = AutoencoderKL(**fixture.config)
    model.load_state_dict(fixture.weights())
    adapter = DiffusersAutoencoder(model)
    latents = adapter.encode(fixture["input"] * 0.5 + 0.5)
    torch.testing.assert_close(latents.values / adapter.scale, fixture["mean"], atol=1e-4, rtol=0)
    expected = (fixture["reconstruction_of_mean"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(adapter.decode(latents), expected, atol=1e-4, rtol=0)


@needs_shared("fixtures", "scvae")
@pytest.mark.parametrize("name", ["autoencoderkl_sd_tiny", "autoencoderkl_flux_tiny", "autoencoderdc_tiny"])
@torch.no_grad()
def test_autoencoders_equal_diffusers(name):
    fixture, case = Fixture(f"scvae/{name}"), diffusers_case(name)
    model = AUTOENCODERS[case["class"]](**case["config"])
    model.load_state_dict(fixture.weights())
    adapter = DiffusersAutoencoder(model)
    x, z = fixture["x"], fixture["z"]
    scaled = Latents((z - adapter.shift) * adapter.scale, *x.shape[-2:])
    mean = fixture["mean"] if "mean" in fixture.tensors else z
    encoded = adapter.encode(x * 0.5 + 0.5).values / adapter.scale + adapter.shift
    torch.testing.assert_close(encoded, mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(adapter.decode(scaled), (fixture["y"] * 0.5 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-4)
    with pytest.warns(RuntimeWarning, match="DiffusersAutoencoder is not local"):
        adapter.enable_tiling(64 if case["class"] == "AutoencoderDC" else 32)  # the fixture's tiles
    encoded = adapter.encode(x * 0.5 + 0.5).values / adapter.scale + adapter.shift
    torch.testing.assert_close(encoded, fixture["z_tiled"], atol=1e-5, rtol=1e-4)
    tiled = (fixture["y_tiled"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(adapter.decode(scaled), tiled, atol=1e-5, rtol=1e-4)


def vq() -> DiffusersVQ:
    torch.manual_seed(0)
    return DiffusersVQ({**BLOCKS, "latent_channels": 4, "num_vq_embeddings": 16}).eval()


@pytest.mark.parametrize("kind", ["AutoencoderKL", "ScaleConsistentVAE", "AutoencoderDC"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 22)])
def test_any_size_comes_back_at_its_size(kind, height, width):
    adapter = DiffusersAutoencoder(make(kind))
    images = torch.rand(2, 3, height, width)
    latents = adapter.encode(images)
    f = adapter.downsample
    assert latents.values.shape[-2:] == (-(-height // f), -(-width // f))
    output = adapter.decode(latents)
    assert output.shape == images.shape and output.isfinite().all()


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "AutoencoderDC":
        half: dict[str, Any] = dict(block_types=("ResBlock", "ResBlock"), block_out_channels=(8, 16),
                                    layers_per_block=(1, 1), qkv_multiscales=((), ()))
        both = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in half.items()}
        return AUTOENCODERS[kind](latent_channels=4, attention_head_dim=4, downsample_block_type="stride_conv",
                                  upsample_block_type="interpolate", decoder_norm_types="rms_norm",
                                  decoder_act_fns="silu", **both)
    return AUTOENCODERS[kind](**BLOCKS)


#: as many norm groups as channels: one value a group on a latent of one token
ONE_A_GROUP: dict[str, Any] = {**BLOCKS, "block_out_channels": (32, 32), "norm_num_groups": 32}


@pytest.mark.parametrize("kind", ["AutoencoderKL", "ScaleConsistentVAE", "AutoencoderDC"])
@pytest.mark.parametrize("training", [False, True])
def test_one_picture_of_one_latent_is_finite(kind, training):
    model = make(kind) if kind == "AutoencoderDC" else AUTOENCODERS[kind](**ONE_A_GROUP)
    adapter = DiffusersAutoencoder(model).train(training)
    latents = adapter.encode(torch.rand(1, 3, 1, 1))
    assert latents.values.shape[-2:] == (1, 1)
    output = adapter.decode(latents)
    assert output.shape == (1, 3, 1, 1) and output.isfinite().all()
    images = torch.rand(1, 3, adapter.downsample, adapter.downsample, requires_grad=True)
    model(images * 2 - 1).sample.square().sum().backward()  # diffusers' own forward
    assert images.grad is not None and images.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_one_picture_of_one_token_is_finite(training):
    tokenizer = DiffusersVQ({**ONE_A_GROUP, "latent_channels": 4, "num_vq_embeddings": 16}).train(training)
    images = torch.rand(1, 3, 1, 1)
    assert tokenizer.decode(tokenizer.encode(images)).isfinite().all()
    reconstruction, quantized = tokenizer(images)
    (reconstruction.square().sum() + quantized.loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in tokenizer.parameters())


def test_group_norms_are_mended_in_place_and_alike():
    model = AutoencoderKL(**BLOCKS).eval()
    z, names = torch.randn(2, 4, 4, 4), list(model.state_dict())
    with torch.no_grad():
        before = model.decode(z).sample
        adapter = DiffusersAutoencoder(model)
        assert torch.equal(adapter.model.decode(z).sample, before)
    assert list(model.state_dict()) == names
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert kinds == {GroupNorm}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 12)])
def test_vq_tokens_of_any_size(height, width):
    tokenizer = vq()
    images = torch.rand(2, 3, height, width)
    tokens = tokenizer.encode(images)
    assert tokens.layout == tokenizer.layout(height, width)
    assert tokenizer.decode(tokens).shape == images.shape


@pytest.mark.parametrize("kind", ["AutoencoderKL", "ScaleConsistentVAE", "AutoencoderDC"])
def test_tiles_are_honoured_and_their_error_told(kind):
    adapter = DiffusersAutoencoder(make(kind))
    images = torch.rand(1, 3, 32, 48)
    latents = adapter.encode(images)
    whole = adapter.decode(latents)
    with pytest.warns(RuntimeWarning, match="not local.* change its result"):
        adapter.enable_tiling(64)
    assert adapter.tiling_error(latents) == 0
    with pytest.warns(RuntimeWarning, match="not local"):
        adapter.enable_tiling(16, 0.25)
    tiled = adapter.decode(latents)
    assert tiled.shape == whole.shape
    assert adapter.tiling_error(latents) == pytest.approx(float((tiled - whole).abs().max())) != 0
    assert adapter.encode(images).values.shape == latents.values.shape
    adapter.disable_tiling()
    assert torch.equal(adapter.decode(latents), whole)
    with pytest.raises(ConfigError, match="multiple of"):
        adapter.enable_tiling(17)
    with pytest.raises(ConfigError, match="whole latents"):
        adapter.enable_tiling(16, 0.3)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "ScaleConsistentVAE", "AutoencoderDC"])
def test_slices_equal_the_batch(kind):
    adapter = DiffusersAutoencoder(make(kind))
    images = torch.rand(3, 3, 13, 18)
    latents = adapter.encode(images)
    output = adapter.decode(latents)
    adapter.enable_slicing()
    torch.testing.assert_close(adapter.encode(images).values, latents.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapter.decode(latents), output, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:DiffusersAutoencoder is not local")
@pytest.mark.parametrize("kind", ["AutoencoderKL", "ScaleConsistentVAE", "AutoencoderDC"])
def test_tiles_and_slices_of_any_size_come_back_at_their_size(kind):
    adapter = DiffusersAutoencoder(make(kind))
    adapter.enable_tiling(8, 0.5)
    adapter.enable_slicing()
    for height, width in ((1, 1), (9, 22), (16, 8), (33, 3)):
        images = torch.rand(2, 3, height, width)
        output = adapter.decode(adapter.encode(images))
        assert output.shape == images.shape and output.isfinite().all()


def test_overflow_in_half_precision_is_repaired_and_damage_told():
    model = make("AutoencoderKL")
    model.decoder.conv_in.weight.data *= 3e4  # group norm brings it back, where the numbers are wide enough
    latents = Latents(torch.randn(1, 4, 4, 4), 8, 8)
    expected = DiffusersAutoencoder(model).decode(latents)
    adapter = DiffusersAutoencoder(model.half())
    assert not model.decode((latents.values / adapter.scale).half()).sample.isfinite().all()
    torch.testing.assert_close(adapter.decode(latents), expected, atol=1e-2, rtol=0)
    assert model.dtype == torch.float16
    with pytest.raises(ModelError, match="not finite"):
        adapter.decode(Latents(torch.full((1, 4, 4, 4), torch.inf), 8, 8))


def test_folders_of_diffusers_load(tmp_path):
    model = VQModel(**BLOCKS, latent_channels=4, num_vq_embeddings=16)
    model.save_pretrained(tmp_path / "vq")
    tokenizer = DiffusersVQ.from_diffusers(tmp_path / "vq")
    for parameter in tokenizer.parameters():
        parameter.data.copy_(parameter.data.half().float())
    tokenizer.save_pretrained(tmp_path / "ours")
    loaded = DiffusersVQ.from_pretrained(tmp_path / "ours")
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.encode(images).indices, tokenizer.encode(images).indices)

    make("AutoencoderDC").save_pretrained(tmp_path / "dc")
    assert type(DiffusersAutoencoder.from_pretrained(tmp_path / "dc").model) is AUTOENCODERS["AutoencoderDC"]
    with pytest.raises(ModelError, match="DiffusersVQ"):
        DiffusersAutoencoder.from_pretrained(tmp_path / "vq")
    with pytest.raises(ModelError, match="No autoencoder"):
        DiffusersAutoencoder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="not Linear"):
        DiffusersAutoencoder(torch.nn.Linear(1, 1))
