"""Picture files to pixels: every mode against values worked out by hand, every failure as one sentence."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from vtc.errors import FileError, ImageError
from vtc.files import read_file, write_file
from vtc.images import load_image, save_image, to_tensor, to_uint8


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG file written by hand; `rows` begin with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def file_of(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def grey_row(data: bytes) -> list[int]:
    """The one row of a picture that must be grey."""
    pixels = load_image(data).pixels
    assert pixels.dtype == np.uint8 and pixels.shape[0] == 1
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


RAINBOW = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_rgb_is_taken_as_it_is() -> None:
    loaded = load_image(file_of(Image.fromarray(RAINBOW), "PNG"))
    np.testing.assert_array_equal(loaded.pixels, RAINBOW)
    assert (loaded.height, loaded.width, loaded.notes) == (5, 7, ())
    loaded.pixels[0, 0] = 0  # writable, as torch.from_numpy wants


def test_path_bytes_and_open_file_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(file_of(Image.fromarray(RAINBOW), "PNG"))
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file):
            np.testing.assert_array_equal(load_image(source).pixels, RAINBOW)


def test_grey_and_one_bit() -> None:
    assert grey_row(png(3, 1, 8, 0, b"\0\x00\x7b\xff")) == [0, 123, 255]
    assert grey_row(png(3, 1, 1, 0, b"\0\xa0")) == [255, 0, 255]
    assert grey_row(png(2, 1, 4, 0, b"\0\x1f")) == [17, 255]


def test_palette() -> None:
    palette = chunk(b"PLTE", bytes((10, 20, 30, 40, 50, 60)))
    assert load_image(png(2, 1, 8, 3, b"\0\1\0", palette)).pixels.tolist() == [[[40, 50, 60], [10, 20, 30]]]


def test_palette_with_transparency_is_composited_on_white() -> None:
    extra = chunk(b"PLTE", bytes((10, 20, 30, 40, 50, 60))) + chunk(b"tRNS", b"\x00\xff")
    loaded = load_image(png(2, 1, 8, 3, b"\0\1\0", extra))
    assert loaded.pixels.tolist() == [[[40, 50, 60], [255, 255, 255]]]
    assert loaded.notes == ("composited transparency on white",)


def test_grey_and_colour_keys_are_transparent() -> None:
    assert grey_row(png(3, 1, 8, 0, b"\0\x05\x06\x07", chunk(b"tRNS", b"\0\x06"))) == [5, 255, 7]
    assert grey_row(png(2, 1, 16, 0, b"\0\x40\x00\x80\x80", chunk(b"tRNS", b"\x40\x00"))) == [255, 128]
    key = chunk(b"tRNS", struct.pack(">3H", 257, 514, 771))
    row = b"\0" + struct.pack(">6H", 257, 514, 771, 2570, 2570, 2570)
    assert load_image(png(2, 1, 16, 2, row, key)).pixels.tolist() == [[[255, 255, 255], [10, 10, 10]]]


def test_alpha_is_composited_on_white_and_rounded() -> None:
    values, alphas = np.meshgrid(np.arange(0, 256, 5), np.arange(0, 256, 3))
    image = np.stack((values, values, values, alphas), -1).astype(np.uint8)
    loaded = load_image(file_of(Image.fromarray(image), "PNG"))
    expected = np.floor((values * alphas + 255 * (255 - alphas)) / 255 + 0.5)
    np.testing.assert_array_equal(loaded.pixels[..., 0], expected)
    assert loaded.notes == ("composited transparency on white",)
    assert load_image(file_of(Image.fromarray(image[..., [0, 3]], "LA"), "PNG")).pixels.tolist() == \
        loaded.pixels.tolist()


def test_an_opaque_alpha_channel_is_not_worth_a_note() -> None:
    opaque = np.dstack((RAINBOW, np.full((5, 7), 255, np.uint8)))
    loaded = load_image(file_of(Image.fromarray(opaque), "PNG"))
    np.testing.assert_array_equal(loaded.pixels, RAINBOW)
    assert loaded.notes == ()


def test_sixteen_bit_grey_is_scaled_and_rounded() -> None:
    values = [0, 128, 129, 385, 386, 32768, 65406, 65407, 65535]  # 128.5 is half a level
    expected = [0, 0, 1, 1, 2, 128, 254, 255, 255]
    loaded = load_image(png(9, 1, 16, 0, b"\0" + struct.pack(">9H", *values)))
    assert loaded.pixels[0, :, 1].tolist() == expected
    assert loaded.notes == ("reduced 16-bit grey to 8 bits",)
    assert grey_row(b"P5 9 1 65535\n" + struct.pack(">9H", *values)) == expected


def test_sixteen_bit_colour() -> None:
    row = b"\0" + struct.pack(">3H", 257 * 3, 257 * 128, 65535)
    assert load_image(png(1, 1, 16, 2, row)).pixels.tolist() == [[[3, 128, 255]]]


def tiff(values: list[float], mode: str) -> bytes:
    kind = {"F": np.float32, "I": np.int32}[mode]
    return file_of(Image.fromarray(np.array([values], kind)), "TIFF")


@pytest.mark.parametrize(("mode", "values", "expected", "note"), [
    ("F", [0.0, 0.25, 1.0], [0, 64, 255], "took floating-point grey as 0 to 1"),
    ("F", [0.0, 63.6, 255.0], [0, 64, 255], "took floating-point grey as 0 to 255"),
    ("F", [-1.0, 0.0, 3.0], [0, 64, 255], "stretched grey of -1 to 3 over 0 to 255"),
    ("F", [0.0, float("nan"), 1.0], [0, 0, 255], "replaced values that are not finite by 0"),
    ("F", [-5.0, -5.0, -5.0], [0, 0, 0], "stretched grey of -5 to -5 over 0 to 255"),
    ("I", [0, 32768, 65535], [0, 128, 255], "reduced 16-bit grey to 8 bits"),
    ("I", [0, 100000, 400000], [0, 64, 255], "stretched grey of 0 to 400000 over 0 to 255"),
])
def test_wide_grey(mode: str, values: list[float], expected: list[int], note: str) -> None:
    data = tiff(values, mode)
    assert grey_row(data) == expected
    assert note in load_image(data).notes


def test_cmyk_lab_and_ycbcr() -> None:
    loaded = load_image(file_of(Image.new("CMYK", (1, 1), (0, 255, 0, 0)), "TIFF"))
    assert loaded.pixels.tolist() == [[[255, 0, 255]]]
    assert loaded.notes == ("converted CMYK without a profile to RGB by the plain formula",)
    # L* = 100 is white and L* = 0 is black; a* = b* = 0, which Pillow stores as 128, is neutral.
    for level, grey in ((255, 255), (0, 0)):
        pixel = load_image(file_of(Image.new("LAB", (1, 1), (level, 128, 128)), "TIFF")).pixels[0, 0]
        assert abs(pixel.astype(int) - grey).max() <= 1
    assert load_image(file_of(Image.new("YCbCr", (1, 1), (77, 128, 128)), "TIFF")).pixels.tolist() == [[[77, 77, 77]]]


ORIENTED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(file_of(Image.fromarray(RAINBOW), "PNG", exif=exif))
    np.testing.assert_array_equal(loaded.pixels, ORIENTED[orientation](RAINBOW))
    assert loaded.notes == (() if orientation == 1 else (f"turned upright, EXIF orientation {orientation}",))


def icc_profile(space: bytes, curve: bytes, columns: dict[bytes, tuple[float, float, float]]) -> bytes:
    """A display profile of ICC version 2 by hand; `columns` are the XYZ (D50) of the primaries."""
    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    text = b"A made-up profile\0"
    white = (0.9642, 1.0, 0.8249)
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"cprt": b"text\0\0\0\0none\0",
            b"wtpt": b"XYZ \0\0\0\0" + fixed(*white)}
    tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in columns.items()}
    tags |= {name + b"TRC": curve for name in (columns or (b"k",))}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = (struct.pack(">I4sI", start + len(body), b"\0\0\0\0", 0x02100000) + b"mntr" + space + b"XYZ "
              + struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*white))
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


SRGB_PRIMARIES = {b"r": (0.4361, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971), b"b": (0.1431, 0.0606, 0.7141)}
LINEAR = b"curv\0\0\0\0" + struct.pack(">I", 0) + bytes(4)  # no entries: the identity


def srgb_of_linear(levels: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, on 0 to 255."""
    x = levels / 255
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def test_colours_go_through_the_profile_to_srgb() -> None:
    profile = icc_profile(b"RGB ", LINEAR, SRGB_PRIMARIES)
    loaded = load_image(file_of(Image.fromarray(RAINBOW), "PNG", icc_profile=profile))
    assert np.abs(loaded.pixels - srgb_of_linear(RAINBOW)).max() <= 2
    assert loaded.notes == ("converted colours from 'A made-up profile' to sRGB",)
    swapped = icc_profile(b"RGB ", LINEAR, dict(zip(SRGB_PRIMARIES, reversed(SRGB_PRIMARIES.values()), strict=True)))
    pixels = load_image(file_of(Image.fromarray(RAINBOW), "PNG", icc_profile=swapped)).pixels
    assert np.abs(pixels - srgb_of_linear(RAINBOW[..., ::-1])).max() <= 2


