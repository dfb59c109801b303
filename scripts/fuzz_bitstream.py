"""Attack the bitstream: mutate valid streams of every kind and decode them.

    python scripts/fuzz_bitstream.py --iterations 20000                  so many cases of each kind
    python scripts/fuzz_bitstream.py --minutes 3 --kinds prior latents   equal time for each kind, always in one order

The kinds are the coders of version 1 (packed, static, seeded, prior, latents), chunks of version 2 (1, 3, 8, 40 and in
scales or levels; "concealed" draws them by a concealer) and "commands", which gives files to vtc-decode. The first have
streams of every token layout that they can have.

Allowed are BitstreamError and ModelError with one sentence, and a clean decode of the declared size. Where no checksum
was set right after the mutation, what decodes must be what was encoded: a lost token may be marked as lost, none may be
another. The command must end with 1 where a file failed, say one sentence of it, write nothing for it, open no file but
its own and reach for no network, whatever model a stream names. Anything else, a crash, a case over --seconds of
processor time and memory beyond the limit are violations: printed with the stream in hex, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import re
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tiny codecs live with the tests

from tests import tiny_codecs
from tests.tiny_tokenizers import TINY_TOKENIZERS, TinyLevels
from vtc.codecs import chunks, container, entropy
from vtc.codecs.container import CRC_BYTES, MAGIC, Coder, Container, Reader, varint
from vtc.codecs.latent_codec import LatentCodec
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError, ModelError
from vtc.models import FINGERPRINTS, MODEL_IDS
from vtc.tokenizers.base import Tokens

Command = import_module("scripts.fuzz_command").Command

LOW_LIMIT = 2**16  # pixels of an image that is drawn
USUAL_LIMIT = 2**20  # pixels of an image whose tokens are decoded; now and then it is the format's own
SIZES = ((1, 1), (1, 64), (64, 1), (17, 33), (64, 64))
INTERESTING = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 257, 1000, 2**14, 2**16 - 1, 2**16, 2**20,
               2**20 + 1, 2**24, 2**28, 2**31, 2**32 - 1)


class Target(Protocol):
    """A codec under attack."""

    fingerprint: bytes

    def read(self, stream: bytes, max_pixels: int) -> tuple[Tensor, Tensor]:
        """Values, and which of them are known to be right."""

    def draw(self, stream: bytes, max_pixels: int) -> Tensor:
        """(3, H, W)."""


class Source(NamedTuple):
    """A valid stream and what it holds."""

    target: Target
    stream: bytes
    values: Tensor


class TokenTarget:
    """A TokenCodec."""

    def __init__(self, codec: TokenCodec) -> None:
        self.codec = codec
        self.fingerprint = codec.fingerprint

    def read(self, stream: bytes, max_pixels: int) -> tuple[Tensor, Tensor]:
        self.codec.max_pixels = max_pixels
        received = self.codec.receive(stream)
        indices, layout = received.tokens.indices, received.tokens.layout
        if (indices < 0).any() or (indices >= torch.tensor(layout.vocab)).any():
            raise AssertionError("an index lies outside its vocabulary")
        parsed = chunks.read(stream)
        if isinstance(parsed, Container) and indices.numel() < 10_000:
            again = payload_of(self.codec, received.tokens, parsed.coder)
            if parsed.payload != again:
                raise AssertionError("a payload decodes to indices that encode to another payload")
        return indices[0], ~received.lost[0]

    def draw(self, stream: bytes, max_pixels: int) -> Tensor:
        self.codec.max_pixels = max_pixels
        received = self.codec.receive(stream)
        if received.lost.any():
            attempt(lambda: self.codec.draw(received, strict=True), expected="")
        return self.codec.draw(received)


class LatentTarget:
    """A LatentCodec."""

    def __init__(self, codec: LatentCodec) -> None:
        self.codec = codec
        self.fingerprint = codec.fingerprint()

    def read(self, stream: bytes, max_pixels: int) -> tuple[Tensor, Tensor]:
        self.codec.max_pixels = max_pixels
        symbols = self.codec.symbols(stream)
        return symbols, torch.ones_like(symbols, dtype=torch.bool)

    def draw(self, stream: bytes, max_pixels: int) -> Tensor:
        self.codec.max_pixels = max_pixels
        return self.codec.decode_streams([stream])[0]


# ---- valid streams --------------------------------------------------------------------------------------------------

def payload_of(codec: TokenCodec, tokens: Tokens, coder: Coder) -> bytes:
    """What a writer that chose this coder would write."""
    indices, layout = tokens.indices[0].numpy(), tokens.layout
    if coder == Coder.PACKED:
        return entropy.pack(indices, layout)
    if coder == Coder.PRIOR and codec.prior is not None:
        return codec.prior.encode(indices[:, 0], layout.scales[0], layout.vocab[0])
    if codec.tables is None:
        raise AssertionError("there are no tables")
    return entropy.encode_ans(indices, layout, codec.tables, seeded=coder == Coder.SEEDED_ANS)


def some_tokens(codec: TokenCodec) -> Iterator[Tokens]:
    """Of images of a few sizes, likely ones and any."""
    rng = np.random.default_rng(0)
    for height, width in SIZES:
        layout = codec.tokenizer.layout(height, width)
        for likely in (True, False):
            indices = rng.integers(0, np.array(layout.vocab), (layout.length, layout.groups))
            if likely and codec.tables is not None:
                for where, group, row in codec.tables.runs(layout):
                    indices[where, group] = rng.choice(len(row), indices[where, group].shape, p=row / row.sum())
            yield Tokens(torch.from_numpy(indices)[None], layout, height, width)


def corpus(names: set[str]) -> dict[str, list[Source]]:
    """Sources by kind, of the kinds in `names` or all of them."""
    found: dict[str, list[Source]] = {name: [] for name in KINDS if not names or name in names}
    codecs = {name: TokenCodec(make()) for name, make in {**TINY_TOKENIZERS, "levels": TinyLevels}.items()}

    def add(kind: str, target: Target, stream: bytes, values: Tensor) -> None:
        if kind in found:
            found[kind].append(Source(target, stream, values))

    def add_coder(kind: str, target: TokenTarget, tokens: Tokens, coder: Coder) -> None:
        codec, payload = target.codec, payload_of(target.codec, tokens, coder)
        add(kind, target, Container(tokens.height, tokens.width, tokens.layout.scales, tokens.layout.groups, coder,
                                    payload, codec.tokenizer.model_id, codec._fingerprint(coder)).to_bytes(),
            tokens.indices[0])

    for codec in codecs.values():
        target = TokenTarget(codec)
        for tokens in some_tokens(codec):
            add_coder("packed", target, tokens, Coder.PACKED)
            if codec.tables is not None:
                add_coder("static", target, tokens, Coder.STATIC_ANS)
                add_coder("seeded", target, tokens, Coder.SEEDED_ANS)
            for count in (1, 3, 8, 40):
                (stream,) = codec.compress_tokens(tokens, resilience=count)
                add(f"chunks-{count}", target, stream, tokens.indices[0])
            if codec.tokenizer.stages:
                (stream,) = codec.compress_tokens(tokens, progressive=True)
                add("progressive", target, stream, tokens.indices[0])
    target = TokenTarget(tiny_codecs.with_prior())
    for tokens in some_tokens(target.codec):
        add_coder("prior", target, tokens, Coder.PRIOR)
    target = TokenTarget(tiny_codecs.with_concealer())
    for tokens in some_tokens(target.codec):
        for count in (2, 5):
            (stream,) = target.codec.compress_tokens(tokens, resilience=count)
            add("concealed", target, stream, tokens.indices[0])
            add("commands", target, stream, tokens.indices[0])
        add_coder("commands", target, tokens, Coder.PACKED)
    if "latents" in found:
        _add_latents(add)
    return {kind: sources for kind, sources in found.items() if sources}


def _add_latents(add: Callable[[str, Target, bytes, Tensor], None]) -> None:
    try:
        latents = tiny_codecs.latent_codec()
    except ModelError as error:
        print(f"latents are left out: {error}")
        return
    generator = torch.Generator().manual_seed(0)
    for height, width in SIZES:
        for picture in (torch.zeros(1, 3, height, width), torch.rand(1, 3, height, width, generator=generator)):
            for quality in range(latents.hyperprior.qualities):
                (stream,) = latents.encode_streams(picture, quality)
                add("latents", LatentTarget(latents), stream, latents.symbols(stream))


# ---- mutations: bytes to bytes, without regard to the format --------------------------------------------------------

def flip_bits(stream: bytes, rng: random.Random) -> bytes:
    out = bytearray(stream)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(stream: bytes, rng: random.Random) -> bytes:
    at, count = rng.randrange(len(stream)), rng.randint(1, 8)
    return stream[:at] + rng.choice((rng.randbytes(count), bytes(count), b"\xff" * count)) + stream[at + count :]


def insert(stream: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(stream))
    return stream[:at] + rng.randbytes(rng.randint(1, 16)) + stream[at:]


def delete(stream: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(stream))
    return stream[:at] + stream[at + rng.randint(1, 8) :]


def truncate(stream: bytes, rng: random.Random) -> bytes:
    return stream[: rng.randrange(len(stream))]


def repeat(stream: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randint(0, len(stream)) for _ in range(2))
    return stream[:b] + stream[a:b] * rng.randint(1, 3) + stream[b:]


BLIND = (flip_bits, overwrite, insert, delete, truncate, repeat)


def splice(stream: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one, the end of another."""
    return stream[: rng.randint(0, len(stream))] + other[rng.randint(0, len(other)) :]


