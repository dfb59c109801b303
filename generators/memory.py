"""How much memory a generation takes, before it runs: it runs once without numbers.

    generator = load_generator("folder", weights=False)        # shapes alone, of no bytes
    print(estimate_memory(generator, batch=16, spec=parse_policy("hack:0.3+int8")))

Model, tokenizer, keys and values become tensors that have a shape and no memory (torch's "meta" device), and the code
that generates runs on them: every tensor's bytes count from its making to its end. So an estimate follows whatever the
code does, in the time that some thousand operations take without their arithmetic.

Not seen are what operations allocate inside themselves and give back. What matters of that is added: the random numbers
of a draw. Attention is taken to be a fused one. Not counted are what libraries keep for themselves (cuDNN, oneDNN, the
program itself) and what an allocator leaves unused.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vtc.generators.inference import prepare
from vtc.generators.infinity import Infinity
from vtc.generators.kv_cache.cache import KVCache, selected
from vtc.generators.kv_cache.calibration import Calibration
from vtc.generators.kv_cache.hack import merge_into
from vtc.generators.kv_cache.policy import Candidates, Heads, Merged
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.kv_cache.specs import PolicySpec
from vtc.generators.kv_cache.wrappers import Around
from vtc.generators.llamagen import Block, LlamaGen
from vtc.generators.pretrained import Condition, LoadedGenerator
from vtc.generators.sampling import Guidance, Sampling
from vtc.tokenizers.base import Tokens

#: tokens of a text, where it is not known yet
TEXT_TOKENS = 64


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. weights: of model, tokenizer and draft. cache: keys and values at their peak, as `peak_nbytes` counts.
    activations: what else is alive at the moment at which most is. total: the peak of all.
    """

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("cache", self.cache), ("activations", self.activations),
                 ("total", self.total))
        return ", ".join(f"{name} {value / 2**20:.1f} MiB" for name, value in parts)


class LiveBytes(TorchDispatchMode):
    """Within it: bytes of the tensors made so far that are alive, `now`, and the most there ever were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(out):
            # A view is no new memory, be it of a weight from outside.
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old:
                self._count(tensor.untyped_storage())
        inside = args[0].nbytes if func is torch.ops.aten.multinomial.default else 0  # one random number a word
        self.peak = max(self.peak, self.now + inside)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


class FusedAttention(TorchFunctionMode):
    """Attention that makes its result and nothing else, as fused kernels do; without a device torch chooses none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, v = args[0], args[2]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def estimate_memory(generator: LoadedGenerator, batch: int, spec: PolicySpec, sampling: Sampling | None = None,
                    guidance: Guidance | None = None, dtype: torch.dtype | None = None,
                    calibration: Calibration | None = None, height_to_width: float = 1.0,
                    text_tokens: int = TEXT_TOKENS, ahead: int = 0) -> MemoryEstimate:
    """Of `generator.generate` for a batch; a generator of any kind, with weights or without.

    dtype: torch.bfloat16: of the products, as `prepare`. calibration: where the policy needs one; without, stand-in
    facts of the right shape, which keep as many tokens. ahead: tokens that the draft proposes at a time, in speculative
    decoding, whose batch is one.
    Raises ConfigError where the policy has no meaning for the model.
    """
    sampling, guidance = sampling or generator.sampling, guidance or generator.guidance
    schedule = generator.schedule(height_to_width)
    if spec.needs_calibration and calibration is None:
        calibration = stand_in(schedule)
    policy, storage = spec.build(schedule, calibration)
    shadow = without_memory(generator)
    if dtype is not None:
        prepare(shadow.model, dtype)
    weights = sum(t.nbytes for part in (shadow.model, shadow.tokenizer, shadow.draft) if part is not None
                  for t in part.state_dict().values())
    cache, beside = KVCache(schedule, AsMany(policy), storage), 0
    with LiveBytes() as live, FusedAttention():
        if isinstance(shadow.model, LlamaGen):
            _run_raster(shadow, batch, cache, sampling, guidance, ahead)
            if ahead and shadow.draft is not None:
                beside = _full_cache(shadow.draft, batch * (2 if guidance.active else 1))
        else:
            condition: Condition = torch.empty(batch, dtype=torch.int64, device="meta")
            if isinstance(shadow.model, Infinity):
                text = torch.empty(batch, text_tokens, shadow.model.text_width, device="meta")
                condition = (text, torch.empty(batch, text_tokens, dtype=torch.bool, device="meta"))
            shadow.generate(condition, cache, sampling, guidance, _nobody(batch))
    kept = cache.peak_nbytes()
    return MemoryEstimate(weights, kept + beside, max(0, live.peak - kept))


