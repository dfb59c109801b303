"""Picture files to pixels and back: the only place where uint8 (H, W, 3) lives.

Whatever Pillow reads becomes upright 8-bit sRGB on a white ground, and what had to be done for that is told in `notes`.
Everything else in vtc sees float RGB, (3, H, W) or (B, 3, H, W), in [0, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from vtc.errors import ImageError
from vtc.files import read_file, write_file

#: pixels of the largest picture that is read. Pillow warns from 89 million on and refuses 179 million.
MAX_PIXELS = 2**27

#: lossy output has a high quality, because the picture was compressed once already
SAVE_OPTIONS: dict[str, dict[str, int]] = {
    "PNG": {"compress_level": 6},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}
#: what is written, by suffix
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: the longest side that a format holds
LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65535, "WEBP": 16383}


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """pixels: uint8 (H, W, 3), sRGB. notes: one sentence for each change that the file's pixels went through."""

    pixels: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.pixels.shape[1]

    def tensor(self) -> Tensor:
        """float32 (3, H, W) in [0, 1]."""
        return to_tensor(self.pixels)

    def part(self, rows: slice, columns: slice) -> Tensor:
        """float32 (1, 3, h, w) in [0, 1]: a picture of 100 megapixels would be 1.2 GB of it."""
        return to_tensor(self.pixels[rows, columns])[None]


class Canvas:
    """A picture that is drawn part by part: `pixels`, uint8 (H, W, 3)."""

    def __init__(self, height: int, width: int) -> None:
        self.pixels = np.zeros((height, width, 3), dtype=np.uint8)

    def put(self, rows: slice, columns: slice, image: Tensor) -> None:
        """Draw (1, 3, h, w) in [0, 1], rounded as by `to_uint8`, onto some rows and columns."""
        self.pixels[rows, columns] = to_uint8(image)


def load_image(source: str | Path | bytes | BinaryIO, max_pixels: int = MAX_PIXELS,
               name: str | None = None) -> LoadedImage:
    """Read a picture: the first frame, turned upright, in sRGB, 8 bits a channel, composited on white.

    source: a path, the bytes of a file, or an open binary file. `name` stands for it in errors.
    Raises ImageError where it is no picture, is damaged, or has more than `max_pixels` (seen in the header, before
    anything is allocated), and FileError where it cannot be read.
    """
    if name is None:
        name = str(source) if isinstance(source, str | Path) else "the picture"
    if isinstance(source, str | Path):
        source = read_file(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    notes: list[str] = []
    try:
        with Image.open(stream) as image:
            _check_size(image.size, max_pixels, name)
            if image.format == "EPS":
                raise ImageError(f"{name} is PostScript, a program and not a picture; convert it to PNG first.")
            if image.format == "TIFF":  # counting its pages takes time that grows with their square
                if getattr(image, "is_animated", False):
                    notes.append("took the first of several frames")
            elif (frames := getattr(image, "n_frames", 1)) > 1:
                notes.append(f"took the first of {frames} frames")
            image.load()
            _check_size(image.size, max_pixels, name)  # an icon's header may lie about the picture inside
            pixels = np.array(_to_rgb(_upright(image, notes), notes))
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture that can be read.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels; the limit is {max_pixels} in all.") from error
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise ImageError(f"{name} is damaged or cut: {_one_line(error)}.") from error
    return LoadedImage(pixels, tuple(notes))


def encode_image(image: Tensor | np.ndarray, format: str) -> bytes:
    """The bytes of a 'PNG', 'JPEG' or 'WEBP' file.

    image: float (3, H, W) or (1, 3, H, W) in [0, 1], or uint8 (H, W, 3). Raises ImageError where `format` holds no
    sides of that length.
    """
    pixels = to_uint8(image) if isinstance(image, Tensor) else image
    height, width = pixels.shape[:2]
    if max(height, width) > LONGEST_SIDE[format]:
        raise ImageError(f"A {format} file holds at most {LONGEST_SIDE[format]} pixels a side, and the picture has "
                         f"{width}x{height}; write a PNG instead.")
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **SAVE_OPTIONS[format])
    return stream.getvalue()


def save_image(image: Tensor | np.ndarray, target: str | Path | BinaryIO, format: str | None = None) -> None:
    """Write an image, as `encode_image` takes it, to a path or to an open binary file.

    format: 'PNG', 'JPEG' or 'WEBP'; by default what the path's suffix says, and PNG for an open file.
    A path holds the whole file or what it held before. Raises ImageError and FileError.
    """
    if format is None:
        format = format_of(target) if isinstance(target, str | Path) else "PNG"
    data = encode_image(image, format)
    if isinstance(target, str | Path):
        write_file(target, data)
    else:
        target.write(data)