# ---- mutations of what a stream says, with right checksums: what a hostile writer does ------------------------------

@dataclass(frozen=True)
class Parts:
    """A stream taken apart.

    fields: kind and coder, model id, fingerprint, width, height, the layout's; of version 2 also division and longest.
    payloads: with the index of each chunk; one in version 1.
    """

    version: int
    fields: tuple[bytes, ...]
    payloads: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, stream: bytes) -> Parts:
        """Raises BitstreamError where the stream is not valid."""
        parsed = chunks.read(stream)
        kind, numbers = container.write_layout(parsed.height, parsed.width, parsed.scales, parsed.groups)
        fields = (bytes((kind | parsed.coder << 3,)), varint(parsed.model_id), parsed.fingerprint,
                  *map(varint, (parsed.width, parsed.height, *numbers)))
        if isinstance(parsed, Container):
            return cls(container.VERSION, fields, ((0, parsed.payload),))
        payloads = tuple((number, payload) for number, payload in enumerate(parsed.chunks) if payload is not None)
        longest = max((len(payload) for _, payload in payloads), default=0)
        return cls(chunks.VERSION, (*fields, varint(parsed.division.number), varint(longest)), payloads)

    def to_bytes(self) -> bytes:
        """With the checksums set right."""
        body = b"".join(self.fields)
        if self.version != chunks.VERSION:
            payload = self.payloads[0][1] if self.payloads else b""
            body = MAGIC + bytes((self.version,)) + body + varint(len(payload)) + payload
            return body + zlib.crc32(body).to_bytes(CRC_BYTES, "little")
        try:
            longest = Reader(self.fields[-1]).varint()
        except BitstreamError:
            longest = 0
        header = MAGIC + bytes((self.version,)) + varint(len(body)) + body
        out = [seal_header(header)]
        for index, payload in self.payloads:
            out.append(seal_chunk(header, varint(index) + varint(max(0, longest - len(payload))), payload, longest))
        return b"".join((*out, out[0]))


