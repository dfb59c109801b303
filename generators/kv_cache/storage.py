"""How keys and values lie in memory: as they come, in another float type, or as int8 with a step a token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: "int8": 127 levels to each side of zero, and one float16 step for each token and head
Storage = torch.dtype | Literal["int8"] | None


class TokenBuffer:
    """(B, h, n, D) vectors that grow along n: a token that was written is never copied again until some are dropped.

    storage: None keeps the type that comes.
    capacity: tokens to allocate for at first; where more come, memory grows by half.
    """

    def __init__(self, storage: Storage = None, capacity: int = 0) -> None:
        self.storage, self.capacity, self.length = storage, capacity, 0
        self.values: Tensor | None = None
        self.steps: Tensor | None = None  # (B, h, n, 1) float16, int8 alone

    def append(self, x: Tensor) -> None:
        """Add (B, h, m, D) at the end."""
        values, steps = _stored(x, self.storage)
        stop = self.length + x.shape[2]
        self.values = self._room(self.values, values, stop)
        self.values[:, :, self.length : stop] = values
        if steps is not None:
            self.steps = self._room(self.steps, steps, stop)
            self.steps[:, :, self.length : stop] = steps
        self.length = stop

    def take(self, indices: Tensor) -> None:
        """Keep the tokens `indices`, (m,) for all or (B | 1, h | 1, m), in this order; the rest is freed."""
        self.values = None if self.values is None else gather(self.values[:, :, : self.length], indices)
        self.steps = None if self.steps is None else gather(self.steps[:, :, : self.length], indices)
        self.length = self.capacity = indices.shape[-1]

    def read(self, dtype: torch.dtype) -> Tensor:
        """(B, h, n, D) in `dtype`; a view where that is how they lie."""
        if self.values is None:
            raise ValueError("nothing was stored")
        values = self.values[:, :, : self.length]
        if self.steps is not None:
            return values.to(dtype) * self.steps[:, :, : self.length].to(dtype)
        return values.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in (self.values, self.steps) if t is not None)

    def _room(self, old: Tensor | None, like: Tensor, tokens: int) -> Tensor:
        if old is not None and old.shape[2] >= tokens:
            return old
        room = max(tokens, self.capacity) if old is None else max(tokens, old.shape[2] * 3 // 2)
        new = like.new_empty(*like.shape[:2], room, like.shape[3])
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """(B, h, n, D) at (m,) or (B | 1, h | 1, m) to (B, h, m, D)."""
    if indices.ndim == 1:
        return x.index_select(2, indices)
    indices = indices.expand(x.shape[0], x.shape[1], -1)
    return x.gather(2, indices[..., None].expand(-1, -1, -1, x.shape[3]))


def _stored(x: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    if storage is None:
        return x, None
    if storage != "int8":
        return x.to(storage), None
    step = (x.abs().amax(-1, keepdim=True) / 127).half().clamp(min=torch.finfo(torch.float16).tiny)
    return (x / step.to(x.dtype)).round().clamp(-127, 127).to(torch.int8), step
