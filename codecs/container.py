"""The vtc container, version 1: what a stream says about itself before its coded tokens. See docs/bitstream.md.

    f5 56 | 01 | kind, coder | model id | fingerprint | width | height | layout | length | payload | CRC-32
    2       1    1             varint     8             varint  varint            varint   length    4 bytes

A 768x512 photograph on a grid at stride 16 has 24 bytes around its payload. A stream is parsed without its model, and
without torch: every number is compared with a limit before anything is allocated. What this version does not know it
refuses with one sentence; what it knows is parsed for ever.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from enum import IntEnum

from vtc.errors import BitstreamError

MAGIC = b"\xf5\x56"  # f5 never occurs in UTF-8, so no text file begins like this
VERSION = 1
NEWEST_VERSION = 2  # codecs/chunks.py
FINGERPRINT_BYTES = 8
CRC_BYTES = 4

# Limits that a version-1 stream declares itself within; a reader may set lower ones.
MAX_SIDE = 2**20  # pixels
MAX_PIXELS = 2**28
MAX_INDICES = 2**24  # positions times groups
MAX_GROUPS = 256
MAX_SCALES = 64
MAX_VARINT = 2**32 - 1

_KIND_BITS = 0b0000_0111
_CODER_BITS = 0b0011_1000
_RESERVED_BIT = 0b0100_0000
_FLAGS_BIT = 0b1000_0000


class LayoutKind(IntEnum):
    """How the token layout is written. The numbers are part of the format: never change or reuse one."""

    STRIDE = 0  # stride; ceil(height / stride) x ceil(width / stride) positions of one index
    STRIDE_GROUPS = 1  # stride, groups
    GRID = 2  # groups, rows, columns
    SCALES = 3  # groups, number of scales, then rows and columns of each
    SEQUENCE = 4  # groups, positions


class Coder(IntEnum):
    """How the payload is coded. The numbers are part of the format: never change or reuse one."""

    PACKED = 0  # every index equally likely
    STATIC_ANS = 1  # the model's static tables
    PRIOR = 2  # a learned prior in whole numbers, which the fingerprint covers too
    SEEDED_ANS = 3  # static tables, and the last indices are the coder's first state
    LATENTS = 4  # no indices: continuous latents, by a hyperprior which the fingerprint covers too


@dataclass(frozen=True)
class Container:
    """One image's stream.

    height, width: of the true image in pixels.
    scales: the token grids, coarse to fine, as (rows, columns); groups: indices at each position.
    coder, payload: how the indices are coded, and the code.
    model_id: the constant of a model that vtc ships, 0 for any other.
    fingerprint: 8 bytes of a hash over what decoding reads of the model; `with_prior` of it where the coder is PRIOR.
    """

    height: int
    width: int
    scales: tuple[tuple[int, int], ...]
    groups: int
    coder: Coder
    payload: bytes
    model_id: int
    fingerprint: bytes

    def __post_init__(self) -> None:
        check_limits(self.height, self.width, self.scales, self.groups)
        if len(self.fingerprint) != FINGERPRINT_BYTES or not 0 <= self.model_id <= MAX_VARINT:
            raise BitstreamError(f"A stream holds a model id of 32 bits and {FINGERPRINT_BYTES} bytes of fingerprint, "
                                 f"not {self.model_id} and {len(self.fingerprint)} bytes.")

    def to_bytes(self) -> bytes:
        """The stream; `parse` is the inverse."""
        kind, numbers = write_layout(self.height, self.width, self.scales, self.groups)
        body = b"".join((
            MAGIC, bytes((VERSION, kind | self.coder << 3)), varint(self.model_id), self.fingerprint,
            *map(varint, (self.width, self.height, *numbers, len(self.payload))), self.payload))
        return body + zlib.crc32(body).to_bytes(CRC_BYTES, "little")


def parse(stream: bytes, max_pixels: int = MAX_PIXELS) -> Container:
    """The container in `stream`, all of it.

    Raises BitstreamError, with a sentence for each case, where the stream is empty, not ours, newer, cut, longer than
    it says, damaged, or declares more than the limits (`max_pixels` may lower the one on height times width).
    """
    if not stream:
        raise BitstreamError("The stream is empty.")
    if stream[: len(MAGIC)] != MAGIC[: len(stream)]:
        raise BitstreamError(f"This is not a vtc stream: it does not begin with the bytes {MAGIC.hex(' ')}.")
    version = stream[len(MAGIC)] if len(stream) > len(MAGIC) else VERSION
    if version > NEWEST_VERSION:
        raise BitstreamError(f"This stream has container version {version}, and this vtc reads versions up to "
                             f"{NEWEST_VERSION}: update vtc.")
    if version > VERSION:
        raise BitstreamError(f"This stream has container version {version}, in chunks, which "
                             "vtc.codecs.chunks.read reads.")
    # The last bytes are the checksum whatever the flags. An intact stream is refused for what it says; one that is
    # not, for being damaged, except where it is plain that it was cut or that something was appended.
    intact = zlib.crc32(stream[:-CRC_BYTES]) == int.from_bytes(stream[-CRC_BYTES:], "little")
    reader = Reader(stream, len(MAGIC))
    try:
        fields = _read_header(reader, max_pixels)
        length = reader.varint()
        missing = reader.position + length + CRC_BYTES - len(stream)
    except OutOfBytesError:
        raise BitstreamError(f"The stream is cut: it ends inside its header, after {len(stream)} bytes.") from None
    except BitstreamError as error:
        if intact:
            raise
        raise BitstreamError(_DAMAGED) from error
    if missing > 0:
        raise BitstreamError(f"The stream is cut: {missing} bytes are missing at its end.")
    if missing < 0:
        raise BitstreamError(f"The stream is followed by {-missing} bytes that do not belong to it.")
    if not intact:
        raise BitstreamError(_DAMAGED)
    return Container(payload=bytes(reader.take(length)), **fields)


_DAMAGED = "The stream is damaged: its checksum does not match."


class OutOfBytesError(BitstreamError):
    """The stream ended inside a field."""


class Reader:
    """A position in a byte string."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.position = data, position

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        part = self.data[self.position : self.position + count]
        if len(part) < count:
            raise OutOfBytesError("The stream ends inside a field.")
        self.position += count
        return part

    def varint(self) -> int:
        """The next LEB128 number: seven bits a byte, low bits first, the top bit set on all bytes but the last."""
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift > 0:
                    raise BitstreamError("A number of the header is padded with zeros, which version 1 does not allow.")
                if value > MAX_VARINT:
                    break
                return value
        raise BitstreamError("A number of the header is wider than 32 bits.")


