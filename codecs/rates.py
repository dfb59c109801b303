"""Any rate: one codec for each quality, and the finest file within a budget.

The members of a family (`vtc.tokenizers.tokenizer_family`) lay the same grid over an image and differ in the number of
words, so files grow with the quality, and which one fits is found by bisection over whole files: every byte counts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, ImageError
from vtc.images import LoadedImage


class RateControl:
    """Chooses the codec for an image: by quality, by bits per pixel, by bytes.

    codec_of: quality -> its codec; called whenever one is needed, so it should keep what it loads.
    qualities: how many there are; 1 is the coarsest.
    resilience, progressive: as of `TokenCodec.compress`.
    """

    def __init__(self, codec_of: Callable[[int], TokenCodec], qualities: int, resilience: int = 0,
                 progressive: bool = False) -> None:
        if qualities < 1:
            raise ConfigError(f"Rate control needs at least one quality, not {qualities}.")
        self.codec_of, self.qualities = codec_of, qualities
        self.resilience, self.progressive = resilience, progressive

    def codec(self, quality: int) -> TokenCodec:
        """The codec of a quality. Raises ConfigError where there is none."""
        if not 1 <= quality <= self.qualities:
            raise ConfigError("The model has one quality and no family of smaller ones." if self.qualities == 1 else
                              f"The model has the qualities 1 to {self.qualities}, and {quality} is none of them.")
        return self.codec_of(quality)

    def compress(self, image: Tensor | LoadedImage, quality: int) -> bytes:
        """(3, H, W) in [0, 1], or a picture, to its stream. Raises ConfigError where there is no such quality."""
        if isinstance(image, LoadedImage):
            return self.codec(quality).compress_picture(image, self.resilience, self.progressive)
        (stream,) = self.codec(quality).compress(image[None], self.resilience, self.progressive)
        return stream

    def compress_within(self, image: Tensor | LoadedImage, max_bytes: int) -> tuple[bytes, int]:
        """The stream of the highest quality that has at most `max_bytes`, and that quality.

        The next quality is larger than that. Raises ImageError with the smallest possible size where nothing fits.
        """
        low, high = 1, self.qualities
        found: tuple[bytes, int] | None = None
        while low <= high:
            # The best quality is what most budgets are above or near: it is tried first, then halves.
            middle = high if found is None and high == self.qualities else (low + high) // 2
            stream = self.compress(image, middle)
            if len(stream) <= max_bytes:
                found, low = (stream, middle), middle + 1
            else:
                high = middle - 1
        if found is None:
            raise ImageError(f"The smallest file of this image has {len(stream)} bytes, and {max_bytes} are allowed.")
        return found

    def compress_at(self, image: Tensor | LoadedImage, bits_per_pixel: float) -> tuple[bytes, int]:
        """As `compress_within`, for the highest rate at or below `bits_per_pixel` of the whole file."""
        height, width = (image.height, image.width) if isinstance(image, LoadedImage) else image.shape[-2:]
        return self.compress_within(image, int(bits_per_pixel * height * width / 8 + 1e-9))
