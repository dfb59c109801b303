"""Bits per pixel from the bytes of whole files: header, checksum and all, as they lie on the disk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.eval.metric import Metric


def bits_per_pixel(num_bytes: int, height: int, width: int) -> float:
    """Eight times the file's bytes over its pixels.

    >>> bits_per_pixel(1966, 512, 768)
    0.0399983723958...
    """
    if num_bytes < 0 or height < 1 or width < 1:
        raise ConfigError(f"{num_bytes} bytes for {width}x{height} pixels make no rate.")
    return 8 * num_bytes / (height * width)


class BitsPerPixel(Metric):
    """Rate over a data set.

    aggregation: "mean_of_images" averages each file's rate; "pooled" is all bits over all pixels. They are equal
        where all images have one size.

    >>> metric = BitsPerPixel()
    >>> metric.update(100, 10, 10)
    >>> metric.update(100, 20, 20)
    >>> metric.compute()
    tensor(5., dtype=torch.float64)
    >>> pooled = BitsPerPixel("pooled")
    >>> pooled.update(100, 10, 10)
    >>> pooled.update(100, 20, 20)
    >>> pooled.compute()
    tensor(3.2000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    rates: Tensor
    count: Tensor
    total_bits: Tensor
    pixels: Tensor

    def __init__(self, aggregation: Literal["mean_of_images", "pooled"] = "mean_of_images") -> None:
        super().__init__()
        if aggregation not in ("mean_of_images", "pooled"):
            raise ConfigError(f'A rate is aggregated as "mean_of_images" or "pooled", not {aggregation!r}.')
        self.aggregation = aggregation
        self.add_state("rates", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "total_bits", "pixels"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, num_bytes: int, height: int, width: int) -> None:
        """Add one file of `num_bytes` that holds a picture of height x width."""
        self.rates += bits_per_pixel(num_bytes, height, width)
        self.count += 1
        self.total_bits += 8 * num_bytes
        self.pixels += height * width

    def compute(self) -> Tensor:
        """Bits per pixel, float64; NaN before the first file."""
        return self.total_bits.double() / self.pixels if self.aggregation == "pooled" else self.rates / self.count
