"""The container: golden bytes, limits, and one sentence for each way in which a stream can be bad."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.codecs import container
from vtc.codecs.container import Coder, Container, Reader, parse, varint
from vtc.errors import BitstreamError

KODAK = Container(512, 768, ((32, 48),), 1, Coder.STATIC_ANS, bytes(1900), 1, b"\1\2\3\4\5\6\7\x08")
SMALL = replace(KODAK, payload=b"\xaa\xbb\xcc")


def sealed(body: bytes) -> bytes:
    """The body with a right checksum."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def message(stream: bytes) -> str:
    with pytest.raises(BitstreamError) as caught:
        parse(stream)
    text = str(caught.value)
    assert text.endswith(".")
    return text


def test_a_kodak_image_has_24_bytes_of_overhead():
    assert len(KODAK.to_bytes()) - 1900 == 24


def test_golden_bytes():
    assert SMALL.to_bytes().hex(" ") == ("f5 56 01 08 01 01 02 03 04 05 06 07 08 80 06 80 04 10 03 aa bb cc "
                                         + zlib.crc32(SMALL.to_bytes()[:-4]).to_bytes(4, "little").hex(" "))
    assert SMALL.to_bytes()[-4:].hex() == "8bc60acd"


def test_the_example_in_the_document_parses():
    text = (Path(__file__).parent.parent / "docs" / "bitstream.md").read_text()
    block = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert block
    stream = bytes.fromhex("".join(line.split("|")[0] for line in block[1].splitlines()))
    parsed = parse(stream)
    assert (parsed.width, parsed.height, parsed.scales, parsed.groups) == (40, 24, ((2, 3),), 1)
    assert (parsed.coder, parsed.model_id, parsed.payload.hex()) == (Coder.PACKED, 0, "000a888f3e")
    assert parsed.to_bytes() == stream


@pytest.mark.parametrize(("scales", "groups", "size", "numbers"), [
    (((32, 48),), 1, (512, 768), "10"),  # stride 16
    (((1, 1),), 1, (1, 1), "01"),  # the smallest stride that gives the grid
    (((1, 63),), 1, (1, 1000), "10"),
    (((32, 48),), 8, (512, 768), "10 08"),
    (((1, 24),), 2, (512, 768), "02 18"),
    (((7, 5),), 3, (512, 768), "03 07 05"),
    (((1, 1), (2, 2), (3, 4)), 1, (512, 768), "01 03 01 01 02 02 03 04"),
])
def test_layout_numbers(scales, groups, size, numbers):
    stream = replace(SMALL, height=size[0], width=size[1], scales=scales, groups=groups).to_bytes()
    start = 13 + len(varint(size[0])) + len(varint(size[1]))
    assert stream[start:-8].hex(" ") == numbers  # then length, three bytes of payload, checksum
    assert (parse(stream).scales, parse(stream).groups) == (scales, groups)


sides = st.integers(1, container.MAX_SIDE)
grids = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=12).map(tuple)


@settings(max_examples=100, deadline=None)
@given(sides, sides, grids, st.integers(1, 8), st.sampled_from(Coder), st.binary(max_size=300),
       st.integers(0, 2**32 - 1), st.binary(min_size=8, max_size=8))
