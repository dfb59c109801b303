"""VQGAN, IBQ, LlamaGen's VQ, VAR's and Infinity's tokenizers: fixtures (tolerances are theirs), sizes, saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fixtures import Fixture
from tests.shared import needs_shared
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, ModelError
from vtc.models import load_tokenizer
from vtc.tokenizers.base import TokenLayout
from vtc.tokenizers.classes import TOKENIZER_CLASSES
from vtc.tokenizers.composed import ComposedPyramid, ComposedTokenizer
from vtc.tokenizers.diffusers_adapters import DiffusersVQ
from vtc.tokenizers.ibq import IBQ
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.llamagen_vq import LlamaGenVQ
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.multi_scale_residual import VAR_512
from vtc.tokenizers.open_magvit2 import OpenMAGVIT2
from vtc.tokenizers.tiling import decode_tiled, encode_tiled
from vtc.tokenizers.upstream import from_state_dict
from vtc.tokenizers.var_vqvae import VARVQVAE
from vtc.tokenizers.vqgan import VQGAN
from vtc.tokenizers.wetok import WeTok

FIXTURES = needs_shared("fixtures")
TINY: dict[str, Any] = dict(channels=32, channel_multipliers=(1, 2), num_res_blocks=1)


def diffusers_vq(channels: int = 32) -> DiffusersVQ:
    return DiffusersVQ(dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                            block_out_channels=[channels, 2 * channels], num_vq_embeddings=16, vq_embed_dim=4,
                            latent_channels=8))


MODELS: dict[str, Callable[..., Any]] = {
    "wetok": lambda **wide: WeTok(groups=2, bits_per_group=4, **TINY | wide),
    "wetok_generative": lambda **wide: WeTok(groups=2, bits_per_group=4, generative=True, **TINY | wide),
    "vqgan": lambda **wide: VQGAN(16, 4, z_channels=8, attention_levels=(1,), **TINY | wide),
    "ibq": lambda **wide: IBQ(16, 4, z_channels=8, attention_levels=(), **TINY | wide),
    "llamagen": lambda **wide: LlamaGenVQ(16, 4, z_channels=8, **TINY | wide),
    "open_magvit2": lambda **wide: OpenMAGVIT2(bits=6, token_bits=(2, 4), **TINY | wide),
    "var": lambda **wide: VARVQVAE(16, 8, sides=(1, 2, 3, 4), **TINY | wide),
    "infinity": lambda **wide: InfinityVAE(6, sides=(1, 3, 4), **TINY | wide),
    "infinity_in_groups": lambda **wide: InfinityVAE(6, sides=(1, 3, 4), token_bits=(1, 2, 3), **TINY | wide),
    "diffusers_vq": diffusers_vq,
    "composed": lambda **wide: ComposedTokenizer("wetok", "fsq", {**TINY, **wide}, {"levels": [5, 5, 3]}),
    "composed_pyramid": lambda **wide: ComposedPyramid("vqgan", "multi_scale_vq", {**TINY, **wide, "z_channels": 8}, {
        "codebook_size": 16, "dim": 8, "scales": [1, 2, 3, 4]}),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.half().float())
    return model


@FIXTURES
@torch.no_grad()
def test_vqgan_equals_upstream():
    fixture = Fixture("taming_vqgan_tiny")
    dd = fixture.config["ddconfig"]
    model = from_state_dict(fixture.weights(), "vqgan", beta=fixture.config["beta"])
    assert isinstance(model, VQGAN)
    assert model.vocab == (fixture.config["n_embed"],)
    assert model.downsample == 2 ** (len(dd["ch_mult"]) - 1)
    latent = model.encode_latents(fixture["input"])
    torch.testing.assert_close(latent, fixture["latent"], atol=1e-4, rtol=0)
    quantized = model.quantizer.train()(latent)
    torch.testing.assert_close(quantized.loss, fixture["loss"], rtol=1e-4, atol=0)
    quantized = model.quantizer.eval()(latent)
    assert torch.equal(quantized.indices, fixture["indices"])
    torch.testing.assert_close(quantized.z_q, fixture["quantized"], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.decode_latents(quantized.z_q), fixture["reconstruction"], atol=2e-4, rtol=0)
    tokens = model.encode(fixture["input"] * 0.5 + 0.5)
    assert torch.equal(tokens.indices.flatten(), fixture["indices"].flatten())
    expected = (fixture["reconstruction"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(tokens), expected, atol=1e-4, rtol=0)


@FIXTURES
def test_var_tokenizer_equals_upstream():
    fixture = Fixture("var_vqvae_tiny")
    config = fixture.config
    sides = tuple(config["v_patch_nums"])
    model = from_state_dict(fixture.weights(), sides=sides, beta=config["beta"], phi_share=config["quant_resi"])
    assert isinstance(model, VARVQVAE)
    with torch.no_grad():
        latent = model.encode_latents(fixture["input"])
        torch.testing.assert_close(latent, fixture["latent"], atol=1e-4, rtol=0)
        tokens = model.encode(fixture["input"] * 0.5 + 0.5)
        for scale, grid in enumerate(tokens.grids()):
            assert torch.equal(grid.flatten(1), fixture[f"indices_scale{scale}"])
        f_hat = model.codes(tokens)
        torch.testing.assert_close(f_hat, fixture["f_hat"], atol=1e-4, rtol=0)
        torch.testing.assert_close(model.decode_latents(f_hat), fixture["reconstruction"], atol=2e-4, rtol=0)
        clamped = fixture["rec_from_indices"].clamp(-1, 1) * 0.5 + 0.5
        torch.testing.assert_close(model.decode(tokens), clamped, atol=1e-4, rtol=0)
        for scale, image in enumerate(model.decode_progressively(tokens)):
            expected = fixture[f"rec_upto_scale{scale}"].clamp(-1, 1) * 0.5 + 0.5
            torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
        indices = tokens.indices[..., 0]
        torch.testing.assert_close(model.quantizer.teacher_inputs(indices), fixture["var_input"], atol=1e-4, rtol=0)
        for scale, total in enumerate(model.quantizer.partial_sums(indices)):
            torch.testing.assert_close(total, fixture[f"f_hat_upto_scale{scale}"], atol=1e-4, rtol=0)
            shown = model.quantizer.next_scale_input(total, scale)
            torch.testing.assert_close(shown, fixture[f"next_input_after_scale{scale}"], atol=1e-4, rtol=0)
    latent = fixture["latent"].clone().requires_grad_(True)
    loss = model.quantizer.train()(latent).loss
    torch.testing.assert_close(loss, fixture["vq_loss"], rtol=1e-4, atol=0)
    loss.backward()
    torch.testing.assert_close(latent.grad, fixture["grad_vq_loss_wrt_latent"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model.quantizer.codebook.grad, fixture["grad_vq_loss_wrt_codebook"], rtol=1e-4,
                               atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_one_picture_of_one_token_is_finite(name):
    """A batch of one leaves a group norm of one channel a group a single value."""
    model, images = make(name), torch.rand(1, 3, 1, 1)
    assert model.decode(model.encode(images)).isfinite().all()
    reconstruction, quantized = model.train()(images)
    (reconstruction.square().mean() + quantized.loss).backward()
    assert reconstruction.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (9, 3), (5, 26)])
def test_any_size_comes_back_at_its_size_and_finite(name, height, width):
    model = make(name)
    images = torch.rand(2, 3, height, width)
    tokens = model.encode(images)
    assert tokens.layout == model.layout(height, width)
    assert tokens.layout.scales[-1] == (-(-height // 2), -(-width // 2))
    assert all(tokens.indices[..., g].min() >= 0 and tokens.indices[..., g].max() < v
               for g, v in enumerate(tokens.layout.vocab))
    output = model.decode(tokens)
    assert output.shape == images.shape
    assert output.isfinite().all() and output.min() >= 0 and output.max() <= 1
    if name != "wetok_generative":  # which draws other noise
        torch.testing.assert_close(model(images)[0].clamp(0, 1), output, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_saving_keeps_tokens_and_images(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    images = torch.rand(1, 3, 8, 6)
    tokens = model.encode(images)
    assert torch.equal(loaded.encode(images).indices, tokens.indices)
    first, second = (m.decode(tokens, torch.Generator().manual_seed(1)) for m in (loaded, model))
    assert torch.equal(first, second)
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_reaches_every_weight(name):
    """With two channels a norm group, since a norm of one takes out every shift before it."""
    torch.manual_seed(0)
    model = MODELS[name](channels=64).train()
    images = torch.rand(2, 3, 8, 8)
    reconstruction, quantized = model(images)
    ((reconstruction - images).square().mean() + quantized.loss).backward()
    norms = {n: 0.0 if p.grad is None else p.grad.norm().item() for n, p in model.named_parameters()}
    assert all(math.isfinite(norm) for norm in norms.values())
    # A shift of all keys alike changes no attention: what is left there is rounding.
    of_keys = {n for n in norms if n.endswith((".k.bias", ".to_k.bias"))}
    assert {n for n, norm in norms.items() if norm < 1e-5} == of_keys
    assert not model.is_local


def test_grids_of_other_sizes_follow_the_trained_ones():
    model = VARVQVAE(16, 8, sides=VAR_512, channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1)
    assert model.scales(512, 512) == tuple((s, s) for s in VAR_512)
    wide = model.scales(256, 1024)
    assert wide[-1] == (16, 64) and wide[0] == (1, 2) and len(wide) == len(VAR_512)
    assert model.scales(1, 1) == ((1, 1),) * len(VAR_512)


def test_every_class_is_tested_here():
    """LocalVQ, the bundled one, and PyramidVQ have tests of their own."""
    assert {type(make(name)).__name__ for name in MODELS} | {"LocalVQ", "PyramidVQ"} == set(TOKENIZER_CLASSES)


@pytest.mark.filterwarnings("ignore:.* is not local, so tiles")
@pytest.mark.parametrize("name", MODELS)
def test_tokens_go_through_the_codec(name, tmp_path):
    """Bytes made by one process's model are read by another's: packed, with a table a group, and one a scale and group.
    """
    model = make(name)
    for kind in ("packed", "group", "scale and group"):
        if kind != "packed":
            model.token_frequencies = skewed_tables(model.layout(8, 8), kind)
        model.save_pretrained(tmp_path / kind)
        codec, reader = TokenCodec(model), TokenCodec(load_tokenizer(tmp_path / kind))
        for height, width in ((1, 1), (9, 14)) if kind == "packed" else ((9, 14),):
            images = torch.rand(2, 3, height, width)
            tokens, streams = model.encode(images), codec.compress(images)
            for number, stream in enumerate(streams):
                read = reader.decompress_tokens(stream)
                assert read.layout == tokens.layout and (read.height, read.width) == (height, width)
                assert torch.equal(read.indices, tokens[number].indices)
            first = reader.decompress(streams, torch.Generator().manual_seed(1))[0]
            expected = model.decode(tokens[0], torch.Generator().manual_seed(1))[0]
            torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    with pytest.raises(ModelError):
        TokenCodec(make("vqgan" if name != "vqgan" else "ibq")).decompress(streams)


def skewed_tables(layout: TokenLayout, kind: str) -> Tensor:
    """(T, K) frequencies that add up to 2^12: the first word of each row has what the others leave."""
    vocab = layout.vocab * (1 if kind == "group" else len(layout.scales))
    rows = torch.zeros(len(vocab), max(vocab), dtype=torch.int32)
    for row, words in zip(rows, vocab, strict=True):
        row[:words] = 3
        row[0] += 2**12 - 3 * words
    return rows


def test_the_fingerprint_covers_how_bits_become_indices():
    one, other = (OpenMAGVIT2(bits=6, token_bits=cut, **TINY) for cut in ((2, 4), (4, 2)))
    other.load_state_dict(one.state_dict())
    assert one.fingerprint() != other.fingerprint()
    other = OpenMAGVIT2(bits=6, token_bits=(2, 4), **TINY)
    other.load_state_dict(one.state_dict())
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize("name", MODELS)
def test_tiling_a_network_that_is_not_local_says_so(name):
    model = make(name)
    images = torch.rand(1, 3, 8, 12)
    with pytest.warns(RuntimeWarning, match="not local"):
        tokens = encode_tiled(model, images, tile=8)
    assert torch.equal(tokens.indices, model.encode(images).indices)
    with pytest.warns(RuntimeWarning, match="not local"):
        tiled = decode_tiled(model, tokens, torch.Generator().manual_seed(1), tile=8)
    assert torch.equal(tiled, model.decode(tokens, torch.Generator().manual_seed(1)))


def test_tiles_smaller_than_a_token_are_refused():
    model = LocalVQ(8, 4, (4, 4, 4), (0, 0, 0), (4, 4, 4, 4), (0, 0, 0, 0), 4).eval()
    images = torch.rand(1, 3, 128, 96)
    tokens = encode_tiled(model, images, tile=16)
    assert torch.equal(tokens.indices, model.encode(images).indices)
    torch.testing.assert_close(decode_tiled(model, tokens, tile=16), model.decode(tokens), atol=1e-5, rtol=0)
    for tile in (15, 0, -16):
        with pytest.raises(ConfigError, match="at least the 16 pixels"):
            encode_tiled(model, images, tile=tile)
        with pytest.raises(ConfigError, match="at least the 16 pixels"):
            decode_tiled(model, tokens, tile=tile)


@pytest.mark.parametrize("name", ["wetok", "vqgan", "var", "diffusers_vq"])
def test_what_is_no_batch_of_images_is_refused(name):
    model = make(name)
    for wrong in (torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
                  torch.rand(1, 3, 0, 8)):
        with pytest.raises(ConfigError, match=r"float images of shape \(B, 3, H, W\)"):
            model.encode(wrong)
