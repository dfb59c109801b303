"""TokBench's resolution protocol: to the tokenizer's size and back, so that boxes and keypoints stay where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtc.errors import ConfigError, ImageError

#: the published sizes
IMAGE_SIZES = (256, 512, 1024)
VIDEO_SIZES = (256, 480)


@dataclass(frozen=True)
class Canvas:
    """How a picture of height x width lies, scaled, on a black canvas. All sizes are (height, width) in pixels."""

    original: tuple[int, int]
    scaled: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]
    resampling: Image.Resampling

    def place(self, pixels: np.ndarray) -> np.ndarray:
        """The original, uint8 (H, W, 3), to what a tokenizer is given."""
        if pixels.dtype != np.uint8 or pixels.shape != (*self.original, 3):
            raise ImageError(f"The canvas was made for uint8 {(*self.original, 3)}, not {pixels.dtype} {pixels.shape}.")
        canvas = Image.new("RGB", self.size[::-1])
        canvas.paste(Image.fromarray(pixels).resize(self.scaled[::-1], self.resampling), (self.left, self.top))
        return np.array(canvas)

    def restore(self, canvas: np.ndarray) -> np.ndarray:
        """What the tokenizer gave back, uint8, to the original's size."""
        if canvas.dtype != np.uint8 or canvas.shape != (*self.size, 3):
            raise ImageError(f"A reconstruction of uint8 {(*self.size, 3)} was expected, not {canvas.dtype} "
                             f"{canvas.shape}.")
        # A side may have come out one pixel too long by rounding; Pillow then pastes and crops beyond the edge.
        area = (self.left, self.top, self.left + self.scaled[1], self.top + self.scaled[0])
        return np.array(Image.fromarray(canvas).crop(area).resize(self.original[::-1], self.resampling))


def image_canvas(height: int, width: int, size: int) -> Canvas:
    """For pictures: the longer side to `size` by Lanczos, centred on size x size.

    >>> image_canvas(720, 1280, 256).scaled
    (144, 256)
    """
    _check_size(size)
    ratio = min(size / width, size / height)
    scaled = math.ceil(height * ratio), math.ceil(width * ratio)
    top, left = (size - scaled[0]) // 2, (size - scaled[1]) // 2
    return Canvas((height, width), scaled, top, left, (size, size), Image.Resampling.LANCZOS)


def video_canvas(height: int, width: int, size: int) -> Canvas:
    """For films: the shorter side to `size`, bilinear, the longer one padded to a multiple of 32.

    >>> video_canvas(720, 1280, 256).size  # 455 columns and 25 of padding
    (256, 480)
    """
    _check_size(size)
    if height <= width:
        scaled = size, round(width * (size / height))
        canvas = size, math.ceil(scaled[1] / 32) * 32
    else:
        scaled = round(height * (size / width)), size
        canvas = math.ceil(scaled[0] / 32) * 32, size
    top, left = (canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2
    return Canvas((height, width), scaled, top, left, canvas, Image.Resampling.BILINEAR)


def reconstruct(pixels: np.ndarray, canvas: Canvas, codec: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    """There and back, uint8 (H, W, 3); `codec` takes and gives uint8 (h, w, 3), and None is TokBench's row "Resize"."""
    placed = canvas.place(pixels)
    return canvas.restore(placed if codec is None else codec(placed))


def _check_size(size: int) -> None:
    if size < 1:
        raise ConfigError(f"A canvas has at least one pixel a side, not {size}.")
