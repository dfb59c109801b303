"""Speed of coding: entropy coders, codecs, and batches, each beside its peers in one run.

    python scripts/bench_codec.py --output docs/results/bench_codec.md               # all three parts
    python scripts/bench_codec.py --parts entropy --prior_symbols 1536               # minutes less
    python scripts/bench_codec.py --parts batch --small 1000 --jobs 1 2

entropy: symbols drawn from the bundled model's table, and the tokens of pictures (--images; one that is here by
default), through vtc's coders, CompressAI's rANS, zlib and lzma; everything is decoded and compared. One thread.
networks: megapixels a second of the bundled model, and of CompressAI's bmshj2018_factorized with random weights, whose
time is the same as a trained one's while its rate means nothing; 1 and 2 threads, codecs taking turns.
batch: a thousand small pictures by one vtc-encode and by one process each, as files and as a shard, and `-j`.

The least of the repeats counts, in wall-clock and in processor seconds: on a busy machine the latter say more.
"""

from __future__ import annotations

import argparse
import lzma
import os
import platform
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # its neighbour, however this is started
from bench_cli import entry, made_picture, once

from vtc.cli.common import load_codec, usable_cpus
from vtc.codecs import entropy
from vtc.codecs.entropy import Indices, StaticTables
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, VtcError
from vtc.files import write_file
from vtc.images import load_image, to_tensor
from vtc.models import DEFAULT_MODEL
from vtc.tokenizers.base import TokenLayout
from vtc.torchvision_guard import ensure_torchvision_imports
from vtc.training.data import image_files

PARTS = ("entropy", "networks", "batch")
#: a shared process must be so many times as fast as a process for each picture
BATCH_BAR = 20
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "coffee.png"


@dataclass(frozen=True)
class Timed:
    """The least wall-clock and processor seconds of several calls."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, Timed]:
    """The last result, and the time."""
    walls, cpus, result = [], [], None
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return result, Timed(min(walls), min(cpus))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 0 done, 1 a bar was missed or something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--images", type=Path, help="folder of pictures; default: one that is here")
    parser.add_argument("--symbols", type=int, default=1_000_000)
    parser.add_argument("--prior_symbols", type=int, default=1_000_000, help="for the learned prior: it takes minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--small", type=int, default=1000, help="small pictures of a batch")
    parser.add_argument("--alone", type=int, default=10, help="of them, those that get a process each")
    parser.add_argument("--photographs", type=int, default=24, help="768x512 pictures for -j")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="the tables in Markdown")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    measures = {"entropy": entropy_part, "networks": networks_part, "batch": batch_part}
    failures: list[str] = []
    try:
        texts = [where()]
        for part in args.parts:
            text, missed = measures[part](args)
            texts.append(text)
            failures += missed
            print(text, flush=True)
        if args.output:
            write_file(args.output, "\n".join(texts).encode())
    except (VtcError, RuntimeError) as error:
        print(f"bench_codec: {error}", file=sys.stderr)
        return 1
    for failure in failures:
        print(f"NOT MET {failure}", file=sys.stderr)
    return 1 if failures else 0


def where() -> str:
    """The head of the page."""
    return "\n".join((
        "# Speed of coding", "",
        "Made by `python scripts/bench_codec.py`; \"wall\" and \"CPU\" are the least seconds of the repeats.",
        f"{usable_cpus()} processors ({platform.machine()}), load {os.getloadavg()[0]:.1f} at the start, "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"constriction {version('constriction')}, compressai {version('compressai')}.", ""))


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown: words to the left, numbers to the right."""
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# ---- entropy coders -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Coder:
    """encode: symbols (N,) to bytes; decode: those and the shape (rows, columns) to the symbols."""

    name: str
    encode: Callable[[Indices, tuple[int, int]], bytes]
    decode: Callable[[bytes, tuple[int, int]], Any]


