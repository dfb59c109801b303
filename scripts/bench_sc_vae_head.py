"""SC-VAE's decode head beside the published, partitioned form: CPU time and peak memory.

    python scripts/bench_sc_vae_head.py                   # 128 channels of 256 x 256 features: an image of 512 x 512
    python scripts/bench_sc_vae_head.py --side 512

One thread; `ms` is the median of the process's CPU time over the repeats, `MB` is by how much the process's peak memory
grew; each form runs in a process of its own. Both forms get the same features and weights; "difference" is the largest
one from the partitioned form, in units of its standard deviation.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor


def partitioned(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The published form: quadrants with a halo of one pixel, each doubled and convolved, cropped from 1, stitched."""
    height, width = features.shape[-2:]
    padded = F.pad(features, (1, 1, 1, 1))
    rows = []
    for top in (0, height // 2):
        row = []
        for left in (0, width // 2):
            part = padded[:, :, top : top + height // 2 + 2, left : left + width // 2 + 2]
            part = F.conv2d(F.interpolate(part, scale_factor=2.0), weight, bias, padding=1)
            row.append(part[:, :, 1 : 1 + height, 1 : 1 + width])
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def run(form: str, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The head in one of its forms."""
    if form == "partitioned":
        return partitioned(features, weight, bias)
    from vtc.tokenizers.scale_consistent_vae import doubled_conv

    return doubled_conv(features, weight, bias, "upstream")


def peak_bytes() -> int:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


@torch.no_grad()
def measure(form: str, channels: int, side: int, repeats: int) -> dict[str, float]:
    """One form, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, channels, 3, 3, generator=generator) * 0.05
    bias = torch.randn(3, generator=generator)
    small = torch.randn(1, channels, 16, 16, generator=generator)
    expected = partitioned(small, weight, bias)
    difference = float((run(form, small, weight, bias) - expected).abs().max() / expected.std())
    features = torch.randn(1, channels, side, side, generator=generator)
    before = peak_bytes()
    run(form, features, weight, bias)
    grown = peak_bytes() - before
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run(form, features, weight, bias)
        seconds.append(time.process_time() - start)
    return {"ms": 1000 * statistics.median(seconds), "MB": grown / 1e6, "difference": difference}


def main() -> int:
    """The command; 0 where vtc's form is at least five times as fast as the partitioned one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--side", type=int, default=256, help="of the features, an even number; the image's is twice")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--form", choices=("partitioned", "vtc"), help="measure this one alone, here, as JSON")
    args = parser.parse_args()
    if args.side % 2 or args.side < 2 or args.channels < 1 or args.repeats < 1:
        parser.error("--side is an even number, --channels and --repeats are at least 1")
    if args.form:
        print(json.dumps(measure(args.form, args.channels, args.side, args.repeats)))
        return 0
    rows = {}
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread, "
          f"1 x {args.channels} x {args.side} x {args.side}\n\n| form | ms | MB | difference |\n|---|---|---|---|")
    for form in ("partitioned", "vtc"):
        command = [sys.executable, __file__, "--form", form, "--channels", str(args.channels), "--side", str(args.side),
                   "--repeats", str(args.repeats)]
        rows[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {form} | {rows[form]['ms']:.1f} | {rows[form]['MB']:.0f} | {rows[form]['difference']:.1e} |")
    ratio = rows["partitioned"]["ms"] / rows["vtc"]["ms"]
    print(f"\n{ratio:.1f} times as fast")
    return 0 if ratio >= 5 else 1


if __name__ == "__main__":
    sys.exit(main())
