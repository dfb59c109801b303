"""The steps of one generation, and the attention that runs in each: what a cache and its policies know of a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from vtc.errors import ConfigError

Grid = tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """Tokens come in steps; those of one step see one another and all earlier ones.

    sizes: (rows, columns) of each step. VAR and Infinity: the scales, coarse to fine. A raster model: (1, P) for its
        prefix, then (1, 1) for each token.
    layers, heads, head_dim: of the self attention.
    softmax_scale: the factor on q.k; 1 where the model has put it into q.
    raster: tokens of one grid, line by line, each a step of its own.
    columns: of a raster model's grid.
    """

    sizes: tuple[Grid, ...]
    layers: int
    heads: int
    head_dim: int
    softmax_scale: float = 1.0
    raster: bool = False
    columns: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(min(s) for s in self.sizes) < 1 or min(self.layers, self.heads, self.head_dim) < 1:
            raise ConfigError(f"A schedule needs steps of at least one token, layers and heads, not {self}.")
        if self.raster and self.columns < 1:
            raise ConfigError("A raster schedule needs the number of columns of its grid.")

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Number of the first token of each step, and after them the number of all tokens."""
        return (0, *accumulate(rows * columns for rows, columns in self.sizes))

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.sizes)

    @property
    def all_tokens(self) -> int:
        """Tokens of all steps: what upstream's caches hold in the end."""
        return self.starts[-1]

    @property
    def stored_tokens(self) -> int:
        """Tokens before the last step: nothing reads the last step's again, so no cache need hold more."""
        return self.starts[-2]

    def tokens(self, step: int) -> int:
        """Tokens of a step."""
        return self.starts[step + 1] - self.starts[step]

    def span(self, first: int, last: int) -> slice:
        """Token numbers of the steps first ... last, both included."""
        return slice(self.starts[first], self.starts[last + 1])

    def step_of(self, tokens: Tensor) -> Tensor:
        """Token numbers to the steps that they belong to."""
        return torch.bucketize(tokens, _ends(self.starts[1:], tokens.device), right=True)

    def kv_bytes(self, tokens: float, batch: int, bytes_per_number: float = 2.0) -> float:
        """Bytes of the keys and values of `tokens` tokens in every layer and head. batch: both halves of guidance."""
        return 2 * self.layers * self.heads * self.head_dim * tokens * batch * bytes_per_number


@lru_cache(maxsize=32)
def _ends(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on a device, which policies ask for at every step."""
    return torch.tensor(numbers, device=device)
