"""Streams in chunks: bytes against a second reader of the format, damage of every kind, concealment, stages, limits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.test_entropy import python_ans_decode
from tests.tiny_tokenizers import TINY_TOKENIZERS, TinyGrid, TinyLevels, TinyScales
from vtc.cli import decode as decode_command
from vtc.cli import encode as encode_command
from vtc.codecs import chunks, container, entropy
from vtc.codecs.chunks import ChunkedContainer, Division
from vtc.codecs.container import Coder
from vtc.codecs.resilience import fill_from_neighbours, interleave, parts_of
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError, ConfigError, ModelError
from vtc.images import save_image
from vtc.models import load_tokenizer
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.layers import GridTokenizer
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.residual_quantizer import ResidualQuantizer
from vtc.tokenizers.var_vqvae import VARVQVAE
from vtc.tokenizers.vector_quantizer import VectorQuantizer

ROOT = Path(__file__).parent.parent
MAKERS: dict[str, type[Tokenizer]] = {**TINY_TOKENIZERS, "levels": TinyLevels}
CODECS = {name: TokenCodec(make()) for name, make in MAKERS.items()}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "streams_v2.json").read_text())


def random_tokens(name: str, height: int, width: int, seed: int = 0, likely: bool = False) -> Tokens:
    """Any tokens, or likely ones, of such an image."""
    codec = CODECS[name]
    layout = codec.tokenizer.layout(height, width)
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, np.array(layout.vocab), (layout.length, layout.groups))
    if likely and codec.tables:
        for where, group, row in codec.tables.runs(layout):
            indices[where, group] = rng.choice(len(row), indices[where, group].shape, p=row / row.sum())
    return Tokens(torch.from_numpy(indices)[None], layout, height, width)


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    base = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(base, (height, width), mode="bilinear")


KODAK = random_tokens("grid", 512, 768, likely=True)
(KODAK_STREAM,) = CODECS["grid"].compress_tokens(KODAK, resilience=8)
KODAK_CHUNK = interleave(((32, 48),), 8)


# ---- the format a second time, from docs/bitstream.md, without looking for damage -----------------------------------

def python_read(stream: bytes) -> tuple[dict[str, int], list[tuple[int, bytes]]]:
    """Header of a stream with one grid given by its stride, and its chunks in their order; all checks are checked."""
    assert stream[:3] == b"\xf5\x56\x02"
    size = stream[3]
    body, check = stream[4 : 4 + size], stream[4 + size : 7 + size]
    assert zlib.crc32(stream[: 4 + size]) & 0xFFFFFF == int.from_bytes(check, "little")
    assert stream.endswith(stream[: 7 + size])

    def numbers(data: bytes, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                return value, at

    header, at = {"kind": body[0] & 7, "coder": body[0] >> 3}, 1
    header["model"], at = numbers(body, at)
    at += 8
    for field in ("width", "height", "stride", *(["groups"] if header["kind"] == 1 else []), "division", "longest"):
        header[field], at = numbers(body, at)
    assert at == size

    found, at = [], 7 + size
    while at < len(stream) - 7 - size:
        start = at
        index, at = numbers(stream, at)
        short, at = numbers(stream, at)
        if header["longest"] >= 1024:
            assert zlib.crc32(stream[: 4 + size] + stream[start:at]) & 0xFFFF == int.from_bytes(stream[at : at + 2],
                                                                                                "little")
            at += 2
        payload = stream[at : at + header["longest"] - short]
        at += len(payload) + 3
        assert (zlib.crc32(stream[: 4 + size] + stream[start : at - 3]) & 0xFFFFFF
                == int.from_bytes(stream[at - 3 : at], "little"))
        found.append((index, payload))
    assert at == len(stream) - 7 - size
    return header, found


@pytest.mark.parametrize("likely", [False, True])
def test_bytes_are_the_documented_ones(likely):
    tokens = random_tokens("grid", 300, 500, seed=3, likely=likely)
    header, found = python_read(CODECS["grid"].compress_tokens(tokens, resilience=8)[0])
    assert header == {"kind": 0, "coder": 3 if likely else 0, "model": 0, "width": 500, "height": 300, "stride": 16,
                      "division": 9, "longest": max(len(payload) for _, payload in found)}
    grid = tokens.indices.view(19, 32)
    row = CODECS["grid"].tokenizer.get_buffer("token_frequencies")[0].numpy()
    assert [index for index, _ in found] == list(range(8))
    for index, payload in found:
        expected = [int(grid[r, c]) for r in range(19) for c in range(32) if (3 * r + c) % 8 == index]
        if likely:
            assert python_ans_decode(payload, [len(expected)], [row], seeded=True) == expected
        else:
            number = 0
            for word in expected:
                number = number * 64 + word
            assert int.from_bytes(payload, "big") == number


def test_long_chunks_have_a_check_at_their_start():
    tokens = random_tokens("grid", 1024, 1024, likely=False)  # 4096 tokens of six bits
    (stream,) = CODECS["grid"].compress_tokens(tokens, resilience=2)
    header, found = python_read(stream)
    assert header["longest"] == 1536 and len(found) == 2
    assert torch.equal(CODECS["grid"].decompress_tokens(stream).indices, tokens.indices)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda r: f"{r['tokenizer']}-{r['division']}-{r['coder']}")
def test_golden_streams(row):
    codec, stream = CODECS[row["tokenizer"]], bytes.fromhex(row["stream"])
    tokens = codec.decompress_tokens(stream, strict=True)
    assert (tokens.height, tokens.width) == (row["height"], row["width"])
    assert tokens.indices.flatten().tolist() == row["indices"]
    parsed = chunks.parse(stream)
    assert (parsed.coder.name, parsed.division.number) == (row["coder"], row["division"])
    again = {"progressive": True} if parsed.division.by else {"resilience": parsed.division.count}
    assert codec.compress_tokens(tokens, **again) == [stream]


def test_golden_streams_cover_both_coders_every_division_and_every_layout():
    assert {(r["coder"], min(r["division"], 2)) for r in GOLDEN} == set(product(("PACKED", "SEEDED_ANS"), (0, 1, 2)))
    assert {r["tokenizer"] for r in GOLDEN} == set(MAKERS)


def test_the_example_in_the_document():
    text = (ROOT / "docs" / "bitstream.md").read_text()
    blocks = re.findall(r"```hex\n(.*?)```", text, re.DOTALL)
    stream = bytes.fromhex("".join(line.split("|")[0] for line in blocks[1].splitlines()))
    tokens = CODECS["grid"].decompress_tokens(stream, strict=True)
    assert (tokens.width, tokens.height, tokens.layout.scales) == (40, 24, ((2, 3),))
    assert tokens.indices.flatten().tolist() == [0, 10, 34, 8, 60, 62]
    assert CODECS["grid"].compress_tokens(tokens, resilience=2) == [stream]


# ---- which token stands where ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 13, 16])
def test_tokens_of_a_chunk_are_as_far_apart_as_any_such_lattice_allows(count):
    def nearest(grid: np.ndarray) -> float:
        places = np.argwhere(grid == 0)
        return min(((a - b) ** 2).sum() for a, b in combinations(places, 2))

    rows, columns = np.mgrid[: 2 * count, : 2 * count]
    best = max(nearest((a * rows + columns) % count) for a in range(count))
    assert nearest(interleave((rows.shape,), count).reshape(rows.shape)) == best


def test_no_neighbour_of_a_lost_token_is_lost_with_it():
    for count in (4, 5, 6, 7, 8, 9, 16):
        grid = interleave(((20, 30),), count).reshape(20, 30)
        for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
            assert (grid != np.roll(grid, (-down, -across), (0, 1)))[:-1, 1:-1].all()


def test_chunks_are_of_one_size():
    sizes = np.bincount(KODAK_CHUNK)
    assert sizes.tolist() == [192] * 8
    assert np.ptp(np.bincount(interleave(((31, 47),), 8))) <= 4


grids = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4).map(tuple)


@given(grids, st.integers(1, 40))
def test_empty_chunks_are_known_without_the_tokens(scales, count):
    division = Division(count)
    parts = parts_of(division, scales, 1)
    assert division.empty(scales) == {n for n, part in enumerate(parts) if not part.positions.size}
    assert sorted(np.concatenate([part.positions for part in parts])) == list(range(sum(r * c for r, c in scales)))


# ---- round trips ----------------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(CODECS)), st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.integers(0, 99),
       st.booleans())
def test_any_tokens_round_trip(name, height, width, count, seed, likely):
    codec, tokens = CODECS[name], random_tokens(name, height, width, seed, likely)
    for options in ({"resilience": count}, *([{"progressive": True}] if codec.tokenizer.stages else [])):
        (stream,) = codec.compress_tokens(tokens, **options)
        received = codec.receive(stream)
        assert not received.lost.any() and received.share_lost == 0
        assert torch.equal(received.tokens.indices, tokens.indices)
        assert (received.tokens.height, received.tokens.width) == (height, width)
        parsed = chunks.read(stream)
        assert parsed.to_bytes() == stream


sides = st.integers(1, container.MAX_SIDE)


@settings(max_examples=100, deadline=None)
@given(sides, sides, grids, st.integers(1, 4), st.sampled_from([Coder.PACKED, Coder.SEEDED_ANS]),
       st.integers(0, 2**32 - 1), st.binary(min_size=8, max_size=8), st.data())
def test_containers_round_trip(height, width, scales, groups, coder, model_id, fingerprint, data):
    division = data.draw(st.sampled_from([Division(3), Division(9), Division(by="scales"), Division(by="groups")]))
    empty = division.empty(scales)
    payloads = tuple(b"" if n in empty else data.draw(st.binary(max_size=40))
                     for n in range(division.chunks(scales, groups)))
    try:
        made = ChunkedContainer(height, width, scales, groups, coder, model_id, fingerprint, division, payloads)
    except BitstreamError as error:
        assert "exceeds the limit" in str(error) and height * width > 2**28
        return
    assert chunks.parse(made.to_bytes()) == made


def test_a_picture_comes_back_alike_in_chunks_or_not():
    for codec in CODECS.values():
        image = smooth(50, 70)
        plain, chunked = codec.decompress([*codec.compress(image), *codec.compress(image, resilience=5)], strict=True)
        assert torch.equal(plain, chunked)


# ---- what it costs --------------------------------------------------------------------------------------------------

def test_eight_chunks_of_a_kodak_grid_cost_at_most_three_and_a_half_per_cent():
    """1536 tokens that follow the bundled model's table, against one chunk without protection."""
    codec = TokenCodec(load_tokenizer())
    layout, row = codec.tokenizer.layout(512, 768), codec.tables.frequencies[0]
    for seed in range(4):
        indices = np.random.default_rng(seed).choice(len(row), (1536, 1), p=row / row.sum())
        tokens = Tokens(torch.from_numpy(indices)[None], layout, 512, 768)
        (plain,), (chunked,) = codec.compress_tokens(tokens), codec.compress_tokens(tokens, resilience=8)
        assert len(chunked) <= 1.035 * len(plain)
        assert 8 * sum(map(len, chunks.parse(chunked).chunks)) <= 1.01 * codec.tables.ideal_bits(indices, layout)


