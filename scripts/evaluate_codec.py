"""Measure a trained tokenizer as an image codec over a folder, next to classical codecs of the same size.

    python scripts/evaluate_codec.py --model NAME_OR_PATH --images FOLDER --output DIR

The suite of `vtc-eval` with a contact sheet. Every image goes through a whole file and back to 8 bits, as a user's
would. DIR receives results.csv (a row an image and codec), results.json (the same with means and provenance),
results.md (tables) and, with --sheet, sheet.png. Each peer gets, image by image, at most the bytes that ours took, and
chooses its down-sampling factor by --best_by.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_rows import Row, find_lpips, number, picture_files, table_csv
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from vtc.cli.eval_methods import ClassicalMethod, Distance, TokenCodecMethod
from vtc.codecs.classical import ENCODERS, available_codecs
from vtc.errors import ConfigError, FileError, ImageError
from vtc.eval.measures import Measure, Options, build
from vtc.eval.pairs import Item, Problem
from vtc.eval.provenance import provenance
from vtc.eval.results import MethodResult, finite
from vtc.eval.suite import Method, Suite
from vtc.files import write_file
from vtc.images import save_image, to_uint8
from vtc.script import run_script

#: column of the CSV -> result of the suite
RESULTS = {"bpp": "bits_per_pixel", "psnr": "peak_signal_noise_ratio", "ms_ssim": "multiscale_structural_similarity",
           "lpips_alex": "learned_perceptual_image_patch_similarity_alex", "encode_seconds": "encode_seconds",
           "decode_seconds": "decode_seconds"}


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse(arguments)
    return run_script(lambda: evaluate(args), "evaluate_codec")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="bundled name, folder, or repository on the Hub")
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--limit", type=int, help="only the first so many pictures, by name")
    parser.add_argument("--lpips_weights", help="folder with AlexNet's features; without it LPIPS is measured where "
                        "the weights are found")
    parser.add_argument("--compare", nargs="*", default=["avif"], choices=list(ENCODERS), help="classical peers")
    parser.add_argument("--downsample", nargs="+", type=int, default=[1, 2, 4], help="factors that the peers may use")
    parser.add_argument("--best_by", choices=["lpips", "psnr"], help="how a peer's factor is chosen; lpips if measured")
    parser.add_argument("--sheet", type=lambda names: names.split(","), default=[], help="files for a contact sheet, "
                        "separated by commas: original | ours | each peer")
    parser.add_argument("--save_reconstructions", action="store_true", help="write them as PNG, a folder a codec")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> None:
    """The whole job."""
    files = picture_files(args.images, args.limit)
    if missing := sorted(set(args.sheet) - {f.name for f in files}):
        raise ConfigError(f"--sheet names {', '.join(missing)}, which --images does not hold.")
    lpips, lpips_note = find_lpips(args.lpips_weights)
    best_by = args.best_by or ("lpips" if lpips else "psnr")
    if best_by == "lpips" and lpips is None:
        raise ConfigError(f"--best_by lpips needs LPIPS. {lpips_note}")
    ours = TokenCodecMethod(args.model, args.device)
    peers = [name for name in args.compare if name in available_codecs()]
    distance = Distance(lpips.to(args.device) if lpips and best_by == "lpips" else None)
    methods: list[Method] = [ours, *(ClassicalMethod(peer, ours, args.downsample, distance) for peer in peers)]
    for method, label in zip(methods, ("ours", *peers), strict=True):
        method.name = label
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The output folder {args.output} cannot be made: {error.strerror}.") from error

    items = [Item(file.name, file) for file in files]
    suite = Suite(methods, measures(args, ours, lpips is not None), device=args.device)
    ours.reconstruct(Item("", Path()), torch.zeros(1, 3, 64, 64))  # warm up: the first call sets up kernels
    with tqdm(total=len(items), disable=args.quiet, file=sys.stderr) as bar:
        found, problems = suite.run(items, progress=lambda done, known: bar.update())
    failures = [short(problem, items) for problem in problems]
    if not found:
        raise ImageError(f"No picture in {args.images} could be measured: {failures[0]}")
    results = {method.name: method for method in found}
    rows = [row for item in items for row in rows_of(item.name, found)]

    settings = {"images": args.images.name, "num_images": len(results["ours"].images),
                "lpips": lpips_note if lpips else "not measured, no weights",
                "peers": {"codecs": peers, "unavailable": sorted(set(args.compare) - set(peers)),
                          "downsample": args.downsample, "best_by": best_by,
                          "budget": "image by image, at most our bytes"},
                "rounding": "reconstructions rounded to the nearest 8-bit level before they are judged",
                "aggregation": "mean over images", "failures": failures}
    report = {"model": describe(args.model, ours), "settings": settings,
              "means": {name: means(method) for name, method in results.items()},
              "codebook": {name.removeprefix("codebook_"): result.value
                           for name, result in results["ours"].results.items() if name.startswith("codebook_")}
              | {"tokens": int(results["ours"].value("codebook_tokens") or 0)},
              "provenance": provenance(), "rows": [asdict(row) for row in rows]}
    write_file(args.output / "results.json", json.dumps(finite(report), indent=1).encode() + b"\n")
    write_file(args.output / "results.csv", table_csv(rows).encode())
    text = markdown(report, rows)
    write_file(args.output / "results.md", text.encode())
    draw(args, suite, items, rows)
    if not args.quiet:
        print(text.partition("## Each image")[0])
    for failure in failures:
        print(f"evaluate_codec: not measured: {failure}", file=sys.stderr)
    if failures:
        raise ImageError(f"{len(failures)} of {len(files)} pictures could not be measured; the others were.")


def measures(args: argparse.Namespace, ours: TokenCodecMethod, with_lpips: bool) -> list[Measure]:
    """What is measured, in the order of the table."""
    options = Options(args.device, args.lpips_weights, period=max(2, ours.codec.tokenizer.downsample))
    names = ["bpp", "psnr", "ms_ssim", *["lpips_alex"] * with_lpips, "lattice", "seconds", "codebook"]
    return [build(name, options) for name in names]


def short(problem: Problem, items: Sequence[Item]) -> str:
    """The sentence with files by their names alone: nobody's folders go into a result."""
    text = problem.sentence
    for item in items:
        text = text.replace(str(item.path), item.name)
    return text


