"""Entropy coding: bytes against a second implementation of the format, sizes against the ideal, hostile payloads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.codecs import entropy
from vtc.codecs.container import Coder
from vtc.codecs.entropy import StaticTables, frequencies_from_counts
from vtc.errors import BitstreamError, ConfigError, ModelError
from vtc.tokenizers.base import TokenLayout

VAR = tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


# ---- the format a second time, from docs/bitstream.md, in Python integers -------------------------------------------

def cumulative(row: np.ndarray) -> list[int]:
    """Table to 24-bit cumulative frequencies, K + 1 of them."""
    total, free = int(row.sum()), 2**24 - len(row)
    return [i + int(row[:i].sum()) * free // total for i in range(len(row))] + [2**24]


def python_ans_decode(payload: bytes, counts: list[int], rows: list[np.ndarray], seeded: bool = False) -> list[int]:
    """Symbols, run after run: counts[i] of them with table rows[i]; the state must end as 0, or is the last symbols."""
    size = len(rows[-1])
    packed = max(1, min(counts[-1], int(24 / math.log2(size)))) if seeded else 0
    counts = [*counts[:-1], counts[-1] - packed]
    words = [int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)]
    state = 0
    while words and state < 2**32:
        state = state << 32 | words.pop()
    symbols = []
    for count, row in zip(counts, rows, strict=True):
        cdf = cumulative(row)
        for _ in range(count):
            low = state % 2**24
            symbol = max(i for i in range(len(row)) if cdf[i] <= low)
            state = (state >> 24) * (cdf[symbol + 1] - cdf[symbol]) + low - cdf[symbol]
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            symbols.append(symbol)
    assert not words and state < size**packed
    return [*symbols, *(state // size**i % size for i in reversed(range(packed)))]


def zipf(size: int, exponent: float) -> np.ndarray:
    return (1e6 / np.arange(1, size + 1) ** exponent).astype(np.int64)


def tables(*rows: np.ndarray) -> StaticTables:
    return StaticTables(np.stack(rows))


def draw(rng: np.random.Generator, layout: TokenLayout, t: StaticTables) -> np.ndarray:
    """Indices that follow the tables."""
    out = np.zeros((layout.length, layout.groups), dtype=np.int64)
    for where, group, row in t.runs(layout):
        out[where, group] = rng.choice(len(row), out[where, group].shape, p=row / row.sum())
    return out


def test_ans_bytes_are_the_documented_ones():
    rng = np.random.default_rng(0)
    layout = TokenLayout(((1, 1), (3, 4)), (11, 5))
    rows = [frequencies_from_counts(rng.integers(0, 50, k), 2**12) for k in (11, 5, 11, 5)]
    t = tables(*(np.pad(r, (0, 11 - len(r))) for r in rows))
    for _ in range(20):
        indices = draw(rng, layout, t)
        expected = [*indices[:1, 0], *indices[:1, 1], *indices[1:, 0], *indices[1:, 1]]
        for seeded in (False, True):
            payload = entropy.encode_ans(indices, layout, t, seeded)
            assert python_ans_decode(payload, [1, 1, 12, 12], rows, seeded) == expected


def test_golden_payloads():
    layout = TokenLayout(((3, 5),), (6,))
    indices = (np.arange(15) ** 2 % 6)[:, None]
    t = tables(np.array([600, 200, 100, 60, 40, 24]))
    assert entropy.pack(indices, layout).hex() == "0561620cc2"
    assert entropy.encode_ans(indices, layout, t).hex() == "0404f5149b2503da01"
    assert entropy.encode_ans(indices, layout, t, seeded=True).hex() == "c33d657dee"
    assert entropy.encode(indices * 0, layout, t) == (Coder.STATIC_ANS, b"")  # the state never leaves 0


def test_packed_is_mixed_radix():
    layout = TokenLayout(((1, 3),), (10, 7))
    indices = np.array([[9, 6], [0, 3], [4, 5]])
    number = ((((9 * 7 + 6) * 10 + 0) * 7 + 3) * 10 + 4) * 7 + 5
    assert entropy.pack(indices, layout) == number.to_bytes(3, "big")


def test_a_power_of_two_packs_like_bits():
    layout = TokenLayout(((32, 48),), (2048,))
    indices = np.random.default_rng(1).integers(0, 2048, (1536, 1))
    bits = "".join(f"{i:011b}" for i in indices[:, 0])
    assert entropy.pack(indices, layout) == int(bits, 2).to_bytes(2112, "big")


@pytest.mark.parametrize("vocab", [3, 10, 1000, 2049])
def test_other_vocabularies_pack_within_a_thousandth_and_a_byte(vocab):
    layout = TokenLayout(((64, 96),), (vocab,))
    assert entropy.packed_size(layout) <= layout.bits / 8 + 1 + 12  # one byte a block of 512
    assert entropy.packed_size(layout) >= layout.bits / 8


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.0, 2.0])
def test_a_kodak_grid_costs_at_most_one_per_cent_over_the_ideal(exponent):
    layout = TokenLayout(((32, 48),), (2048,))
    t = tables(frequencies_from_counts(zipf(2048, exponent)))
    for seed in range(5):
        indices = draw(np.random.default_rng(seed), layout, t)
        coder, payload = entropy.encode(indices, layout, t)
        assert coder == Coder.STATIC_ANS
        assert 8 * len(payload) <= 1.01 * t.ideal_bits(indices, layout)


def test_uniform_indices_are_packed():
    layout = TokenLayout(((32, 48),), (2048,))
    indices = np.random.default_rng(0).integers(0, 2048, (1536, 1))
    packed = (Coder.PACKED, entropy.pack(indices, layout))
    assert entropy.encode(indices, layout, tables(frequencies_from_counts(zipf(2048, 1.0)))) == packed
    assert entropy.encode(indices, layout, None) == packed


@st.composite
def cases(drawer) -> tuple[TokenLayout, StaticTables, np.ndarray]:
    """Any layout with tables of any of the three kinds, and indices of any values."""
    scales = tuple(drawer(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)))
    vocab = tuple(drawer(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    kind = drawer(st.sampled_from(["one", "group", "scale"]))
    if kind == "one":
        vocab = (vocab[0],) * len(vocab)
    rows = {"one": 1, "group": len(vocab), "scale": len(scales) * len(vocab)}[kind]
    rng = np.random.default_rng(drawer(st.integers(0, 2**32)))
    made = [frequencies_from_counts(rng.integers(0, 1000, vocab[r % len(vocab)]) ** 3) for r in range(rows)]
    layout = TokenLayout(scales, vocab)
    indices = rng.integers(0, np.array(vocab), (layout.length, len(vocab)))
    return layout, tables(*(np.pad(m, (0, max(vocab) - len(m))) for m in made)), indices


@settings(max_examples=150, deadline=None)
@given(cases())
def test_round_trip(case):
    layout, t, indices = case
    assert np.array_equal(entropy.unpack(entropy.pack(indices, layout), layout), indices)
    for seeded in (False, True):
        coded = entropy.encode_ans(indices, layout, t, seeded)
        assert np.array_equal(entropy.decode_ans(coded, layout, t, seeded), indices)
    coder, payload = entropy.encode(indices, layout, t)
    assert np.array_equal(entropy.decode(coder, payload, layout, t), indices)
    assert len(payload) <= entropy.packed_size(layout)


@settings(max_examples=150, deadline=None)
@given(cases(), st.binary(max_size=60), st.sampled_from([Coder.PACKED, Coder.STATIC_ANS, Coder.SEEDED_ANS]))
def test_any_payload_decodes_to_what_encodes_to_it_or_is_refused(case, payload, coder):
    layout, t, _ = case
    try:
        indices = entropy.decode(coder, payload, layout, t)
    except BitstreamError:
        return
    assert (indices >= 0).all() and (indices < np.array(layout.vocab)).all()
    again = (entropy.pack(indices, layout) if coder == Coder.PACKED else
             entropy.encode_ans(indices, layout, t, seeded=coder == Coder.SEEDED_ANS))
    assert again == payload


@pytest.mark.parametrize("vocab", [(1000,), (16, 16, 8), (1,), (2,) * 32])
def test_blocks_join(vocab):
    layout = TokenLayout(((37, 41),), vocab)
    indices = np.random.default_rng(2).integers(0, np.array(vocab), (37 * 41, len(vocab)))
    payload = entropy.pack(indices, layout)
    assert len(payload) == entropy.packed_size(layout)
    assert np.array_equal(entropy.unpack(payload, layout), indices)


def test_var_scales_each_with_a_table_save_what_they_should():
    layout = TokenLayout(VAR, (4096,))
    row = frequencies_from_counts(zipf(4096, 1.0))
    t = tables(*(np.roll(row, 7 * s) for s in range(10)))
    indices = draw(np.random.default_rng(3), layout, t)
    coder, payload = entropy.encode(indices, layout, t)
    assert coder == Coder.STATIC_ANS and len(payload) < 0.8 * entropy.packed_size(layout)
    assert 8 * len(payload) <= 1.01 * t.ideal_bits(indices, layout)
    assert np.array_equal(entropy.decode(coder, payload, layout, t), indices)


def test_bad_payloads():
    layout = TokenLayout(((4, 4),), (10,))
    t = tables(frequencies_from_counts(zipf(10, 1.0)))
    payload = entropy.encode_ans(np.arange(16)[:, None] % 10, layout, t)
    with pytest.raises(BitstreamError, match="end where"):
        entropy.decode_ans(payload + b"\1\2\3\4", layout, t)
    with pytest.raises(BitstreamError, match="padded"):
        entropy.decode_ans(payload + b"\0", layout, t)
    with pytest.raises(BitstreamError, match="take 7"):
        entropy.unpack(bytes(6), layout)
    with pytest.raises(BitstreamError, match="beyond the vocabulary"):
        entropy.unpack(b"\xff" * 7, layout)
    with pytest.raises(ModelError, match="the model has none"):
        entropy.decode(Coder.STATIC_ANS, payload, layout, None)
    with pytest.raises(ModelError, match="decode the stream with TokenCodec"):
        entropy.decode(Coder.PRIOR, payload, layout, t)


def test_bad_indices_and_tables():
    layout = TokenLayout(((2, 2),), (10,))
    with pytest.raises(ConfigError, match="outside its vocabulary"):
        entropy.encode(np.full((4, 1), 10), layout, None)
    with pytest.raises(ConfigError, match="fit this layout"):
        entropy.encode(np.zeros((5, 1), dtype=np.int64), layout, None)
    with pytest.raises(ModelError, match="power of two"):
        tables(np.array([5, 4]))
    with pytest.raises(ModelError, match="power of two"):
        tables(np.array([5, -1]))
    with pytest.raises(ModelError, match="whole numbers"):
        tables(np.array([0.5, 0.5]))
    ten = frequencies_from_counts(zipf(10, 1.0))
    with pytest.raises(ModelError, match="vocabulary of 10"):
        list(tables(frequencies_from_counts(zipf(9, 1.0))).runs(layout))
    with pytest.raises(ModelError, match="vocabulary of 10"):
        list(tables(frequencies_from_counts(zipf(11, 1.0))).runs(layout))
    with pytest.raises(ModelError, match="3 entropy-coding tables"):
        list(tables(ten, ten, ten).runs(layout))


# ---- frequencies ----------------------------------------------------------------------------------------------------

def cost(counts: np.ndarray, frequencies: np.ndarray) -> float:
    return -sum(c * math.log2(f / sum(frequencies)) for c, f in zip(counts, frequencies, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(4, 14))
def test_frequencies_are_the_best_of_all(counts, total):
    """Against every way to split `total` into positive parts."""
    counts = counts if any(counts) else [1] * len(counts)
    found = frequencies_from_counts(np.array(counts), total)
    assert found.sum() == total and found.min() >= 1
    splits = ([b - a for a, b in itertools.pairwise((0, *cut, total))]
              for cut in itertools.combinations(range(1, total), len(counts) - 1))
    assert cost(np.array(counts), found) <= min(cost(np.array(counts), np.array(s)) for s in splits) + 1e-9


def test_frequencies_of_nothing_and_of_one():
    assert frequencies_from_counts(np.zeros(3, dtype=int), 8).tolist() == [3, 3, 2]
    assert frequencies_from_counts(np.array([5]), 8).tolist() == [8]
    assert frequencies_from_counts(np.array([10**12, 0, 0]), 8).tolist() == [6, 1, 1]
    with pytest.raises(ConfigError):
        frequencies_from_counts(np.array([-1, 2]))
    with pytest.raises(ConfigError):
        frequencies_from_counts(np.ones(9, dtype=int), 8)


def test_frequencies_cost_next_to_nothing():
    counts = np.random.default_rng(0).poisson(40, 2048) ** 2
    entropy_bits = -(counts * np.log2(np.maximum(counts, 1) / counts.sum())).sum()
    assert cost(counts, frequencies_from_counts(counts)) <= entropy_bits * 1.0001
