"""The classical peers at a given size: JPEG, WebP, AVIF, JPEG XL and JPEG 2000, searched by whole-file bytes.

At a few hundredths of a bit per pixel each of them does better on a smaller picture: it is shrunk by Lanczos before
encoding and enlarged by Lanczos after decoding. The true size is taken from outside, which is a gift to the peers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from vtc.errors import ConfigError


def _saver(format: str, **options: object) -> Callable[[Image.Image, float], bytes]:
    def save(image: Image.Image, quality: float) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format, quality=round(quality), **options)
        return stream.getvalue()
    return save


def _jpeg2000(image: Image.Image, ratio: float) -> bytes:
    """The bare codestream, 9/7 wavelet, one layer at `ratio` times fewer bytes than the pixels have."""
    stream = io.BytesIO()
    resolutions = max(1, min(6, int(math.log2(min(image.size)))))
    image.save(stream, "JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True, no_jp2=True,
               num_resolutions=resolutions)
    return stream.getvalue()


#: name -> (encoder of a picture at a quality, lowest and highest quality); JPEG 2000 is searched by ratio instead
ENCODERS: dict[str, tuple[Callable[[Image.Image, float], bytes], int, int]] = {
    "avif": (_saver("AVIF", speed=6), 0, 100),
    "webp": (_saver("WEBP", method=6), 0, 100),
    "jpeg": (_saver("JPEG", optimize=True, progressive=True), 1, 95),
    "jxl": (_saver("JXL", effort=7), 0, 99),
    "jpeg2000": (_jpeg2000, 0, 0),
}


@dataclass(frozen=True, eq=False)
class ClassicalStream:
    """One picture in a classical format.

    data: the whole file. downsample: how many times smaller the coded picture is along each axis.
    quality: the encoder's setting; for JPEG 2000 the ratio.
    height, width: of the true picture.
    """

    codec: str
    data: bytes
    downsample: int
    quality: float
    height: int
    width: int

    def decode(self) -> np.ndarray:
        """uint8 (H, W, 3) at the true size."""
        with Image.open(io.BytesIO(self.data)) as image:
            return np.array(_resized(image.convert("RGB"), self.width, self.height))


def available_codecs() -> list[str]:
    """Which of ENCODERS this installation of Pillow can write."""
    found = {"jpeg": features.check("jpg"), "webp": features.check("webp"), "avif": features.check("avif"),
             "jpeg2000": features.check("jpg_2000"), "jxl": _has_jxl()}
    return [name for name in ENCODERS if found[name]]


def encode_within(codec: str, pixels: np.ndarray, max_bytes: int, downsample: int = 1) -> ClassicalStream | None:
    """The finest file of at most `max_bytes`, or None where even the coarsest is larger.

    pixels: uint8 (H, W, 3). downsample: shrink by this factor first.
    Raises ConfigError where the codec is unknown or Pillow cannot write it here.
    """
    if codec not in available_codecs():
        raise ConfigError(f"Pillow cannot write {codec!r} here; it can {', '.join(available_codecs())}.")
    if downsample < 1:
        raise ConfigError(f"A picture is shrunk by a factor of at least 1, not {downsample}.")
    height, width = pixels.shape[:2]
    small = _resized(Image.fromarray(pixels), -(-width // downsample), -(-height // downsample))
    search = _search_ratio if codec == "jpeg2000" else _search_quality
    found = search(codec, small, max_bytes)
    return None if found is None else ClassicalStream(codec, found[1], downsample, found[0], height, width)


def encode_best(codec: str, pixels: np.ndarray, max_bytes: int, factors: Sequence[int],
                distance: Callable[[np.ndarray], float]) -> tuple[ClassicalStream, np.ndarray] | None:
    """The file of at most `max_bytes` whose down-sampling factor does best, and its picture, uint8 (H, W, 3).

    distance: of a decoded picture from the original; lower is better. None where no factor reaches the size.
    """
    candidates = [(stream, stream.decode()) for factor in factors
                  if (stream := encode_within(codec, pixels, max_bytes, factor)) is not None]
    return min(candidates, key=lambda candidate: distance(candidate[1])) if len(candidates) > 1 else next(
        iter(candidates), None)


def _search_quality(codec: str, image: Image.Image, max_bytes: int) -> tuple[float, bytes] | None:
    """Bisection over whole qualities. Sizes are not quite monotone, so only measured files are accepted."""
    encode, low, high = ENCODERS[codec]
    best = None
    while low <= high:
        middle = (low + high) // 2
        data = encode(image, middle)
        if len(data) <= max_bytes:
            best, low = (float(middle), data), middle + 1
        else:
            high = middle - 1
    return best


def _search_ratio(codec: str, image: Image.Image, max_bytes: int, steps: int = 8) -> tuple[float, bytes] | None:
    """Bisection over the logarithm of JPEG 2000's ratio: its own rate control misses tiny sizes by a few bytes."""
    if max_bytes < 1:
        return None
    encode = ENCODERS[codec][0]
    raw = 3 * image.width * image.height
    best = None
    low, high = math.log(max(1.0, raw / max_bytes / 2)), math.log(max(2.0, raw / max_bytes * 4))
    for _ in range(steps):
        middle = (low + high) / 2
        data = encode(image, math.exp(middle))
        if len(data) <= max_bytes:
            if best is None or len(data) >= len(best[1]):
                best = (math.exp(middle), data)
            high = middle
        else:
            low = middle
    return best


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def _has_jxl() -> bool:
    try:
        import pillow_jxl  # noqa: F401  registers the format with Pillow
    except ImportError:
        return False
    return True
