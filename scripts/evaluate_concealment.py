"""Measure what lost tokens cost, and what each way of filling them in gives back.

    python scripts/evaluate_concealment.py --model localvq-f16-8192-r3 --images ../shared/data/kodak \\
        --output docs/results/concealment --lpips_weights ../shared/weights [--size 256]

Tokens of each picture are lost singly, or by interleaved chunk (`vtc.codecs.resilience`). Reconstructions are rounded
to 8 bits, and the same tokens are lost for every filling:

    none        nothing is lost
    mean        the mean codeword, weighted by the static table
    frequent    the most frequent word
    neighbour   the nearest received token (`vtc.codecs.resilience.fill_from_neighbours`)
    words       the concealer's likeliest words
    concealer   the concealer's mean codewords

The output folder receives a JSON file for each codebook and results.md, the tables of all that lie there; with
--picture also one image's reconstructions side by side, sheet.jpg: nothing lost, what was lost, mean, neighbour,
concealer; above singly, below by chunk, 20 % each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vtc.codecs.concealer import CONCEALER, Concealer
from vtc.codecs.resilience import fill_from_neighbours, interleave
from vtc.errors import ConfigError
from vtc.eval.provenance import provenance
from vtc.eval.psnr import peak_signal_noise_ratio
from vtc.files import write_file
from vtc.hub import fetch, fingerprint
from vtc.images import load_image, save_image, to_tensor, to_uint8
from vtc.models import load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.training.data import image_files

#: how tokens are lost: name -> (chunks, or 0 for singly; chunks or per cent lost)
PATTERNS = {"5 % singly": (0, 5), "10 % singly": (0, 10), "20 % singly": (0, 20), "30 % singly": (0, 30),
            "1 of 20 chunks (5 %)": (20, 1), "2 of 20 chunks (10 %)": (20, 2), "4 of 20 chunks (20 %)": (20, 4),
            "6 of 20 chunks (30 %)": (20, 6), "1 of 8 chunks (12.5 %)": (8, 1), "2 of 8 chunks (25 %)": (8, 2)}
FILLINGS = ("mean", "frequent", "neighbour", "words", "concealer")
SHEET = "sheet.jpg"


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 failed (one sentence on stderr)."""
    return run_script(lambda: evaluate(parse(arguments)), "evaluate_concealment")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name or folder of a LocalVQ")
    parser.add_argument("--size", type=int, help="the member of the model's family with so many words; default: itself")
    parser.add_argument("--concealer", type=Path, help="its file; default: the one in the model's folder")
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--lpips_weights", help="folder with AlexNet's features")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS), metavar="PATTERN",
                        help=f"out of {', '.join(PATTERNS)}".replace("%", "%%"))
    parser.add_argument("--fillings", nargs="+", choices=FILLINGS, default=list(FILLINGS))
    parser.add_argument("--limit", type=int, help="only the first so many pictures, by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="also draw this picture's fillings at 20 %% lost into sheet.jpg")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def lose(grid: tuple[int, int], pattern: str, rng: np.random.Generator) -> Tensor:
    """(1, L) bool."""
    chunks, count = PATTERNS[pattern]
    length = grid[0] * grid[1]
    lost = np.zeros(length, dtype=bool)
    if chunks:
        lost = np.isin(interleave((grid,), chunks), rng.permutation(chunks)[:count])
    else:
        lost[rng.permutation(length)[: round(length * count / 100)]] = True
    return torch.from_numpy(lost)[None]


class Fillings:
    """Each name of FILLINGS to a function: (indices (1, L), lost (1, L), grid) to codewords (1, L, d)."""

    def __init__(self, tokenizer: LocalVQ, concealer: Concealer) -> None:
        self.tokenizer, self.concealer = tokenizer, concealer
        self.words = tokenizer.quantizer.codewords
        table = tokenizer.token_frequencies
        if table is None:
            raise ConfigError("The model has no static table; count one with scripts/fit_tables.py.")
        self.mean = (table[0].float() / table[0].sum()) @ self.words
        self.frequent = int(table[0].argmax())
        self.seconds: list[float] = []

    def __call__(self, name: str, indices: Tensor, lost: Tensor, grid: tuple[int, int]) -> Tensor:
        codes = self.words[indices.masked_fill(lost, 0)]
        if name == "mean":
            return torch.where(lost[..., None], self.mean, codes)
        if name == "frequent":
            return self.words[indices.masked_fill(lost, self.frequent)]
        if name == "neighbour":
            layout = self.tokenizer.layout(grid[0] * self.tokenizer.downsample, grid[1] * self.tokenizer.downsample)
            filled = fill_from_neighbours(indices.masked_fill(lost, 0).T.numpy(), lost.T.numpy(), layout)
            return self.words[torch.from_numpy(filled).T]
        if name == "words":
            return self.words[self.concealer.conceal(indices, lost, grid, self.words)]
        start = time.process_time()
        codes = self.concealer.conceal_codes(indices, lost, grid, self.words)
        self.seconds.append(time.process_time() - start)
        return codes

    def accuracy(self, codes: Tensor, indices: Tensor, lost: Tensor) -> float:
        """Share of lost tokens whose filling is nearest to the right word."""
        nearest = torch.cdist(codes[lost], self.words).argmin(1)
        return float((nearest == indices[lost]).float().mean())


def evaluate(args: argparse.Namespace) -> None:
    """The whole job."""
    tokenizer = load_tokenizer(args.model, size=args.size)
    if not isinstance(tokenizer, LocalVQ):
        raise ConfigError(f"Concealment is measured with LocalVQ, and {args.model!r} is a {type(tokenizer).__name__}.")
    concealer = Concealer.load(args.concealer or fetch(args.model, CONCEALER))
    fill, judge = Fillings(tokenizer, concealer), LPIPS("alex", args.lpips_weights)
    files = image_files(args.images)[: args.limit]
    if not files:
        raise ConfigError(f"--images takes a folder of pictures, and {args.images} holds none.")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"words-{tokenizer.quantizer.codebook_size}.json"
    report = {"model": args.model, "codebook": tokenizer.quantizer.codebook_size,
              "fingerprint": tokenizer.fingerprint().hex(), "images": args.images.name, "seed": args.seed,
              "concealer": fingerprint(concealer, ("",)).hex(), "columns": ["lpips_alex", "psnr", "token_accuracy"],
              "threads": torch.get_num_threads(), "seconds": [], "provenance": provenance(), "values": {}}
    keep_measured(path, report)
    for number, file in enumerate(tqdm(files, disable=args.quiet, file=sys.stderr)):
        rows = report["values"].setdefault(file.name, {})
        wanted = [(pattern, filling) for pattern in args.patterns for filling in args.fillings
                  if f"{pattern}: {filling}" not in rows]
        if not wanted:
            continue
        image, known = load_image(file).tensor()[None], "nothing: none" in rows
        rows |= measure(image, fill, judge, wanted, (args.seed, number), known)
        report["values"][file.name] = rows
        report["seconds"] += fill.seconds
        fill.seconds.clear()
        write_file(path, json.dumps(report).encode() + b"\n")
    if args.picture:
        save_image(sheet(load_image(args.picture).tensor()[None], fill), args.output / SHEET)
    write_file(args.output / "results.md", markdown(args.output).encode())


def keep_measured(path: Path, report: dict) -> None:
    """What an earlier run measured of the same model on the same losses goes into the report, so that it is not done
    again; of the concealer only where it is the same one.
    """
    if not path.is_file():
        return
    earlier = json.loads(path.read_text())
    if any(earlier[key] != report[key] for key in ("fingerprint", "images", "seed")):
        return
    same = earlier["concealer"] == report["concealer"]
    report["seconds"] = earlier["seconds"] if same else []
    report["values"] = {name: {case: row for case, row in rows.items()
                               if same or not case.endswith((": words", ": concealer"))}
                        for name, rows in earlier["values"].items()}


def drawn(tokenizer: LocalVQ, codes: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Codewords (1, L, d) to an image (1, 3, H, W) of 8-bit levels in [0, 1]."""
    output = tokenizer.reconstruct(codes.unflatten(1, grid).permute(0, 3, 1, 2))[..., : size[0], : size[1]]
    return to_tensor(to_uint8(output))[None]


@torch.no_grad()
def measure(image: Tensor, fill: Fillings, judge: LPIPS, wanted: list[tuple[str, str]], seed: tuple[int, ...],
            whole_is_known: bool) -> dict[str, list[float]]:
    """"pattern: filling" to [LPIPS, PSNR, accuracy], for one image (1, 3, H, W); first what it is without losses."""
    tokenizer = fill.tokenizer
    tokens = tokenizer.encode(image)
    indices, (grid,) = tokens.indices[..., 0], tokens.layout.scales
    target = judge.unit_features(image)

    def row(codes: Tensor, accuracy: float) -> list[float]:
        preds = drawn(tokenizer, codes, grid, (tokens.height, tokens.width))
        return [judge.distance(judge.unit_features(preds), target).item(),
                peak_signal_noise_ratio(preds, image).item(), accuracy]

    rows = {} if whole_is_known else {"nothing: none": row(fill.words[indices], 1.0)}
    for pattern, filling in wanted:
        lost = lose(grid, pattern, np.random.default_rng((*seed, list(PATTERNS).index(pattern))))
        codes = fill(filling, indices, lost, grid)
        rows[f"{pattern}: {filling}"] = row(codes, fill.accuracy(codes, indices, lost))
    return rows


@torch.no_grad()
def sheet(image: Tensor, fill: Fillings) -> np.ndarray:
    """Nothing lost, what was lost in grey, three fillings; above singly, below by chunk. (H, W, 3) uint8."""
    tokenizer = fill.tokenizer
    tokens = tokenizer.encode(image)
    indices, (grid,) = tokens.indices[..., 0], tokens.layout.scales
    size = (tokens.height, tokens.width)
    whole = drawn(tokenizer, fill.words[indices], grid, size)
    rows = []
    for pattern in ("20 % singly", "4 of 20 chunks (20 %)"):
        lost = lose(grid, pattern, np.random.default_rng(0))
        hole = lost.view(1, 1, *grid).repeat_interleave(tokenizer.downsample, 2)
        hole = hole.repeat_interleave(tokenizer.downsample, 3)[..., : size[0], : size[1]]
        pictures = [whole, torch.where(hole, 0.5, whole),
                    *(drawn(tokenizer, fill(way, indices, lost, grid), grid, size)
                      for way in ("mean", "neighbour", "concealer"))]
        rows.append(torch.cat(pictures, 3))
    return to_uint8(torch.cat(rows, 2))


def markdown(folder: Path) -> str:
    """The tables of all JSON files in a folder, the largest codebook first."""
    reports = [json.loads(path.read_text()) for path in folder.glob("words-*.json")]
    reports.sort(key=lambda report: -report["codebook"])
    text = ["# Lost tokens, filled in", "", "Made by", "", *__doc__.strip().splitlines()[2:], ""]
    if (folder / SHEET).is_file():
        text += [f"![Nothing lost, what was lost, mean, neighbour, concealer]({SHEET})", ""]
    return "\n".join([*text, *(line for report in reports for line in table(report))])


def table(report: dict) -> list[str]:
    """One codebook's section."""
    images = list(report["values"].values())
    means = {case: [statistics.fmean(column) for column in zip(*(rows[case] for rows in images), strict=True)]
             for case in images[0] if all(case in rows for rows in images)}
    lpips, psnr, _ = means["nothing: none"]
    lines = [f"## {report['codebook']} words", "",
             f"{report['model']}, fingerprint `{report['fingerprint']}`; {len(images)} images of {report['images']}, "
             f"seed {report['seed']}. Without losses: LPIPS {lpips:.4f}, PSNR {psnr:.2f} dB. Means over images. The "
             "share is that of the LPIPS loss in the loss of the best of mean, frequent and neighbour.",
             "", "| lost | filling | accuracy | LPIPS | LPIPS loss | PSNR dB | share |", "|-|-|-|-|-|-|-|"]
    for pattern in PATTERNS:
        simple = [means[case][0] - lpips for name in FILLINGS[:3] if (case := f"{pattern}: {name}") in means]
        for name in FILLINGS:
            if (case := f"{pattern}: {name}") not in means:
                continue
            value, decibels, accuracy = means[case]
            share = f"{(value - lpips) / min(simple):.2f}" if simple and name in ("words", "concealer") else ""
            lines.append(f"| {pattern} | {name} | {100 * accuracy:.1f} % | {value:.4f} | {value - lpips:.4f} | "
                         f"{decibels:.2f} | {share} |")
    if report["seconds"]:
        lines += ["", f"The concealer took {statistics.median(report['seconds']):.2f} s of processor time an image "
                  f"(median; {report['threads']} threads)."]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
