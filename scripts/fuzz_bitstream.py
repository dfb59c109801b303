"""Attack the bitstream: mutate valid streams of every token layout and decode them.

    python scripts/fuzz_bitstream.py --iterations 20000

Each case is parsed, its tokens decoded under the format's own limits, and its pixels under a low one. Allowed are
BitstreamError, ModelError, and a clean decode of the declared size. Half of the cases get a right checksum again, so
that the code behind it is reached. A crash, any other exception, a case over --seconds of processor time, or memory
beyond the limit is a violation: it is printed with the stream in hex, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import re
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tiny tokenizers live with the tests

from tests.tiny_tokenizers import TINY_TOKENIZERS
from vtc.codecs import container
from vtc.codecs.container import LayoutKind, Reader, varint
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError, ModelError

LOW_LIMIT = 2**16  # pixels of an image that is drawn
INTERESTING = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 257, 1000, 2**14, 2**16 - 1, 2**16, 2**20,
               2**20 + 1, 2**24, 2**28, 2**31, 2**32 - 1)


def corpus(codecs: dict[str, TokenCodec]) -> list[tuple[str, bytes]]:
    """Valid streams: every layout, several sizes of at most 64 pixels, flat, smooth and noisy pictures."""
    generator = torch.Generator().manual_seed(0)
    streams = []
    for name, codec in codecs.items():
        for height, width in ((1, 1), (1, 64), (64, 1), (17, 33), (64, 64)):
            noise = torch.rand(1, 3, height, width, generator=generator)
            for picture in (torch.zeros_like(noise), noise * 0.2, noise):
                streams.append((name, codec.compress(picture)[0]))
    return streams


# ---- mutations: bytes to bytes --------------------------------------------------------------------------------------

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


def edit_fields(stream: bytes, rng: random.Random) -> bytes:
    """Replace one to three numbers of the header, now and then by a padded or too wide one, or the payload."""
    fields = split(stream)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(1, len(fields))
        if at == 1:  # version, kind, coder
            fields[1] = bytes((rng.choice((1, 1, 1, 0, 2, 255)), rng.randrange(256)))
        elif at == 3:
            fields[3] = rng.choice((fields[3], rng.randbytes(8)))
        elif at == len(fields) - 1:
            fields[-1] = rng.choice((flip_bits, overwrite, insert, delete))(fields[-1] or b"\0", rng)
            fields[-2] = varint(len(fields[-1]))
        else:
            value = rng.choice((*INTERESTING, rng.getrandbits(rng.randint(1, 32))))
            fields[at] = rng.choice((varint(value),) * 8 + (b"\x80" * rng.randint(1, 6) + b"\0", b"\xff" * 6))
    return b"".join(fields) + bytes(4)


def edit_payload(stream: bytes, rng: random.Random) -> bytes:
    """The same number of other bytes: some flipped, or all random."""
    fields = split(stream)
    if fields[-1]:
        fields[-1] = flip_bits(fields[-1], rng) if rng.random() < 0.5 else rng.randbytes(len(fields[-1]))
    return b"".join(fields) + bytes(4)


def change_sizes(stream: bytes, rng: random.Random) -> bytes:
    """Another width and height, and a payload of any length: what a hostile writer would do."""
    fields = split(stream)
    fields[4], fields[5] = (varint(1 + rng.getrandbits(rng.randint(0, 15))) for _ in range(2))
    if rng.random() < 0.5:
        fields[-1] = rng.randbytes(rng.choice((0, 1, 4, 8, 100, 1000, 20000)))
        fields[-2] = varint(len(fields[-1]))
    return b"".join(fields) + bytes(4)


def split(stream: bytes) -> list[bytes]:
    """[magic, version and kind, model id, fingerprint, width, height, layout..., length, payload] of a valid stream."""
    reader = Reader(stream, 4)
    fields = [stream[:2], stream[2:4], varint(reader.varint()), reader.take(8)]
    numbers = [reader.varint(), reader.varint(), reader.varint()]  # width, height, the layout's first
    kind = stream[3] & 7
    if kind == LayoutKind.SCALES:
        numbers.append(reader.varint())
        numbers += [reader.varint() for _ in range(2 * numbers[-1])]
    else:
        numbers += [reader.varint() for _ in range({LayoutKind.STRIDE: 0, LayoutKind.GRID: 2}.get(LayoutKind(kind), 1))]
    payload = reader.take(length := reader.varint())
    return [*fields, *map(varint, numbers), varint(length), payload]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bits, overwrite, insert, delete, truncate, repeat, edit_fields, edit_fields, edit_payload, change_sizes)


def seal(stream: bytes) -> bytes:
    """With the checksum set right."""
    return stream[:-4] + zlib.crc32(stream[:-4]).to_bytes(4, "little")


def mutate(stream: bytes, rng: random.Random) -> bytes:
    mutation = rng.choice(MUTATIONS)
    mutated = mutation(stream, rng)
    if rng.random() < 0.2 and mutated:
        mutated = rng.choice(MUTATIONS[:6])(mutated, rng)
    always = mutation in (edit_fields, edit_payload, change_sizes)
    return seal(mutated) if len(mutated) > 4 and rng.random() < (0.9 if always else 0.4) else mutated


# ---- one case -------------------------------------------------------------------------------------------------------

def attempt(action: Callable[[], object]) -> str:
    """What came of it: 'decoded', or the error's sentence without its numbers. Other exceptions pass through."""
    try:
        action()
    except (BitstreamError, ModelError) as error:
        text = str(error)
        if not text or "\n" in text or len(text) > 400:
            raise AssertionError(f"not one clear sentence: {text!r}") from error
        return f"{type(error).__name__}: {re.sub(r'0x[0-9a-f]+|[0-9a-f]{16}|[0-9]+', 'N', text)}"
    return "decoded"