def test_estimated_and_true_bytes_agree_within_one_per_cent():
    layout = TokenLayout(((32, 48),), (2500,))
    table = entropy.StaticTables(entropy.frequencies_from_counts(np.arange(2500, 0, -1) ** 2)[None])
    row = table.frequencies[0]
    indices = np.random.default_rng(0).choice(2500, (1536, 1), p=row / row.sum())
    assert 8 * entropy.packed_size(layout) <= 1.01 * layout.bits
    for seeded in (False, True):
        true = 8 * len(entropy.encode_ans(indices, layout, table, seeded))
        assert abs(true / table.ideal_bits(indices, layout) - 1) <= 0.01


# ---- damage ---------------------------------------------------------------------------------------------------------

def spans(stream: bytes) -> dict[int, tuple[int, int]]:
    """Where each chunk of KODAK_STREAM or the like lies, by the second reader."""
    size, at, out = stream[3] + 7, stream[3] + 7, {}
    for index, payload in python_read(stream)[1]:
        end = stream.index(payload, at) + len(payload) + 3
        out[index] = (at, end)
        at = end
    assert at == len(stream) - size
    return out


SPANS = spans(KODAK_STREAM)


def check_received(stream: bytes, lost_chunks: set[int]) -> None:
    received = CODECS["grid"].receive(stream)
    lost = np.isin(KODAK_CHUNK, list(lost_chunks))
    assert received.lost[0, :, 0].tolist() == lost.tolist()
    assert torch.equal(received.tokens.indices[~received.lost], KODAK.indices[~received.lost])
    assert received.share_lost == pytest.approx(len(lost_chunks) / 8)