def contact_sheet(images: Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Pictures of one size, uint8 (H, W, 3), on one white sheet, row by row; by default as many columns as rows."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def format_of(path: str | Path) -> str:
    """'PNG', 'JPEG' or 'WEBP' by the suffix of a path; raises ImageError for another suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ImageError(f"{path} does not end in {', '.join(FORMATS)}: its suffix says how to write a picture.")
    return FORMATS[suffix]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Uint8 (H, W, 3) to float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def to_uint8(image: Tensor) -> np.ndarray:
    """(3, H, W) or (1, 3, H, W) in [0, 1] to uint8 (H, W, 3): clamped, and rounded to the nearest level."""
    image = image.squeeze(0) if image.ndim == 4 else image
    if image.ndim != 3 or image.shape[0] != 3:
        raise ImageError(f"An image has the shape (3, H, W), not {tuple(image.shape)}.")
    levels = image.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width}x{height}).")
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width}x{height} pixels, and the limit is {max_pixels} in all.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """Apply the EXIF orientation."""
    try:
        orientation = image.getexif().get(0x0112, 1)
        if orientation not in range(2, 9):
            return image  # Pillow would copy it
        turned = ImageOps.exif_transpose(image)
    except Exception:  # whatever a damaged EXIF block raises; the pixels are fine
        notes.append("ignored EXIF data that cannot be read")
        return image
    notes.append(f"turned upright, EXIF orientation {orientation}")
    return turned


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Any mode that Pillow has to RGB in sRGB, transparency composited on white."""
    profile = image.info.get("icc_profile")
    image = _to_eight_bits(image, notes)
    colour, alpha = _split_alpha(image)
    if profile:
        colour = _to_srgb(colour, profile, notes)
    elif colour.mode == "CMYK":
        notes.append("converted CMYK without a profile to RGB by the plain formula")
    if colour.mode == "LAB":
        # Pillow itself cannot convert from Lab.
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        colour = _transformed(colour, lab, srgb)
        notes.append("converted Lab to sRGB")
    if colour.mode != "RGB":  # a copy of a large picture is worth avoiding
        colour = colour.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] != 255:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
        notes.append("composited transparency on white")
    return colour


def _to_eight_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """Modes of 16 and 32 bits to L or LA, scaled and rounded; the others as they are.

    Pillow reads 16-bit colour PNGs and TIFFs by their upper bytes, so those arrive here as 8-bit RGB.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        values = np.where(finite, values, 0)
        notes.append("replaced values that are not finite by 0")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        white = 4095.0 if _tiff_bits(image) == (12,) else 65535.0
        black, note = 0.0, f"reduced {12 if white == 4095 else 16}-bit grey to 8 bits"
    elif image.mode == "F" and low >= 0 and high <= 1:
        black, white, note = 0.0, 1.0, "took floating-point grey as 0 to 1"
    elif image.mode == "F" and low >= 0 and high <= 255:
        black, white, note = 0.0, 255.0, "took floating-point grey as 0 to 255"
    else:
        black, white, note = low, high, f"stretched grey of {low:g} to {high:g} over 0 to 255"
    notes.append(note)
    levels = np.rint((values - black) * (255 / ((white - black) or 1.0))).clip(0, 255).astype(np.uint8)
    grey = Image.fromarray(levels)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _tiff_bits(image: Image.Image) -> tuple[int, ...] | None:
    bits_per_sample = 258
    return getattr(image, "tag_v2", {}).get(bits_per_sample)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(colour without alpha, alpha as L or None). A palette becomes RGB, one bit becomes L."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # The colour that a 16-bit PNG calls transparent; its pixels have been cut down to their upper bytes.
        image.info["transparency"] = tuple(v >> 8 for v in transparent)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode == "PA" or (transparent is not None and image.mode in ("1", "L", "P", "RGB")):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode == "P":
        return image.convert("RGB"), None
    return (image.convert("L") if image.mode == "1" else image), None


def _to_srgb(colour: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """RGB, L or CMYK through an ICC profile to sRGB; as it is where the profile is broken or for other modes."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        label = " ".join(ImageCms.getProfileDescription(source).split())
        if label.startswith("sRGB"):
            return colour
        space = source.profile.xcolor_space.strip()
        if space == "GRAY" and colour.mode == "RGB":  # a grey picture that was stored with three channels or a palette
            colour = colour.convert("L")
        elif space == "RGB" and colour.mode == "L":
            colour = colour.convert("RGB")
        converted = _transformed(colour, source, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        notes.append("ignored a colour profile that is broken or does not fit")
        return colour
    notes.append(f"converted colours from {label!r} to sRGB")
    return converted


def _transformed(colour: Image.Image, source: Any, target: Any) -> Image.Image:
    result = ImageCms.profileToProfile(colour, source, target, outputMode="RGB")
    assert result is not None  # it is None only for in-place conversions
    return result
