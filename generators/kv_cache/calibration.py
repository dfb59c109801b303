"""What a model's heads and layers are like, measured once on a few generations: the facts that policies build on.

    recorder = Recorder()
    model.generate(labels, tokenizer, cache=KVCache(model.schedule(), recorder))       # several times
    calibration = recorder.calibration(model)
    calibration.save("model.kv.safetensors")
    policy = calibration.hack(tokens=127)

The file carries the model's fingerprint: another model's is refused. `scripts/calibrate_kv.py` makes one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vtc.errors import ConfigError, FileError, ModelError
from vtc.files import write_file
from vtc.generators.kv_cache.hack import HACK
from vtc.generators.kv_cache.heatkv import HeatKV
from vtc.generators.kv_cache.policy import Candidates, KVPolicy, Merged
from vtc.generators.kv_cache.scalekv import ScaleKV
from vtc.generators.kv_cache.schedule import Grid, Schedule
from vtc.hub import fingerprint

FORMAT = "vtc kv calibration 1"
#: queries whose attention is in memory at a time
QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Calibration:
    """Means over samples. L layers, H heads, K scales.

    variance: (L, H) sum over keys of the variance over the last scale's queries; high in structural heads (HACK).
    selectivity: (L, K) attention selectivity index; high in refiners (ScaleKV). The first scale has no history: 0.
    attention: (L, H, K) attention that later scales' queries pay to each scale, over the later scales (HeatKV).
    sizes: the scales. model: its fingerprint in hexadecimal. samples: how many images.
    """

    variance: Tensor
    selectivity: Tensor
    attention: Tensor
    sizes: tuple[Grid, ...]
    model: str
    samples: int

    def save(self, path: str | Path) -> None:
        """One safetensors file. FileError."""
        metadata = {"format": FORMAT, "model": self.model, "samples": str(self.samples),
                    "sizes": json.dumps(self.sizes)}
        write_file(path, save({name: getattr(self, name).float().contiguous() for name in _TENSORS}, metadata))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Calibration:
        """What `save` wrote of this very model. FileError: no such file. ModelError: another model's, or damaged."""
        if not Path(path).is_file():
            raise FileError(f"There is no file {path}.")
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            if facts.get("format") != FORMAT or set(tensors) != set(_TENSORS):
                raise ModelError(f"{path} is no calibration of a key-value cache.")
            found = cls(**tensors, sizes=tuple(tuple(s) for s in json.loads(facts["sizes"])), model=facts["model"],
                        samples=int(facts["samples"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ModelError(f"{path} cannot be read as a calibration ({error}).") from error
        if found.model != (ours := fingerprint(model, ("",)).hex()):
            raise ModelError(f"{path} was measured on another model ({found.model}) than this one ({ours}): calibrate "
                             "again.")
        return found

    def contextual(self, share: float = 0.5) -> tuple[tuple[int, ...], ...]:
        """For each layer its contextual heads: the `share` of all heads with the least variance."""
        if not 0 <= share <= 1:
            raise ConfigError(f"A share of heads is from 0 to 1, not {share}.")
        chosen = torch.zeros(self.variance.numel(), dtype=torch.bool)
        chosen[self.variance.flatten().argsort(stable=True)[: round(share * len(chosen))]] = True
        return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in chosen.view_as(self.variance))

    def head_order(self, share: float = 0.5) -> Tensor:
        """(L, H) for a model's `permute_heads`: contextual heads first, so that each kind is a slice.

        What the model is like afterwards, `permuted` says.
        """
        return torch.stack([torch.tensor([*kind, *(h for h in range(self.variance.shape[1]) if h not in kind)])
                            for kind in self.contextual(share)])

    def permuted(self, order: Tensor, model: nn.Module) -> Calibration:
        """That of a model after `permute_heads(order)`, whose heads have other numbers and whose fingerprint is new."""
        return replace(self, variance=self.variance.gather(1, order), model=fingerprint(model, ("",)).hex(),
                       attention=self.attention.gather(1, order[..., None].expand_as(self.attention)))

    def standardised(self) -> Tensor:
        """(L, K - 1): the selectivity of the scales after the first, less its mean over the layers, in deviations."""
        index = self.selectivity[:, 1:].double()
        return (index - index.mean(0)) / (index.std(0, correction=0) + 1e-6)

    def drafters(self, count: int | None = None) -> tuple[tuple[int, ...], ...]:
        """For each scale its drafting layers: of all pairs of layer and scale the `count` of least standardised index.

        The first scale, which has no history, has none. count: default an eighth of the pairs.
        """
        z = self.standardised()
        count = z.numel() // 8 if count is None else count
        if not 0 <= count <= z.numel():
            raise ConfigError(f"Of {z.numel()} pairs of layer and scale from 0 to all may draft, not {count}.")
        chosen = torch.zeros(z.numel(), dtype=torch.bool)
        chosen[z.flatten().argsort(stable=True)[:count]] = True
        return ((), *(tuple(column.nonzero()[:, 0].tolist()) for column in chosen.view_as(z).T))

    def hack(self, tokens: int | None = None, attention: int | None = None, share: float = 0.5) -> HACK:
        """The policy, with `share` of the heads contextual."""
        return HACK(self.contextual(share), tokens, attention)

    def scalekv(self, tokens: int, drafters: int | None = None,
                compat: Literal["upstream"] | None = None) -> ScaleKV:
        """The policy, with so many drafting pairs of layer and scale."""
        return ScaleKV(self.drafters(drafters), tokens, compat=compat)

    def heatkv(self, tokens: int) -> HeatKV:
        """The policy."""
        return HeatKV(tuple(tuple(tuple(row) for row in layer) for layer in self.attention.tolist()), tokens)


_TENSORS = ("variance", "selectivity", "attention")


@dataclass(frozen=True)
class Recorder(KVPolicy):
    """A policy that drops nothing and looks: use it in caches of as many generations as there are samples.

    history: keys whose attention makes the second factor of the selectivity index (K' of ScaleKV).
    guided: the batches have an unconditional half, which is left out.
    """

    keeps_all: ClassVar[bool] = True
    history: int = 4
    guided: bool = True
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _facts: dict[str, Schedule] = field(default_factory=dict, repr=False, compare=False)

    def check(self, schedule: Schedule) -> None:
        if schedule.raster:
            raise ConfigError("What is measured are scales, and a raster model has none.")
        if self._facts.setdefault("schedule", schedule) != schedule:
            raise ConfigError("One recorder measures one model at one size: take another for this one.")

    def attended(self, candidates: Candidates) -> Tensor | Merged | None:
        schedule, layer, step = candidates.schedule, candidates.layer, candidates.step
        images = candidates.q.shape[0] // (2 if self.guided else 1)
        seen = _Sums(candidates, images, self.history)
        if step == 0:
            self._sums.setdefault("samples", torch.zeros(schedule.layers))[layer] += images
        shape = (schedule.layers, schedule.heads, schedule.steps)
        if step > 0:
            self._sums.setdefault("selectivity", torch.zeros(shape[0], shape[2]))[layer, step] += seen.selectivity()
            mass = self._sums.setdefault("attention", torch.zeros(shape))
            mass[layer, :, :step] += seen.by_scale()[:, :step]
        if candidates.last:
            self._sums.setdefault("variance", torch.zeros(shape[:2]))[layer] += seen.variance()
        return None

    def calibration(self, model: nn.Module) -> Calibration:
        """The means so far. ConfigError where nothing was recorded to the end."""
        if "variance" not in self._sums:
            raise ConfigError("Nothing was recorded: generate with this policy first, more than one scale, to the end.")
        schedule, samples = self._facts["schedule"], float(self._sums["samples"][0])
        later = torch.arange(schedule.steps - 1, -1, -1).clamp(min=1)
        return Calibration(self._sums["variance"] / samples, self._sums["selectivity"] / samples,
                           self._sums["attention"] / samples / later, schedule.sizes, fingerprint(model, ("",)).hex(),
                           int(samples))


class _Sums:
    """The statistics of one step's attention, summed over images; its rows pass by in blocks."""

    def __init__(self, candidates: Candidates, images: int, history: int) -> None:
        self.images, old = images, candidates.count - candidates.new
        queries = candidates.q.shape[2]
        self.steps = candidates.steps[0, 0]
        self.scales = candidates.schedule.steps
        total = total_squares = current = top = torch.zeros(())
        for start in range(0, queries, QUERIES_AT_ONCE):
            block = torch.arange(start, min(start + QUERIES_AT_ONCE, queries), device=candidates.q.device)
            a = candidates.attention(block)[:images].double()  # (images, h, m, n)
            total, total_squares = total + a.sum(2), total_squares + a.square().sum(2)
            current = current + a[..., old:].sum((2, 3))
            top = top + a[..., :old].topk(min(history, old), -1).values.sum((2, 3))
        self.mean, self.squares = total / queries, total_squares / queries  # (images, h, n)
        self.current, self.top = current / queries, top / queries  # (images, h)

    def variance(self) -> Tensor:
        """(h,) sum over keys of the variance over queries."""
        return (self.squares - self.mean.square()).sum(2).sum(0).float().cpu()

    def selectivity(self) -> Tensor:
        """The index of the layer: mean over heads of attention to the own map times that to the best of the history."""
        return (self.current * self.top).mean(1).sum(0).float().cpu()

    def by_scale(self) -> Tensor:
        """(h, K) attention to each scale."""
        mass = self.mean.new_zeros(*self.mean.shape[:2], self.scales)
        return mass.index_add_(2, self.steps, self.mean).sum(0).float().cpu()