def seal_header(header: bytes) -> bytes:
    return header + zlib.crc32(header).to_bytes(4, "little")[: chunks.CHECK_BYTES]


def seal_chunk(header: bytes, numbers: bytes, payload: bytes, longest: int) -> bytes:
    if longest >= chunks.LONG_PAYLOAD:
        numbers += zlib.crc32(header + numbers).to_bytes(4, "little")[:2]
    covered = numbers + payload
    return covered + zlib.crc32(header + covered).to_bytes(4, "little")[: chunks.CHECK_BYTES]


def edit_fields(parts: Parts, rng: random.Random) -> Parts:
    """Replace one to three numbers of the header, now and then by a padded or too wide one, or the version."""
    fields, version = list(parts.fields), parts.version
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(fields))
        if at == 0:
            fields[0] = bytes((rng.randrange(256),))
            version = rng.choice((version, version, version, 0, 1, 2, 3, 255))
        elif at == 2:
            fields[2] = rng.choice((fields[2], rng.randbytes(8)))
        else:
            value = rng.choice((*INTERESTING, rng.getrandbits(rng.randint(1, 32))))
            fields[at] = rng.choice((varint(value),) * 8 + (b"\x80" * rng.randint(1, 6) + b"\0", b"\xff" * 6))
    return replace(parts, version=version, fields=tuple(fields))


