"""The model in the wheel: what its card says of the file, its codebook, its tiles, its pictures."""

import hashlib
import re

import pytest
import torch

from tests.shared import ROOT, SHARED, needs_shared
from vtc.hub import BUNDLED
from vtc.images import load_image
from vtc.models import DEFAULT_MODEL, MODEL_IDS, load_codec, load_tokenizer
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.tokenizers.tiling import decode_tiled, encode_tiled

FOLDER = BUNDLED / DEFAULT_MODEL
CARD = (FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def model() -> LocalVQ:
    tokenizer = load_tokenizer()
    assert isinstance(tokenizer, LocalVQ)
    return tokenizer


@pytest.fixture(scope="module")
def coffee():
    return load_image(ROOT / "docs/images/coffee.png").tensor()[None]


def test_the_card_describes_this_file(model):
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) <= 16 * 2**20
    assert hashlib.sha256(weights).hexdigest() in CARD
    assert f"{len(weights):,} bytes" in CARD
    assert model.fingerprint().hex() in CARD and model.fingerprint().hex() in (ROOT / "CHANGELOG.md").read_text()
    assert model.model_id == MODEL_IDS[DEFAULT_MODEL]


def test_the_codebook_can_be_clustered_to_every_rate(model):
    words, dim = model.quantizer.codebook.shape
    assert words >= 2048 and dim <= 64
    assert f"{words:,} x {dim}" in CARD
    assert len(model.quantizer.codebook.unique(dim=0)) == words
    assert model.token_frequencies.shape == (1, words) and model.token_frequencies.min() >= 1


def test_tiles_equal_the_whole(model, coffee):
    whole = model.encode(coffee)
    tiled = encode_tiled(model, coffee, tile=128)
    assert (tiled.indices != whole.indices).float().mean() < 0.002  # a latent may lie between two words
    torch.testing.assert_close(decode_tiled(model, whole, tile=128), model.decode(whole), atol=1e-4, rtol=0)


def test_a_photograph_survives_at_its_rate(coffee):
    codec = load_codec()
    [stream] = codec.compress(coffee)
    [decoded] = codec.decompress([stream])
    assert 8 * len(stream) / coffee[0, 0].numel() < 0.04  # 600x400 has 950 tokens, of 13 bits without the prior
    assert -10 * (decoded - coffee).square().mean().log10() > 22


@needs_shared("weights")
@needs_shared("data", "holdout", "set14")
def test_the_numbers_of_the_card_are_of_this_model(model):
    """Two pictures of the hold-out stand for the table: far above chance, within what they had when they were made."""
    judge = LPIPS("alex", SHARED / "weights")
    distances = []
    for path in sorted((SHARED / "data/holdout/set14").iterdir())[:2]:
        image = load_image(path).tensor()[None]
        distances.append(judge(image, model.decode(model.encode(image))).item())
    assert all(distance < 0.6 for distance in distances), distances


def test_the_card_names_every_look_at_kodak():
    looks = re.search(r"### Looks at Kodak\n(.*?)\n## ", CARD, re.DOTALL)
    assert looks and "this one" in looks[1]