@pytest.mark.parametrize("chunk", range(8))
@pytest.mark.parametrize("kind", ["overwritten", "dropped", "inserted", "flipped", "gone"])
def test_damage_costs_the_chunk_that_it_hits(kind, chunk):
    start, end = SPANS[chunk]
    middle = (start + end) // 2
    check_received({
        "overwritten": KODAK_STREAM[: middle - 5] + bytes(10) + KODAK_STREAM[middle + 5 :],
        "dropped": KODAK_STREAM[: middle - 5] + KODAK_STREAM[middle + 5 :],
        "inserted": KODAK_STREAM[:middle] + b"\xa5" * 33 + KODAK_STREAM[middle:],
        "flipped": KODAK_STREAM[:middle] + bytes([KODAK_STREAM[middle] ^ 1]) + KODAK_STREAM[middle + 1 :],
        "gone": KODAK_STREAM[:start] + KODAK_STREAM[end:],
    }[kind], {chunk})


def test_every_damaged_byte_of_a_chunk_is_noticed_wherever_it_is():
    for at in range(*SPANS[5]):
        check_received(KODAK_STREAM[:at] + bytes([KODAK_STREAM[at] ^ 0x41]) + KODAK_STREAM[at + 1 :], {5})


def test_bytes_between_chunks_cost_nothing():
    for at in (end for _, end in SPANS.values()):
        check_received(KODAK_STREAM[:at] + b"\0\1\2" + KODAK_STREAM[at:], set())


