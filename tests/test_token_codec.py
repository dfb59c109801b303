"""TokenCodec with every kind of token layout: round trips, golden streams, wrong models."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_codecs import small_prior
from tests.tiny_tokenizers import TINY_TOKENIZERS, TinyGrid, TinyGroups, TinyScales
from vtc.codecs import container
from vtc.codecs.container import Coder
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError, ConfigError, ImageError, ModelError, VtcError
from vtc.tokenizers.base import TokenLayout, Tokens

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((Path(__file__).parent / "golden" / "streams_v1.json").read_text())
GOLDEN_PRIOR = json.loads((Path(__file__).parent / "golden" / "streams_prior.json").read_text())
CODECS = {name: TokenCodec(make()) for name, make in TINY_TOKENIZERS.items()}
SIZES = [(1, 1), (1, 1000), (1000, 1), (7, 5), (16, 16), (33, 50), (64, 64)]


def picture(height: int, width: int, count: int = 1, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some noise, (count, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(count, 3, 2, 2, generator=generator)
    smooth = torch.nn.functional.interpolate(base, (height, width), mode="bilinear")
    return (smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", SIZES)
def test_round_trip(name, size):
    codec = CODECS[name]
    images = picture(size[0], size[1], count=2)
    tokens = codec.tokenizer.encode(images)
    streams = codec.compress(images)
    decoded = codec.decompress(streams)
    assert len(streams) == len(decoded) == 2
    expected = codec.tokenizer.decode(tokens)
    for i, stream in enumerate(streams):
        back = codec.decompress_tokens(stream)
        assert (back.layout, back.height, back.width) == (tokens.layout, *size)
        assert torch.equal(back.indices, tokens[i].indices)
        assert decoded[i].shape == (3, *size)
        assert torch.equal(decoded[i], expected[i])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CODECS)), st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32))
def test_any_tokens_round_trip(name, height, width, seed):
    codec = CODECS[name]
    layout = codec.tokenizer.layout(height, width)
    random = torch.randint(2**31, (1, layout.length, layout.groups), generator=torch.Generator().manual_seed(seed))
    tokens = Tokens(random % torch.tensor(layout.vocab), layout, height, width)
    (stream,) = codec.compress_tokens(tokens)
    back = codec.decompress_tokens(stream)
    assert torch.equal(back.indices, tokens.indices)
    assert codec.compress_tokens(back) == [stream]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda r: f"{r['tokenizer']}-{r['height']}x{r['width']}-{r['coder']}")
def test_golden_streams(row):
    codec = CODECS[row["tokenizer"]]
    stream = bytes.fromhex(row["stream"])
    tokens = codec.decompress_tokens(stream)
    assert (tokens.height, tokens.width) == (row["height"], row["width"])
    assert tokens.indices.flatten().tolist() == row["indices"]
    assert container.parse(stream).coder.name == row["coder"]
    assert codec.compress_tokens(tokens) == [stream]


def test_golden_streams_cover_every_layout_kind_of_theirs_and_both_coders():
    assert {(r["tokenizer"], r["coder"]) for r in GOLDEN} == {
        *((name, "PACKED") for name in TINY_TOKENIZERS),
        *((name, "STATIC_ANS") for name in ("grid", "groups", "scales"))}


def test_the_same_bytes_as_literals():
    layout = TokenLayout(((2, 3),), (64,))
    uneven = Tokens(torch.tensor([0, 10, 34, 8, 60, 62]).view(1, 6, 1), layout, 24, 40)
    likely = Tokens(torch.tensor([1, 0, 0, 0, 0, 1]).view(1, 6, 1), layout, 24, 40)
    assert CODECS["grid"].compress_tokens(uneven)[0].hex() == "f5560100006181ef50ebec2a7b28181005000a888f3ed3530820"
    assert CODECS["grid"].compress_tokens(likely)[0].hex() == "f5560108006181ef50ebec2a7b281810047a916dee5fd6f5ae"


def test_the_example_in_the_document():
    text = (ROOT / "docs" / "bitstream.md").read_text()
    block = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert block
    stream = bytes.fromhex("".join(line.split("|")[0] for line in block[1].splitlines()))
    tokens = CODECS["grid"].decompress_tokens(stream)
    assert (tokens.width, tokens.height, tokens.layout.scales) == (40, 24, ((2, 3),))
    assert tokens.indices.flatten().tolist() == [0, 10, 34, 8, 60, 62]
    assert CODECS["grid"].compress_tokens(tokens) == [stream]


def test_overhead_is_at_most_24_bytes_for_a_kodak_image_of_any_shipped_model():
    (stream,) = CODECS["grid"].compress(picture(512, 768))
    assert len(stream) - len(container.parse(stream).payload) <= 24


def test_a_smooth_picture_uses_the_tables():
    (stream,) = CODECS["grid"].compress(torch.zeros(1, 3, 512, 768))
    parsed = container.parse(stream)
    assert parsed.coder == Coder.STATIC_ANS and len(parsed.payload) < 1536 * 6 / 8 / 2


# ---- a prior --------------------------------------------------------------------------------------------------------

class LeftNeighbour:
    """A prior of the simplest kind: each index less the one before it, deflated."""

    fingerprint = b"leftleft"
    sizes: tuple[int, ...] = (8, 64)

    def encode(self, indices, grid, codebook):
        assert len(indices) == grid[0] * grid[1] and codebook == 64
        return zlib.compress((np.diff(indices, prepend=0) % 64).astype(np.uint8).tobytes(), 9)

    def decode(self, payload, grid, codebook):
        return np.cumsum(np.frombuffer(zlib.decompress(payload), dtype=np.uint8).astype(np.int64)) % codebook

    def probabilities(self, indices, grid, codebook):
        return np.full(len(indices), 1 / codebook)


def with_prior(prior: LeftNeighbour) -> TokenCodec:
    return TokenCodec(TinyGrid(), prior=prior)


def test_the_prior_is_used_where_it_is_shorter_and_the_fingerprint_names_both():
    codec, plain = with_prior(LeftNeighbour()), CODECS["grid"]
    smooth = torch.linspace(0, 1, 512).expand(1, 3, 512, 512)
    (stream,) = codec.compress(smooth)
    parsed = container.parse(stream)
    assert parsed.coder == Coder.PRIOR and len(stream) < len(plain.compress(smooth)[0])
    assert parsed.fingerprint == hashlib.sha256(plain.fingerprint + b"leftleft").digest()[:8]
    assert torch.equal(codec.decompress([stream])[0], plain.decompress(plain.compress(smooth))[0])

    tiny = picture(16, 16)
    assert codec.compress(tiny) == plain.compress(tiny)  # a deflate header is longer than one token


def test_a_prior_is_left_alone_by_tokens_that_it_does_not_know():
    for make in (TinyGroups, TinyScales):
        codec = TokenCodec(make(), prior=LeftNeighbour())
        assert container.parse(codec.compress(picture(64, 64))[0]).coder != Coder.PRIOR


def test_without_the_prior_of_a_stream_there_is_one_sentence():
    (stream,) = with_prior(LeftNeighbour()).compress(torch.linspace(0, 1, 512).expand(1, 3, 512, 512))
    with pytest.raises(ModelError, match="learned prior, and this codec has none"):
        CODECS["grid"].decompress([stream])
    other = LeftNeighbour()
    other.fingerprint = b"another."
    with pytest.raises(ModelError, match="another prior or other weights"):
        with_prior(other).decompress([stream])


def test_a_prior_that_does_not_know_the_codebook_is_not_asked():
    other = LeftNeighbour()
    other.sizes = (8,)
    smooth = torch.linspace(0, 1, 512).expand(1, 3, 512, 512)
    assert with_prior(other).compress(smooth) == CODECS["grid"].compress(smooth)
    with pytest.raises(ModelError, match="does not know this model's tokens"):
        with_prior(other).decompress(with_prior(LeftNeighbour()).compress(smooth))


@pytest.mark.parametrize("row", GOLDEN_PRIOR, ids=lambda r: f"{r['height']}x{r['width']}")
def test_golden_streams_of_a_prior(row):
    codec, prior = TokenCodec(TinyGrid(), prior=small_prior()), small_prior()
    stream = bytes.fromhex(row["stream"])
    assert prior.fingerprint.hex() == row["prior"]
    tokens = codec.decompress_tokens(stream)
    assert tokens.indices.flatten().tolist() == row["indices"]
    parsed = container.parse(stream)
    assert parsed.coder == Coder.PRIOR
    assert parsed.fingerprint == container.with_prior(codec.fingerprint, prior.fingerprint)
    assert prior.encode(tokens.indices[0, :, 0].numpy(), tokens.layout.scales[0], 64) == parsed.payload
    assert parsed.to_bytes() == stream


# ---- wrong models ---------------------------------------------------------------------------------------------------

def test_other_weights_are_refused_and_both_fingerprints_named():
    (stream,) = CODECS["grid"].compress(picture(32, 32))
    other = TinyGrid()
    other.get_buffer("codebook")[0, 0] += 0.5
    codec = TokenCodec(other)
    with pytest.raises(ModelError) as caught:
        codec.decompress([stream])
    assert CODECS["grid"].fingerprint.hex() in str(caught.value) and codec.fingerprint.hex() in str(caught.value)


def test_other_tables_are_other_weights():
    (stream,) = CODECS["grid"].compress(picture(32, 32))
    other = TinyGrid()
    other.token_frequencies = other.get_buffer("token_frequencies").roll(1)
    with pytest.raises(ModelError, match="fingerprint"):
        TokenCodec(other).decompress([stream])


def test_another_model_id_is_refused():
    (stream,) = CODECS["groups"].compress(picture(32, 32))
    other = TinyGroups()
    other.model_id = 78
    with pytest.raises(ModelError, match=r"made with model 77 .* this is model 78"):
        TokenCodec(other).decompress([stream])
    with pytest.raises(ModelError, match=r"other weights of model 77: .* fingerprint"):
        CODECS["grid"].decompress([stream])


@pytest.mark.parametrize(("written", "read"), [(0, 5), (5, 0), (5, 5)])
def test_a_model_without_an_id_is_known_by_its_fingerprint(written, read):
    """A copy in a folder has id 0; it decodes the shipped model's streams, and the other way round."""
    writer, reader = TinyGrid(), TinyGrid()
    writer.model_id, reader.model_id = written, read
    (stream,) = TokenCodec(writer).compress(picture(32, 32))
    assert container.parse(stream).model_id == written
    assert torch.equal(TokenCodec(reader).decompress([stream])[0], CODECS["grid"].decompress(
        CODECS["grid"].compress(picture(32, 32)))[0])