def coders(codec: TokenCodec, words: int) -> list[Coder]:
    """vtc's and their peers for a vocabulary of so many words, under the model's static table."""
    if codec.tables is None or codec.prior is None:
        raise ConfigError("The entropy coders are compared on a model that has static tables and a prior.")
    tables, prior = codec.tables, codec.prior
    bits = (words - 1).bit_length()

    def layout(grid: tuple[int, int]) -> TokenLayout:
        return TokenLayout((grid,), (words,))

    def as_bits(symbols: Indices) -> bytes:
        return np.packbits((symbols[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)).tobytes()

    def from_bits(data: bytes, grid: tuple[int, int]) -> Indices:
        flat = np.unpackbits(np.frombuffer(data, np.uint8), count=bits * grid[0] * grid[1])
        return flat.reshape(-1, bits).astype(np.int64) @ (1 << np.arange(bits)[::-1])

    general = [
        Coder(f"{name}, {form}", lambda s, g, pack=pack, press=press: press(pack(s)),  # type: ignore[misc]  # mypy infers no lambda with defaults
              lambda d, g, unpack=unpack, expand=expand: unpack(expand(d), g))  # type: ignore[misc]  # mypy infers no lambda with defaults
        for name, press, expand in (("zlib 9", lambda d: zlib.compress(d, 9), zlib.decompress),
                                    ("lzma 6", lambda d: lzma.compress(d, preset=6), lzma.decompress))
        for form, pack, unpack in (("16 bits", lambda s: s.astype("<u2").tobytes(),
                                    lambda d, g: np.frombuffer(d, "<u2").astype(np.int64)),
                                   (f"{bits} bits", as_bits, from_bits))]
    return [
        Coder("vtc, static tables (ANS)", lambda s, g: entropy.encode_ans(s[:, None], layout(g), tables),
              lambda d, g: entropy.decode_ans(d, layout(g), tables)[:, 0]),
        Coder("vtc, learned prior", lambda s, g: prior.encode(s, g, words), lambda d, g: prior.decode(d, g, words)),
        Coder("vtc, packed", lambda s, g: entropy.pack(s[:, None], layout(g)),
              lambda d, g: entropy.unpack(d, layout(g))[:, 0]),
        compressai_rans(tables),
        *general]


def compressai_rans(tables: StaticTables) -> Coder:
    """CompressAI's rANS with 16-bit tables, as its entropy models call it: lists of symbols and of table numbers."""
    ensure_torchvision_imports()
    from compressai import ans
    from compressai._CXX import pmf_to_quantized_cdf

    row = tables.frequencies[0] / tables.frequencies[0].sum()
    cdf = pmf_to_quantized_cdf([*row.tolist(), 0.0], 16)  # the last is the mass of values beyond the table
    shared = ([list(cdf)], [len(cdf)], [0])

    def encode(symbols: Indices, grid: tuple[int, int]) -> bytes:
        return bytes(ans.RansEncoder().encode_with_indexes(symbols.tolist(), [0] * len(symbols), *shared))

    def decode(data: bytes, grid: tuple[int, int]) -> Indices:
        return np.array(ans.RansDecoder().decode_with_indexes(data, [0] * (grid[0] * grid[1]), *shared))

    return Coder("CompressAI, static tables (rANS)", encode, decode)


def entropy_part(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Every coder on the same symbols."""
    torch.set_num_threads(1)
    codec = load_codec(args.model, "cpu")
    if codec.tables is None:
        raise ConfigError("The entropy coders are compared on a model that has static tables and a prior.")
    words = codec.tokenizer.layout(16, 16).vocab[0]
    files = image_files(args.images) if args.images else [PICTURE]
    pictures = []
    for file in files:
        tokens = codec.tokenizer.encode(load_image(file).tensor()[None])
        pictures.append((tokens.indices[0, :, 0].numpy(), tokens.layout.scales[0]))
    row = codec.tables.frequencies[0] / codec.tables.frequencies[0].sum()

    def drawn(count: int) -> tuple[Indices, tuple[int, int]]:
        rows = max(n for n in range(1, int(count**0.5) + 1) if count % n == 0)
        return np.random.default_rng(0).choice(len(row), count, p=row), (rows, count // rows)

    text = [f"## Entropy coders\n\n{words} words, one thread. Sizes in bits a symbol; ratios to vtc's static tables.\n"]
    many = drawn(args.symbols)
    count = sum(len(symbols) for symbols, _ in pictures)
    cases = [(f"{args.symbols:,} symbols drawn from the model's table: {entropy_of(row):.4f} bits each", [many], True),
             (f"The tokens of {len(pictures)} pictures, each coded alone: {count // len(pictures):,} on average",
              pictures, False)]
    for title, streams, are_drawn in cases:
        measured = []
        for coder in coders(codec, words):
            slow = are_drawn and coder.name == "vtc, learned prior"
            own = [drawn(args.prior_symbols)] if slow else streams
            measured.append(one_coder(coder, own, 1 if slow else args.repeats))
        text += [title + ".\n", coder_table(measured)]
        if are_drawn:
            text.append(f"The learned prior coded {args.prior_symbols:,} of them once: here its time counts, not its "
                        "size, since drawn symbols have no neighbours to be told by.\n")
    return "\n".join(text), []


def entropy_of(row: np.ndarray) -> float:
    """Bits a symbol."""
    return float(-(row * np.log2(row)).sum())


def one_coder(coder: Coder, streams: list[tuple[Indices, tuple[int, int]]], repeats: int) -> dict[str, Any]:
    """Bits a symbol, and microseconds a symbol there and back; raises where a symbol came back as another."""
    coded, encoding = timed(lambda: [coder.encode(*stream) for stream in streams], repeats)
    back, decoding = timed(lambda: [coder.decode(d, g) for d, (_, g) in zip(coded, streams, strict=True)], repeats)
    for (symbols, _), decoded in zip(streams, back, strict=True):
        if not np.array_equal(symbols, decoded):
            raise RuntimeError(f"{coder.name} did not give the symbols back.")
    count = sum(len(symbols) for symbols, _ in streams)
    return {"name": coder.name, "bits": 8 * sum(map(len, coded)) / count, "count": count, "encode": encoding,
            "decode": decoding}


def coder_table(measured: list[dict[str, Any]]) -> str:
    """Rows, with ratios to the first."""
    first = measured[0]
    rows = [[m["name"], f"{m['bits']:.4f}", f"{m['bits'] / first['bits']:.3f}",
             *(f"{m['count'] / t / 1e6:.3g}" for way in ("encode", "decode") for t in (m[way].wall, m[way].cpu)),
             *(f"{first[way].cpu * m['count'] / (m[way].cpu * first['count']):.3g}" for way in ("encode", "decode"))]
            for m in measured]
    return table(["coder", "bits a symbol", "ratio", "encode, M symbols/s wall", "CPU", "decode, wall", "CPU",
                  "encode, times vtc's", "decode, times vtc's"], rows)


# ---- networks -------------------------------------------------------------------------------------------------------

def networks_part(args: argparse.Namespace) -> tuple[str, list[str]]:
    """vtc and CompressAI from the picture to bytes and back, taking turns."""
    ensure_torchvision_imports()
    from compressai.zoo import bmshj2018_factorized

    image = to_tensor(np.asarray(made_picture(768, 512)))[None]
    megapixels = image.shape[-1] * image.shape[-2] / 1e6
    codec = load_codec(args.model, "cpu")
    plain = TokenCodec(codec.tokenizer)
    calls: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        f"vtc, {args.model}": (lambda: codec.compress(image), codec.decompress),
        "vtc, static tables": (lambda: plain.compress(image), plain.decompress)}
    for quality in (1, 8):
        torch.manual_seed(0)
        model = bmshj2018_factorized(quality, pretrained=False).eval()
        model.update()
        calls[f"CompressAI, bmshj2018_factorized quality {quality}"] = (
            partial(model.compress, image), partial(decompress, model))
    text = [f"## Codecs\n\nA 768x512 picture, in memory on both sides, the models loaded; MP/s by the least of "
            f"{args.repeats} turns. Ratios are of processor time, to vtc.\n"]
    for threads in args.threads:
        torch.set_num_threads(threads)
        least: dict[str, list[Timed]] = {}
        for turn in range(args.repeats + 1):  # the first does not count
            for name, (encode, decode) in calls.items():
                with torch.no_grad():
                    out, encoding = timed(encode, 1)
                    _, decoding = timed(partial(decode, out), 1)
                if turn:
                    times = [encoding, decoding]
                    old = least.get(name, times)
                    least[name] = [Timed(min(a.wall, b.wall), min(a.cpu, b.cpu))
                                   for a, b in zip(old, times, strict=True)]
        first = next(iter(least.values()))
        rows = [[name, *(f"{megapixels / t:.2f}" for way in times for t in (way.wall, way.cpu)),
                 *(f"{a.cpu / b.cpu:.2f}" for a, b in zip(first, times, strict=True))] for name, times in least.items()]
        text += [f"{threads} thread{'s' if threads > 1 else ''}:\n",
                 table(["codec", "encode, MP/s wall", "MP per CPU s", "decode, wall", "CPU", "encode, times vtc's",
                        "decode, times vtc's"], rows)]
    return "\n".join(text), []


def decompress(model: Any, out: dict[str, Any]) -> Any:
    """What a model of CompressAI made of its own output."""
    return model.decompress(out["strings"], out["shape"])


# ---- batches --------------------------------------------------------------------------------------------------------

def batch_part(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Whole processes of the command lines."""
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        small.mkdir()
        large.mkdir()
        rng = np.random.default_rng(0)
        for n in range(args.small):
            width, height = rng.integers(64, 129, 2).tolist()
            made_picture(width, height).save(small / f"{n:05}.png")
        for n in range(args.photographs):
            made_picture(768, 512).save(large / f"{n:05}.png")
        with tarfile.open(Path(folder, "small.tar"), "w") as tar:
            tar.add(small, "small")
        some, missed = sorted(small.iterdir()), []
        rows: list[list[str]] = []

        def row(name: str, count: int, seconds: list[tuple[float, float, float]]) -> tuple[float, float]:
            wall, cpu = sum(s[0] for s in seconds) / count, sum(s[1] for s in seconds) / count
            peak = max(s[2] for s in seconds)
            rows.append([name, str(count), f"{1000 * wall:.1f}", f"{1000 * cpu:.1f}", f"{peak:.0f}"])
            return wall, cpu

        def command(way: str, source: Path, target: Path, jobs: int) -> tuple[float, float, float]:
            return once(entry(way, source, "-o", target, "-j", str(jobs), "--quiet", "--model", args.model), 0)

        once(entry("encode", some[0], "-o", Path(folder, "warm.vtc"), "--quiet"), 0)
        alone = row("encode, a process each", args.alone,
                    [command("encode", file, Path(folder, f"{file.stem}.vtc"), 1) for file in some[: args.alone]])
        shared = row("encode, one process", args.small, [command("encode", small, Path(folder, "coded/"), 1)])
        row("encode, one process, a shard", args.small,
            [command("encode", Path(folder, "small.tar"), Path(folder, "coded.tar"), 1)])
        back = row("decode, a process each", args.alone,
                   [command("decode", Path(folder, "coded", f"{file.stem}.vtc"), Path(folder, f"{file.stem}.png"), 1)
                    for file in some[: args.alone]])
        both = row("decode, one process", args.small,
                   [command("decode", Path(folder, "coded"), Path(folder, "back/"), 1)])
        ratios = {"encode": [a / b for a, b in zip(alone, shared, strict=True)],
                  "decode": [a / b for a, b in zip(back, both, strict=True)]}
        missed = [f"{way}: {wall:.1f} times as fast, the bar is {BATCH_BAR}" for way, (wall, _) in ratios.items()
                  if wall < BATCH_BAR]
        text = ["## Batches\n\nWhole processes, from their start to their end; milliseconds a picture.\n",
                f"{args.small} pictures of 64 to 128 pixels a side:\n",
                table(["command", "pictures", "wall, ms", "CPU, ms", "peak MiB"], rows),
                *(f"{way.capitalize()}: one process is {wall:.0f} times as fast as a process each by the clock, "
                  f"{cpu:.0f} times by processor time; the bar is {BATCH_BAR}.\n"
                  for way, (wall, cpu) in ratios.items())]
        if args.photographs:
            rows.clear()
            for jobs in args.jobs:
                row(f"encode, -j {jobs}", args.photographs, [command("encode", large, Path(folder, f"l{jobs}/"), jobs)])
                row(f"decode, -j {jobs}", args.photographs,
                    [command("decode", Path(folder, f"l{jobs}"), Path(folder, f"b{jobs}/"), jobs)])
            text += [f"{args.photographs} pictures of 768x512, torch free to use every processor:\n",
                     table(["command", "pictures", "wall, ms", "CPU, ms", "peak MiB"], rows)]
    return "\n".join(text), missed


if __name__ == "__main__":
    sys.exit(main())
