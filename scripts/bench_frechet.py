"""Time the Frechet distance beside scipy's sqrtm, which pytorch-fid and clean-fid use, and check that both agree.

    python scripts/bench_frechet.py [--dim 2048] [--num_images 5000] [--threads 1] [--repeats 1]

Two clouds of correlated Gaussian features, more vectors than dimensions so that the answer is well defined; the
statistics are made before the clock starts. Bars, in processor seconds: 10x, and distances equal to 1e-6 of themselves
(and of one). A missed bar exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

BAR, TOLERANCE = 10.0, 1e-6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of scipy's BLAS")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.num_images <= args.dim:
        parser.error("take more images than dimensions: of fewer, the distance is known to rounding only")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # read when the libraries are loaded
    import torch

    from vtc.eval.frechet import FeatureStatistics, feature_statistics, frechet_distance
    from vtc.eval.provenance import provenance

    torch.set_num_threads(args.threads)
    try:
        from scipy.linalg import sqrtm
    except ImportError:
        print("bench_frechet: scipy is not installed: pip install vtc[eval]", file=sys.stderr)
        return 1

    def cloud(seed: int) -> FeatureStatistics:
        generator = torch.Generator().manual_seed(seed)
        decay = torch.arange(1, args.dim + 1) ** -0.5  # a spectrum that falls, as that of features does
        mix = torch.randn(args.dim, args.dim, generator=generator) / args.dim**0.5 * decay
        return feature_statistics(torch.randn(args.num_images, args.dim, generator=generator) @ mix.T + 0.1 * seed)

    a, b = cloud(0), cloud(1)

    def scipys() -> float:
        root = sqrtm(a.covariance.numpy() @ b.covariance.numpy())
        means = (a.mean - b.mean).square().sum()
        return float(means + a.covariance.trace() + b.covariance.trace() - 2 * root.trace().real)

    ours = [timed(lambda: frechet_distance(a, b)) for _ in range(args.repeats)]
    theirs = [timed(scipys) for _ in range(args.repeats)]
    (mine, my_wall, my_cpu), (other, their_wall, their_cpu) = (
        (side[0][0], min(s[1] for s in side), min(s[2] for s in side)) for side in (ours, theirs))
    difference = abs(mine - other)
    ratio = their_cpu / my_cpu
    print(json.dumps({"dim": args.dim, "num_images": args.num_images, "threads": args.threads, "distance": mine,
                      "difference": difference, "vtc_processor": my_cpu, "sqrtm_processor": their_cpu,
                      "processor_ratio": ratio, "vtc_wall": my_wall, "sqrtm_wall": their_wall,
                      "wall_ratio": their_wall / my_wall, "provenance": provenance()}, indent=1))
    failed = missed(ratio, difference, mine)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def timed(function: Callable[[], float]) -> tuple[float, float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - wall, time.process_time() - processor


def missed(ratio: float, difference: float, distance: float) -> list[str]:
    """A sentence for each bar that is not met."""
    found = []
    if ratio < BAR:
        found.append(f"NOT MET: {ratio:.1f}x less processor time than sqrtm, the bar is {BAR:g}x")
    if not difference <= TOLERANCE * max(1.0, distance):
        found.append(f"NOT MET: the distances differ by {difference:.2g} of {distance:.6g}")
    return found


if __name__ == "__main__":
    sys.exit(main())
