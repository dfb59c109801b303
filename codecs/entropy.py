"""Indices to bytes and back: packed, or by static integer tables and asymmetric numeral systems (ANS).

Both are exact integer arithmetic on integers that the model ships, so the same indices give the same bytes on every
machine; nothing here depends on a network, a thread count or a rounding mode. See docs/bitstream.md for every bit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from vtc.codecs.container import Coder
from vtc.errors import BitstreamError, ConfigError, ModelError
from vtc.tokenizers.base import TokenLayout

#: what the frequencies of a table add up to
TOTAL = 2**20
#: a larger total would not stay exact in float64 on its way through constriction
MAX_TOTAL = 2**24
#: indices that share one number in a packed payload
BLOCK = 512

Indices = NDArray[np.int64]  # (L, G)


@dataclass(frozen=True)
class StaticTables:
    """Static frequencies of indices: integers that each row adds up to the same kind of power of two.

    frequencies: (T, K) integers; one row for all indices, one a group, or one a scale and group (scale major).
        At least 1 for every word of the vocabulary, 0 beyond it.
    """

    frequencies: NDArray[np.int64]

    def __post_init__(self) -> None:
        rows = self.frequencies
        if rows.ndim != 2 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
            raise ModelError(f"Entropy-coding tables are whole numbers (T, K), not {rows.dtype} {rows.shape}.")
        totals = {int(t) for t in rows.sum(1, dtype=np.int64)}
        if rows.min() < 0 or any(t < 1 or t > MAX_TOTAL or t & (t - 1) for t in totals):
            raise ModelError(f"Each entropy-coding table adds up to a power of two of at most {MAX_TOTAL}.")

    def runs(self, layout: TokenLayout) -> Iterator[tuple[slice, slice, NDArray[np.int64]]]:
        """In coding order: positions and groups that share a table, and that table, cut to the vocabulary.

        Raises ModelError where the number of tables or a vocabulary does not fit the layout.
        """
        count, groups = len(self.frequencies), layout.groups
        everywhere = slice(0, layout.length)
        if count == 1 and len(set(layout.vocab)) == 1:
            yield everywhere, slice(0, groups), self._row(0, layout.vocab[0])
        elif count == groups:
            for g, vocab in enumerate(layout.vocab):
                yield everywhere, slice(g, g + 1), self._row(g, vocab)
        elif count == len(layout.scales) * groups:
            start = 0
            for s, (rows, columns) in enumerate(layout.scales):
                for g, vocab in enumerate(layout.vocab):
                    yield slice(start, start + rows * columns), slice(g, g + 1), self._row(s * groups + g, vocab)
                start += rows * columns
        else:
            raise ModelError(f"{count} entropy-coding tables fit neither the {groups} groups nor the "
                             f"{len(layout.scales)} scales of the token layout.")

    def _row(self, index: int, vocab: int) -> NDArray[np.int64]:
        row = self.frequencies[index]
        if len(row) < vocab or row[:vocab].min() < 1 or row[vocab:].any():
            raise ModelError(f"Entropy-coding table {index} does not fit a vocabulary of {vocab} words: "
                             "each needs a frequency of at least 1, and words beyond it have 0.")
        return row[:vocab]

    def ideal_bits(self, indices: Indices, layout: TokenLayout) -> float:
        """The information of `indices` (L, G) under these tables: what no coder can go below on average."""
        return sum(float(np.log2(table.sum() / table[indices[where, group]]).sum())
                   for where, group, table in self.runs(layout))


def encode(indices: Indices, layout: TokenLayout, tables: StaticTables | None) -> tuple[Coder, bytes]:
    """The shorter of the two codes of `indices` (L, G); packed where both are equally long, or without tables.

    Raises ConfigError where an index lies outside its vocabulary, ModelError where the tables do not fit the layout.
    """
    check_indices(indices, layout)
    packed = pack(indices, layout)
    if tables is None:
        return Coder.PACKED, packed
    coded = encode_ans(indices, layout, tables)
    return (Coder.STATIC_ANS, coded) if len(coded) < len(packed) else (Coder.PACKED, packed)


def check_indices(indices: Indices, layout: TokenLayout) -> None:
    """Raise ConfigError where indices are not (L, G) or one lies outside its vocabulary."""
    if indices.shape != (layout.length, layout.groups):
        raise ConfigError(f"Indices of shape {(layout.length, layout.groups)} fit this layout, not {indices.shape}.")
    if (indices < 0).any() or (indices >= np.array(layout.vocab)).any():
        raise ConfigError(f"An index lies outside its vocabulary of {layout.vocab} words.")


def decode(coder: Coder, payload: bytes, layout: TokenLayout, tables: StaticTables | None) -> Indices:
    """The indices (L, G), int64; allocates what the layout declares and no more.

    Raises BitstreamError where the payload is not exactly the code of such indices, ModelError where it needs tables
    that the model lacks.
    """
    if coder == Coder.PACKED:
        return unpack(payload, layout)
    if coder == Coder.LATENTS:
        raise ModelError("The stream holds continuous latents, not tokens: decode it with LatentCodec.")
    if coder not in (Coder.STATIC_ANS, Coder.SEEDED_ANS):
        raise ModelError(f"Coder {coder.name} needs more than static tables: decode the stream with TokenCodec.")
    if tables is None:
        raise ModelError("The stream is coded with static tables, and the model has none.")
    return decode_ans(payload, layout, tables, seeded=coder == Coder.SEEDED_ANS)


# ---- packed: mixed radix --------------------------------------------------------------------------------------------

def _blocks(layout: TokenLayout) -> Iterator[tuple[int, int, int]]:
    """(first index, number of indices, bytes) of each block of a packed payload."""
    count, groups = layout.length * layout.groups, layout.groups
    # Bytes of a full block by the group that it begins with: a large layout is sized without multiplying all of it.
    full: dict[int, int] = {}
    for start in range(0, count, BLOCK):
        if count - start < BLOCK:
            yield start, count - start, _block_bytes(layout, start, count - start)
        else:
            if start % groups not in full:
                full[start % groups] = _block_bytes(layout, start, BLOCK)
            yield start, BLOCK, full[start % groups]


def _vocabularies(layout: TokenLayout, start: int, size: int) -> list[int]:
    """Of the indices start ... start + size - 1 in layout order."""
    return [layout.vocab[i % layout.groups] for i in range(start, start + size)]


def _block_bytes(layout: TokenLayout, start: int, size: int) -> int:
    return ((math.prod(_vocabularies(layout, start, size)) - 1).bit_length() + 7) // 8


def packed_size(layout: TokenLayout) -> int:
    """Bytes of a packed payload: the layout alone decides."""
    return sum(size for _, _, size in _blocks(layout))


def pack(indices: Indices, layout: TokenLayout) -> bytes:
    """Blocks of 512 indices, each one number in mixed radix, first index most significant, big-endian."""
    flat = indices.reshape(-1).tolist()
    out = bytearray()
    for start, size, byte_count in _blocks(layout):
        number = 0
        for index, vocab in zip(flat[start : start + size], _vocabularies(layout, start, size), strict=True):
            number = number * vocab + index
        out += number.to_bytes(byte_count, "big")
    return bytes(out)


def unpack(payload: bytes, layout: TokenLayout) -> Indices:
    """Inverse of `pack`; raises BitstreamError for a payload of another length or with a number out of range."""
    size_expected = packed_size(layout)
    if len(payload) != size_expected:
        raise BitstreamError(f"The payload has {len(payload)} bytes; these packed indices take {size_expected}.")
    out = np.empty(layout.length * layout.groups, dtype=np.int64)
    position = 0
    for start, size, byte_count in _blocks(layout):
        number = int.from_bytes(payload[position : position + byte_count], "big")
        position += byte_count
        digits = []
        for vocab in reversed(_vocabularies(layout, start, size)):
            number, digit = divmod(number, vocab)
            digits.append(digit)
        if number:
            raise BitstreamError("The payload holds a number beyond the vocabulary.")
        out[start : start + size] = digits[::-1]
    return out.reshape(layout.length, layout.groups)


# ---- static tables: asymmetric numeral systems ----------------------------------------------------------------------

def _categorical(table: NDArray[np.int64]) -> object:
    """constriction's model of one table.

    constriction quantizes cumulative probabilities to 24 bits as i + floor(P_i * (2^24 - K)) with `perfect=False`.
    Whole frequencies over a power of two are exact in float64, and so are their sums and this product (at most
    24 + 24 bits): no rounding happens, on any machine. (`perfect=True` searches in floating point; never use it.)
    """
    return constriction.stream.model.Categorical(table / float(table.sum()), perfect=False)


def encode_ans(indices: Indices, layout: TokenLayout, tables: StaticTables, seeded: bool = False) -> bytes:
    """The 32-bit words of constriction's ANS coder, little-endian, without the zero bytes at the end.

    The coder starts with state 0, from which the first index costs 24 bits whatever it is. With `seeded` the state
    starts as the last indices instead, packed into 24 bits: up to three bytes less, which chunks are glad of.
    """
    runs = [(indices[where, group].reshape(-1).astype(np.int32), table)
            for where, group, table in tables.runs(layout) if len(table) > 1]
    coder = constriction.stream.stack.AnsCoder()
    if seeded and runs:
        values, table = runs.pop()
        rest = len(values) - seed_length(values.size, len(table))
        coder = _coder(reduce(lambda state, index: state * len(table) + index, values[rest:].tolist(), 0))
        runs.append((values[:rest], table))
    for values, table in reversed(runs):  # a stack: last in, first out
        coder.encode_reverse(values, _categorical(table))
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def decode_ans(payload: bytes, layout: TokenLayout, tables: StaticTables, seeded: bool = False) -> Indices:
    """Inverse of `encode_ans`; raises BitstreamError where the payload is not used up exactly."""
    if payload.endswith(b"\0"):
        raise BitstreamError("The payload is padded with zeros.")
    words = np.frombuffer(payload + bytes(-len(payload) % 4), dtype="<u4").astype(np.uint32)
    coder = constriction.stream.stack.AnsCoder(words)
    out = np.zeros((layout.length, layout.groups), dtype=np.int64)
    runs = [(out[where, group], table) for where, group, table in tables.runs(layout) if len(table) > 1]
    for number, (part, table) in enumerate(runs, 1):
        packed = seed_length(part.size, len(table)) if seeded and number == len(runs) else 0
        values = coder.decode(_categorical(table), part.size - packed)
        if packed:
            left, coder = coder.get_compressed(), _coder(0)
            state = int(left[0]) if len(left) else 0
            if len(left) > 1 or state >= len(table) ** packed:
                raise BitstreamError("The payload does not end where its indices end.")
            digits = [state // len(table) ** place % len(table) for place in reversed(range(packed))]
            values = np.append(values, digits)
        part[:] = values.reshape(part.shape)
    if not coder.is_empty():
        raise BitstreamError("The payload does not end where its indices end.")
    return out


def seed_length(count: int, vocab: int) -> int:
    """How many of a run's `count` indices the first state of a seeded coder is: as 24 bits hold."""
    length = 0
    while length < count and vocab ** (length + 1) <= MAX_TOTAL:
        length += 1
    return max(1, length)