def test_grey_profile_and_alpha_beside_a_profile() -> None:
    grey = RAINBOW[..., 0] | 32  # near black, where sRGB is steep, the 8-bit path of LittleCMS is coarser
    profile = icc_profile(b"GRAY", LINEAR, {})
    expected = srgb_of_linear(grey)
    pixels = load_image(file_of(Image.fromarray(grey), "PNG", icc_profile=profile)).pixels
    assert np.abs(pixels - expected[..., None]).max() <= 1
    half = np.stack((grey, np.full_like(grey, 51)), -1)  # alpha 1/5
    pixels = load_image(file_of(Image.fromarray(half, "LA"), "PNG", icc_profile=profile)).pixels
    assert np.abs(pixels - (0.2 * expected + 0.8 * 255)[..., None]).max() <= 1


def test_a_broken_profile_is_ignored_and_said_so() -> None:
    for profile in (b"not a profile", icc_profile(b"CMYK", LINEAR, SRGB_PRIMARIES)):
        loaded = load_image(file_of(Image.fromarray(RAINBOW), "PNG", icc_profile=profile))
        np.testing.assert_array_equal(loaded.pixels, RAINBOW)
        assert loaded.notes == ("ignored a colour profile that is broken or does not fit",)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("L", (2, 1), level) for level in (10, 200, 90)]
    loaded = load_image(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (loaded.pixels == 10).all()
    assert loaded.notes == ("took the first of 3 frames",)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_its_pixels_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for side in (12_000, 65_000):
        with pytest.raises(ImageError, match=r"^the picture has"):
            load_image(png(side, side, 8, 2, b""))
    with pytest.raises(ImageError, match=r"bomb\.png has 5x7 pixels, and the limit is 34 in all"):
        load_image(png(5, 7, 8, 2, b""), max_pixels=34, name="bomb.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "TGA"])
def test_a_cut_file_is_one_sentence(format: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = file_of(image, format)
    path = tmp_path / "cut.picture"
    for length in (1, 9, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"cut\.picture") as caught:
            load_image(path)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_what_is_not_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for data, kind, text in ((b"", FileError, "is empty"), (b"hello there\n" * 9, ImageError, "is not a picture"),
                             (postscript, ImageError, "is PostScript")):
        path.write_bytes(data)
        with pytest.raises(kind, match=rf"a\.png .*{text}"):
            load_image(path)
    with pytest.raises(FileError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(FileError, match=r"no\.png cannot be read: no such file"):
        load_image(tmp_path / "no.png")


def test_tensors_and_levels_round_trip_and_round() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor = to_tensor(levels)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.min() == 0 and tensor.max() == 1 and tensor[0, 0, 1] == torch.tensor(1 / 255)
    np.testing.assert_array_equal(to_uint8(tensor), levels)
    np.testing.assert_array_equal(to_uint8(tensor[None]), levels)
    values = torch.tensor([-0.2, 0.49 / 255, 0.51 / 255, 99.4 / 255, 99.6 / 255, 1.3])
    assert to_uint8(values.expand(3, 1, 6))[0, :, 0].tolist() == [0, 0, 1, 99, 100, 255]
    with pytest.raises(ImageError, match=r"\(3, H, W\), not \(4, 2, 2\)"):
        to_uint8(torch.zeros(4, 2, 2))


@pytest.mark.parametrize(("suffix", "format", "tolerance"),
                         [("png", "PNG", 0), ("PNG", "PNG", 0), ("jpg", "JPEG", 12), ("jpeg", "JPEG", 12),
                          ("webp", "WEBP", 24)])
def test_saved_by_suffix(suffix: str, format: str, tolerance: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).round().astype(np.uint8)
    for image in (ramp, to_tensor(ramp), to_tensor(ramp)[None]):
        save_image(image, tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as file:
            assert file.format == format
            assert np.abs(np.asarray(file.convert("RGB")).astype(int) - ramp).max() <= tolerance
    assert os.listdir(tmp_path) == [f"a.{suffix}"]


def test_saving_into_an_open_file() -> None:
    stream = io.BytesIO()
    save_image(RAINBOW, stream)
    np.testing.assert_array_equal(load_image(stream.getvalue()).pixels, RAINBOW)


def test_saving_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.gif does not end in \.png"):
        save_image(RAINBOW, tmp_path / "a.gif")
    with pytest.raises(ImageError, match="WEBP file holds at most 16383"):
        save_image(np.zeros((1, 16384, 3), np.uint8), tmp_path / "a.webp")
    with pytest.raises(FileError, match=r"output folder .*none does not exist"):
        save_image(RAINBOW, tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileError, match=r"folder\.png cannot be written"):
        save_image(RAINBOW, tmp_path / "folder.png")
    assert os.listdir(tmp_path) == ["folder.png"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        def fail(descriptor: int, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises((FileError, KeyboardInterrupt)):
            save_image(RAINBOW, path)
        assert os.listdir(tmp_path) == ["a.png"] and path.read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_is_written_to_and_not_replaced() -> None:
    with pytest.raises(FileError, match="no space left"):
        save_image(RAINBOW, "/dev/full", "PNG")
    save_image(RAINBOW, "/dev/null", "PNG")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_mode_bits_and_links(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    old = os.umask(0o027)
    try:
        save_image(RAINBOW, tmp_path / "link.png")
    finally:
        os.umask(old)
    assert (tmp_path / "link.png").is_symlink()
    assert stat.S_IMODE((tmp_path / "real.png").stat().st_mode) == 0o640


def test_a_descriptor_is_written_to_and_a_file_may_be_called_stdin(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/stdout in a pipe is a link to what is no path."""
    read, write = os.pipe()
    write_file(f"/dev/fd/{write}", b"abc")
    assert os.read(read, 9) == b"abc"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdin").write_bytes(b"a file")
    assert read_file("stdin") == b"a file"


def test_the_pages_of_a_tiff_are_not_counted() -> None:
    pages = [Image.new("L", (2, 2), n) for n in range(3)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    assert load_image(stream.getvalue()).notes == ("took the first of several frames",)
    assert load_image(file_of(pages[0], "TIFF")).notes == ()
