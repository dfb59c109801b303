"""WeTok against its upstream fixtures (tolerances are the fixtures' own), and sizes, noise, 1x1 latents, saving."""

import pytest
import torch
import torch.nn.functional as F

from tests.fixtures import Fixture
from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.wetok import WeTok

FIXTURES = needs_shared("fixtures")


def from_fixture(fixture: Fixture, generative: bool = False) -> WeTok:
    config, dd = fixture.config, fixture.config["ddconfig"]
    model = WeTok(dd["ch"], dd["ch_mult"], dd["num_res_blocks"], config["groups"], config["bits_per_group"], generative)
    model.load_state_dict(fixture.weights())
    return model.eval()


def small(**changes) -> WeTok:
    torch.manual_seed(0)
    return WeTok(**{**dict(channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, groups=2, bits_per_group=4),
                    **changes}).eval()


@FIXTURES
@torch.no_grad()
def test_autoencoder_equals_upstream():
    fixture = Fixture("wetok_ae_tiny")
    model = from_fixture(fixture)
    latent = model.encoder(fixture["input"])
    torch.testing.assert_close(latent, fixture["latent"], atol=1e-4, rtol=0)
    quantized = model.quantizer(latent)
    torch.testing.assert_close(quantized.z_q, fixture["quantized"], atol=1e-6, rtol=0)
    assert torch.equal(quantized.indices.flatten(), fixture["indices"])
    torch.testing.assert_close(model.decoder(quantized.z_q), fixture["reconstruction"], atol=2e-4, rtol=0)
    torch.testing.assert_close(model.decoder(quantized.z_q), fixture["reconstruction_from_exact_codes"], atol=2e-4,
                               rtol=0)
    rectangle = model.encoder(fixture["rect_input"])
    torch.testing.assert_close(rectangle, fixture["rect_latent"], atol=1e-4, rtol=0)
    codes = model.quantizer(rectangle).z_q
    torch.testing.assert_close(model.decoder(codes), fixture["rect_reconstruction"], atol=2e-4, rtol=0)


@FIXTURES
def test_tokens_and_images_equal_upstream():
    fixture = Fixture("wetok_ae_tiny")
    model = from_fixture(fixture)
    tokens = model.encode(fixture["input"] * 0.5 + 0.5)
    assert torch.equal(tokens.indices.flatten(), fixture["indices"])
    expected = (fixture["reconstruction"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(tokens), expected, atol=1e-4, rtol=0)


@FIXTURES
@torch.no_grad()
def test_generative_decoder_equals_upstream():
    fixture = Fixture("wetok_gd_tiny")
    model = from_fixture(fixture, generative=True)
    quantized = model.quantizer(model.encoder(fixture["input"]))
    assert torch.equal(quantized.indices.flatten(), fixture["indices"])
    for noise, image in (("noise", "reconstruction"), ("noise_b", "reconstruction_b")):
        output = model.decode_latents(quantized.z_q, noise=fixture[noise])
        torch.testing.assert_close(output, fixture[image], atol=2e-4, rtol=0)


@FIXTURES
@torch.no_grad()
def test_zero_extension_equals_upstream():
    fixture = Fixture("wetok_gd_tiny")
    config, weights = fixture.config, fixture.weights()
    z_channels = config["ddconfig"]["z_channels"]
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :z_channels]
    dd = config["ddconfig"]
    plain = WeTok(dd["ch"], dd["ch_mult"], dd["num_res_blocks"], config["groups"], config["bits_per_group"]).eval()
    plain.load_state_dict(weights)
    codes = plain.quantizer(plain.encoder(fixture["input"])).z_q
    expected = fixture["plain_decoder_reconstruction"]
    torch.testing.assert_close(plain.decode_latents(codes), expected, atol=2e-4, rtol=0)
    grown = plain.to_generative()
    for name in ("noise", "noise_b"):
        output = grown.decode_latents(codes, noise=fixture[name])
        torch.testing.assert_close(output, fixture["zero_extended_gd_reconstruction"], atol=2e-4, rtol=0)


#: shifts of whole channels right before a norm of one channel a group, which takes them out again: their gradient is
#: zero, and in float64 it is below 1e-14. The other norms lie between 6e-3 and 1.
WITHOUT_EFFECT = ("encoder.down.0.downsample.bias", "decoder.conv_in.bias", "decoder.adaptive.0.beta.weight",
                  "decoder.adaptive.0.beta.bias")


