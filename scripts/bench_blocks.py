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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; GFLOP/s, forward | forward + backward")
    for side, width in ((16, 384), (32, 192), (64, 96), (128, 48)):
        x = torch.randn(8, width, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        for block in (Block, DoubleBlock, DepthwiseBlock):
            net = nn.Sequential(block(width), block(width)).to(memory_format=torch.channels_last)
            work = 2 * 8 * side * side * sum(p.numel() for p in net.parameters() if p.ndim == 4)
            cells = []
            for enabled in (False, True):

                def forward(net: nn.Module = net, x: Tensor = x, enabled: bool = enabled) -> Tensor:
                    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                        return net(x)

                with torch.no_grad():
                    inference = median_seconds(forward, repeats)
                training = median_seconds(lambda f=forward: f().float().mean().backward(), repeats)
                cells.append(f"{work / inference / 1e9:5.0f} | {3 * work / training / 1e9:5.0f}")
            name = f"{side:3d}^2 x {width:3d}  {block.__name__:14s}"
            print(f"{name}  float32 {cells[0]}  bfloat16 {cells[1]}", flush=True)


if __name__ == "__main__":
    main()
