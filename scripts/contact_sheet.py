"""Look at a model: pictures at a few rates beside AVIF and JPEG XL of the same bytes.

    python scripts/contact_sheet.py --images ../shared/data/holdout/set14 ../shared/data/faces -o sheet.png
    python scripts/contact_sheet.py --model runs/localvq/model --images photos/ --pick a.jpg b.jpg --crop 320 -o s.jpg

A row for each picture and rate: the original, ours by the finest member of the model's family whose whole file has at
most that rate, and each peer with at most our bytes and the down-sampling that suits it best by LPIPS (by squared error
where its weights are not found). Under each picture stand the bytes of the whole file and its LPIPS with AlexNet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from evaluate_codec import caption, contact_sheet
from image_rows import Judge, Row, find_lpips, picture_files
from tqdm import tqdm

from vtc.cli.common import load_codec
from vtc.cli.eval_methods import Distance
from vtc.codecs.classical import ENCODERS, available_codecs, encode_best
from vtc.codecs.rates import RateControl
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, ImageError
from vtc.files import write_file
from vtc.images import FORMATS, load_image, save_image, to_tensor, to_uint8
from vtc.models import DEFAULT_MODEL, family_of
from vtc.script import run_script


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture, uint8 (H, W, 3), what to say under it, and its scores; white and none where there is no such file."""

    pixels: np.ndarray
    text: str
    row: Row | None = None


def main(arguments: list[str] | None = None) -> int:
    """Parse, code, draw; 0 done, 1 failed (one sentence on stderr)."""
    args = parse_args(arguments)
    return run_script(lambda: draw(args), "contact_sheet")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name or folder (default: %(default)s)")
    parser.add_argument("--images", required=True, nargs="+", type=Path, metavar="FOLDER", help="folders of pictures")
    parser.add_argument("--pick", nargs="+", metavar="FILE", help="only these files of the folders")
    parser.add_argument("--per_folder", type=int, default=2, help="without --pick: so many of each folder, evenly "
                                                                  "spread over the names (default: %(default)s)")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.03, 0.04], metavar="BPP",
                        help="bits per pixel of the whole file, at most (default: 0.02 0.03 0.04)")
    parser.add_argument("--peers", nargs="*", default=["avif", "jxl"], choices=list(ENCODERS))
    parser.add_argument("--downsample", nargs="+", type=int, default=[1, 2, 4, 8], help="factors that peers may use")
    parser.add_argument("--crop", type=int, default=0, help="show the middle of so many pixels; all is scored")
    parser.add_argument("--lpips_weights", help="folder with AlexNet's features; default VTC_LPIPS_WEIGHTS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scores", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the sheet, .png or .jpg")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def draw(args: argparse.Namespace) -> None:
    """The whole job."""
    if args.output.suffix.lower() not in FORMATS:
        raise ConfigError(f"The sheet is one of {', '.join(FORMATS)}, not {args.output.name}.")
    if missing := sorted(set(args.peers) - set(available_codecs())):
        raise ConfigError(f"Pillow cannot write {', '.join(missing)} here; it can {', '.join(available_codecs())}.")
    files = chosen(args.images, args.pick, args.per_folder)
    lpips, note = find_lpips(args.lpips_weights)
    if lpips is None:
        print(f"contact_sheet: LPIPS is {note}", file=sys.stderr)
    judge, distance = Judge(None if lpips is None else lpips.to(args.device)), Distance(lpips)
    rates = qualities(args.model, args.device)
    rows: list[list[Cell]] = []
    for file in tqdm(files, disable=args.quiet, file=sys.stderr):
        pixels = load_image(file).pixels
        for rate in sorted(args.rates):
            title = Cell(pixels, f"{file.name}, {pixels.shape[1]}x{pixels.shape[0]}\nat most {rate:g} bpp")
            rows.append([title, *cells(file.name, pixels, rate, rates, args, judge, distance)])
    save_image(contact_sheet([[(middle(c.pixels, args.crop), c.text) for c in row] for row in rows]), args.output)
    if args.scores:
        scores = [asdict(cell.row) for row in rows for cell in row if cell.row is not None]
        write_file(args.scores, json.dumps(scores, indent=1).encode() + b"\n")


def chosen(folders: Sequence[Path], names: Sequence[str] | None, per_folder: int) -> list[Path]:
    """The files by name, or evenly out of each folder. ConfigError where a name is in none."""
    files = [picture_files(folder, None) for folder in folders]
    if names is not None:
        found = {file.name: file for folder in files for file in folder}
        if missing := [name for name in names if name not in found]:
            raise ConfigError(f"--pick names {', '.join(missing)}, which the folders of --images do not hold.")
        return [found[name] for name in names]
    if per_folder < 1:
        raise ConfigError(f"--per_folder is at least 1, not {per_folder}.")
    return [folder[(2 * n + 1) * len(folder) // (2 * count)] for folder in files
            for count in [min(per_folder, len(folder))] for n in range(count)]


def qualities(name: str, device: str) -> RateControl:
    """The codecs of a model and of its family, if it has one."""
    family = family_of(name)
    sizes: tuple[int | None, ...] = (*(family.sizes if family else ()), None)

    @cache
    def codec(quality: int) -> TokenCodec:
        return load_codec(name, device, sizes[quality - 1])

    return RateControl(codec, len(sizes))


def cells(name: str, pixels: np.ndarray, rate: float, rates: RateControl, args: argparse.Namespace, judge: Judge,
          distance: Distance) -> list[Cell]:
    """Ours at a rate and each peer of its bytes."""
    try:
        data, quality = rates.compress_at(to_tensor(pixels), rate)
    except ImageError:  # the coarsest file is larger
        return [blank(pixels, f"ours: no file of {rate:g} bpp"), *(blank(pixels, peer) for peer in args.peers)]
    decoded = to_uint8(rates.codec(quality).decompress([data])[0].cpu())
    found = [scored(judge.row(name, f"ours, -q {quality}", pixels, decoded, len(data)), decoded)]
    to_original: Callable[[np.ndarray], float] = lambda decoded: distance(pixels, decoded)  # noqa: E731
    for peer in args.peers:
        best = encode_best(peer, pixels, len(data), args.downsample, to_original)
        if best is None:
            found.append(blank(pixels, f"{peer}: no file of {len(data)} bytes"))
            continue
        stream, shown = best
        row = judge.row(name, peer, pixels, shown, len(stream.data))
        found.append(scored(replace(row, downsample=stream.downsample, quality=stream.quality), shown))
    return found


def scored(row: Row, pixels: np.ndarray) -> Cell:
    return Cell(pixels, caption(row), row)


def blank(pixels: np.ndarray, text: str) -> Cell:
    return Cell(np.full_like(pixels, 255), text)


def middle(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle of at most side x side pixels; all for 0."""
    height, width = pixels.shape[:2]
    if not side:
        return pixels
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return pixels[top : top + side, left : left + side]


if __name__ == "__main__":
    sys.exit(main())
