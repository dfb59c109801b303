"""Time the GLCM score beside the scikit-image form that Diffusion-4K publishes, and check that both agree.

    python scripts/bench_glcm.py [--size 4096] [--threads 2] [--repeats 5] [--images DIR]

Three pictures: a photograph enlarged to the size, the same photograph tiled to it, and uniform noise, the worst case;
with --images the pictures of a folder, enlarged, in place of scikit-image's astronaut. scikit-image runs in one
process over --rows rows of patches (default 2) and is multiplied up; ours runs over the whole picture on --threads
threads, the compiler's time apart. Best of --repeats for both, alternating. Bars: 5x by wall clock on photographs, 4x
on noise, patches' scores equal to 1e-9; a missed one exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtc.errors import ConfigError
from vtc.eval.glcm import PATCH, glcm_patch_scores, grey_levels
from vtc.eval.provenance import provenance
from vtc.images import load_image
from vtc.script import run_script
from vtc.training.data import image_files

BARS = {"photograph": 5.0, "noise": 4.0}
TOLERANCE = 1e-9


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2, help="rows of patches that scikit-image measures")
    parser.add_argument("--images", type=Path, help="folder of photographs; default scikit-image's astronaut")
    args = parser.parse_args(arguments)
    return run_script(lambda: benchmark(args), "bench_glcm")


def benchmark(args: argparse.Namespace) -> int:
    """1 where we missed a bar."""
    try:
        import numba
    except ImportError as error:
        raise ConfigError("numba is not installed: pip install vtc[eval]") from error
    most = numba.get_num_threads()
    if not 1 <= args.threads <= most:
        raise ConfigError(f"numba may use 1 to {most} threads here, not {args.threads}.")
    numba.set_num_threads(args.threads)
    rows = [measure(name, levels, args) for name, levels in pictures(args.size, args.images).items()]
    print(json.dumps({"size": args.size, "threads": args.threads, "repeats": args.repeats, "rows": rows,
                      "provenance": provenance()}, indent=1))
    failed = missed(rows)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def pictures(size: int, folder: Path | None) -> dict[str, np.ndarray]:
    """64 grey levels (size, size) by name."""
    if size < PATCH:
        raise ConfigError(f"A picture has at least {PATCH} pixels a side, not {size}.")
    if folder is None:
        from skimage import data

        photographs = {"astronaut": data.astronaut()}
    else:
        photographs = {file.stem: load_image(file).pixels for file in image_files(folder)}
        if not photographs:
            raise ConfigError(f"There are no pictures in {folder}.")
    found = {}
    for name, pixels in photographs.items():
        enlarged = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        found[f"photograph {name}, enlarged"] = grey_levels(np.array(enlarged))
        height, width = pixels.shape[:2]
        tiled = np.tile(pixels, (-(-size // height), -(-size // width), 1))[:size, :size]
        found[f"photograph {name}, tiled"] = grey_levels(tiled)
    found["noise"] = np.random.default_rng(0).integers(0, 64, (size, size)).astype(np.uint8)
    return found


def measure(name: str, levels: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both and their ratios, and the largest difference of a patch's score."""
    rows = min(args.rows, len(levels) // PATCH)
    share = rows / (len(levels) // PATCH)
    glcm_patch_scores(levels[:PATCH])  # compiles
    ours, theirs = [], []
    for _ in range(args.repeats):
        scores, *spent = timed(lambda: glcm_patch_scores(levels))
        ours.append(spent)
        reference, *spent = timed(lambda: scikit_image(levels[: rows * PATCH]))
        theirs.append([seconds / share for seconds in spent])
    (our_wall, our_cpu), (their_wall, their_cpu) = (np.min(side, 0).tolist() for side in (ours, theirs))
    return {"picture": name, "vtc_wall": our_wall, "vtc_processor": our_cpu, "skimage_wall": their_wall,
            "skimage_processor": their_cpu, "wall_ratio": their_wall / our_wall,
            "processor_ratio": their_cpu / our_cpu, "difference": float(np.abs(scores[:rows] - reference).max())}


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - wall, time.process_time() - processor


def scikit_image(levels: np.ndarray) -> np.ndarray:
    """Upstream's form: `shannon_entropy` of the sixteen matrices of each patch."""
    from skimage.feature import graycomatrix
    from skimage.measure import shannon_entropy

    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    return np.array([[shannon_entropy(graycomatrix(levels[r : r + PATCH, c : c + PATCH], [1, 2, 3, 4], angles,
                                                   levels=64, symmetric=False, normed=True))
                      for c in range(0, levels.shape[1] - PATCH + 1, PATCH)]
                     for r in range(0, levels.shape[0] - PATCH + 1, PATCH)])


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each bar that is not met."""
    found = []
    for row in rows:
        bar = BARS[row["picture"].split()[0]]
        if row["wall_ratio"] < bar:
            found.append(f"NOT MET {row['picture']}: {row['wall_ratio']:.1f}x by wall clock, the bar is {bar:g}x")
        if not row["difference"] <= TOLERANCE:
            found.append(f"NOT MET {row['picture']}: scores differ by {row['difference']:.2g}, not {TOLERANCE:g}")
    return found


if __name__ == "__main__":
    sys.exit(main())
