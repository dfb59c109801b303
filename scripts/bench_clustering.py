"""K-means over the words of a codebook: vtc against scikit-learn, from the same start.

Both get the same float32 words, the same first centres, one start, and the same tolerance, iterations and threads.
Three kinds of words: independent normal numbers; 2,048 groups of similar words; words near a space of 16 dimensions,
where most centres move to the end and least can be skipped. The two take turns; the time is each one's shortest.

    OMP_NUM_THREADS=1 python scripts/bench_clustering.py          (needs the `bench` extra)

Exit code 1 where a row misses a bar: at least 3 times as fast (wall time), inertia within 0.5 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc.tokenizers.kmeans import kmeans

#: what each row must reach
FASTER, INERTIA = 3.0, 0.005


def words(kind: str, count: int, dim: int) -> Tensor:
    """(count, dim) float32 from seed 0."""
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(count, dim, generator=generator)
    if kind == "groups":
        middles = torch.randn(count // 8, dim, generator=generator)
        chosen = torch.randint(len(middles), (count,), generator=generator)
        return middles[chosen] + 0.5 * torch.randn(count, dim, generator=generator)
    basis = torch.randn(16, dim, generator=generator)
    near = torch.randn(count, 16, generator=generator) @ basis / 4
    return near + 0.1 * torch.randn(count, dim, generator=generator)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds, processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - processor


def missed_bars(row: str, faster: float, inertia: float) -> list[str]:
    """What is wrong with a row: how many times as fast it is, and the ratio of the inertias."""
    missed = []
    if faster < FASTER:
        missed.append(f"{row}: {faster:.1f} times as fast, not {FASTER:g}")
    if abs(inertia - 1) > INERTIA:
        missed.append(f"{row}: inertia off by {inertia - 1:+.2%}, not within {INERTIA:.1%}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 8192])
    kinds = ["normal", "groups", "plane"]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(args.threads)
    kmeans(torch.randn(64, args.dim), 8)  # the first call of a GEMM prepares it
    print(f"torch {torch.__version__}, {args.words} x {args.dim} float32, {args.threads} thread(s), tolerance "
          f"{args.tolerance}, at most {args.iterations} iterations")
    print("| words | S | vtc s (cpu) | scikit-learn s (cpu) | faster (cpu) | iterations | inertia vtc, scikit-learn |")
    print("|---|---|---|---|---|---|---|")
    missed: list[str] = []
    for kind in args.kinds:
        points = words(kind, args.words, args.dim)
        for size in args.sizes:
            rows = torch.randperm(len(points), generator=torch.Generator().manual_seed(size))[:size]
            start = points[rows].clone()
            reference = KMeans(size, init=start.numpy(), n_init=1, max_iter=args.iterations, tol=args.tolerance)
            runs: dict[str, list[tuple[Any, float, float]]] = {"vtc": [], "sklearn": []}
            for _ in range(args.repeats):
                runs["vtc"].append(timed(partial(kmeans, points, size, start=start, iterations=args.iterations,
                                                 tolerance=args.tolerance)))
                with threadpool_limits(args.threads):
                    runs["sklearn"].append(timed(partial(reference.fit, points.numpy())))
            (ours, _, _), (theirs, _, _) = runs["vtc"][0], runs["sklearn"][0]
            wall, cpu = ({name: min(run[i] for run in of) for name, of in runs.items()} for i in (1, 2))
            print(f"| {kind} | {size} | {wall['vtc']:.2f} ({cpu['vtc']:.2f}) "
                  f"| {wall['sklearn']:.2f} ({cpu['sklearn']:.2f}) | {wall['sklearn'] / wall['vtc']:.1f} "
                  f"({cpu['sklearn'] / cpu['vtc']:.1f}) | {ours.iterations} / {theirs.n_iter_} "
                  f"| {ours.inertia:.6g} / {theirs.inertia_:.6g} ({ours.inertia / theirs.inertia_ - 1:+.5%}) |",
                  flush=True)
            missed += missed_bars(f"{kind}, {size}", wall["sklearn"] / wall["vtc"], ours.inertia / theirs.inertia_)
    print("\n" + "\n".join(f"NOT MET {line}" for line in missed) if missed else "\nall bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
