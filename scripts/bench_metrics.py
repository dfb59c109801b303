"""Time vtc-eval's suite beside torchmetrics called image by image: PSNR, SSIM, MS-SSIM and LPIPS of pairs of files.

    python scripts/bench_metrics.py --lpips_weights FOLDER [--num_images 1000 --size 256 --jobs 2]

Pairs of smooth pictures with noise are written to a temporary folder as PNG; both sides read them from there. Ours runs
`--jobs` pictures at a time with one thread each; torchmetrics one after the other with `--jobs` threads. Both sides
take the same LPIPS network (AlexNet, weights by path), loaded before the clock starts; nothing is cached. Prints a JSON
with wall-clock and processor seconds of each side, alternately `--repeats` times, the ratios of their medians, and the
means, which have to agree where the definitions do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vtc.eval.measures import Options, build
from vtc.eval.metric import Metric
from vtc.eval.pairs import Item, find_items, match
from vtc.eval.provenance import provenance
from vtc.eval.suite import Files, Suite
from vtc.images import load_image, save_image
from vtc.script import run_script
from vtc.tokenizers.lpips import LPIPS

NAMES = ("psnr", "ssim", "ms_ssim", "lpips_alex")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lpips_weights", help="folder with AlexNet's features; default as vtc-eval's")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args(arguments)
    return run_script(lambda: report(args), "bench_metrics")


def report(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(benchmark(args, Path(folder)), indent=1))


def benchmark(args: argparse.Namespace, folder: Path) -> dict:
    write_pairs(folder, args.num_images, args.size)
    items, _ = find_items(folder / "ref")
    files, _ = match(items, folder / "rec", "rec")
    measures = [build(name, Options(lpips_weights=args.lpips_weights)) for name in NAMES]
    suite = Suite([Files("rec", files)], measures, jobs=args.jobs)
    theirs = [make() for make in peers(args.lpips_weights)]

    def ours_runs() -> dict[str, float | None]:
        torch.set_num_threads(1)
        ((result,), problems) = suite.run(items)
        assert not problems
        return {name: entry.value for name, entry in result.results.items()}

    def theirs_runs() -> dict[str, float | None]:
        torch.set_num_threads(args.jobs)
        return image_by_image(theirs, items, files)

    for warm in (ours_runs, theirs_runs):  # the first call sets up kernels
        items, everything = items[:4], items
        warm()
        items = everything
    found: dict[str, dict] = {"ours": {"wall": [], "processor": []}, "torchmetrics": {"wall": [], "processor": []}}
    for _ in range(args.repeats):
        for name, run in (("ours", ours_runs), ("torchmetrics", theirs_runs)):
            wall, processor = time.perf_counter(), time.process_time()
            found[name]["means"] = run()
            found[name]["wall"].append(time.perf_counter() - wall)
            found[name]["processor"].append(time.process_time() - processor)
    ratios = {clock: statistics.median(found["torchmetrics"][clock]) / statistics.median(found["ours"][clock])
              for clock in ("wall", "processor")}
    return {"num_images": args.num_images, "size": args.size, "jobs": args.jobs, "ratio": ratios, **found,
            "provenance": provenance()}


def write_pairs(folder: Path, count: int, size: int) -> None:
    """Smooth pictures and the same with noise."""
    rng = np.random.default_rng(0)
    for kind in ("ref", "rec"):
        (folder / kind).mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels = np.array(coarse.resize((size, size), Image.Resampling.BICUBIC))
        noise = rng.integers(-24, 25, pixels.shape)
        save_image(pixels, folder / "ref" / f"{number:05}.png")
        save_image((pixels + noise).clip(0, 255).astype(np.uint8), folder / "rec" / f"{number:05}.png")


def peers(weights: str | None) -> list[Callable[[], Metric]]:
    """torchmetrics' four; its LPIPS class needs torchvision's download, so the network here is ours inside its mean."""
    from torchmetrics import MeanMetric
    from torchmetrics.image import (
        MultiScaleStructuralSimilarityIndexMeasure,
        PeakSignalNoiseRatio,
        StructuralSimilarityIndexMeasure,
    )

    network = LPIPS("alex", weights)

    class Perceptual(MeanMetric):
        @torch.no_grad()
        def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:  # type: ignore[override]  # torchmetrics' own idiom
            super().update(network(preds, target))

    return [lambda: PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)),
            lambda: StructuralSimilarityIndexMeasure(data_range=1.0),
            lambda: MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0), Perceptual]


def image_by_image(metrics: list[Metric], items: list[Item], files: dict[str, Path]) -> dict[str, float | None]:
    """Each file read, each metric updated, then the means."""
    for metric in metrics:
        metric.reset()
    for item in items:
        target, preds = (load_image(path).tensor()[None] for path in (item.path, files[item.name]))
        for metric in metrics:
            metric.update(preds, target)
    return {name: metric.compute().item() for name, metric in zip(NAMES, metrics, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