def test_another_layout_is_refused():
    (stream,) = CODECS["grid"].compress(picture(32, 32))
    parsed = container.parse(stream)
    fields = {k: v for k, v in vars(parsed).items() if k != "scales"}
    with pytest.raises(ModelError, match="token layout"):
        CODECS["grid"].decompress([container.Container(scales=((4, 4),), **fields).to_bytes()])
    with pytest.raises(ConfigError, match="laid out"):
        CODECS["grid"].compress_tokens(CODECS["groups"].tokenizer.encode(picture(32, 32)))


def test_tables_that_are_no_tables():
    tokenizer = TinyGrid()
    tokenizer.token_frequencies = torch.ones(1, 63, dtype=torch.int32)
    with pytest.raises(ModelError, match="power of two"):
        TokenCodec(tokenizer)


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 0, 8),
                                    torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_wrong_images_are_refused(images):
    with pytest.raises(ImageError):
        CODECS["grid"].compress(images)


def test_a_lower_limit_on_pixels_holds_both_ways():
    (stream,) = CODECS["grid"].compress(picture(32, 32))
    codec = TokenCodec(TinyGrid(), max_pixels=1000)
    with pytest.raises(ImageError, match="limit of 1000"):
        codec.compress(picture(32, 32))
    with pytest.raises(BitstreamError, match="limit of 1000"):
        codec.decompress([stream])


@pytest.mark.parametrize("make", [TinyGrid, TinyGroups, TinyScales])
def test_flipped_bits_and_cuts_give_typed_errors(make):
    codec = TokenCodec(make())
    (stream,) = codec.compress(picture(20, 20))
    for at in range(len(stream)):
        with pytest.raises(VtcError):
            codec.decompress([stream[:at]])
        with pytest.raises(VtcError):
            codec.decompress([stream[:at] + bytes([stream[at] ^ 16]) + stream[at + 1 :]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_pictures_of_other_floats_are_read(dtype):
    codec = CODECS["grid"]
    images = (picture(16, 16) * 255).round() / 256  # exact in all of them
    assert codec.compress(images.to(dtype)) == codec.compress(images)
