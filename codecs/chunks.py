"""The vtc container, version 2: tokens in chunks that are decoded alone, so that damage costs only what it hits.

    header | chunk | chunk | ... | header again

    header   f5 56 02 | length | kind, coder | model id | fingerprint | width | height | layout | division | longest
             | check
    chunk    index | longest - length | payload | check

A header is found by its first three bytes, a chunk by its check, which also covers the header; so both are found again
after bytes that were overwritten, dropped or inserted. Chunks are interleaved over the picture, which suits lost
packets, or follow the scales or levels of the tokens, so that a cut stream is a coarser picture. See docs/bitstream.md
for every bit. A stream is taken apart here without its model, torch or numpy; `codecs/resilience.py` decodes chunks.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from vtc.codecs import container
from vtc.codecs.container import FINGERPRINT_BYTES, MAGIC, Coder, Container, OutOfBytesError, Reader, varint
from vtc.errors import BitstreamError, ConfigError

VERSION = 2
CHECK_BYTES = 3
#: chunks that tokens are interleaved over, at most
MAX_CHUNKS = 4096
#: bytes of a payload, at most: four for each index
MAX_PAYLOAD = 4 * container.MAX_INDICES
#: bytes of a header between its length and its check, at most
MAX_HEADER = 1024
#: from this longest payload on, the numbers at the start of a chunk have a check of their own, of two bytes
LONG_PAYLOAD = 1024
#: a reader gives up looking for an intact header after so many places that looked like one
MAX_HEADER_TRIALS = 4096
#: a reader stops looking for chunks when it has checked this many times the bytes that the stream has
MAX_CHECKED = 512

_START = MAGIC + bytes((VERSION,))


# ---- which tokens stand in which chunk ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Division:
    """How tokens are divided into chunks: `Division(8)`, `Division.SCALES` or `Division.GROUPS`.

    count: tokens are interleaved over so many chunks, so that neighbours in the grid stand in different ones: in grid
        number s the token at (row, column) in chunk (steepness * row + column + s) mod count.
    by: instead, each scale or each group (residual level) is a chunk, in order.
    """

    count: int = 1
    by: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_CHUNKS:
            raise ConfigError(f"Tokens are divided into 1 to {MAX_CHUNKS} chunks, not {self.count}.")

    @property
    def number(self) -> int:
        """As a header has it: 0 by scales, 1 by groups, n + 1 over n chunks."""
        return {"scales": 0, "groups": 1}.get(self.by, self.count + 1)

    @classmethod
    def of(cls, number: int) -> Division:
        """The division that a header's number means. Raises BitstreamError."""
        if number > MAX_CHUNKS + 1:
            raise BitstreamError(f"A stream of {number - 1} chunks exceeds the limit of {MAX_CHUNKS}.")
        return cls(by=("scales", "groups")[number]) if number < 2 else cls(number - 1)

    def chunks(self, scales: tuple[tuple[int, int], ...], groups: int) -> int:
        """One more than the largest index of a chunk."""
        return {"scales": len(scales), "groups": groups}.get(self.by, self.count)

    def empty(self, scales: tuple[tuple[int, int], ...]) -> set[int]:
        """The indices of chunks that hold no tokens and are not written: a small grid interleaved over many."""
        if self.by:
            return set()
        # Each row covers an arc of the circle of chunks: a step up where it begins, a step down behind its end.
        n, a = self.count, steepness(self.count)
        steps = [0] * (2 * n + 1)
        for s, (rows, columns) in enumerate(scales):
            for row in range(min(rows, n)):
                start = (a * row + s) % n
                steps[start] += 1
                steps[start + min(columns, n)] -= 1
        arcs = list(accumulate(steps))
        return {index for index in range(n) if not arcs[index] and not arcs[index + n]}


@lru_cache(maxsize=64)
def steepness(chunks: int) -> int:
    """The number that keeps the tokens of one chunk farthest apart; the smallest where several do.

    They form a lattice, which (1, -steepness) and (0, chunks) span; the length of its shortest vector is the distance
    between nearest tokens of a chunk. Eight chunks have 3 and a distance of sqrt(8): all eight neighbours of a token
    stand in other chunks.
    """
    return max(range(chunks), key=lambda a: (_shortest(a, chunks), -a))


