"""How good a class-conditional generator is, and whether it has learnt pictures by heart: a table and a contact sheet.

    python scripts/evaluate_generator.py --model var-d6-128 --images tiny.npz --weights weights/ --samples 2000 \\
        --output docs/results/generator

Samples are drawn class by turn, each from a seed of its own. OUTPUT receives rows.json, tables.md and
samples.jpg, generated pictures alone; --private_dir receives the same beside the nearest training pictures.

Frechet distances are over AlexNet's pooled features, and depend on the number of pictures: each row names it. To learn
by heart would be to come nearer to training pictures than other real pictures come, so the distance (LPIPS) of each
sample to its nearest training picture stands beside that of held-out pictures, as they are and through the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generator_quality import Facts, GeneratorJudge, as_floats
from torch import Tensor
from tqdm import tqdm

from vtc.errors import ConfigError
from vtc.eval.frechet import feature_statistics, frechet_distance
from vtc.eval.provenance import provenance
from vtc.files import write_file
from vtc.generators.infinity import Infinity
from vtc.generators.pretrained import LoadedGenerator
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.images import save_image
from vtc.models import load_generator
from vtc.script import run_script
from vtc.training.loop import picture_grid


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, or folder of a generator")
    parser.add_argument("--images", required=True, help="real pictures with the splits train and val")
    parser.add_argument("--weights", help="folder of AlexNet's features; default VTC_LPIPS_WEIGHTS")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--private_dir", type=Path, help="takes the sheet with training pictures, and samples.npz")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--neighbours", type=int, default=400, help="pictures of each kind whose neighbours are found")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; each next one has the next")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace, generator: LoadedGenerator) -> tuple[Sampling, Guidance]:
    """The model's, with what the flags change."""
    own, guidance = generator.sampling, generator.guidance
    sampling = Sampling(own.temperature if args.temperature is None else args.temperature,
                        own.top_k if args.top_k is None else args.top_k,
                        own.top_p if args.top_p is None else args.top_p)
    return sampling, guidance if args.guidance is None else Guidance(args.guidance, guidance.ramp)


@torch.inference_mode()
def draw(generator: LoadedGenerator, sampling: Sampling, guidance: Guidance, count: int, batch: int,
         seed: int = 0, progress: bool = True) -> tuple[Tensor, Tensor, float]:
    """`count` pictures, uint8 (N, 3, S, S), class by turn; their labels; seconds a picture."""
    if isinstance(generator.model, Infinity):
        raise ConfigError("This script is for generators with classes; Infinity draws from texts.")
    model: Any = generator.model
    labels = torch.arange(count) % model.classes
    made, start = [], time.perf_counter()
    for first in tqdm(range(0, count, batch), disable=not progress):
        part = labels[first : first + batch].to(generator.device)
        seeds = seeded(range(seed + first, seed + first + len(part)), generator.device)
        images = model.generate(part, generator.tokenizer, sampling, guidance, generators=seeds)[1]
        made.append((images * 255).round().to(torch.uint8).cpu())
    return torch.cat(made), labels, (time.perf_counter() - start) / count


@torch.inference_mode()
def reconstruct(generator: LoadedGenerator, images: Tensor, batch: int = 20) -> Tensor:
    """uint8 pictures through the tokenizer and back."""
    tokenizer, made = generator.tokenizer, []
    for part in images.split(batch):
        output = tokenizer.decode(tokenizer.encode(as_floats(part).to(generator.device)))
        made.append((output * 255).round().to(torch.uint8).cpu())
    return torch.cat(made)


def evaluate(judge: GeneratorJudge, images: Tensor, labels: Tensor) -> tuple[dict[str, float], Facts]:
    """Frechet distances and the classifier's verdict."""
    facts = judge.look(images)
    return {"count": len(images), **judge.frechet(facts.pooled), "class_accuracy": judge.accuracy(facts, labels)}, facts


def quantiles(distances: Tensor) -> dict[str, float]:
    values = torch.quantile(distances, torch.tensor([0.0, 0.01, 0.1, 0.5]))
    return dict(zip(("least", "one_percent", "ten_percent", "median"), values.tolist(), strict=True))


