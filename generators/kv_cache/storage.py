"""How keys and values lie in memory: as they come, in another float type, in 8 or 4 bits, or some finer than others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.errors import ConfigError

#: "int8" and "int4": 127 or 7 levels to each side of zero, and one float16 step for each token and head
Uniform = torch.dtype | Literal["int8", "int4"] | None


@dataclass(frozen=True)
class MixedPrecision:
    """A share of the tokens, those with the most attention, stored finely and the rest coarsely: ZipVL (2410.08584).

    Each head chooses anew at every step, from the attention of `queries` of the step's queries, evenly spaced. ZipVL
    lets the share follow the attention; here it is fixed, so that memory is known beforehand.
    """

    share: float = 0.2
    fine: Uniform = None
    coarse: Uniform = "int4"
    queries: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.queries < 1:
            raise ConfigError(f"Mixed precision takes a share between 0 and 1 and at least one query, not {self}.")
        for part in (self.fine, self.coarse):
            check_uniform(part)


Storage = Uniform | MixedPrecision


def check_uniform(storage: Uniform) -> None:
    """Raise ConfigError unless it is a way to store numbers."""
    if not (storage in (None, "int8", "int4") or (isinstance(storage, torch.dtype) and storage.is_floating_point)):
        raise ConfigError(f'Keys and values are stored in a float type of torch, "int8" or "int4", not {storage!r}.')


def check_storage(storage: Storage, head_dim: int) -> None:
    """Raise ConfigError unless vectors of so many numbers can be stored so."""
    parts = (storage.fine, storage.coarse) if isinstance(storage, MixedPrecision) else (storage,)
    for part in parts:
        check_uniform(part)
    if "int4" in parts and head_dim % 2:
        raise ConfigError(f"Two numbers of 4 bits share a byte, and {head_dim} dimensions a head are odd: take int8.")


class TokenBuffer:
    """(B, h, n, D) vectors that grow along n: a token that was written is never copied again until some are dropped.

    storage: None keeps the type that comes.
    capacity: tokens to allocate for at first.
    growth: where more come, memory is taken for all of them, or for this times what there was. 1 wastes none.
    limit: tokens that there will never be more of, so that no more are grown for.
    """

    def __init__(self, storage: Uniform = None, capacity: int = 0, growth: float = 1.5,
                 limit: int | None = None) -> None:
        self.storage, self.capacity, self.growth, self.limit, self.length = storage, capacity, growth, limit, 0
        self.values: Tensor | None = None
        self.steps: Tensor | None = None  # (B, h, n, 1) float16, of whole numbers alone

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

    def truncate(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        self.length = min(self.length, tokens)

    def read(self, dtype: torch.dtype) -> Tensor:
        """(B, h, n, D) in `dtype`; a view where that is how they lie."""
        if self.values is None:
            raise ValueError("nothing was stored")
        values = self.values[:, :, : self.length]
        if self.steps is None:
            return values.to(dtype)
        if self.storage == "int4":  # two to a byte, each 8 above its value
            values = torch.stack([values & 15, values >> 4], -1).flatten(-2).to(dtype) - 8
        return values.to(dtype) * self.steps[:, :, : self.length].to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in (self.values, self.steps) if t is not None)

    def _room(self, old: Tensor | None, like: Tensor, tokens: int) -> Tensor:
        if old is not None and old.shape[2] >= tokens:
            return old
        grown = self.capacity if old is None else int(old.shape[2] * self.growth)
        room = max(tokens, grown if self.limit is None else min(grown, self.limit))
        new = like.new_empty(*like.shape[:2], room, like.shape[3])
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new


class MixedBuffer:
    """A `TokenBuffer` in two parts, fine and coarse; it reads in the order in which the tokens came.

    What was appended or taken waits as it is until `split` says which of all tokens are fine.
    """

    def __init__(self, storage: MixedPrecision) -> None:
        self.storage, self.length = storage, 0
        self.dtype = torch.float32  # of what came last: what waits keeps it
        self.waiting: Tensor | None = None
        self.fine, self.coarse = TokenBuffer(storage.fine), TokenBuffer(storage.coarse)
        self.place: Tensor | None = None  # (B, h, n) where each token lies in fine and coarse, one after the other

    def append(self, x: Tensor) -> None:
        """Add (B, h, m, D) at the end."""
        self.dtype = x.dtype
        self.waiting = x if self.length == 0 else torch.cat([self.read(x.dtype), x], 2)
        self.length, self.place = self.waiting.shape[2], None

    def take(self, indices: Tensor) -> None:
        """Keep the tokens `indices`, (m,) for all or (B | 1, h | 1, m), in this order."""
        self.waiting = gather(self.read(self.dtype), indices)
        self.length, self.place = indices.shape[-1], None

    def split(self, fine: Tensor) -> None:
        """Store the tokens `fine`, (B, h, m), finely and the others coarsely."""
        x = self.read(self.dtype)
        coarse = torch.ones(x.shape[:3], dtype=torch.uint8, device=x.device).scatter(2, fine, 0)
        order = coarse.argsort(stable=True)  # the fine ones first; how many there are needs no look at the device
        self.fine, self.coarse = TokenBuffer(self.storage.fine), TokenBuffer(self.storage.coarse)
        self.fine.append(gather(x, order[..., : fine.shape[2]]))
        self.coarse.append(gather(x, order[..., fine.shape[2] :]))
        self.place, self.waiting = order.argsort(-1), None

    def truncate(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        if tokens < self.length:
            self.waiting, self.length, self.place = self.read(self.dtype)[:, :, :tokens].clone(), tokens, None

    def read(self, dtype: torch.dtype) -> Tensor:
        """(B, h, n, D) in `dtype`."""
        if self.waiting is not None:
            return self.waiting.to(dtype)
        if self.place is None:
            raise ValueError("nothing was stored")
        return gather(torch.cat([self.fine.read(dtype), self.coarse.read(dtype)], 2), self.place)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors; the tokens' places are metadata."""
        return self.waiting.nbytes if self.waiting is not None else self.fine.nbytes + self.coarse.nbytes


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """(B, h, n, D) at (m,) or (B | 1, h | 1, m) to (B, h, m, D)."""
    if indices.ndim == 1:
        return x.index_select(2, indices)
    # As rows of one long table: whole vectors are copied, where `Tensor.gather` looks up every number by itself.
    batch, heads, count, width = x.shape
    first = torch.arange(0, batch * heads * count, count, device=x.device).view(batch, heads, 1)
    rows = (first + indices).flatten()
    return x.reshape(-1, width).index_select(0, rows).view(batch, heads, -1, width)


def _stored(x: Tensor, storage: Uniform) -> tuple[Tensor, Tensor | None]:
    if storage is None:
        return x, None
    if isinstance(storage, torch.dtype):
        return x.to(storage), None
    levels = 127 if storage == "int8" else 7
    step = (x.abs().amax(-1, keepdim=True) / levels).half().clamp(min=torch.finfo(torch.float16).tiny)
    whole = (x / step.to(x.dtype)).round().clamp(-levels, levels)
    if storage == "int8":
        return whole.to(torch.int8), step
    low, high = (whole + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, step