def _shortest(a: int, chunks: int) -> int:
    """Squared length of the shortest vector of the lattice, by Gauss's reduction."""
    u, v = (1, -a), (0, chunks)
    while True:
        u, v = sorted((u, v), key=lambda w: w[0] ** 2 + w[1] ** 2)
        square = u[0] ** 2 + u[1] ** 2
        times = (2 * (u[0] * v[0] + u[1] * v[1]) + square) // (2 * square)  # rounded
        if times == 0:
            return square
        v = (v[0] - times * u[0], v[1] - times * u[1])


# ---- the stream -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ChunkedContainer:
    """One image's stream in chunks.

    division, chunks: how tokens are divided, and the payload of each chunk, None where it is lost; chunks that hold no
        tokens have an empty payload and are not written.
    headers: intact copies of the header that were found, of two.
    The rest as in `Container`.
    """

    height: int
    width: int
    scales: tuple[tuple[int, int], ...]
    groups: int
    coder: Coder
    model_id: int
    fingerprint: bytes
    division: Division
    chunks: tuple[bytes | None, ...]
    headers: int = 2

    def __post_init__(self) -> None:
        container.check_limits(self.height, self.width, self.scales, self.groups)
        if len(self.fingerprint) != FINGERPRINT_BYTES or not 0 <= self.model_id <= container.MAX_VARINT:
            raise BitstreamError(f"A stream holds a model id of 32 bits and {FINGERPRINT_BYTES} bytes of fingerprint, "
                                 f"not {self.model_id} and {len(self.fingerprint)} bytes.")
        if self.coder == Coder.PRIOR:
            raise BitstreamError("A learned prior codes no chunks: each would need the others.")
        if self.coder == Coder.LATENTS:
            raise BitstreamError("Continuous latents are not coded in chunks.")

    @property
    def lost(self) -> tuple[int, ...]:
        """The indices of the chunks that are missing or damaged."""
        return tuple(number for number, chunk in enumerate(self.chunks) if chunk is None)

    def to_bytes(self) -> bytes:
        """The stream; `parse` is the inverse. Chunks that are lost are left out."""
        longest = max((len(chunk) for chunk in self.chunks if chunk is not None), default=0)
        kind, numbers = container.write_layout(self.height, self.width, self.scales, self.groups)
        header = _Header(self, longest, b"".join((
            bytes((kind | self.coder << 3,)), varint(self.model_id), self.fingerprint,
            *map(varint, (self.width, self.height, *numbers, self.division.number, longest)))))
        empty = self.division.empty(self.scales)
        return b"".join((header.code, *(header.chunk(number, chunk) for number, chunk in enumerate(self.chunks)
                                        if chunk is not None and number not in empty), header.code))


class _Header:
    """What a header makes of chunks.

    fields: the stream, whose chunks are not looked at. longest: bytes of the longest payload.
    body: the header's bytes between its length and its check.
    """

    def __init__(self, fields: ChunkedContainer, longest: int, body: bytes) -> None:
        self.fields, self.longest = fields, longest
        covered = _START + varint(len(body)) + body
        self.seed = zlib.crc32(covered)  # the checks of chunks go on from here
        self.code = covered + _check(self.seed)

    def chunk(self, index: int, payload: bytes) -> bytes:
        """A chunk in bytes."""
        numbers = varint(index) + varint(self.longest - len(payload))
        if self.longest >= LONG_PAYLOAD:
            numbers += self._short_check(numbers)
        return numbers + payload + _check(zlib.crc32(numbers + payload, self.seed))

    def find(self, stream: bytes) -> dict[int, bytes]:
        """The intact chunks in `stream`, by index; the first where there are several of one.

        The start of a chunk is where it should be, just behind another one, or else is looked for at every byte.
        """
        count = self.fields.division.chunks(self.fields.scales, self.fields.groups)
        found: dict[int, bytes] = {}
        work = MAX_CHECKED * len(stream)
        position = len(self.code) if stream.startswith(self.code) else 0
        while position < len(stream) and len(found) < count:
            # A quick look first: of the bytes that a damaged stretch consists of, few can be the start of an index.
            if stream[position] < count or count > 0x80:
                number, end, checked = self._chunk_at(stream, position, count, found)
                work -= checked
                if work < 0:
                    break
                if number is not None:
                    position = end
                    continue
            position += 1
        return found

    def _chunk_at(self, stream: bytes, position: int, count: int, found: dict[int, bytes],
                  ) -> tuple[int | None, int, int]:
        """(index, end, bytes that were checked); no index where no intact chunk starts here. Adds it to `found`."""
        reader = Reader(stream, position)
        try:
            index, length = reader.varint(), self.longest - reader.varint()
            if index >= count or length < 0:
                return None, 0, 0
            if self.longest >= LONG_PAYLOAD:
                numbers = stream[position : reader.position]
                if reader.take(2) != self._short_check(numbers):
                    return None, 0, 0
            if reader.position + length + CHECK_BYTES > len(stream):
                return None, 0, 0
            payload = reader.take(length)
            covered = stream[position : reader.position]
            if reader.take(CHECK_BYTES) != _check(zlib.crc32(covered, self.seed)):
                return None, 0, length
        except BitstreamError:
            return None, 0, 0
        found.setdefault(index, payload)
        return index, reader.position, length

    def _short_check(self, numbers: bytes) -> bytes:
        return zlib.crc32(numbers, self.seed).to_bytes(4, "little")[:2]