def pixel_scores(judge: GeneratorJudge, a: Tensor, b: Tensor) -> dict[str, float]:
    """Mean PSNR in dB and LPIPS (AlexNet) of two lists of uint8 pictures."""
    errors, lpips = [], []
    for x, y in zip(a.split(50), b.split(50), strict=True):
        x, y = as_floats(x), as_floats(y)
        errors.append((x - y).square().mean((1, 2, 3)))
        lpips.append(judge.lpips(x, y))
    return {"psnr": (-10 * torch.cat(errors).log10()).mean().item(), "lpips_alex": torch.cat(lpips).mean().item()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    generator = load_generator(args.model).to(args.device)
    sampling, guidance = settings_of(args, generator)
    images, labels, seconds = draw(generator, sampling, guidance, args.samples, args.batch_size, args.seed)
    judge = GeneratorJudge(args.images, args.weights, images.shape[-1])
    print(f"classifier on held-out pictures: {judge.held_out_accuracy:.3f}", file=sys.stderr)
    half = torch.randperm(len(judge.train), generator=torch.Generator().manual_seed(0))
    some, others = half[: args.samples], half[args.samples :]
    through = reconstruct(generator, judge.held_out)
    rows: dict[str, Any] = {}
    rows["samples"], _ = evaluate(judge, images, labels)
    rows["held-out pictures"], _ = evaluate(judge, judge.held_out, judge.held_out_labels)
    rows["held-out through the tokenizer"], _ = evaluate(judge, through, judge.held_out_labels)
    rows["held-out through the tokenizer"] |= pixel_scores(judge, through, judge.held_out)
    if len(others) > 1:
        pooled = judge.train_facts.pooled
        floor = frechet_distance(feature_statistics(pooled[others]), feature_statistics(pooled[some]))
        rows["training pictures to the other ones"] = {"count": len(some), "fd_alexnet_to_train": floor}
    near: dict[str, Any] = {}
    distances: dict[str, Tensor] = {}
    numbers = torch.empty(0, dtype=torch.int64)
    for name, pictures in (("samples", images), ("held-out pictures", judge.held_out),
                           ("held-out through the tokenizer", through)):
        chosen = pictures[torch.linspace(0, len(pictures) - 1, min(args.neighbours, len(pictures))).round().long()]
        distances[name], which = judge.nearest(chosen)
        near[name] = {"count": len(chosen), **quantiles(distances[name])}
        if name == "samples":
            numbers, shown = which, chosen
    bar = near["held-out through the tokenizer"]["one_percent"]
    near["samples"]["nearer_than_one_percent_of_held_out"] = (distances["samples"] < bar).float().mean().item()
    write_sheets(args, judge, images, labels, shown, numbers, distances["samples"])
    facts = {"model": str(args.model), "classes": list(judge.classes), "sampling": vars(sampling),
             "guidance": vars(guidance), "seed": args.seed, "seconds_a_picture": seconds,
             "threads": torch.get_num_threads(), "device": args.device}
    return {"facts": facts, "rows": rows, "nearest": near, "held_out_accuracy": judge.held_out_accuracy,
            "provenance": provenance()}


def write_sheets(args: argparse.Namespace, judge: GeneratorJudge, images: Tensor, labels: Tensor, shown: Tensor,
                 numbers: Tensor, distances: Tensor) -> None:
    """Eight samples a class, a class a row; and, apart, the samples that are nearest to a training picture with it."""
    rows = [images[labels == c][:8] for c in range(len(judge.classes))]
    sheet = picture_grid(as_floats(torch.cat(rows)), columns=min(map(len, rows)))
    save_image(sheet, args.output / "samples.jpg")
    if args.private_dir is None:
        return
    args.private_dir.mkdir(parents=True, exist_ok=True)
    order = distances.argsort()[:20]
    pairs = torch.stack([as_floats(shown[order]), as_floats(judge.train[numbers[order]])], 1).flatten(0, 1)
    save_image(picture_grid(pairs, columns=8), args.private_dir / "nearest.png")
    save_image(sheet, args.private_dir / "samples.png")
    np.savez_compressed(args.private_dir / "samples.npz", images=images.numpy(), labels=labels.numpy())


def report(result: dict[str, Any]) -> str:
    """As Markdown."""
    facts = result["facts"]
    sampling, guidance = facts["sampling"], facts["guidance"]
    lines = [f"`{facts['model']}`: temperature {sampling['temperature']}, top-k {sampling['top_k']}, top-p "
             f"{sampling['top_p']}, guidance {guidance['weight']}{' (ramp)' if guidance['ramp'] else ''}; seeds from "
             f"{facts['seed']}; {facts['seconds_a_picture']:.3f} s a picture, {facts['device']}, {facts['threads']} "
             "threads.", "", "| pictures | n | FD-AlexNet to train | FD-AlexNet to held-out | class accuracy | PSNR dB "
             "| LPIPS |", "|---|---|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        cells = [f"{row[key]:{form}}" if key in row else "-" for key, form in (
            ("fd_alexnet_to_train", ".3f"), ("fd_alexnet_to_held_out", ".3f"), ("class_accuracy", ".3f"),
            ("psnr", ".2f"), ("lpips_alex", ".3f"))]
        lines.append(f"| {name} | {row['count']} | {' | '.join(cells)} |")
    lines += ["", "LPIPS (AlexNet) to the nearest training picture or its mirror image:", "",
              "| pictures | n | least | 1 % | 10 % | median |", "|---|---|---|---|---|---|"]
    for name, row in result["nearest"].items():
        cells = [f"{row[key]:.3f}" for key in ("least", "one_percent", "ten_percent", "median")]
        lines.append(f"| {name} | {row['count']} | {' | '.join(cells)} |")
    share = result["nearest"]["samples"]["nearer_than_one_percent_of_held_out"]
    lines += ["", f"{share:.1%} of the samples are nearer to a training picture than the nearest 1 % of held-out "
                  "pictures that went through the tokenizer."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    result = measure(args)
    write_file(args.output / "rows.json", json.dumps(result, indent=1, default=str).encode() + b"\n")
    text = report(result)
    write_file(args.output / "tables.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(run_script(main, "evaluate_generator"))