def edit_payload(parts: Parts, rng: random.Random) -> Parts:
    """Other bytes in a payload: some changed, or all random."""
    if not parts.payloads:
        return parts
    payloads = list(parts.payloads)
    at = rng.randrange(len(payloads))
    index, payload = payloads[at]
    change = rng.choice((flip_bits, flip_bits, overwrite, insert, delete, None))
    payloads[at] = index, change(payload or b"\0", rng) if change else rng.randbytes(len(payload))
    return replace(parts, payloads=tuple(payloads))


def edit_chunks(parts: Parts, rng: random.Random) -> Parts:
    """Chunks dropped, doubled, in another order, with each other's index or an impossible one; none in version 1."""
    payloads = list(parts.payloads)
    rng.shuffle(payloads)
    payloads = payloads[: rng.randint(0, len(payloads))] + payloads[: rng.randint(0, 2)]
    if payloads and rng.random() < 0.5:
        at = rng.randrange(len(payloads))
        payloads[at] = rng.choice((0, 1, 2, 7, 8, 40, 4096, 2**32 - 1)), payloads[at][1]
    return replace(parts, payloads=tuple(payloads))


def change_sizes(parts: Parts, rng: random.Random) -> Parts:
    """Another width and height, with payloads of any length, or with as many chunks as the limit allows."""
    fields, payloads = list(parts.fields), parts.payloads
    fields[3], fields[4] = (varint(1 + rng.getrandbits(rng.randint(0, 15))) for _ in range(2))
    if rng.random() < 0.5:
        length = rng.choice((0, 1, 4, 8, 100, 1000, 20000))
        payloads = tuple((index, rng.randbytes(length)) for index, _ in payloads[:8])
        if parts.version == chunks.VERSION:
            fields[-1] = varint(length)
    if parts.version == chunks.VERSION and rng.random() < 0.3:
        fields[-2] = varint(rng.choice((0, 1, 2, 3, 41, 1000, chunks.MAX_CHUNKS + 1)))
    return replace(parts, fields=tuple(fields), payloads=payloads)


def name_model(parts: Parts, rng: random.Random) -> Parts:
    """Another model: one that vtc ships, the next one that it may ship, or any."""
    fields = list(parts.fields)
    fields[1] = varint(rng.choice((0, *MODEL_IDS.values(), max(MODEL_IDS.values()) + 1, rng.getrandbits(32))))
    fields[2] = rng.choice((fields[2], fields[2], rng.randbytes(8),
                            bytes.fromhex(rng.choice(tuple(FINGERPRINTS.values())))))
    return replace(parts, fields=tuple(fields))


HOSTILE = (edit_fields, edit_fields, edit_payload, edit_payload, edit_chunks, change_sizes, name_model)


