"""Measure a trained tokenizer as an image codec over a folder, next to classical codecs of the same size.

    python scripts/evaluate_codec.py --model NAME_OR_PATH --images FOLDER --output DIR

Every image goes through a whole file and back to 8 bits, as a user's would. DIR receives results.csv (a row an image
and codec), results.json (the same with means and provenance), results.md (tables) and, with --sheet, sheet.png.
Each peer gets, image by image, at most the bytes that ours took, and chooses its down-sampling factor by --best_by.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from vtc.codecs.classical import ENCODERS, available_codecs, encode_within
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, FileError, ImageError, ModelError, VtcError
from vtc.eval.bits import bits_per_pixel
from vtc.eval.codebook import CodebookUsageMetric
from vtc.eval.lattice import LatticeRatio
from vtc.eval.lpips import learned_perceptual_image_patch_similarity
from vtc.eval.provenance import provenance
from vtc.eval.psnr import peak_signal_noise_ratio
from vtc.eval.results import finite
from vtc.eval.ssim import MS_SSIM_MIN_SIDE, multiscale_structural_similarity
from vtc.eval.suite import timed
from vtc.files import write_file
from vtc.images import load_image, save_image, to_tensor, to_uint8
from vtc.models import companions, load_tokenizer
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.lpips import LPIPS

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
MEASURES = ("bpp", "psnr", "ms_ssim", "lpips_alex", "encode_seconds", "decode_seconds")


@dataclass
class Row:
    """One image through one codec; None is what was not measured."""

    image: str
    codec: str
    width: int
    height: int
    num_bytes: int
    bpp: float
    psnr: float
    ms_ssim: float | None
    lpips_alex: float | None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    downsample: int = 1
    quality: float | None = None


class Judge:
    """Scores a reconstruction and adds up its error's spectrum, codec by codec."""

    def __init__(self, lpips: LPIPS | None, period: int) -> None:
        self.lpips, self.period = lpips, period
        self.lattices: dict[str, LatticeRatio] = {}

    def row(self, image: str, codec: str, original: np.ndarray, decoded: np.ndarray, num_bytes: int) -> Row:
        """Both pictures are uint8 (H, W, 3): what is judged is what would be saved."""
        height, width = original.shape[:2]
        target, preds = (to_tensor(pixels)[None] for pixels in (original, decoded))
        ms_ssim = lpips = None
        if min(height, width) >= MS_SSIM_MIN_SIDE:
            ms_ssim = multiscale_structural_similarity(preds, target).item()
        if self.lpips is not None:
            lpips = learned_perceptual_image_patch_similarity(preds, target, self.lpips).item()
        return Row(image, codec, width, height, num_bytes, bits_per_pixel(num_bytes, height, width),
                   peak_signal_noise_ratio(preds, target).item(), ms_ssim, lpips)

    def add_error(self, codec: str, original: np.ndarray, decoded: np.ndarray) -> None:
        """Once for each image's final reconstruction."""
        lattice = self.lattices.setdefault(codec, LatticeRatio(self.period))
        lattice.update(to_tensor(decoded)[None], to_tensor(original)[None])


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse(arguments)
    try:
        evaluate(args)
    except VtcError as error:
        print(f"evaluate_codec: {error}", file=sys.stderr)
        return 1
    return 0


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
    peers = [name for name in args.compare if name in available_codecs()]
    tokenizer = load_tokenizer(args.model).to(args.device)
    lpips, lpips_note = find_lpips(args.lpips_weights)
    best_by = args.best_by or ("lpips" if lpips else "psnr")
    if best_by == "lpips" and lpips is None:
        raise ConfigError(f"--best_by lpips needs LPIPS. {lpips_note}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The output folder {args.output} cannot be made: {error.strerror}.") from error

    codec = TokenCodec(tokenizer, *companions(args.model, args.device))
    codec.decompress(codec.compress(torch.zeros(1, 3, 64, 64)))  # warm up: the first call sets up kernels
    judge = Judge(lpips, max(2, tokenizer.downsample))
    codebook = CodebookUsageMetric(tokenizer.layout(64, 64).vocab)
    rows: list[Row] = []
    failures: list[str] = []
    sheet: list[list[tuple[np.ndarray, str]]] = []
    for file in tqdm(files, disable=args.quiet, file=sys.stderr):
        try:
            original = load_image(file).pixels
            results = list(one_image(file.name, original, codec, codebook, judge, peers, args.downsample, best_by))
        except (ImageError, FileError) as error:
            failures.append(str(error).replace(str(file), file.name))
            continue
        for row, decoded in results:
            rows.append(row)
            judge.add_error(row.codec, original, decoded)
            if args.save_reconstructions:
                folder = args.output / "reconstructions" / row.codec
                folder.mkdir(parents=True, exist_ok=True)
                save_image(decoded, folder / f"{file.stem}.png")
        if file.name in args.sheet:
            sheet.append([(original, file.name), *((decoded, caption(row)) for row, decoded in results)])
    if not rows:
        raise ImageError(f"No picture in {args.images} could be measured: {failures[0]}")

    settings = {"images": args.images.name, "num_images": len(files) - len(failures),
                "lpips": lpips_note if lpips else "not measured, no weights",
                "peers": {"codecs": peers, "unavailable": sorted(set(args.compare) - set(peers)),
                          "downsample": args.downsample, "best_by": best_by,
                          "budget": "image by image, at most our bytes"},
                "rounding": "reconstructions rounded to the nearest 8-bit level before they are judged",
                "aggregation": "mean over images", "failures": failures}
    report = {"model": describe(args.model, tokenizer, codec), "settings": settings,
              "means": means(rows, judge), "codebook": codebook.compute()._asdict(),
              "provenance": provenance(), "rows": [asdict(row) for row in rows]}
    write_file(args.output / "results.json", json.dumps(finite(report), indent=1).encode() + b"\n")
    write_file(args.output / "results.csv", table_csv(rows).encode())
    text = markdown(report, rows)
    write_file(args.output / "results.md", text.encode())
    if sheet:
        save_image(contact_sheet(sheet), args.output / "sheet.png")
    if not args.quiet:
        print(text.partition("## Each image")[0])
    for failure in failures:
        print(f"evaluate_codec: not measured: {failure}", file=sys.stderr)
    if failures:
        raise ImageError(f"{len(failures)} of {len(files)} pictures could not be measured; the others were.")