def with_prior(model: bytes, prior: bytes) -> bytes:
    """The fingerprint in a stream that needs a model and a prior: it names both in the room of one."""
    return hashlib.sha256(model + prior).digest()[:FINGERPRINT_BYTES]


def varint(value: int) -> bytes:
    """LEB128, shortest form, of 0 <= value < 2^32.

    >>> varint(768).hex()
    '8006'
    """
    if not 0 <= value <= MAX_VARINT:
        raise BitstreamError(f"{value} does not fit the 32 bits of a header's number.")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def check_limits(height: int, width: int, scales: tuple[tuple[int, int], ...], groups: int,
                 max_pixels: int = MAX_PIXELS) -> None:
    """Raise BitstreamError where a version-1 stream cannot, or may not, describe such an image."""
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise BitstreamError(f"An image of {width}x{height} pixels is outside the limits of 1 to {MAX_SIDE} a side.")
    if height * width > max_pixels:
        raise BitstreamError(f"An image of {width}x{height} pixels exceeds the limit of {max_pixels} pixels.")
    if not 1 <= len(scales) <= MAX_SCALES:
        raise BitstreamError(f"A token layout of {len(scales)} scales is outside the limits of 1 to {MAX_SCALES}.")
    if not 1 <= groups <= MAX_GROUPS:
        raise BitstreamError(f"A token layout of {groups} groups is outside the limits of 1 to {MAX_GROUPS}.")
    if any(rows < 1 or columns < 1 for rows, columns in scales):
        raise BitstreamError("A token grid of the layout is empty.")
    indices = groups * sum(rows * columns for rows, columns in scales)
    if indices > MAX_INDICES:
        raise BitstreamError(f"A token layout of {indices} indices exceeds the limit of {MAX_INDICES}.")


