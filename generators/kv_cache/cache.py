"""One key-value cache for every generator and every policy. The model calls `attend`, and nothing else.

    for each head group of the layer:
        candidates = stored keys, then the step's own
        attended   = policy.attended(candidates)           before attention; None: all
        out        = softmax(q k^T) v                      one dense attention a group
        stored     = policy.stored(attended)               after attention; None: all; nothing of the last step

Keys lie as the model gives them, after norm and rotation, so what stays needs no second look. Heads that keep different
numbers of tokens are different groups with tensors of their own: no mask, no padding, so what is dropped is really
free. The last step's keys are never stored: nothing would read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.full import Full
from vtc.generators.kv_cache.policy import Candidates, Heads, KVPolicy, Merged
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.kv_cache.storage import MixedBuffer, MixedPrecision, Storage, TokenBuffer, check_storage, gather


@dataclass
class HeadGroup:
    """Heads that keep equally many tokens: their keys and values, and which tokens these are."""

    heads: Heads
    k: TokenBuffer | MixedBuffer
    v: TokenBuffer | MixedBuffer
    tokens: Tensor | None = None  # (1 | B, 1 | h, n) int64
    scores: Tensor | None = None  # (B, h, n) float32, the policy's own

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, allocated."""
        return self.k.nbytes + self.v.nbytes

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of token numbers and scores."""
        return sum(t.nbytes for t in (self.tokens, self.scores) if t is not None)


@dataclass
class KVCache:
    """The keys and values of one generation.

    policy: by default everything of the steps before the last stays.
    storage: another float type, "int8", "int4" or `MixedPrecision` for what is stored; the step that runs sees its own
        keys as they are.
    batch_halves: the batch is two halves of guidance, conditional and not, which shall keep the same tokens.
    """

    schedule: Schedule
    policy: KVPolicy = field(default_factory=Full)
    storage: Storage = None
    batch_halves: bool = False

    def __post_init__(self) -> None:
        self.policy.check(self.schedule)
        check_storage(self.storage, self.schedule.head_dim)
        self.groups = [[HeadGroup(heads, self._buffer(layer), self._buffer(layer)) for heads in
                        self.policy.heads(self.schedule, layer)] for layer in range(self.schedule.layers)]
        self._nbytes = self._peak = 0

    def _buffer(self, layer: int) -> TokenBuffer | MixedBuffer:
        if isinstance(self.storage, MixedPrecision):
            return MixedBuffer(self.storage)
        if self.policy.keeps_all:
            return TokenBuffer(self.storage, self.schedule.stored_tokens)
        # Any other grows as it goes: a raster model's by half at a time, for its steps are many and small.
        if not self.schedule.raster:
            return TokenBuffer(self.storage, growth=1.0)
        most = self.policy.budget(self.schedule, layer, self.schedule.steps - 1)
        return TokenBuffer(self.storage, limit=min(most, self.schedule.stored_tokens) + 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int) -> Tensor:
        """Attention of a step's tokens, (B, H, m, D) each, to everything stored and to one another: (B, H, m, D).

        A raster model may give several steps at once, from `step` on; no token then sees a later one.
        """
        expected = (self.schedule.heads, self.schedule.tokens(step), self.schedule.head_dim)
        if self.schedule.raster:
            expected = (expected[0], max(q.shape[2], expected[1]), expected[2])
        if tuple(q.shape[1:]) != expected:
            raise ConfigError(f"Step {step} has (heads, tokens, dimensions) {expected}, not {tuple(q.shape[1:])}.")
        if self.batch_halves and len(q) % 2:
            raise ConfigError(f"A batch of {len(q)} is no two halves of guidance: make the cache without batch_halves.")
        groups = self.groups[layer]
        if step == 0 and groups[0].k.length > 0:
            raise ConfigError("This cache holds a generation already: make a new one for each.")
        if len(groups) == 1:
            return self._attend(groups[0], q, k, v, layer, step)
        out = torch.empty_like(q)
        for group in groups:
            h = group.heads
            out[:, h] = self._attend(group, q[:, h], k[:, h], v[:, h], layer, step)
        return out

    def _change(self, group: HeadGroup, of_k: Callable[[TokenBuffer | MixedBuffer], None],
                of_v: Callable[[TokenBuffer | MixedBuffer], None] | None = None) -> None:
        """Change a group's keys, then its values, and keep account of the peak: what moves is there twice."""
        for buffer, change in ((group.k, of_k), (group.v, of_v or of_k)):
            before = buffer.nbytes
            change(buffer)
            self._nbytes += buffer.nbytes - before
            self._peak = max(self._peak, self._nbytes + (before if buffer.nbytes != before else 0))

    def _attend(self, group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int) -> Tensor:
        new = k.shape[2]
        first = self.schedule.starts[step]
        last = first + new == self.schedule.all_tokens
        # Where what is stored is what was given, write first and attend to the buffer: nothing is copied twice.
        write_first = not last and self.storage in (None, k.dtype)
        if write_first:
            self._change(group, lambda keys: keys.append(k), lambda values: values.append(v))
        k_all, v_all = (self._with(group.k, k, write_first), self._with(group.v, v, write_first))
        numbers = torch.arange(first, first + new, device=k.device)
        seen = Candidates(self.schedule, layer, step, group.heads, q, k_all, v_all, _joined(group.tokens, numbers), new,
                          _extended(group.scores, new), self.batch_halves)
        chosen = self.policy.attended(seen)
        transient = 0 if write_first or k_all is k else k_all.nbytes + v_all.nbytes
        if isinstance(chosen, Merged):
            k_all, v_all = chosen.k, chosen.v
            transient += k_all.nbytes + v_all.nbytes
        elif chosen is not None:
            seen = selected(seen, chosen)
            k_all, v_all = seen.k, seen.v
            transient += k_all.nbytes + v_all.nbytes
        mask = _earlier(seen.tokens, numbers) if self.schedule.raster and new > 1 else None
        out = F.scaled_dot_product_attention(q, k_all, v_all, mask, scale=self.schedule.softmax_scale)
        self._peak = max(self._peak, self._nbytes + transient)
        if not last:
            if not write_first:
                self._change(group, lambda keys: keys.append(k), lambda values: values.append(v))
            self._store(group, seen, chosen if isinstance(chosen, Tensor) else None)
        elif new > 1 and self.schedule.raster and self.policy.keeps_all:
            # Several steps at once, of which only the very last is never read again; `truncate` may take some back.
            self._change(group, lambda keys: keys.append(k[:, :, :-1]), lambda values: values.append(v[:, :, :-1]))
            group.tokens = seen.tokens[..., :-1]
        return out

    def _store(self, group: HeadGroup, seen: Candidates, attended: Tensor | None) -> None:
        """Drop from the group, which holds all, what was not attended or is not to stay."""
        keep = self.policy.stored(seen)
        group.tokens, group.scores = seen.tokens, seen.scores
        if keep is not None:
            group.tokens = _numbers_at(group.tokens, keep)
            group.scores = None if group.scores is None else group.scores.gather(2, keep.expand(*seen.k.shape[:2], -1))
            if attended is not None:
                attended = _numbers_at(attended if attended.ndim == 3 else attended[None, None], keep)
        indices = attended if attended is not None else keep
        if indices is not None:
            self._change(group, lambda buffer: buffer.take(indices))
        if isinstance(self.storage, MixedPrecision):
            self._split(group, seen, keep)

    def _split(self, group: HeadGroup, seen: Candidates, keep: Tensor | None) -> None:
        """The stored tokens with the most attention lie finely, the others coarsely."""
        assert isinstance(self.storage, MixedPrecision)
        received = seen.attention(seen.spaced_queries(self.storage.queries)).sum(2)
        if keep is not None:
            received = received.gather(2, keep.expand(*received.shape[:2], -1))
        kept = replace(seen, k=seen.k[:, :, : received.shape[2]])  # as many keys as there are scores
        fine = kept.top(received, max(1, round(self.storage.share * received.shape[2])))
        self._change(group, lambda buffer: cast(MixedBuffer, buffer).split(fine))

    @staticmethod
    def _with(buffer: TokenBuffer | MixedBuffer, x: Tensor, written: bool) -> Tensor:
        if buffer.length == 0:
            return x
        return buffer.read(x.dtype) if written else torch.cat([buffer.read(x.dtype), x], 2)

    def truncate(self, tokens: int) -> None:
        """Forget token number `tokens` and all later ones, as if they had not been seen; for policies that keep all."""
        if not self.policy.keeps_all:
            raise ConfigError(f"What {type(self.policy).__name__} has dropped does not come back: only a cache that "
                              "keeps all can be truncated.")
        for group in (group for layer in self.groups for group in layer):
            if group.tokens is not None:
                self._change(group, lambda buffer: buffer.truncate(tokens))
                group.tokens = group.tokens[..., :tokens]

    def nbytes(self, metadata: bool = False) -> int:
        """Bytes of keys and values that are allocated now; with `metadata` also of token numbers and scores."""
        return sum(g.nbytes + (g.metadata_nbytes if metadata else 0) for layer in self.groups for g in layer)

    def peak_nbytes(self) -> int:
        """The most bytes of keys and values allocated at once: stored, on the move, joined for the attention."""
        return self._peak

    def kept(self, layer: int) -> list[int]:
        """Tokens that are stored now, for each head of the layer."""
        counts = torch.zeros(self.schedule.heads, dtype=torch.int64)
        for group in self.groups[layer]:
            counts[group.heads] = group.k.length
        return counts.tolist()