def rows_of(image: str, found: Sequence[MethodResult]) -> Iterator[Row]:
    """What the suite measured of one image, ours first."""
    for method in found:
        if image in method.images:
            place = method.images.index(image)
            values = {name: float(column[place]) for name, column in method.columns.items()
                      if not math.isnan(column[place])}
            yield Row(image, method.name, int(values["width"]), int(values["height"]), int(values["num_bytes"]),
                      **{name: values.get(result) for name, result in RESULTS.items()},  # type: ignore[arg-type]  # rate and PSNR are always measured
                      downsample=int(values.get("downsample", 1)), quality=values.get("quality"))


def describe(name: str, ours: TokenCodecMethod) -> dict[str, Any]:
    """What was measured, by its fingerprint."""
    about = ours.description
    return {"name": Path(name).name, "fingerprint": ours.codec.fingerprint.hex(),
            **{key: about[key] for key in ("class", "model_id", "downsample", "vocab", "prior", "parameters")}}


def means(method: MethodResult) -> dict[str, float | int | None]:
    """The mean of each measure over the images, how many they were, and the lattice ratio."""
    found: dict[str, float | int | None] = {"num_images": len(method.images)}
    for name, result in RESULTS.items():
        measured = method.results.get(result)
        found[name] = measured.value if measured else None
        if measured and 0 < measured.n < len(method.images):
            found[f"num_images_{name}"] = measured.n
    return found | {"lattice_ratio": method.value("stride_lattice_ratio")}