def case(stream: bytes, wide: TokenCodec, low: TokenCodec) -> str:
    """Parse, decode the tokens under the format's limits, draw under a low one; the outcome of the drawing."""
    attempt(lambda: container.parse(stream))

    def tokens() -> None:
        decoded = wide.decompress_tokens(stream)
        if (decoded.indices < 0).any() or (decoded.indices >= torch.tensor(decoded.layout.vocab)).any():
            raise AssertionError("an index lies outside its vocabulary")
        if decoded.indices.numel() < 10_000:
            parsed, again = container.parse(stream), container.parse(wide.compress_tokens(decoded)[0])
            # A writer may choose the longer coder, but one coder has one payload for the same tokens.
            if parsed.coder == again.coder and parsed.payload != again.payload:
                raise AssertionError("a payload decodes to indices that encode to another payload")

    def pixels() -> None:
        header = container.parse(stream)
        (image,) = low.decompress([stream])
        if image.shape != (3, header.height, header.width) or not torch.isfinite(image).all():
            raise AssertionError("the image has not the declared size or is not finite")

    attempt(tokens)
    return attempt(pixels)


def peak_memory() -> int:
    """Bytes of the largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str] | None = None) -> int:
    """Attack; 0 where nothing but typed errors and clean decodes came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="processor time that one case may take")
    parser.add_argument("--mebibytes", type=int, default=1024, help="by how much memory may grow over all cases")
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    wide = {name: TokenCodec(make()) for name, make in TINY_TOKENIZERS.items()}
    low = {name: TokenCodec(make(), max_pixels=LOW_LIMIT) for name, make in TINY_TOKENIZERS.items()}
    streams = corpus(wide)
    for name, stream in streams:
        if case(stream, wide[name], low[name]) != "decoded":
            print(f"A valid stream of {name!r} does not decode.", file=sys.stderr)
            return 1

    base = peak_memory()
    outcomes: Counter[str] = Counter()
    violations, slowest, started = 0, 0.0, time.monotonic()
    for i in range(args.iterations):
        name, stream = rng.choice(streams)
        mutated = mutate(stream, rng)
        # A hang, even inside Rust, ends the run with status 1 and a traceback.
        faulthandler.dump_traceback_later(60 * args.seconds, exit=True, file=sys.__stderr__ or 2)
        before = time.process_time()
        try:
            outcome = case(mutated, wide[name], low[name])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in constriction's Rust is a BaseException
            outcome = f"VIOLATION {type(error).__name__}: {error}"
        seconds = time.process_time() - before
        slowest = max(slowest, seconds)
        if seconds > args.seconds:
            outcome = f"VIOLATION {seconds:.1f} s of processor time"
        elif (grown := (peak_memory() - base) / 2**20) > args.mebibytes:
            outcome, base = f"VIOLATION memory grew by {grown:.0f} MiB", peak_memory()
        if outcome.startswith("VIOLATION"):
            violations += 1
            print(f"case {i}, {name}: {outcome}\n  {mutated.hex()}", file=sys.stderr)
        outcomes[outcome] += 1
    faulthandler.cancel_dump_traceback_later()

    for outcome, count in outcomes.most_common():
        print(f"{count:8d}  {outcome}")
    print(f"{args.iterations} cases (seed {args.seed}), {violations} violations; slowest {slowest:.2f} s of processor "
          f"time, memory grew by {(peak_memory() - base) / 2**20:.0f} MiB, {time.monotonic() - started:.0f} s in all")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
