"""Statistics of a batch that is spread over the processes of a data-parallel run; one process: nothing happens."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_parallel() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` summed over all processes, in place and without gradient."""
    if is_parallel():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """`x` averaged over all processes, in place and without gradient."""
    return sum_over_ranks(x).div_(dist.get_world_size()) if is_parallel() else x


def from_first_rank(x: Tensor) -> Tensor:
    """`x` of the first process, in place: what was drawn at random becomes the same everywhere."""
    if is_parallel():
        dist.broadcast(x, 0)
    return x
