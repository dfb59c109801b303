"""Rate-distortion of a model's family beside classical codecs: a table and a plot.

    python scripts/evaluate_rates.py --model localvq-f16-8192-r3 --images kodak/ --output docs/results/rates

Every quality of the family, every image: a whole file and back to 8 bits. Each peer gets, image by image, at most the
bytes of a target in bits per pixel, at each down-sampling factor, and searches its quality for it. --also measures
another family of the same base (a file), say one without fine-tuning. OUTPUT receives rates.csv (a row an image),
rates.json (means and provenance), rates.md and rates.svg.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_rows import Judge, Row, find_lpips, number, picture_files, table_csv
from tqdm import tqdm

from vtc.codecs.classical import ENCODERS, available_codecs, encode_within
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError
from vtc.eval.provenance import provenance
from vtc.eval.suite import timed
from vtc.files import write_file
from vtc.images import load_image, to_tensor, to_uint8
from vtc.models import companions, family_of, load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.tokenizer_family import TokenizerFamily

TARGETS = (0.02, 0.045, 0.1)
MEASURES = {"lpips_alex": "LPIPS (lower is better)", "psnr": "PSNR in dB", "ms_ssim": "MS-SSIM"}


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, write; 0 done, 1 failed (one sentence on stderr)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name or folder of a model with a family")
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--limit", type=int, help="only the first so many pictures, by name")
    parser.add_argument("--lpips_weights", help="folder with AlexNet's features")
    parser.add_argument("--also", action="append", default=[], metavar="LABEL=FILE", help="another family of the base")
    parser.add_argument("--compare", nargs="*", default=list(ENCODERS), choices=list(ENCODERS), help="classical peers")
    parser.add_argument("--downsample", nargs="+", type=int, default=[1, 2, 4], help="factors that the peers may use")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="peers' bits per pixel")
    parser.add_argument("--reuse", type=Path, metavar="CSV", help="rates.csv of an earlier run: what it holds of peers "
                                                                 "and of --also is not measured again")
    parser.add_argument("--resume", action="store_true", help="go on with what OUTPUT's rates.csv holds, ours too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    return run_script(lambda: evaluate(args), "evaluate_rates")


def evaluate(args: argparse.Namespace) -> None:
    """Measure, average, write."""
    files = picture_files(args.images, args.limit)
    beside = companions(args.model)  # as the command line codes: with the model's prior, where it has one
    codecs = {label: TokenCodec(model, *beside) for label, model in models(args.model, args.also)}
    peers = [name for name in args.compare if name in available_codecs()]
    lpips, lpips_note = find_lpips(args.lpips_weights)
    judge = Judge(lpips)
    args.output.mkdir(parents=True, exist_ok=True)
    known = [row for row in read_rows(args.reuse) if not row.codec.startswith("ours ")] if args.reuse else []
    table = args.output / "rates.csv"
    known += read_rows(table) if args.resume and table.is_file() else []
    rows: list[Row] = []
    for file in tqdm(files, disable=args.quiet, unit="image"):
        old = [row for row in known if row.image == file.name]
        rows += measured(file.name, load_image(file).pixels, codecs, old, peers, args, judge)
        write_file(table, table_csv(rows + [row for row in known if row.image > file.name]).encode())
    points = averages(rows, len(files))
    report = {"model": args.model, "images": args.images.name, "num_images": len(files),
              "lpips": lpips_note if lpips else "not measured, no weights", "peers": peers,
              "unavailable": sorted(set(args.compare) - set(peers)), "points": points, "provenance": provenance()}
    write_file(table, table_csv(rows).encode())
    write_file(args.output / "rates.json", json.dumps(report, indent=1).encode() + b"\n")
    write_file(args.output / "rates.md", markdown(report).encode())
    plot(points, len(files), args.output / "rates.svg")
    if not args.quiet:
        print(markdown(report))


def measured(name: str, original: np.ndarray, codecs: dict[str, TokenCodec], old: list[Row], peers: list[str],
             args: argparse.Namespace, judge: Judge) -> Iterator[Row]:
    """All rows of one image."""
    for label, codec in codecs.items():
        reused = [row for row in old if row.codec == label]
        yield from reused or [ours(name, original, label, codec, judge)]
    for peer in peers:
        reused = [row for row in old if row.codec.startswith(f"{peer} 1/")]
        yield from reused or classical(name, original, peer, args.downsample, args.targets, judge)


def read_rows(path: Path) -> list[Row]:
    """The rows of a rates.csv. Raises ConfigError where it is something else."""
    kinds = {"image": str, "codec": str, "width": int, "height": int, "num_bytes": int, "downsample": int}
    try:
        with open(path, newline="") as file:
            lines = [{name: kinds.get(name, float)(text) if text else None for name, text in line.items()}
                     for line in csv.DictReader(file)]
            return [Row(**line) for line in lines]  # type: ignore[arg-type]  # TypeError says what is missing
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no rates.csv of this script: {error}.") from error


def models(name: str, also: list[str]) -> Iterator[tuple[str, Tokenizer]]:
    """("ours q3", tokenizer) for each quality, then those of other families that draw other pictures than ours."""
    about = family_of(name)
    if about is None:
        raise ConfigError(f"The model {name} has no family; make one with scripts/finetune_codebook.py.")
    own = {size: load_tokenizer(name, size=size) for size in about.sizes}
    base = load_tokenizer(name)
    for quality, model in enumerate((*own.values(), base), 1):
        yield f"ours q{quality}", model
    for option in also:
        label, _, path = option.partition("=")
        family = TokenizerFamily.load(path)
        for quality, size in enumerate(family.about.sizes, 1):
            member = family.member(base, size)
            if size not in own or not draw_alike(member, own[size]):
                yield f"{label} q{quality}", member


def draw_alike(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two models differ in their entropy-coding tables at most."""
    tensors = b.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in a.state_dict().items()
               if name != "token_frequencies")