def test_chunks_in_any_order_and_twice():
    size = KODAK_STREAM[3] + 7
    parts = [KODAK_STREAM[a:b] for a, b in SPANS.values()]
    header = KODAK_STREAM[:size]
    check_received(header + b"".join(reversed(parts)), set())
    check_received(b"".join([*parts[:3], *parts[2:5], header]), {5, 6, 7})


def test_every_damaged_byte_of_one_header_costs_nothing():
    size = KODAK_STREAM[3] + 7
    for start in (0, len(KODAK_STREAM) - size):
        for at in range(start, start + size):
            check_received(KODAK_STREAM[:at] + bytes([KODAK_STREAM[at] ^ 0x10]) + KODAK_STREAM[at + 1 :], set())
    for cut in range(1, size):
        check_received(KODAK_STREAM[cut:], set())
        check_received(KODAK_STREAM[:-cut], set())


def test_a_cut_stream_has_the_chunks_before_the_cut():
    for chunk, (start, end) in SPANS.items():
        if chunk:
            check_received(KODAK_STREAM[: end - 1], set(range(chunk, 8)))
        if chunk < 7:
            check_received(KODAK_STREAM[start + 1 :], set(range(chunk + 1)))


def test_without_any_header_or_any_chunk_there_is_one_sentence():
    size = KODAK_STREAM[3] + 7
    for stream, words in ((KODAK_STREAM[size:-size], "not a vtc stream"), (KODAK_STREAM[:3], "no intact copy"),
                          (KODAK_STREAM[:size], "none of its chunks is intact"),
                          (KODAK_STREAM[:2] + b"\2" + bytes(50), "no intact copy of its header"),
                          (KODAK_STREAM + bytes(100_000), "more than four times as long")):
        with pytest.raises(BitstreamError, match=words):
            CODECS["grid"].decompress([stream])


def test_chunks_of_another_stream_are_not_taken():
    size = KODAK_STREAM[3] + 7
    (other,) = CODECS["grid"].compress_tokens(random_tokens("grid", 512, 767, likely=True), resilience=8)
    with pytest.raises(BitstreamError, match="none of its chunks"):
        CODECS["grid"].receive(KODAK_STREAM[:size] + other[size:-size])


def test_strict_refuses_any_loss_and_says_how_much():
    codec, damaged = CODECS["grid"], KODAK_STREAM[: SPANS[6][0]]
    with pytest.raises(BitstreamError, match=r"25\.0% of its tokens are lost"):
        codec.decompress([damaged], strict=True)
    with pytest.raises(BitstreamError, match=r"25\.0% of its tokens are lost"):
        codec.decompress_tokens(damaged, strict=True)
    assert codec.decompress([damaged])[0].shape == (3, 512, 768)


def test_a_damaged_stream_without_chunks_is_refused_as_ever():
    (stream,) = CODECS["grid"].compress(smooth(64, 64))
    with pytest.raises(BitstreamError, match="checksum"):
        CODECS["grid"].receive(stream[:20] + bytes([stream[20] ^ 1]) + stream[21:])


def test_a_payload_that_is_no_code_of_tokens_is_lost_though_its_check_is_right():
    parsed = chunks.parse(KODAK_STREAM)
    forged = replace(parsed, chunks=(parsed.chunks[0] + b"\1\2\3\4", *parsed.chunks[1:]))
    check_received(forged.to_bytes(), {0})


# ---- whatever is done to a stream -----------------------------------------------------------------------------------

edits = st.lists(st.tuples(st.sampled_from(["overwrite", "drop", "insert", "flip", "copy", "cut"]),
                           st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), max_size=6)


