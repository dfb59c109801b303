"""Which residual block does the most arithmetic per second on this machine? What LocalVQ's design rests on.

Forward, and forward + backward, of two blocks at each resolution of a 256 x 256 crop, batch 8, in float32 and bfloat16
autocast. Rates count the convolutions' multiply-adds as two operations; a block that only moves data scores low.

    python scripts/bench_blocks.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.tokenizers.local_vq import Block, ChannelNorm


class DepthwiseBlock(nn.Module):
    """ConvNeXt's block: depth-wise 7x7, norm, 1x1 to twice the width, GELU, 1x1 back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = ChannelNorm(width)
        self.expand, self.reduce = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(F.gelu(self.expand(self.norm(self.spatial(x)))))


class DoubleBlock(nn.Module):
    """VQGAN's block without its group norms: two dense 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def seconds(net: nn.Module, x: Tensor, bfloat16: bool, repeats: int) -> tuple[float, float]:
    """Medians for the forward pass alone and for forward and backward."""

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return net(x)

    def inference() -> None:
        with torch.no_grad():
            forward()

    def training() -> None:
        forward().float().mean().backward()

    return median_seconds(inference, repeats), median_seconds(training, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; GFLOP/s, forward | forward + backward")
    for side, width in ((16, 384), (32, 192), (64, 96), (128, 48)):
        x = torch.randn(8, width, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        for block in (Block, DoubleBlock, DepthwiseBlock):
            net = nn.Sequential(block(width), block(width))
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
            work = 2 * 8 * side * side * sum(p.numel() for p in net.parameters() if p.ndim == 4)
            cells = []
            for bfloat16 in (False, True):
                inference, training = seconds(net, x, bfloat16, repeats)
                cells.append(f"{work / inference / 1e9:5.0f} | {3 * work / training / 1e9:5.0f}")
            name = f"{side:3d}^2 x {width:3d}  {block.__name__:14s}"
            print(f"{name}  float32 {cells[0]}  bfloat16 {cells[1]}", flush=True)


if __name__ == "__main__":
    main()