def _earlier(keys: Tensor, queries: Tensor) -> Tensor:
    """(1 | B, 1 | h, n) key numbers and (m,) query numbers: which keys a query may see, (1 | B, 1 | h, m, n)."""
    return keys[:, :, None, :] <= queries[:, None]


def _joined(stored: Tensor | None, new: Tensor) -> Tensor:
    """Token numbers (1 | B, 1 | h, n) and those of the step, (m,)."""
    if stored is None:
        return new[None, None]
    return torch.cat([stored, new.expand(*stored.shape[:2], -1)], 2)


def _extended(scores: Tensor | None, new: int) -> Tensor | None:
    return None if scores is None else F.pad(scores, (0, new))


def _numbers_at(numbers: Tensor, indices: Tensor) -> Tensor:
    """(1 | B, 1 | h, n) at (m,) or (B | 1, h | 1, m)."""
    if indices.ndim == 1:
        return numbers.index_select(2, indices)
    shape = torch.broadcast_shapes(numbers.shape[:2], indices.shape[:2])
    return numbers.expand(*shape, -1).gather(2, indices.expand(*shape, -1))


def selected(seen: Candidates, chosen: Tensor) -> Candidates:
    """The candidates at some indices, (m,) or (B | 1, h | 1, m)."""
    new = chosen >= seen.count - seen.new
    scores = seen.scores
    return replace(seen, k=gather(seen.k, chosen), v=gather(seen.v, chosen), tokens=_numbers_at(seen.tokens, chosen),
                   new=int(new.sum(-1).max()), scores=None if scores is None else _numbers_at(scores, chosen))