def without_memory(generator: LoadedGenerator) -> LoadedGenerator:
    """The same generator as shapes, which does not look at numbers that are not there."""
    def shape_of(part: Any) -> Any:
        with torch.device("meta"):
            return type(part)(**part.arguments()).eval()

    model, tokenizer = shape_of(generator.model), shape_of(generator.tokenizer)
    for check in ("check_labels", "_check_text"):
        if hasattr(model, check):
            setattr(model, check, lambda *_: None)
    for part in tokenizer.modules():
        if hasattr(part, "checked_indices"):
            part.checked_indices = lambda indices: indices
    return LoadedGenerator(model, tokenizer, generator.config, generator.draft and shape_of(generator.draft))


def _dtype(model: LlamaGen) -> torch.dtype:
    """Of its keys and values."""
    return cast(Block, model.blocks[0]).attention.qkv.weight.dtype


def _full_cache(model: LlamaGen, rows: int) -> int:
    """Bytes of a cache that keeps everything."""
    schedule = model.schedule()
    return round(schedule.kv_bytes(schedule.stored_tokens, rows, _dtype(model).itemsize))


def _run_raster(generator: LoadedGenerator, batch: int, cache: KVCache, sampling: Sampling, guidance: Guidance,
                ahead: int = 0) -> None:
    """The last tokens and the picture: what came before differs by less than they hold.

    The last tokens are two, one after the other, or with a draft all that are judged at once.
    """
    model = generator.model
    assert isinstance(model, LlamaGen)
    schedule, rows = cache.schedule, batch * (2 if guidance.active else 1)
    together = min(ahead + 1, schedule.steps - 1)
    numbers = range(schedule.steps - max(2, together), schedule.steps, together)
    dtype = _dtype(model)
    for layer in range(schedule.layers):
        for group in cache.groups[layer]:
            heads = len(range(schedule.heads)[group.heads]) if isinstance(group.heads, slice) else len(group.heads)
            before = min(cache.policy.budget(schedule, layer, numbers[0] - 1), numbers[0])
            for buffer in (group.k, group.v):
                buffer.append(torch.empty(rows, heads, before, schedule.head_dim, dtype=dtype, device="meta"))
                if not cache.policy.keeps_all:
                    buffer.take(torch.empty(before, dtype=torch.int64, device="meta"))
                cache._nbytes += buffer.nbytes  # which the cache counts of what it is given step by step
            group.tokens = torch.empty(1, 1, before, dtype=torch.int64, device="meta")
            cast(AsMany, cache.policy).remember(layer, group.heads, before)
    positions = model.positions()
    x = torch.empty(rows, together, model.width, device="meta")
    for number in numbers:
        logits = guidance(model.extend(x, cache, number, positions), number, schedule.steps)
        sampling(logits, _nobody(batch))
    layout = model.check_tokenizer(generator.tokenizer)
    side = model.side * generator.tokenizer.downsample
    drawn = torch.empty(batch, model.tokens, 1, dtype=torch.int64, device="meta")
    generator.tokenizer.decode(Tokens(drawn, layout, side, side))


def _nobody(batch: int) -> list[torch.Generator]:
    """In the place of a random generator for each picture: without numbers there is nothing to draw."""
    return cast(list[torch.Generator], [None] * batch)