def picture_files(folder: Path, limit: int | None) -> list[Path]:
    """The pictures of a folder, by name."""
    if not folder.is_dir():
        raise ConfigError(f"--images takes a folder, and {folder} is none.")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)[:limit]
    if not files:
        raise ConfigError(f"The folder {folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return files


def find_lpips(weights: str | None) -> tuple[LPIPS | None, str]:
    """AlexNet LPIPS and what to say of it; weights that were named must be there."""
    try:
        return LPIPS("alex", weights), "AlexNet, version 0.1"
    except ModelError as error:
        if weights:
            raise
        return None, f"not measured: {error}"


def one_image(name: str, original: np.ndarray, codec: TokenCodec, codebook: CodebookUsageMetric, judge: Judge,
              peers: list[str], factors: list[int], best_by: str) -> Iterator[tuple[Row, np.ndarray]]:
    """Ours first, then each peer that reaches our size, as (row, uint8 reconstruction)."""
    image = to_tensor(original)[None]
    (data,), encode_seconds = timed(lambda: codec.compress(image))
    (decoded,), decode_seconds = timed(lambda: codec.decompress([data]))
    codebook.update(codec.decompress_tokens(data).indices.cpu())
    pixels = to_uint8(decoded)
    ours = judge.row(name, "ours", original, pixels, len(data))
    ours.encode_seconds, ours.decode_seconds = encode_seconds, decode_seconds
    yield ours, pixels
    for peer in peers:
        candidates = list(peer_candidates(name, original, peer, len(data), judge, factors))
        if candidates:
            yield max(candidates, key=lambda c: -(c[0].lpips_alex or 0) if best_by == "lpips" else c[0].psnr)


def peer_candidates(name: str, original: np.ndarray, peer: str, max_bytes: int, judge: Judge,
                    factors: list[int]) -> Iterator[tuple[Row, np.ndarray]]:
    """A peer's file at each down-sampling factor at which it fits. The search for the quality is not timed."""
    for factor in factors:
        stream = encode_within(peer, original, max_bytes, factor)
        if stream is not None:
            pixels, seconds = timed(stream.decode)
            row = judge.row(name, peer, original, pixels, len(stream.data))
            row.downsample, row.quality, row.decode_seconds = factor, stream.quality, seconds
            yield row, pixels


def describe(name: str, tokenizer: Tokenizer, codec: TokenCodec) -> dict[str, object]:
    """What was measured, by its fingerprint."""
    return {"name": Path(name).name, "class": type(tokenizer).__name__, "fingerprint": codec.fingerprint.hex(),
            "model_id": tokenizer.model_id, "downsample": tokenizer.downsample,
            "vocab": tokenizer.layout(64, 64).vocab,
            "prior": codec.prior.fingerprint.hex() if codec.prior else None,
            "parameters": sum(p.numel() for p in tokenizer.parameters())}


def means(rows: list[Row], judge: Judge) -> dict[str, dict[str, float | int | None]]:
    """Codec -> the mean of each measure over its images, how many they were, and the lattice ratio."""
    table: dict[str, dict[str, float | int | None]] = {}
    for codec in dict.fromkeys(row.codec for row in rows):
        own = [row for row in rows if row.codec == codec]
        table[codec] = {"num_images": len(own)}
        for measure in MEASURES:
            values = [v for v in (getattr(row, measure) for row in own) if v is not None]
            table[codec][measure] = statistics.fmean(values) if values else None
            if values and len(values) < len(own):
                table[codec][f"num_images_{measure}"] = len(values)
        table[codec]["lattice_ratio"] = judge.lattices[codec].compute().item()
    return table


def table_csv(rows: list[Row]) -> str:
    """One line a row, with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return stream.getvalue()


def number(value: float | None, digits: int) -> str:
    """For a table; a dash where nothing was measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


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
    lines += ["", f"Codebook: {codebook['usage']:.1%} of {model['vocab']} words used, perplexity "
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