def _check(crc: int) -> bytes:
    """The low 24 bits of a CRC-32, little-endian."""
    return crc.to_bytes(4, "little")[:CHECK_BYTES]


def parse(stream: bytes, max_pixels: int = container.MAX_PIXELS) -> ChunkedContainer:
    """The stream in chunks in `stream`, with those that are intact, wherever they lie.

    Raises BitstreamError where there is no intact header, where it declares more than the limits or what this vtc does
    not know, or where no chunk is intact.
    """
    header, copies = _find_header(stream, max_pixels)
    fields = header.fields
    count = fields.division.chunks(fields.scales, fields.groups)
    if len(stream) > 2**16 + 4 * (2 * len(header.code) + count * (header.longest + 16)):
        raise BitstreamError(f"The stream of {len(stream)} bytes is more than four times as long as its header says.")
    found = header.find(stream)
    if not found:
        raise BitstreamError("The stream is damaged: none of its chunks is intact.")
    empty = fields.division.empty(fields.scales)
    chunks = tuple(found.get(n, b"" if n in empty else None) for n in range(count))
    return replace(fields, chunks=chunks, headers=copies)


def read(stream: bytes, max_pixels: int = container.MAX_PIXELS) -> Container | ChunkedContainer:
    """A stream of either version. Raises BitstreamError as `container.parse` and `parse` do.

    A header of version 2 is looked for wherever it may lie, since the first bytes of the stream may be damaged.
    """
    if stream.startswith(_START):
        return parse(stream, max_pixels)
    try:
        return container.parse(stream, max_pixels)
    except BitstreamError:
        try:
            _find_header(stream, container.MAX_PIXELS)
        except BitstreamError:
            pass
        else:
            return parse(stream, max_pixels)
        raise


def _find_header(stream: bytes, max_pixels: int) -> tuple[_Header, int]:
    """The first intact header, and how many copies of it there are (two are enough)."""
    position = -1
    for _ in range(MAX_HEADER_TRIALS):
        position = stream.find(_START, position + 1)
        if position < 0:
            break
        reader = Reader(stream, position + len(_START))
        try:
            length = reader.varint()
            if length > MAX_HEADER:
                continue
            body = reader.take(length)
            code = stream[position : reader.position]
            if reader.take(CHECK_BYTES) != _check(zlib.crc32(code)):
                continue
        except BitstreamError:
            continue
        header = _read_header(body, max_pixels)
        return header, 1 + (stream.find(header.code, reader.position) >= 0)
    raise BitstreamError("The stream is damaged: no intact copy of its header is left.")


def _read_header(body: bytes, max_pixels: int) -> _Header:
    """An intact header, checked against the limits before anything is allocated."""
    reader = Reader(body)
    try:
        fields = container.read_fields(reader, max_pixels)
        division, longest = Division.of(reader.varint()), reader.varint()
    except OutOfBytesError:
        raise BitstreamError("The header of the stream is shorter than its fields.") from None
    if reader.position < len(body):
        raise BitstreamError("The header of the stream has more fields than this vtc knows: update vtc.")
    if longest > MAX_PAYLOAD:
        raise BitstreamError(f"A chunk of {longest} bytes exceeds the limit of {MAX_PAYLOAD}.")
    return _Header(ChunkedContainer(**fields, division=division, chunks=()), longest, body)