def edited(stream: bytes, changes: list) -> bytes:
    for kind, place, count, data in changes:
        at = int(place * len(stream))
        stream = {
            "overwrite": stream[:at] + data + stream[at + len(data) :],
            "drop": stream[:at] + stream[at + count :],
            "insert": stream[:at] + data + stream[at:],
            "flip": stream[:at] + bytes(b ^ 1 << count % 8 for b in stream[at : at + 1]) + stream[at + 1 :],
            "copy": stream[:at] + stream[at : at + count] + stream[at:],
            "cut": stream[:at] if place > 0.2 else stream,
        }[kind]
    return stream


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CODECS)), st.integers(0, 12), st.booleans(), edits)
@example("grid", 8, True, [("cut", 0.5, 0, b"")])
def test_any_damage_gives_right_tokens_or_a_typed_error(name, count, likely, changes):
    """No chunk of wrong tokens passes (one in 2^24 might), no other exception, an image of the right size."""
    codec, tokens = CODECS[name], random_tokens(name, 60, 90, 1, likely)
    options = {"resilience": count} if count or not codec.tokenizer.stages else {"progressive": True}
    (stream,) = codec.compress_tokens(tokens, **options)
    damaged = edited(stream, changes)
    try:
        received = codec.receive(damaged)
    except (BitstreamError, ModelError) as error:
        assert len(str(error)) < 400 and str(error).endswith(".")
        return
    assert torch.equal(received.tokens.indices[~received.lost], tokens.indices[~received.lost])
    if damaged == stream:
        assert not received.lost.any()
    if received.stages == 0:
        with pytest.raises(BitstreamError, match="coarsest stage"):
            codec.draw(received)
        return
    assert codec.draw(received).shape == (3, 60, 90)
    concealed = codec.conceal(received).indices
    assert (concealed >= 0).all() and (concealed < torch.tensor(tokens.layout.vocab)).all()
    assert torch.equal(concealed[~received.lost], tokens.indices[~received.lost])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_behind_a_header_give_a_typed_error_or_tokens(data):
    header = KODAK_STREAM[: KODAK_STREAM[3] + 7]
    with pytest.raises(BitstreamError):
        CODECS["grid"].receive(header + data)


def numbers_of_a_header(*numbers: int, kind: int = 0, coder: int = 0) -> bytes:
    """A header with a right check and any numbers from the width on."""
    body = bytes([kind | coder << 3, 0]) + CODECS["grid"].fingerprint + b"".join(map(container.varint, numbers))
    covered = b"\xf5\x56\x02" + container.varint(len(body)) + body
    return covered + zlib.crc32(covered).to_bytes(4, "little")[:3]


@pytest.mark.parametrize(("numbers", "kind", "coder", "words"), [
    ((768, 512, 16, 4098, 5), 0, 0, "4097 chunks exceeds the limit of 4096"),
    ((768, 512, 16, 2**32 - 1, 5), 0, 0, "exceeds the limit of 4096"),
    ((768, 512, 16, 9, 2**26 + 1), 0, 0, "67108865 bytes exceeds"),
    ((768, 512, 16, 9, 5, 0), 0, 0, "more fields"),
    ((768, 512, 16, 9), 0, 0, "shorter than its fields"),
    ((2**15, 2**14, 16, 9, 5), 0, 0, "exceeds the limit of 268435456 pixels"),
    ((768, 512, 256, 2**16, 2**16, 9, 5), 2, 0, "exceeds the limit of 16777216"),
    ((768, 512, 16, 9, 5), 0, 2, "learned prior"),
    ((768, 512, 16, 9, 5), 0, 5, "coder 5"),
    ((768, 512, 16, 9, 5), 6, 0, "layout kind 6"),
])
def test_limits(numbers, kind, coder, words):
    with pytest.raises(BitstreamError, match=words):
        chunks.parse(numbers_of_a_header(*numbers, kind=kind, coder=coder) + bytes(50))


def test_a_lower_limit_on_pixels_holds():
    with pytest.raises(BitstreamError, match="limit of 1000"):
        TokenCodec(TinyGrid(), max_pixels=1000).receive(KODAK_STREAM)