def seal(stream: bytes) -> bytes:
    """A damaged stream of either version with its checksums set right, as far as it can still be taken apart."""
    if stream[2:3] != bytes((chunks.VERSION,)):
        body = stream[:-CRC_BYTES]
        return body + zlib.crc32(body).to_bytes(CRC_BYTES, "little")
    reader = Reader(stream, 3)
    out = []
    try:
        body = reader.take(reader.varint())
        header = stream[: reader.position]
        out.append(seal_header(header))
        reader.take(chunks.CHECK_BYTES)
        fields = Reader(body)
        container.read_fields(fields, container.MAX_PIXELS)
        fields.varint()
        longest = fields.varint()
        while reader.position < len(stream) - len(out[0]):
            start = reader.position
            reader.varint()
            length = longest - reader.varint()
            numbers = stream[start : reader.position]
            if longest >= chunks.LONG_PAYLOAD:
                reader.take(2)
            if length < 0:
                break
            out.append(seal_chunk(header, numbers, reader.take(length), longest))
            reader.take(chunks.CHECK_BYTES)
    except BitstreamError:
        pass  # the rest stays as it is
    return b"".join(out) + stream[reader.position :]


class Mutated(NamedTuple):
    """A case: `sealed` where a checksum was set right after a change; `sources` whose bytes it has."""

    stream: bytes
    sealed: bool
    sources: tuple[Source, ...]


def mutate(source: Source, others: list[Source], rng: random.Random) -> Mutated:
    kind = rng.random()
    if kind < 0.4:
        mutated = rng.choice(HOSTILE)(Parts.of(source.stream), rng).to_bytes()
        if rng.random() < 0.1:
            mutated = rng.choice(BLIND)(mutated, rng)
        return Mutated(mutated, True, (source,))
    sources: tuple[Source, ...] = (source,)
    if kind < 0.5:
        other = rng.choice(others)
        sources = source, other
        mutated = splice(source.stream, other.stream, rng)
    else:
        mutated = rng.choice(BLIND)(source.stream, rng)
    while mutated and rng.random() < 0.2:
        mutated = rng.choice(BLIND)(mutated, rng)
    sealed = len(mutated) > CRC_BYTES and rng.random() < 0.4
    return Mutated(seal(mutated) if sealed else mutated, sealed, sources)


# ---- one case -------------------------------------------------------------------------------------------------------

def attempt(action: Callable[[], object], expected: str = "decoded") -> str:
    """What came of it: 'decoded', or the error's sentence without its numbers. Other exceptions pass through."""
    try:
        action()
    except (BitstreamError, ModelError) as error:
        text = str(error)
        if not text or "\n" in text or len(text) > 400:
            raise AssertionError(f"not one clear sentence: {text!r}") from error
        return f"{type(error).__name__}: {re.sub(r'0x[0-9a-f]+|[0-9a-f]{16}|[0-9.]+%?', 'N', text)}"
    if not expected:
        raise AssertionError("what should be refused was not")
    return expected


def case(mutated: Mutated, target: Target, max_pixels: int = USUAL_LIMIT) -> str:
    """Decode the values within `max_pixels`, and draw within a low limit; the outcome of the decoding."""
    stream = mutated.stream

    def values() -> None:
        found, known = target.read(stream, max_pixels)
        if not mutated.sealed and not is_right(found, known, mutated.sources):
            raise AssertionError("damage passed for what was encoded")

    def pixels() -> None:
        header = chunks.read(stream)
        image = target.draw(stream, LOW_LIMIT)
        if image.shape != (3, header.height, header.width) or not torch.isfinite(image).all():
            raise AssertionError("the image has not the declared size or is not finite")

    outcome = attempt(values)
    drawn = attempt(pixels)
    return drawn if outcome == "decoded" else outcome


def is_right(values: Tensor, known: Tensor, sources: tuple[Source, ...]) -> bool:
    """Whether each known value is that of a source."""
    right = ~known
    for source in sources:
        if source.values.shape == values.shape:
            right |= values == source.values
    return bool(right.all())


#: what is attacked: every kind of stream, and the command line
KINDS = ("packed", "static", "seeded", "prior", "latents", "chunks-1", "chunks-3", "chunks-8", "chunks-40",
         "progressive", "concealed", "commands")