def ours(name: str, original: np.ndarray, label: str, codec: TokenCodec, judge: Judge) -> Row:
    """One image through one member."""
    (data,), encode_seconds = timed(lambda: codec.compress(to_tensor(original)[None]))
    (decoded,), decode_seconds = timed(lambda: codec.decompress([data]))
    row = judge.row(name, label, original, to_uint8(decoded), len(data))
    row.encode_seconds, row.decode_seconds = encode_seconds, decode_seconds
    return row


def classical(name: str, original: np.ndarray, peer: str, factors: list[int], targets: list[float],
              judge: Judge) -> Iterator[Row]:
    """One image through a peer at each factor and target that it reaches; the same file is not judged twice."""
    height, width = original.shape[:2]
    for factor in factors:
        known: dict[bytes, Row] = {}
        for target in sorted(targets, reverse=True):
            stream = encode_within(peer, original, int(target * height * width / 8), factor)
            if stream is None:
                break  # nor will it fit into less
            if stream.data not in known:
                known[stream.data] = judge.row(name, peer, original, stream.decode(), len(stream.data))
            row = Row(**asdict(known[stream.data]))
            row.codec, row.downsample, row.quality = f"{peer} 1/{factor} {target:g}", factor, stream.quality
            yield row


def averages(rows: list[Row], count: int) -> list[dict[str, Any]]:
    """A point for each codec and setting, in the order of `rows`: means over images; `complete` where it has all."""
    points = []
    for codec in dict.fromkeys(row.codec for row in rows):
        own = [row for row in rows if row.codec == codec]
        curve, _, setting = codec.rpartition(" ")
        point: dict[str, Any] = {"curve": curve, "setting": setting, "num_images": len(own),
                                 "complete": len(own) == count}
        for measure in ("bpp", *MEASURES, "encode_seconds", "decode_seconds"):
            values = [v for v in (getattr(row, measure) for row in own) if v is not None]
            point[measure] = statistics.fmean(values) if values else None
        points.append(point)
    return points


def markdown(report: dict[str, Any]) -> str:
    """One table of all points."""
    lines = [f"# Rates of {report['model']} on {report['images']}", "",
             f"{report['num_images']} images, whole files, means over images, reconstructions rounded to 8 bits. "
             f"LPIPS: {report['lpips']}. A peer has, image by image, at most as many bits per pixel as its setting, "
             "its picture shrunk by the factor in its name; a row with fewer images is not comparable.", "",
             "| codec | setting | n | bpp | LPIPS | PSNR dB | MS-SSIM |", "|-|-|-|-|-|-|-|"]
    for point in report["points"]:
        lines.append(f"| {point['curve']} | {point['setting']} | {point['num_images']} | {number(point['bpp'], 4)} | "
                     f"{number(point['lpips_alex'], 4)} | {number(point['psnr'], 2)} | "
                     f"{number(point['ms_ssim'], 4)} |")
    about = report["provenance"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines += ["", f"Made by `{' '.join(about['command'])}` with {packages}, Python {about['python']}, on "
              f"{about['processor']}, {about['threads']} threads.", ""]
    return "\n".join(lines)


def plot(points: list[dict[str, Any]], count: int, path: Path) -> None:
    """A panel a measure, bits per pixel on a logarithmic axis; a peer's dashed line is without down-sampling, its solid
    one the best factor at each target by that measure. Only points with all images.
    """
    import io

    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shown = [m for m in MEASURES if any(p[m] is not None for p in points)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.4 * len(shown), 4.6), squeeze=False)
    usable = [p for p in points if p["complete"]]
    peers = sorted({p["curve"].split(" 1/")[0] for p in usable if " 1/" in p["curve"]})
    for axis, measure in zip(axes[0], shown, strict=True):
        for curve in dict.fromkeys(p["curve"] for p in usable if " 1/" not in p["curve"]):
            own = [p for p in usable if p["curve"] == curve and p[measure] is not None]
            main_curve = curve == "ours"
            axis.plot([p["bpp"] for p in own], [p[measure] for p in own], "o-" if main_curve else "o:", label=curve,
                      color="black" if main_curve else "gray", zorder=3 if main_curve else 2,
                      markersize=5 if main_curve else 3)
        for color, peer in enumerate(peers):
            own = [p for p in usable if p["curve"].startswith(f"{peer} 1/") and p[measure] is not None]
            plain = [p for p in own if p["curve"] == f"{peer} 1/1"]
            best = [(min if measure == "lpips_alex" else max)((p for p in own if p["setting"] == setting),
                                                             key=lambda p: p[measure])
                    for setting in dict.fromkeys(p["setting"] for p in own)]
            axis.plot([p["bpp"] for p in best], [p[measure] for p in best], ".-", color=f"C{color}", label=peer,
                      linewidth=1)
            axis.plot([p["bpp"] for p in plain], [p[measure] for p in plain], "x--", color=f"C{color}", linewidth=1,
                      markersize=5, alpha=0.6, label=f"{peer}, not shrunk" if plain else None)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([0.01, 0.02, 0.03, 0.05, 0.1, 0.15]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("bits per pixel, whole file")
        axis.set_title(MEASURES[measure], fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{count} images; peers at their best down-sampling (solid) and without (dashed)", fontsize=10)
    figure.tight_layout()
    stream = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = "vtc"
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    write_file(path, stream.getvalue().encode())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