def write_layout(height: int, width: int, scales: tuple[tuple[int, int], ...], groups: int,
                 ) -> tuple[LayoutKind, tuple[int, ...]]:
    """The shortest description: the kind, and the numbers that go with it."""
    if len(scales) > 1:
        return LayoutKind.SCALES, (groups, len(scales), *(n for scale in scales for n in scale))
    ((rows, columns),) = scales
    smallest = max(-(-height // rows), -(-width // columns))  # no smaller stride could give this grid
    for stride in (1 << (smallest - 1).bit_length(), smallest):  # a power of two reads better
        if (-(-height // stride), -(-width // stride)) == (rows, columns):
            return (LayoutKind.STRIDE, (stride,)) if groups == 1 else (LayoutKind.STRIDE_GROUPS, (stride, groups))
    if rows == 1:
        return LayoutKind.SEQUENCE, (groups, columns)
    return LayoutKind.GRID, (groups, rows, columns)


def read_layout(reader: Reader, kind: int, height: int, width: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """(scales, groups) from the numbers that go with `kind`; the loop over scales is bounded before it starts."""
    if kind in (LayoutKind.STRIDE, LayoutKind.STRIDE_GROUPS):
        stride = reader.varint()
        if not 1 <= stride <= MAX_SIDE:
            raise BitstreamError(f"A stride of {stride} pixels is outside the limits of 1 to {MAX_SIDE}.")
        groups = reader.varint() if kind == LayoutKind.STRIDE_GROUPS else 1
        return ((-(-height // stride), -(-width // stride)),), groups
    if kind not in (LayoutKind.GRID, LayoutKind.SCALES, LayoutKind.SEQUENCE):
        raise BitstreamError(f"The stream has token layout kind {kind}, which this vtc does not know: update vtc.")
    groups = reader.varint()
    if kind == LayoutKind.SEQUENCE:
        return ((1, reader.varint()),), groups
    count = reader.varint() if kind == LayoutKind.SCALES else 1
    if count > MAX_SCALES:
        raise BitstreamError(f"A token layout of {count} scales is outside the limits of 1 to {MAX_SCALES}.")
    return tuple((reader.varint(), reader.varint()) for _ in range(count)), groups


def _read_header(reader: Reader, max_pixels: int) -> dict:
    """The fields of a Container but its payload, checked."""
    (version,) = reader.take(1)
    if version != VERSION:
        raise BitstreamError(f"Container version {version} does not exist.")
    return read_fields(reader, max_pixels)


def read_fields(reader: Reader, max_pixels: int) -> dict:
    """What both versions say of an image, from the byte of kind and coder to the layout, checked.

    Raises BitstreamError at the limits, and for whatever this vtc does not know.
    """
    (packed,) = reader.take(1)
    if packed & _FLAGS_BIT:
        raise BitstreamError(f"The stream sets flags {reader.varint():#x}, which this vtc does not know: update vtc.")
    if packed & _RESERVED_BIT:
        raise BitstreamError("The stream sets a reserved bit, which this vtc does not know: update vtc.")
    kind, coder = packed & _KIND_BITS, (packed & _CODER_BITS) >> 3
    if coder not in list(Coder):
        raise BitstreamError(f"The stream has coder {coder}, which this vtc does not know: update vtc.")
    model_id, fingerprint = reader.varint(), bytes(reader.take(FINGERPRINT_BYTES))
    width, height = reader.varint(), reader.varint()
    check_limits(height, width, ((1, 1),), 1, max_pixels)
    scales, groups = read_layout(reader, kind, height, width)
    check_limits(height, width, scales, groups, max_pixels)
    return {"height": height, "width": width, "scales": scales, "groups": groups, "coder": Coder(coder),
            "model_id": model_id, "fingerprint": fingerprint}