def test_hostile_headers_allocate_nothing():
    hostile = numbers_of_a_header(2**14, 2**14, 256, 256, 256, 4097, 2**26, kind=2)  # 2^24 indices in 4096 chunks
    tracemalloc.start()
    with pytest.raises(BitstreamError, match="none of its chunks"):
        chunks.parse(hostile + bytes(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("longest", [1000, 60_000])
def test_hostile_chunks_cost_bounded_work(longest, monkeypatch):
    """Every byte looks like the start of a chunk as long as can be; what is checksummed stays within the limit."""
    header = numbers_of_a_header(768, 512, 16, 4097, longest)
    seed = zlib.crc32(header[:-3])
    start = b"\1\0" + zlib.crc32(b"\1\0", seed).to_bytes(4, "little")[:2] if longest >= 1024 else b"\1\0"
    stream = header + start * (60_000 // len(start))
    checked = 0

    class Counting:
        @staticmethod
        def crc32(data: bytes, value: int = 0) -> int:
            nonlocal checked
            checked += len(data)
            return zlib.crc32(data, value)

    monkeypatch.setattr(chunks, "zlib", Counting)
    with pytest.raises(BitstreamError, match="none of its chunks"):
        chunks.parse(stream)
    assert len(stream) < checked < 520 * len(stream)


def test_many_places_that_look_like_headers():
    with pytest.raises(BitstreamError, match="no intact copy"):
        chunks.parse(b"\xf5\x56\x02\x10" * 20_000)


def test_a_stream_is_taken_apart_without_torch_and_numpy():
    code = f"""import sys
from vtc.codecs.chunks import read
assert read({KODAK_STREAM!r}).lost == ()
assert 'torch' not in sys.modules and 'numpy' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- concealment ----------------------------------------------------------------------------------------------------

def nearest_in_row_or_column(lost: np.ndarray, r: int, c: int) -> tuple[int, int] | None:
    """The received cell of the same row or column that is nearest; the row first, then left or above."""
    row = [(abs(c - k), 0, k > c, (r, k)) for k in range(lost.shape[1]) if not lost[r, k]]
    column = [(abs(r - k), 1, k > r, (k, c)) for k in range(lost.shape[0]) if not lost[k, c]]
    return min(row + column)[3] if row or column else None


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.floats(0.1, 0.95))
def test_lost_tokens_take_the_nearest_neighbour(rows, columns, seed, share):
    rng = np.random.default_rng(seed)
    lost = rng.random((rows, columns)) < share
    indices = np.arange(rows * columns).reshape(rows, columns)
    filled = fill_from_neighbours(np.where(lost, 0, indices).reshape(-1, 1), lost.reshape(-1, 1),
                                  TokenLayout(((rows, columns),), (rows * columns,)))[:, 0].reshape(rows, columns)
    received = set(indices[~lost].tolist())
    for (r, c), value in np.ndenumerate(filled):
        source = (r, c) if not lost[r, c] else nearest_in_row_or_column(lost, r, c)
        if source is not None:
            assert value == indices[source]
        else:
            assert value in received or not received


def test_a_grid_that_is_lost_whole_takes_the_likeliest_words():
    codec = CODECS["scales"]
    layout = codec.tokenizer.layout(64, 64)
    lost = np.ones((layout.length, 1), dtype=bool)
    lost[5:14] = False  # the grid of 3x3, of which word 6 is the likeliest
    filled = fill_from_neighbours(np.full((layout.length, 1), 31) * ~lost, lost, layout, codec.tables)
    assert filled[0] == 0 and (filled[1:5] == 3).all() and (filled[5:14] == 31).all() and (filled[14:30] == 9).all()


def test_the_concealer_is_asked_and_only_for_what_is_lost():
    class Constant:
        def conceal(self, indices, lost, grid, codebook):
            assert indices.shape == lost.shape == (1, 1536) and grid == (32, 48) and codebook.shape == (64, 3)
            return torch.where(lost, 7, indices)

        def conceal_codes(self, indices, lost, grid, codebook):
            return codebook[self.conceal(indices, lost, grid, codebook)]

    codec = TokenCodec(TinyGrid(), concealer=Constant())
    tokens = codec.decompress_tokens(KODAK_STREAM[: SPANS[7][0]])
    assert torch.equal(tokens.indices[0, :, 0], torch.where(torch.from_numpy(KODAK_CHUNK == 7), 7,
                                                            KODAK.indices[0, :, 0]))
    layers = TokenCodec(TinyLevels(), concealer=Constant())  # several groups: from neighbours
    (stream,) = layers.compress_tokens(random_tokens("levels", 64, 64), resilience=4)
    assert layers.receive(stream[:-60]).lost.any() and len(layers.decompress([stream[:-60]])) == 1


def test_guesses_that_are_no_words_are_drawn():
    """A concealer that knows the codes between words: the picture is what the decoder makes of them."""
    torch.manual_seed(0)
    model = LocalVQ(codebook_size=64, dim=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8, 8)).eval()

    class Mean:
        def conceal(self, indices, lost, grid, codebook):
            return torch.where(lost, 0, indices)

        def conceal_codes(self, indices, lost, grid, codebook):
            return torch.where(lost[..., None], codebook.mean(0), codebook[indices])

    codec = TokenCodec(model, concealer=Mean())
    (stream,) = codec.compress(smooth(64, 96), resilience=4)
    start, end = spans(stream)[2]
    received = codec.receive(stream[:start] + stream[end:])
    codebook = model.quantizer.codewords
    codes = codebook[received.tokens.indices[..., 0]]
    codes[received.lost[..., 0]] = codebook.mean(0)
    with torch.no_grad():
        expected = model.reconstruct(codes.view(1, 4, 6, 4).permute(0, 3, 1, 2)).clamp(0, 1)[0]
    assert torch.allclose(codec.draw(received), expected, atol=1e-6)
    assert (codec.conceal(received).indices[received.lost] == 0).all()
    with pytest.raises(BitstreamError, match="are lost"):
        codec.draw(received, strict=True)
    nothing = received._replace(lost=torch.ones_like(received.lost))
    for show in (codec.draw, codec.conceal):
        with pytest.raises(BitstreamError, match="All tokens of the stream are lost"):
            show(nothing)


def test_concealed_pictures_are_near_the_picture():
    """A smooth picture without one chunk of eight: nearest neighbours are off by little."""
    codec, image = CODECS["grid"], smooth(512, 768)
    (stream,) = codec.compress(image, resilience=8)
    whole, parts = codec.decompress([stream])[0], spans(stream)
    for chunk in range(8):
        start, end = parts[chunk]
        (damaged,) = codec.decompress([stream[:start] + stream[end:]])
        assert 0 < (damaged - whole).abs().mean() < 0.01


# ---- progressive ----------------------------------------------------------------------------------------------------

def residual_tokenizer() -> GridTokenizer:
    """Three residual levels on one grid, between networks that only shrink and grow."""

    class Levels(GridTokenizer):
        downsample, vocab, grouped_indices = 4, (8, 8, 8), True

        def __init__(self) -> None:
            super().__init__()
            self.quantizer = ResidualQuantizer(VectorQuantizer(8, 3) for _ in range(3))

        def encode_latents(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x, 4)

        def decode_latents(self, z_q: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(z_q, scale_factor=4)

    return Levels()


def tiny_var() -> VARVQVAE:
    return VARVQVAE(16, 8, sides=(1, 2, 3, 4), channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1)


ORDERED = {"scales": TinyScales, "levels": TinyLevels, "residual": residual_tokenizer, "var": tiny_var,
           "infinity": lambda: InfinityVAE(6, 32, (1, 1, 1), 1, sides=(1, 3, 4))}


@pytest.mark.parametrize("name", ORDERED)
def test_a_cut_stream_is_a_coarser_picture(name):
    torch.manual_seed(0)
    codec = TokenCodec(ORDERED[name]().eval())
    image = smooth(30, 44)
    tokens = codec.tokenizer.encode(image)
    (stream,) = codec.compress(image, progressive=True)
    parsed = chunks.parse(stream)
    assert parsed.division.by == codec.tokenizer.stages
    stages = len(parsed.chunks)
    assert stages == (len(tokens.layout.scales) if parsed.division.by == "scales" else tokens.layout.groups)
    expected = [codec.tokenizer.decode_stages(tokens, n)[0] for n in range(1, stages + 1)]
    assert torch.equal(expected[-1], codec.tokenizer.decode(tokens)[0])

    seen = set()
    for cut in range(stream[3] + 7, len(stream) + 1, 1 + len(stream) // 100):
        try:
            received = codec.receive(stream[:cut])
        except BitstreamError as error:  # before the end of the first chunk
            assert "none of its chunks" in str(error) and not seen
            continue
        if received.stages not in seen:
            seen.add(received.stages)
            assert torch.equal(codec.draw(received), expected[received.stages - 1])
            shown = codec.draw_stages(received)
            assert len(shown) == received.stages
            assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=False))
    assert seen == set(range(1, stages + 1))


def test_stages_do_not_depend_on_what_comes_later():
    torch.manual_seed(0)
    for make in ORDERED.values():
        tokenizer = make().eval()
        tokens = tokenizer.encode(smooth(30, 44))
        other = tokens.indices.clone()
        if tokenizer.stages == "scales":
            first = tokens.layout.scales[0][0] * tokens.layout.scales[0][1]
            other[:, first:] = 0
        else:
            other[..., 1:] = 0
        assert torch.equal(tokenizer.decode_stages(replace(tokens, indices=other), 1),
                           tokenizer.decode_stages(tokens, 1))


def test_var_shows_the_stages_that_it_decodes_progressively():
    torch.manual_seed(0)
    tokenizer = ORDERED["var"]().eval()
    codec, image = TokenCodec(tokenizer), smooth(32, 32)
    (plain,) = codec.compress(image)  # any stream will do, if nothing of it is lost
    shown = codec.draw_stages(codec.receive(plain))
    expected = tokenizer.decode_progressively(tokenizer.encode(image))
    assert len(shown) == 4 and all(torch.equal(a, b[0]) for a, b in zip(shown, expected, strict=True))


def test_a_hole_in_the_middle_ends_the_stages():
    codec, tokens = CODECS["levels"], random_tokens("levels", 64, 64)
    parsed = chunks.parse(codec.compress_tokens(tokens, progressive=True)[0])
    received = codec.receive(replace(parsed, chunks=(parsed.chunks[0], None, parsed.chunks[2])).to_bytes())
    assert received.stages == 1 and received.lost[..., 1].all() and not received.lost[..., 2].any()
    assert torch.equal(codec.draw(received), codec.tokenizer.decode_stages(tokens, 1)[0])
    without_first = replace(parsed, chunks=(None, *parsed.chunks[1:])).to_bytes()
    with pytest.raises(BitstreamError, match="coarsest stage"):
        codec.decompress([without_first])
    with pytest.raises(BitstreamError, match="are lost"):
        codec.draw_stages(received, strict=True)


def test_tokens_without_an_order_make_no_progressive_stream():
    for name in ("grid", "groups", "sequence"):
        with pytest.raises(ConfigError, match="no order from coarse to fine"):
            CODECS[name].compress(smooth(20, 20), progressive=True)
        with pytest.raises(ConfigError, match="no order from coarse to fine"):
            CODECS[name].draw_stages(CODECS[name].receive(CODECS[name].compress(smooth(20, 20))[0]))
        with pytest.raises(ConfigError, match="no order from coarse to fine"):
            CODECS[name].tokenizer.decode_stages(random_tokens(name, 20, 20), 1)
    with pytest.raises(ConfigError, match="not both"):
        CODECS["scales"].compress(smooth(20, 20), resilience=4, progressive=True)
    with pytest.raises(ConfigError, match="1 to 4096 chunks"):
        CODECS["grid"].compress(smooth(20, 20), resilience=4097)


def test_an_ordered_stream_needs_a_model_of_that_order():
    (stream,) = CODECS["levels"].compress(smooth(20, 20), progressive=True)

    class Unordered(TinyLevels):
        stages = None

    with pytest.raises(ModelError, match="ordered by groups"):
        TokenCodec(Unordered()).receive(stream)


# ---- the command lines ----------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """A picture and two tiny models, one with an order."""
    torch.manual_seed(0)
    LocalVQ(codebook_size=64, dim=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8, 8)).save_pretrained(
        tmp_path / "grid")
    tiny_var().save_pretrained(tmp_path / "var")
    save_image(smooth(60, 160)[0], tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_guess_what_is_lost_and_say_so(folder, capsys):
    assert encode_command.main(["a.png", "--model", "grid", "--resilience", "4", "--quiet"]) == 0
    stream = Path("a.vtc").read_bytes()
    Path("b.vtc").write_bytes(b"\0" + stream[1:45] + stream[47:])
    assert decode_command.main(["b.vtc", "--model", "grid"]) == 0
    said = capsys.readouterr().err
    lost = chunks.read(Path("b.vtc").read_bytes()).lost
    assert len(lost) == 1 and re.search(r"b\.vtc: 2\d\.\d% of the tokens were lost and are guessed\.", said)
    assert decode_command.main(["b.vtc", "--model", "grid", "--strict", "-o", "c.png"]) == 1
    assert "of its tokens are lost." in capsys.readouterr().err and not Path("c.png").exists()
    assert decode_command.main(["a.vtc", "--model", "grid", "--strict", "-o", "c.png", "--quiet"]) == 0

    assert decode_command.main(["b.vtc", "--info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["version"], facts["chunks"], facts["chunks_lost"], facts["headers_intact"]) == (2, 4, list(lost), 1)
    assert decode_command.main(["a.vtc", "--info"]) == 0
    assert re.search(r"chunks_lost: +none\n", capsys.readouterr().out)


def test_commands_write_the_stages(folder, capsys):
    assert encode_command.main(["a.png", "--model", "var", "--progressive", "--quiet"]) == 0
    assert decode_command.main(["a.vtc", "--model", "var", "--progressive", "--json"]) == 0
    names = [f"a.decoded.stage{n}.png" for n in (1, 2, 3)]
    assert json.loads(capsys.readouterr().out)["stages"] == names
    assert sorted(p.name for p in folder.glob("*.png")) == ["a.decoded.png", *names, "a.png"]

    stream = Path("a.vtc").read_bytes()
    for name in ("a.stage2.vtc", "a.stage0.vtc"):
        Path(name).write_bytes(stream)
    streams = ["a.stage2.vtc", "a.vtc", "a.stage0.vtc"]
    assert decode_command.main([*streams, "-o", "out", "--model", "var", "--progressive"]) == 1
    assert "a.stage2.vtc would become out/a.stage2.png, which is also a stage of what a.vtc" in capsys.readouterr().err
    assert (folder / "out" / "a.stage2.png").read_bytes() == (folder / names[1]).read_bytes()
    assert (folder / "out" / "a.stage0.stage1.png").is_file()  # stages are counted from one: no conflict
    assert decode_command.main([*streams, "-o", "out2", "--model", "var"]) == 0
    capsys.readouterr()

    Path("cut.vtc").write_bytes(stream[: len(stream) * 3 // 5])
    assert decode_command.main(["cut.vtc", "--model", "var"]) == 0
    assert re.search(r"of the tokens were lost: it is shown up to stage [23]\.", capsys.readouterr().err)
