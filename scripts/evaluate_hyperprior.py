"""Rate-distortion of a codec of continuous latents beside JPEG and vtc's tokens: a table and a plot.

    python scripts/evaluate_hyperprior.py --codec runs/hyperprior/codec --images kodak/ \\
        --tokens docs/results/rates/rates.csv --output docs/results/hyperprior

Every quality, every image: a whole file and back to 8 bits; also the bytes that CompressAI's likelihoods predict. A
peer gets, image by image, at most the bytes of each target in bits per pixel. --tokens adds rows that
scripts/evaluate_rates.py measured. Then the symbols of all files are read again in other processes, under other
instruction sets, numbers of threads and types of the model, and compared. OUTPUT receives hyperprior.csv, .json, .md
and .svg.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate_rates import MEASURES, averages, classical, read_rows
from image_rows import Judge, Row, find_lpips, number, picture_files, table_csv
from tqdm import tqdm

from vtc.codecs.classical import ENCODERS
from vtc.codecs.latent_codec import LatentCodec
from vtc.errors import ModelError, VtcError
from vtc.eval.provenance import provenance
from vtc.eval.suite import timed
from vtc.files import write_file
from vtc.images import load_image, to_tensor, to_uint8
from vtc.script import run_script

TARGETS = (0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
#: other processes: what is different in them, environment variables, type of the model
PROCESSES: dict[str, tuple[dict[str, str], str]] = {
    "1 thread": ({"OMP_NUM_THREADS": "1"}, "float32"),
    "2 threads": ({"OMP_NUM_THREADS": "2"}, "float32"),
    "ATEN_CPU_CAPABILITY=default": ({"ATEN_CPU_CAPABILITY": "default"}, "float32"),
    "ONEDNN_MAX_CPU_ISA=SSE41": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, "float32"),
    "model in bfloat16": ({}, "bfloat16"),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", required=True, help="folder of a LatentCodec")
    parser.add_argument("--images", type=Path, help="folder of pictures")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--limit", type=int, help="only the first so many pictures, by name")
    parser.add_argument("--lpips_weights", help="folder with AlexNet's features")
    parser.add_argument("--compare", nargs="*", default=["jpeg"], choices=list(ENCODERS), help="classical peers")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="peers' bits per pixel")
    parser.add_argument("--tokens", type=Path, metavar="CSV", help="rates.csv with rows of vtc's tokens")
    parser.add_argument("--reuse", type=Path, metavar="CSV", help="hyperprior.csv of an earlier run: its peers are not "
                                                                  "measured again")
    parser.add_argument("--note", default="", help="how the codec was trained, for the report")
    parser.add_argument("--symbols_of", type=Path, help="print a hash of the symbols of each stream in a folder")
    parser.add_argument("--type", choices=("float32", "bfloat16"), default="float32", help="of the model, for that")
    args = parser.parse_args(arguments)
    if not args.symbols_of and not (args.images and args.output):
        parser.error("--images and --output are needed")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse_args(arguments)

    def work() -> None:
        if args.symbols_of:
            print(json.dumps(symbols_of(args.codec, args.symbols_of, args.type)))
        else:
            evaluate(args)

    return run_script(work, "evaluate_hyperprior")


def evaluate(args: argparse.Namespace) -> None:
    """Measure, average, write."""
    files = picture_files(args.images, args.limit)
    codec = LatentCodec.from_pretrained(args.codec)
    lpips, lpips_note = find_lpips(args.lpips_weights)
    judge = Judge(lpips)
    known = read_rows(args.reuse) if args.reuse else []
    rows, estimates = [], list[float]()
    with tempfile.TemporaryDirectory() as folder:
        for file in tqdm(files, unit="image"):
            original = load_image(file).pixels
            for quality in range(codec.hyperprior.qualities):
                row, estimated, stream = ours(file.name, original, codec, quality, judge)
                write_file(Path(folder) / f"{file.stem}-{quality}.vtc", stream)
                rows.append(row)
                estimates.append(row.num_bytes / estimated - 1)
            for peer in args.compare:
                reused = [row for row in known if (row.image, row.codec.split(" 1/")[0]) == (file.name, peer)]
                rows += reused or classical(file.name, original, peer, [1], args.targets, judge)
        mismatches = compare_processes(args.codec, Path(folder))
    names = {file.name for file in files}
    if args.tokens:
        rows += [row for row in read_rows(args.tokens) if row.codec.startswith("ours q") and row.image in names]
    points = averages(rows, len(files))
    report: dict[str, Any] = {
        "codec": Path(args.codec).name, "note": args.note, "fingerprint": codec.fingerprint().hex(),
        "parameters": sum(p.numel() for p in codec.parameters()), "images": args.images.name, "num_images": len(files),
        "lpips": lpips_note if lpips else "not measured, no weights", "points": points,
        "true_bytes_over_estimated": {"mean": float(np.mean(estimates)), "lowest": min(estimates),
                                      "highest": max(estimates)},
        "streams_with_other_symbols": mismatches, "streams": len(estimates), "provenance": provenance()}
    args.output.mkdir(parents=True, exist_ok=True)
    write_file(args.output / "hyperprior.csv", table_csv(rows).encode())
    write_file(args.output / "hyperprior.json", json.dumps(report, indent=1).encode() + b"\n")
    write_file(args.output / "hyperprior.md", markdown(report).encode())
    write_file(args.output / "hyperprior.svg", plot(points, len(files)))
    print(markdown(report))


@torch.no_grad()
def ours(name: str, original: np.ndarray, codec: LatentCodec, quality: int, judge: Judge) -> tuple[Row, float, bytes]:
    """One image at one quality: its row, the bytes that the likelihoods say, and the stream."""
    x = to_tensor(original)[None]
    (stream,), encode_seconds = timed(lambda: codec.encode_streams(x, quality))
    (decoded,), decode_seconds = timed(lambda: codec.decode_streams([stream]))
    likelihoods = codec.hyperprior(codec.latents(x), quality)["likelihoods"].values()
    estimated = sum(-torch.log2(likelihood.double()).sum().item() for likelihood in likelihoods) / 8
    row = judge.row(name, f"latents q{quality + 1}", original, to_uint8(decoded), len(stream))
    row.encode_seconds, row.decode_seconds = encode_seconds, decode_seconds
    return row, estimated, stream


def symbols_of(codec_folder: str, streams: Path, type: str) -> dict[str, str]:
    """Stream -> hash of its symbols, or what went wrong."""
    codec = LatentCodec.from_pretrained(codec_folder)
    codec.fingerprint()  # before the cast
    codec.to(getattr(torch, type))
    found = {}
    for path in sorted(streams.glob("*.vtc")):
        try:
            symbols = codec.symbols(path.read_bytes())
            found[path.name] = hashlib.sha256(symbols.numpy().astype("<i4").tobytes()).hexdigest()
        except VtcError as error:
            found[path.name] = str(error)
    return found


def compare_processes(codec_folder: str, streams: Path) -> dict[str, int]:
    """What is different in a process -> streams of which it reads other symbols than this process."""
    wanted = symbols_of(codec_folder, streams, "float32")
    counts = {}
    for what, (variables, type) in PROCESSES.items():
        command = [sys.executable, "-W", "ignore", __file__, "--codec", str(codec_folder), "--symbols_of", str(streams),
                   "--type", type]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(f"A process with {what} failed: {done.stderr.strip()[-300:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        counts[what] = sum(found.get(name) != symbols for name, symbols in wanted.items())
    return counts


def markdown(report: dict[str, Any]) -> str:
    """One table of all points, and what was checked."""
    about, ratio = report["provenance"], report["true_bytes_over_estimated"]
    lines = [f"# Continuous latents on {report['images']}", "",
             f"{report['num_images']} images, whole files, means over images, reconstructions rounded to 8 bits. "
             f"LPIPS: {report['lpips']}. The codec has {report['parameters']:,} parameters; fingerprint "
             f"{report['fingerprint']}. A peer has, image by image, at most as many bits per pixel as its setting, at "
             "full size; a row with fewer images is not comparable.", "",
             *([report["note"], ""] if report["note"] else []),
             "| codec | setting | n | bpp | PSNR dB | MS-SSIM | LPIPS | encode s | decode s |", "|-|-|-|-|-|-|-|-|-|"]
    for point in report["points"]:
        timed_here = point["curve"] == "latents"
        lines.append(f"| {'tokens' if point['curve'] == 'ours' else point['curve'].removesuffix(' 1/1')} | "
                     f"{point['setting']} | {point['num_images']} | {number(point['bpp'], 4)} | "
                     f"{number(point['psnr'], 2)} | {number(point['ms_ssim'], 4)} | {number(point['lpips_alex'], 4)} | "
                     f"{number(point['encode_seconds'] if timed_here else None, 2)} | "
                     f"{number(point['decode_seconds'] if timed_here else None, 2)} |")
    lines += ["", f"True bytes over those that the likelihoods say: {ratio['mean']:+.2%} on average, "
              f"{ratio['lowest']:+.2%} to {ratio['highest']:+.2%} (whole files, header included).", "",
              f"| process | streams with other symbols, of {report['streams']} |", "|-|-|",
              *(f"| {what} | {count} |" for what, count in report["streams_with_other_symbols"].items())]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines += ["", f"Made by `{' '.join(about['command'])}` with {packages}, Python {about['python']}, on "
              f"{about['processor']}, {about['threads']} threads.", ""]
    return "\n".join(lines)


def plot(points: list[dict[str, Any]], count: int) -> bytes:
    """An SVG with a panel a measure; only points with all images."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    usable = [p for p in points if p["num_images"] == count]
    shown = [m for m in MEASURES if any(p[m] is not None for p in usable)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.0 * len(shown), 4.4), squeeze=False)
    for axis, measure in zip(axes[0], shown, strict=True):
        for curve in dict.fromkeys(p["curve"] for p in usable):
            own = sorted((p["bpp"], p[measure]) for p in usable if p["curve"] == curve and p[measure] is not None)
            label = {"latents": "latents, hyperprior", "ours": "tokens"}.get(curve, curve.removesuffix(" 1/1"))
            axis.plot(*zip(*own, strict=True), "o-" if curve == "latents" else ".--", label=label,
                      color={"latents": "black", "ours": "gray"}.get(curve))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("bits per pixel, whole file")
        axis.set_title(MEASURES[measure], fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{count} images", fontsize=10)
    figure.tight_layout()
    stream = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = "vtc"
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return stream.getvalue().encode()


if __name__ == "__main__":
    sys.exit(main())