def stand_in(schedule: Schedule) -> Calibration:
    """A calibration of random facts, for how much is kept, not what."""
    g = torch.Generator().manual_seed(0)
    shape = (schedule.layers, schedule.heads)
    return Calibration(torch.rand(shape, generator=g) + 0.5, torch.rand(shape[0], schedule.steps, generator=g),
                       torch.rand(*shape, schedule.steps, generator=g), schedule.sizes, "", 1)


# ---- a policy's numbers of tokens, without the tokens ---------------------------------------------------------------

@dataclass(frozen=True)
class AsMany(Around):
    """Keeps as many keys as another policy and allocates what that one allocates to choose; which ones, nobody asks.

    For that the other policy is asked about small random keys, one picture of four dimensions a head.
    """

    #: by layer and first head the small tokens and scores that are kept; and what was asked last, one at most
    _kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _asked: list[_Asked] = field(default_factory=list)

    def remember(self, layer: int, heads: Heads, count: int) -> None:
        """The heads have so many tokens, the newest of which nobody asks."""
        self._kept[layer, _first(heads)] = (torch.arange(count)[None, None], None)

    def attended(self, candidates: Candidates) -> Tensor | Merged | None:
        asked = self._small(candidates)
        chosen = self.policy.attended(asked)
        asked.repeat_on(candidates)
        self._asked[:] = [asked]
        if chosen is None:
            return None
        k, v = candidates.k, candidates.v
        if isinstance(chosen, Merged):
            return merge_into(k, v, torch.empty(*k.shape[:2], chosen.k.shape[2], dtype=torch.int64, device=k.device))
        self._asked[:] = [asked.narrowed(chosen)]
        count = chosen.shape[-1]
        return Merged(k[:, :, :count].clone(), v[:, :, :count].clone())  # as large as what is selected

    def stored(self, candidates: Candidates) -> Tensor | None:
        asked = self._asked.pop()
        before = asked.count
        chosen = self.policy.stored(asked)
        asked.repeat_on(candidates)
        if asked.scores is not None:
            candidates.scores = candidates.k.new_empty(candidates.k.shape[:3], dtype=torch.float32)
        kept = asked.narrowed(chosen) if chosen is not None else asked
        self._kept[candidates.layer, _first(candidates.heads)] = (kept.tokens, kept.scores)
        if chosen is None and before == candidates.count:
            return None
        return torch.empty(kept.count, dtype=torch.int64, device=candidates.k.device)

    def _small(self, candidates: Candidates) -> _Asked:
        """The candidates as small random ones with true token numbers."""
        place = candidates.layer, _first(candidates.heads)
        tokens, scores = self._kept.get(place, (torch.empty(1, 1, 0, dtype=torch.int64), None))
        schedule, step, heads = candidates.schedule, candidates.step, candidates.k.shape[1]
        new = candidates.new
        numbers = torch.arange(schedule.starts[step], schedule.starts[step] + new)
        tokens = torch.cat([tokens, numbers.expand(*tokens.shape[:2], -1)], 2)
        count = tokens.shape[2]
        keys = torch.rand(1, heads, count, 4)
        if scores is not None:
            scores = torch.nn.functional.pad(scores, (0, new))
        queries = torch.rand(1, heads, candidates.q.shape[2], 4)
        return _Asked(schedule, candidates.layer, step, candidates.heads, queries, keys, keys, tokens, new, scores)


def _first(heads: Heads) -> int:
    return heads.start if isinstance(heads, slice) else int(heads[0])


class _Asked(Candidates):
    """Candidates that remember for how many queries their attention was asked."""

    queries = 0

    def attention(self, queries: Tensor | None = None) -> Tensor:
        self.queries = self.q.shape[2] if queries is None else len(queries)
        return super().attention(queries)

    def repeat_on(self, candidates: Candidates) -> None:
        """Ask the true candidates for the same, for what it allocates."""
        if self.queries:
            candidates.attention(torch.empty(self.queries, dtype=torch.int64, device=candidates.k.device))
        self.queries = 0

    def narrowed(self, chosen: Tensor) -> _Asked:
        """Those candidates alone."""
        kept = selected(self, chosen)
        assert isinstance(kept, _Asked)
        kept.queries = 0
        return kept