def test_round_trip(height, width, scales, groups, coder, payload, model_id, fingerprint):
    try:
        made = Container(height, width, scales, groups, coder, payload, model_id, fingerprint)
    except BitstreamError as error:
        assert "exceeds the limit" in str(error)
        assert height * width > 2**28 or groups * sum(r * c for r, c in scales) > 2**24
        return
    assert parse(made.to_bytes()) == made


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 64))
def test_a_grid_at_any_stride_costs_one_byte(height, width, stride):
    grid = ((-(-height // stride), -(-width // stride)),)
    stream = replace(SMALL, height=height, width=width, scales=grid).to_bytes()
    assert parse(stream).scales == grid
    assert len(stream) == 13 + len(varint(width)) + len(varint(height)) + 1 + 1 + 3 + 4


@given(st.integers(0, 2**32 - 1))
def test_varints(value):
    code = varint(value)
    assert Reader(code).varint() == value
    assert len(code) == max(1, -(-value.bit_length() // 7))


@pytest.mark.parametrize("code", ["8000", "ff8000", "8080808010", "ffffffff7f", "ffffffffff01", "8080808080808000"])
def test_padded_and_wide_varints_are_refused(code):
    with pytest.raises(BitstreamError, match=r"padded with zeros|wider than 32 bits"):
        Reader(bytes.fromhex(code)).varint()


def test_every_failure_has_its_sentence():
    good = SMALL.to_bytes()
    sentences = {
        "empty": message(b""),
        "not ours": message(b"\x89PNG\r\n\x1a\n" + bytes(40)),
        "newer": message(sealed(good[:2] + b"\x03" + good[3:-4])),
        "chunks": message(sealed(good[:2] + b"\x02" + good[3:-4])),
        "cut in header": message(good[:7]),
        "cut": message(good[:-1]),
        "appended": message(good + b"\n"),
        "damaged": message(good[:20] + b"\xab" + good[21:]),
        "flags": message(sealed(good[:3] + b"\x88\x01" + good[4:-4])),
        "reserved": message(sealed(good[:3] + b"\x48" + good[4:-4])),
        "coder": message(sealed(good[:3] + b"\x38" + good[4:-4])),
        "layout": message(sealed(good[:3] + b"\x0f" + good[4:-4])),
        "version": message(sealed(good[:2] + b"\x00" + good[3:-4])),
    }
    assert len(set(sentences.values())) == len(sentences)
    assert sentences["newer"] == "This stream has container version 3, and this vtc reads versions up to 2: update vtc."
    assert sentences["cut"] == "The stream is cut: 1 bytes are missing at its end."
    assert sentences["damaged"] == "The stream is damaged: its checksum does not match."


def test_every_cut_and_every_flipped_bit_is_noticed():
    good = SMALL.to_bytes()
    for length in range(len(good)):
        message(good[:length])
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        message(bytes(flipped))


def rebuilt(*numbers: int, kind: int) -> bytes:
    """A stream with a right checksum and any numbers from the width on."""
    head = bytes.fromhex("f5 56 01") + bytes([kind]) + SMALL.to_bytes()[4:13]
    return sealed(head + b"".join(map(varint, numbers)) + varint(3) + b"\xaa\xbb\xcc")


@pytest.mark.parametrize(("numbers", "kind", "words"), [
    ((0, 512, 16), 0, "limits of 1 to 1048576 a side"),
    ((768, 2**20 + 1, 16), 0, "limits of 1 to 1048576 a side"),
    ((2**15, 2**14, 16), 0, "exceeds the limit of 268435456 pixels"),
    ((768, 512, 0), 0, "A stride of 0"),
    ((768, 512, 2**21), 0, "A stride of 2097152"),
    ((2**14, 2**14, 1), 0, "exceeds the limit of 16777216"),
    ((768, 512, 16, 0), 1, "0 groups"),
    ((768, 512, 16, 257), 1, "257 groups"),
    ((768, 512, 1, 2**32 - 1, 2**32 - 1), 2, "exceeds the limit of 16777216"),
    ((768, 512, 1, 0, 5), 2, "empty"),
    ((768, 512, 1, 0), 4, "empty"),
    ((768, 512, 1, 0), 3, "0 scales"),
    ((768, 512, 1, 65, *[1] * 130), 3, "65 scales"),
    ((768, 512, 1, 2**32 - 1), 3, "4294967295 scales"),
])
def test_limits(numbers, kind, words):
    assert words in message(rebuilt(*numbers, kind=kind))


def test_hostile_numbers_allocate_nothing():
    hostile = [rebuilt(2**14, 2**14, 16, kind=0), rebuilt(768, 512, 1, 2**32 - 1, kind=3),
               rebuilt(768, 512, 256, 2**32 - 1, 2**32 - 1, kind=2)]
    tracemalloc.start()
    parse(hostile[0])  # 2^28 pixels and 2^20 tokens are within the limits: parsing them costs nothing yet
    for stream in hostile[1:]:
        message(stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_lower_limit_on_pixels():
    with pytest.raises(BitstreamError, match="exceeds the limit of 1000 pixels"):
        parse(SMALL.to_bytes(), max_pixels=1000)


def test_what_cannot_be_written_is_refused():
    with pytest.raises(BitstreamError, match="fingerprint"):
        replace(SMALL, fingerprint=b"short")
    with pytest.raises(BitstreamError, match="a side"):
        replace(SMALL, width=0)


def test_parsing_needs_no_torch():
    code = f"""import sys
from vtc.codecs.container import parse
parse({SMALL.to_bytes()!r})
assert 'torch' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