@FIXTURES
def test_train_step_equals_upstream():
    fixture = Fixture("wetok_train_step_tiny")
    model = from_fixture(fixture).train()
    model.quantizer.entropy, model.quantizer.commitment = 0.1, 0.25
    latent = model.encoder(fixture["input"])
    quantized = model.quantizer(latent)
    output = model.decode_latents(quantized.z_q)
    l1 = F.l1_loss(output, fixture["input"])
    loss = l1 + quantized.loss
    terms = model.quantizer.loss_terms(latent)
    aux = terms["per_sample_entropy"] - terms["codebook_entropy"]
    torch.testing.assert_close(l1, fixture["l1"], rtol=1e-4, atol=0)
    torch.testing.assert_close(aux, fixture["entropy_aux_loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["commitment"], fixture["commitment"], rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, fixture["loss"], rtol=1e-4, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if name in WITHOUT_EFFECT:
            assert parameter.grad.norm() < 1e-5 and fixture[f"gradnorm.{name}"] < 1e-5  # all of it is rounding
        else:
            torch.testing.assert_close(parameter.grad.norm(), fixture[f"gradnorm.{name}"], rtol=1e-3, atol=0)
    expected = {name: tensor for name, tensor in fixture.tensors.items() if name.startswith("grad.")}
    assert expected
    for name, gradient in expected.items():
        actual = model.get_parameter(name.removeprefix("grad.")).grad
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-6)


@FIXTURES
def test_the_published_model_has_the_published_keys():
    with torch.device("meta"):
        model = WeTok(channel_multipliers=(1, 1, 2, 2, 4), groups=4)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    lines = (SHARED / "fixtures" / "wetok_keys_f16_g4.txt").read_text().splitlines()
    theirs = {name: [int(n) for n in shape.strip("[]").split(",")] for name, shape in (x.split("\t") for x in lines)}
    assert ours == theirs


def test_published_parameter_counts():
    """Encoder and decoder in millions, as measured on the upstream code."""
    for multipliers, groups, generative, counts in (((1, 2, 2, 4), 8, False, (193.7, 254.8)),
                                                    ((1, 1, 2, 2, 4), 4, False, (198.9, 261.4)),
                                                    ((1, 1, 2, 2, 4, 8), 4, True, (720.2, 953.5))):
        with torch.device("meta"):
            model = WeTok(channel_multipliers=multipliers, groups=groups, generative=generative)
        measured = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
        assert measured == pytest.approx(counts, abs=0.06)


def test_one_picture_of_one_token_is_finite():
    """A batch of one leaves a group norm of one channel a group a single value."""
    model = small()
    assert model.decode(model.encode(torch.rand(1, 3, 1, 1))).isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (5, 31), (33, 2)])
def test_any_size_comes_back_at_its_size_and_finite(height, width):
    model = small()
    images = torch.rand(2, 3, height, width)
    tokens = model.encode(images)
    assert tokens.layout == model.layout(height, width)
    assert tokens.indices.shape == (2, -(-height // 4) * -(-width // 4), 2)
    output = model.decode(tokens)
    assert output.shape == images.shape
    assert output.isfinite().all()
    reconstruction, _ = model(images)
    assert reconstruction.shape == images.shape
    torch.testing.assert_close(reconstruction.clamp(0, 1), output, atol=1e-4, rtol=0)


def test_noise_is_the_callers():
    model = small(generative=True)
    tokens = model.encode(torch.rand(1, 3, 12, 8))
    a, b, c = (model.decode(tokens, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    drawn = torch.randn(1, 8, 3, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.decode(tokens, noise=drawn), a)
    with pytest.raises(ConfigError, match="shape of the codes"):
        model.decode(tokens, noise=drawn[:, :4])
    with pytest.raises(ConfigError, match="plain decoder"):
        small().decode(tokens, noise=drawn)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (16, 16), (30, 40)])
def test_zero_extension_decodes_alike_to_the_last_bit(size):
    plain = small()
    grown = plain.to_generative()
    tokens = plain.encode(torch.rand(2, 3, *size))
    assert torch.equal(grown.decode(tokens), plain.decode(tokens))


def test_a_grown_decoder_learns_from_noise():
    grown = small().to_generative()
    codes = grown.codes(grown.encode(torch.rand(1, 3, 16, 16)))
    grown.decode_latents(codes, noise=torch.randn_like(codes)).square().mean().backward()
    grad = grown.decoder.conv_in.weight.grad
    assert grad is not None
    assert grad[:, 8:].abs().max() > 0


def test_saving_keeps_tokens_and_images(tmp_path):
    model = small(generative=True)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.half().float())
    model.save_pretrained(tmp_path)
    loaded = WeTok.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 9, 10)
    tokens = model.encode(images)
    assert torch.equal(loaded.encode(images).indices, tokens.indices)
    noise = torch.randn(1, 8, 3, 3)
    assert torch.equal(loaded.decode(tokens, noise=noise), model.decode(tokens, noise=noise))
    assert loaded.fingerprint() == model.fingerprint()