def _coder(state: int) -> Any:
    """constriction's coder in a state below 2^32."""
    return constriction.stream.stack.AnsCoder(np.array([state] if state else [], dtype=np.uint32))


# ---- fitting tables -------------------------------------------------------------------------------------------------

def frequencies_from_counts(counts: NDArray[np.integer], total: int = TOTAL) -> NDArray[np.int64]:
    """Whole frequencies (K,) >= 1 that add up to `total` and code `counts` (K,) in the fewest bits.

    Minimises -sum(counts * log2(frequencies)). That cost is separable and convex, so a table from which no unit can be
    moved to another word with a gain is the optimum: start from rounded-down proportions, give or take single units
    where they matter most or least until the sum is right, then move units while it helps. Equal cases go to the lower
    word. Without any count all words are equally likely.
    """
    size = len(counts)
    if counts.ndim != 1 or size < 1 or size > total or (counts < 0).any():
        raise ConfigError(f"Counts are one non-negative number for each of 1 to {total} words.")
    c = [int(n) for n in counts] if counts.any() else [1] * size
    f = [max(1, n * total // sum(c)) for n in c]

    def gain(i: int) -> float:
        return c[i] * math.log1p(1 / f[i])

    def loss(i: int) -> float:
        return -c[i] * math.log1p(-1 / f[i]) if f[i] > 1 else math.inf

    # Heaps of (key, word, frequency when pushed); an entry whose frequency has changed since is stale.
    gains = [(-gain(i), i, f[i]) for i in range(size)]
    losses = [(loss(i), i, f[i]) for i in range(size)]
    heapq.heapify(gains)
    heapq.heapify(losses)

    def change(i: int, by: int) -> None:
        f[i] += by
        heapq.heappush(gains, (-gain(i), i, f[i]))
        heapq.heappush(losses, (loss(i), i, f[i]))

    def top(heap: list[tuple[float, int, int]]) -> tuple[float, int]:
        while heap[0][2] != f[heap[0][1]]:
            heapq.heappop(heap)
        return heap[0][0], heap[0][1]

    surplus = sum(f) - total
    for _ in range(abs(surplus)):
        change(top(losses)[1] if surplus > 0 else top(gains)[1], -1 if surplus > 0 else 1)
    while True:
        (negative_gain, i), (cost, j) = top(gains), top(losses)
        if i == j or -negative_gain <= cost * (1 + 1e-12):
            return np.array(f, dtype=np.int64)
        change(i, 1)
        change(j, -1)
