"""Pictures that are never floats as a whole: what is read and written at a time, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import test_models
from vtc.cli import decode, encode
from vtc.codecs.rates import RateControl
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ImageError, ModelError
from vtc.images import Canvas, LoadedImage, load_image, save_image, to_uint8
from vtc.tokenizers import tiling
from vtc.tokenizers.base import Tokens
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.tiling import decode_tiled, decode_tiles, encode_tiled, encode_tiles

HEIGHT, WIDTH, TILE = 210, 333, 64


def tiny() -> LocalVQ:
    return test_models.tiny().eval()  # training moves the codebook


@pytest.fixture
def picture() -> LoadedImage:
    return LoadedImage(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def test_no_more_is_read_at_once_than_a_tile_and_its_halo(picture: LoadedImage) -> None:
    model, parts = tiny(), []

    def read(rows: slice, columns: slice) -> Tensor:
        parts.append((rows, columns))
        return picture.part(rows, columns)

    tokens = encode_tiles(model, read, HEIGHT, WIDTH, TILE)
    assert torch.equal(tokens.indices, encode_tiled(model, picture.tensor()[None], TILE).indices)
    assert torch.equal(tokens.indices, model.encode(picture.tensor()[None]).indices)
    assert len(parts) == 4 * 6
    assert max(s.stop - s.start for part in parts for s in part) <= TILE + 2 * model.halo
    assert {(max(r.stop for r, _ in parts), max(c.stop for _, c in parts))} == {(HEIGHT, WIDTH)}


def test_every_pixel_is_written_once_and_no_more_than_a_tile_at_once(picture: LoadedImage) -> None:
    model = tiny()
    tokens = model.encode(picture.tensor()[None])
    canvas, times = Canvas(HEIGHT, WIDTH), np.zeros((HEIGHT, WIDTH), dtype=int)

    def write(rows: slice, columns: slice, pixels: Tensor) -> None:
        assert pixels.shape == (1, 3, rows.stop - rows.start, columns.stop - columns.start)
        assert max(pixels.shape) <= TILE
        times[rows, columns] += 1
        canvas.put(rows, columns, pixels)

    decode_tiles(model, tokens, write, tile=TILE)
    assert (times == 1).all()
    np.testing.assert_array_equal(canvas.pixels, to_uint8(decode_tiled(model, tokens, tile=TILE)))


def test_a_picture_has_the_stream_of_its_tensor(picture: LoadedImage) -> None:
    codec = TokenCodec(tiny())
    for chunks in (0, 4):
        stream = codec.compress_picture(picture, chunks)
        assert [stream] == codec.compress(picture.tensor()[None], chunks)
    canvas = Canvas(HEIGHT, WIDTH)
    received = codec.receive(stream)
    codec.draw_tiles(received, canvas.put)
    np.testing.assert_array_equal(canvas.pixels, to_uint8(codec.draw(received)))
    rates = RateControl(lambda quality: codec, 1)
    assert rates.compress(picture, 1) == codec.compress(picture.tensor()[None])[0]
    assert rates.compress_at(picture, 1.0) == rates.compress_at(picture.tensor(), 1.0)
    with pytest.raises(ImageError, match="cannot be coded"):
        TokenCodec(tiny(), max_pixels=HEIGHT * WIDTH - 1).compress_picture(picture)


def test_a_model_that_draws_another_size_is_told(picture: LoadedImage, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = TokenCodec(tiny())
    stream = codec.compress_picture(picture)

    def decode(tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(1, 3, tokens.height + 1, tokens.width)

    monkeypatch.setattr(codec.tokenizer, "decode", decode)
    with pytest.raises(ModelError, match="shape"):
        codec.decompress([stream])


def test_the_commands_never_make_a_whole_float_picture(picture: LoadedImage, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """With small tiles: of 210x333 pixels none of the float tensors that pass has more than a tile and its halo."""
    tiny().save_pretrained(tmp_path / "model")
    save_image(picture.pixels, tmp_path / "a.png")
    largest = [0, 0]
    part, put = LoadedImage.part, Canvas.put

    def counted_part(self: LoadedImage, rows: slice, columns: slice) -> Tensor:
        pixels = part(self, rows, columns)
        largest[0] = max(largest[0], pixels.numel())
        return pixels

    def counted_put(self: Canvas, rows: slice, columns: slice, image: Tensor) -> None:
        largest[1] = max(largest[1], image.numel())
        put(self, rows, columns, image)

    monkeypatch.setattr(LoadedImage, "part", counted_part)
    monkeypatch.setattr(Canvas, "put", counted_put)
    monkeypatch.setattr(LoadedImage, "tensor", lambda self: pytest.fail("the whole picture became floats"))
    for function in (tiling.encode_tiles, tiling.decode_tiles):
        defaults = tuple(TILE if value == tiling.DEFAULT_TILE else value for value in function.__defaults__ or ())
        monkeypatch.setattr(function, "__defaults__", defaults)
    model = ["--model", str(tmp_path / "model"), "--quiet"]
    assert encode.main([str(tmp_path / "a.png"), *model]) == 0
    assert decode.main([str(tmp_path / "a.vtc"), "-o", str(tmp_path / "b.png"), *model]) == 0
    assert 0 < largest[0] <= 3 * (TILE + 2 * tiny().halo) ** 2 and 0 < largest[1] <= 3 * TILE**2
    assert load_image(tmp_path / "b.png").pixels.shape == (HEIGHT, WIDTH, 3)
