"""PyramidVQ: layout, round trips, saving; the residuals of its quantizer; attention scale by scale, for VAR."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vtc.errors import ConfigError
from vtc.generators.blocks import attention_by_scale, dense_attention
from vtc.models import load_tokenizer
from vtc.tokenizers.base import TokenLayout
from vtc.tokenizers.pyramid_vq import PyramidVQ

SIDES = (1, 2, 4)


@pytest.fixture
def tiny() -> PyramidVQ:
    torch.manual_seed(0)
    model = PyramidVQ(16, 4, (8, 8), (1, 1), (8, 8, 8), (1, 1, 1), 4, SIDES).eval()
    with torch.no_grad():
        model.quantizer.codebook.normal_()
    return model


def test_an_image_of_the_training_size_has_the_trained_grids(tiny):
    tokens = tiny.encode(torch.rand(2, 3, 32, 32))
    assert tokens.layout == TokenLayout(((1, 1), (2, 2), (4, 4)), (16,)) and tokens.indices.shape == (2, 21, 1)
    assert tiny.decode(tokens).shape == (2, 3, 32, 32)
    assert PyramidVQ().layout(128, 128).length == 680


def test_other_sizes_come_back_in_their_own_size(tiny):
    tokens = tiny.encode(torch.rand(1, 3, 41, 75))
    assert tokens.layout.scales == ((2, 3), (3, 5), (6, 10))
    assert tiny.decode(tokens).shape == (1, 3, 41, 75)


def test_what_training_reconstructs_is_what_decoding_gives(tiny):
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        output, quantized = tiny(images)
    torch.testing.assert_close(output.clamp(0, 1), tiny.decode(tiny.encode(images)), rtol=0, atol=1e-5)
    assert quantized.indices.shape == (2, 21)
    plain, nothing = tiny(images, quantize=False)
    torch.testing.assert_close(plain, tiny.reconstruct(tiny.latents(images)))
    assert nothing.indices.numel() == 0 and nothing.loss == 0


def test_saved_and_loaded_by_the_class_in_its_config(tiny, tmp_path):
    tiny.half().float().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, PyramidVQ) and loaded.fingerprint() == tiny.fingerprint()
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.encode(images).indices, tiny.encode(images).indices)


def test_one_grid_is_an_ordinary_tokenizer():
    model = PyramidVQ(16, 4, (8, 8), (1, 1), (8, 8, 8), (1, 1, 1), 4, (4,))
    assert model.layout(32, 32) == TokenLayout(((4, 4),), (16,))


def test_widths_of_another_number_are_refused():
    with pytest.raises(ConfigError, match="two encoder widths"):
        PyramidVQ(encoder_widths=(8, 8, 8))


def test_the_nearest_words_of_the_residuals_are_the_tokens(tiny):
    z = torch.randn(2, 4, 4, 4)
    quantizer = tiny.quantizer
    residuals = quantizer.residuals(z)
    assert residuals.shape == (2, 21, 4)
    words = torch.cdist(residuals, quantizer.codebook.detach()).argmin(-1)
    assert torch.equal(words, quantizer(z).indices)
    torch.testing.assert_close(residuals[:, 0], z.mean((2, 3)))


@pytest.mark.parametrize("together", [0, 5, 20, 1000])
def test_attention_by_scale_is_the_masked_square(together):
    torch.manual_seed(0)
    sizes = [1, 4, 9, 16]
    q, k, v = torch.randn(3, 2, 2, 30, 8)
    step = torch.repeat_interleave(torch.tensor(sizes))
    wanted = dense_attention(step[:, None] >= step, 0.3)(q, k, v, 0)
    torch.testing.assert_close(attention_by_scale(sizes, 0.3, together)(q, k, v, 0), wanted, rtol=0, atol=1e-6)
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(step[:, None] < step, -torch.inf)
    torch.testing.assert_close(F.softmax(scores, -1) @ v, wanted, rtol=0, atol=1e-6)
