"""LocalVQ: sizes, locality, tiling, saving."""

import pytest
import torch

from vtc.errors import ModelError
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.tiling import decode_tiled, encode_tiled


def small(**changes) -> LocalVQ:
    torch.manual_seed(0)
    config = dict(codebook_size=32, dim=8, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                  decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4)
    model = LocalVQ(**{**config, **changes}).eval()
    for name, parameter in model.named_parameters():  # blocks start near the identity: make every weight count
        if name.endswith("proj.weight"):
            parameter.data.mul_(10)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.half().float())
    model.quantizer.codebook.copy_(model.quantizer.codebook.half().float())
    return model


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (17, 31), (1, 100), (250, 3)])
def test_any_size_comes_back_at_its_size(height, width):
    model = small()
    images = torch.rand(2, 3, height, width)
    tokens = model.encode(images)
    assert tokens.layout == model.layout(height, width)
    assert tokens.indices.shape == (2, -(-height // 16) * -(-width // 16), 1)
    output = model.decode(tokens)
    assert output.shape == images.shape
    assert output.min() >= 0 and output.max() <= 1


def test_the_halo_covers_the_receptive_field():
    model = small()
    side = 2 * model.halo + 48
    image = torch.rand(1, 3, side, side)
    changed = image.clone()
    changed[..., side // 2, side // 2] = 1 - changed[..., side // 2, side // 2]
    difference = (model.latents(image) - model.latents(changed)).abs().amax((0, 1))
    reach = difference.nonzero()
    assert len(reach) > 1
    centre = side // 2 // 16
    assert (reach - centre).abs().max() * 16 <= model.halo

    codes = torch.randn(1, 8, side // 16, side // 16)
    other = codes.clone()
    other[..., centre, centre] += 1
    rows = (model.reconstruct(codes) - model.reconstruct(other)).abs().amax((0, 1, 3)).nonzero()
    assert centre * 16 - model.halo <= rows.min() < centre * 16
    assert rows.max() < (centre + 1) * 16 + model.halo


@pytest.mark.parametrize(("height", "width"), [(400, 333), (35, 700)])
def test_tiles_equal_the_whole(height, width):
    model = small()
    images = torch.rand(1, 3, height, width)
    whole = model.encode(images)
    tiled = encode_tiled(model, images, tile=64)
    assert torch.equal(tiled.indices, whole.indices)
    torch.testing.assert_close(decode_tiled(model, whole, tile=64), model.decode(whole), atol=1e-4, rtol=0)


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again = LocalVQ.from_pretrained(tmp_path)
    assert not again.training
    images = torch.rand(1, 3, 40, 40)
    tokens = model.encode(images)
    assert torch.equal(again.encode(images).indices, tokens.indices)
    assert torch.equal(again.decode(tokens), model.decode(tokens))
    assert again.fingerprint() == model.fingerprint()


def test_the_fingerprint_covers_what_decoding_reads_and_nothing_else():
    model, other = small(), small()
    with torch.no_grad():
        other.encoder.head.bias += 1
    assert other.fingerprint() == model.fingerprint()
    with torch.no_grad():
        other.decoder.head.bias += 1
    assert other.fingerprint() != model.fingerprint()
    tables = small()
    tables.token_frequencies[0, :2] += torch.tensor([1, -1], dtype=torch.int32)
    assert tables.fingerprint() != model.fingerprint()


def test_a_model_folder_that_does_not_fit_is_refused(tmp_path):
    small().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"thin": 4', '"thin": 5'))
    with pytest.raises(ModelError, match="does not fit LocalVQ"):
        LocalVQ.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="damaged"):
        LocalVQ.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        LocalVQ.from_pretrained(tmp_path)


def test_values_beyond_float16_are_not_saved_as_infinity(tmp_path):
    model = small()
    with torch.no_grad():
        model.decoder.head.bias[0] = 1e5
    with pytest.raises(ModelError, match=r"decoder\.head\.bias has values beyond float16, .*: up to 1e\+05"):
        model.save_pretrained(tmp_path)


def test_training_goes_on_from_a_loaded_codebook(tmp_path):
    model = small()
    images = torch.rand(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    again = LocalVQ.from_pretrained(tmp_path).train()
    again(images)
    used = model.encode(images).indices.unique()
    unused = torch.ones(32, dtype=torch.bool)
    unused[used] = False
    moved = (again.quantizer.codebook - model.quantizer.codebook).norm(dim=1) / model.quantizer.codebook.norm(dim=1)
    assert 0 < moved[used].max() < 0.5  # a moving average that started at the codebook takes small steps
    assert moved[unused].max() < 1e-6


def test_training_path_moves_the_codebook_and_gives_gradients():
    model = small().train()
    before = model.quantizer.codebook.clone()
    output, quantized = model(torch.rand(2, 3, 64, 64))
    (output.square().mean() + quantized.loss).backward()
    assert not torch.equal(model.quantizer.codebook, before)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