def markdown(report: dict, rows: list[Row]) -> str:
    """Means of each codec, the codebook, then ours image by image."""
    model, settings, codebook = report["model"], report["settings"], report["codebook"]
    lines = [f"# {model['name']} on {settings['images']}", "",
             f"{settings['num_images']} images, {model['class']} with fingerprint `{model['fingerprint']}`. Every byte "
             "of the files is counted; reconstructions are rounded to 8 bits; means over images. LPIPS: "
             f"{settings['lpips']}. A peer has, image by image, at most our bytes, and its best down-sampling factor "
             f"out of {settings['peers']['downsample']} by {settings['peers']['best_by'].upper()}.", "",
             "| codec | n | bpp | PSNR dB | MS-SSIM | LPIPS | lattice ratio | encode s | decode s |",
             "|-|-|-|-|-|-|-|-|-|"]
    for codec, mean in report["means"].items():
        short = "" if mean["num_images"] == settings["num_images"] else " (fewer images: means not comparable)"
        cells = [number(mean[m], d) for m, d in
                 (("bpp", 4), ("psnr", 2), ("ms_ssim", 4), ("lpips_alex", 4), ("lattice_ratio", 2),
                  ("encode_seconds", 3), ("decode_seconds", 3))]
        lines.append(f"| {codec}{short} | {mean['num_images']} | " + " | ".join(cells) + " |")
    lines += ["", f"Codebook: {codebook['usage']:.1%} of {' + '.join(map(str, model['vocab']))} words used, perplexity "
              f"{codebook['perplexity']:.0f}, {codebook['tokens']} tokens.", "", "## Each image", "",
              "| image | size | bytes | bpp | PSNR dB | MS-SSIM | LPIPS |", "|-|-|-|-|-|-|-|"]
    for row in rows:
        if row.codec == "ours":
            lines.append(f"| {row.image} | {row.width}x{row.height} | {row.num_bytes} | {row.bpp:.4f} | "
                         f"{number(row.psnr, 2)} | {number(row.ms_ssim, 4)} | {number(row.lpips_alex, 4)} |")
    about = report["provenance"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines += ["", f"Made by `{' '.join(about['command'])}` with {packages}, Python {about['python']}, on "
              f"{about['processor']}, {about['threads']} threads.", ""]
    return "\n".join(lines)


def draw(args: argparse.Namespace, suite: Suite, items: Sequence[Item], rows: Sequence[Row]) -> None:
    """The contact sheet and the reconstructions, where they are asked for: made once more, as they were judged."""
    sheet: list[list[tuple[np.ndarray, str]]] = []
    for item in items:
        own = [row for row in rows if row.image == item.name]
        if not own or not (args.save_reconstructions or item.name in args.sheet):
            continue
        original = suite.prepared(item)
        line = [(to_uint8(original), item.name)]
        for row in own:
            image = suite.reconstructed(item, next(m for m in suite.methods if m.name == row.codec), original)
            assert image is not None
            line.append((to_uint8(image), caption(row)))
            if args.save_reconstructions:
                folder = args.output / "reconstructions" / row.codec
                folder.mkdir(parents=True, exist_ok=True)
                save_image(line[-1][0], folder / f"{item.path.stem}.png")
        if item.name in args.sheet:
            sheet.append(line)
    if sheet:
        save_image(contact_sheet(sheet), args.output / "sheet.png")


def caption(row: Row) -> str:
    """Two lines under a picture of the contact sheet."""
    shrunk = f", 1/{row.downsample} size" if row.downsample > 1 else ""
    lpips = "" if row.lpips_alex is None else f", LPIPS {row.lpips_alex:.3f}"
    return f"{row.codec}{shrunk}: {row.num_bytes} bytes, {row.bpp:.4f} bpp\n{row.psnr:.2f} dB{lpips}"


def contact_sheet(rows: list[list[tuple[np.ndarray, str]]], margin: int = 8) -> np.ndarray:
    """Pictures (H, W, 3) with captions, a row an image, on white."""
    width = max(picture.shape[1] for row in rows for picture, _ in row)
    size = min(24, max(10, width // 28))
    font = ImageFont.load_default(size)
    text_height = int(2.8 * size)
    heights = [row[0][0].shape[0] + text_height + margin for row in rows]
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + margin) + margin, sum(heights) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, text) in enumerate(row):
            left = margin + column * (width + margin)
            sheet.paste(Image.fromarray(picture), (left, top))
            draw.multiline_text((left, top + picture.shape[0] + 2), text, fill="black", font=font)
        top += height
    return np.array(sheet)


if __name__ == "__main__":
    sys.exit(main())
