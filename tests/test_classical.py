"""The classical peers: what fits is the finest that fits, at the true size."""

import numpy as np
import pytest

from vtc.codecs.classical import ENCODERS, available_codecs, encode_within
from vtc.errors import ConfigError


def picture(height: int = 48, width: int = 67) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(3)]
    return ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)


@pytest.mark.parametrize("codec", ENCODERS)
@pytest.mark.parametrize("downsample", [1, 4])
def test_the_file_fits_and_comes_back_at_its_size(codec, downsample):
    if codec not in available_codecs():
        pytest.skip(f"Pillow cannot write {codec} here")
    stream = encode_within(codec, picture(), 1200, downsample)
    assert stream is not None and len(stream.data) <= 1200
    assert (stream.codec, stream.downsample) == (codec, downsample)
    decoded = stream.decode()
    assert decoded.shape == picture().shape
    error = np.square(decoded.astype(float) - picture()).mean()
    assert error < 0.3 * picture().astype(float).var()


@pytest.mark.parametrize("codec", ["webp", "jpeg2000"])
def test_more_bytes_are_used(codec):
    small, large = (encode_within(codec, picture(), size) for size in (700, 1400))
    assert small is not None and large is not None
    assert len(small.data) <= 700 < len(large.data) <= 1400


def test_what_does_not_fit_is_none():
    assert encode_within("jpeg", picture(), 100) is None
    assert encode_within("jpeg2000", picture(), 0) is None


def test_unknown_codecs_are_refused():
    with pytest.raises(ConfigError, match="cannot write 'bpg'"):
        encode_within("bpg", picture(), 1000)