def peak_memory() -> int:
    """Bytes of the largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Count:
    """What came out of the cases of one kind."""

    cases: int = 0
    violations: int = 0
    slowest: float = 0.0
    grown: int = 0


def attack(kind: str, sources: list[Source], args: argparse.Namespace, until: float, outcomes: Counter[str]) -> Count:
    """Cases of one kind, until their number is reached or the time is over (one there is always)."""
    rng = random.Random(f"{args.seed} {kind}")
    count, base = Count(), peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        command = Command(Path(folder), tiny_codecs.small_local_vq()) if kind == "commands" else None
        while count.cases == 0 or (count.cases < args.iterations and time.monotonic() < until):
            if command:
                batch = [mutate(rng.choice(sources), sources, rng).stream for _ in range(20)]
            else:
                source = rng.choice(sources)
                mutated = mutate(source, sources, rng)
                limit = container.MAX_PIXELS if rng.random() < 1 / 1000 else USUAL_LIMIT
                batch = [mutated.stream]
            # A hang, even inside Rust or C++, ends the run with status 1 and a traceback.
            faulthandler.dump_traceback_later(60 * args.seconds, exit=True, file=sys.__stderr__ or 2)
            before = time.process_time()
            try:
                made = command(batch, rng) if command else [case(mutated, source.target, limit)]
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in constriction's Rust is a BaseException
                made = [f"VIOLATION {type(error).__name__}: {error}"]
            seconds = (time.process_time() - before) / len(batch)
            count.slowest = max(count.slowest, seconds)
            if seconds > args.seconds:
                made = [f"VIOLATION {seconds:.1f} s of processor time"]
            elif (grown := peak_memory() - base) > args.mebibytes * 2**20:
                made, base = [f"VIOLATION memory grew by {grown / 2**20:.0f} MiB"], peak_memory()
            count.grown = max(count.grown, peak_memory() - base)
            if made[0].startswith("VIOLATION"):
                count.violations += 1
                print(f"{kind}, case {count.cases}: {made[0]}", *(stream.hex() for stream in batch), sep="\n  ",
                      file=sys.stderr)
            outcomes.update(made)
            count.cases += len(batch)
    faulthandler.cancel_dump_traceback_later()
    return count


def main(arguments: list[str] | None = None) -> int:
    """Attack; 0 where nothing but typed errors and clean decodes came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, help="cases of each kind; default 2000, or no limit with --minutes")
    parser.add_argument("--minutes", type=float, help="for all kinds together; each has its share")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[], help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="the cases of each kind follow from it alone")
    parser.add_argument("--seconds", type=float, default=10.0, help="processor time that one case may take")
    parser.add_argument("--mebibytes", type=int, default=1024, help="by how much memory may grow over all cases")
    parser.add_argument("--outcomes", action="store_true", help="also list every outcome and how often it was")
    args = parser.parse_args(arguments)
    if args.iterations is None:
        args.iterations = 2000 if args.minutes is None else sys.maxsize

    torch.set_num_threads(1)
    started = time.monotonic()
    found = corpus(set(args.kinds))
    for kind, sources in found.items():
        for source in sources:
            if (outcome := case(Mutated(source.stream, False, (source,)), source.target)) != "decoded":
                print(f"A valid stream of the kind {kind} does not decode: {outcome}", file=sys.stderr)
                return 1

    outcomes: Counter[str] = Counter()
    violations = 0
    for number, (kind, sources) in enumerate(found.items()):
        left = np.inf if args.minutes is None else started + 60 * args.minutes - time.monotonic()
        count = attack(kind, sources, args, time.monotonic() + left / (len(found) - number), outcomes)
        violations += count.violations
        print(f"{kind:<12} {count.cases:7d} cases, {count.violations} violations; slowest {count.slowest:.2f} s of "
              f"processor time, memory grew by {count.grown / 2**20:.0f} MiB", flush=True)
    if args.outcomes:
        for outcome, number in outcomes.most_common():
            print(f"{number:8d}  {outcome}")
    print(f"{outcomes.total()} cases (seed {args.seed}), {violations} violations, {len(outcomes)} different outcomes, "
          f"{time.monotonic() - started:.0f} s in all")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
