"""A calibration of a generator: a few pictures are drawn, or read, with a cache that looks (`kv_cache.calibration`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.calibration import Calibration, Recorder
from vtc.generators.llamagen import LlamaGen
from vtc.generators.pretrained import Condition, LoadedGenerator
from vtc.generators.sampling import Guidance, seeded

#: multiplications and additions that a calibration nobody asked for may take: some half a minute on two cores; a GPU
AFFORDABLE = {"cpu": 3e12, "gpu": 1e15}


@torch.no_grad()
def calibrate(generator: LoadedGenerator, conditions: Sequence[Condition], seed: int = 0,
              given: Sequence[Tensor] | None = None, heard: Callable[[int], None] | None = None,
              height_to_width: float = 1.0) -> Calibration:
    """Means over batches: each of `conditions` is one. Float32 weights, on any device.

    given: for each batch the tokens (B, L, G) of real pictures, which are then read instead of drawn, without guidance.
    seed: of the first picture that is drawn. heard: is told how many pictures are done.
    Raises ConfigError for a raster model, whose policies need none, and without any picture.
    """
    if isinstance(generator.model, LlamaGen):
        raise ConfigError("What is calibrated are scales, and a raster model has none: its policies need nothing.")
    if not conditions:
        raise ConfigError("A calibration needs at least one picture.")
    guidance = Guidance() if given is not None else generator.guidance
    recorder = Recorder(guided=guidance.active)
    schedule, done = generator.schedule(height_to_width), 0
    for number, condition in enumerate(conditions):
        batch = len(condition if isinstance(condition, Tensor) else condition[0])
        held = None
        if given is not None:
            words = given[number].to(generator.device)
            held = (words, torch.ones(words.shape[:2], dtype=torch.bool, device=words.device))
        generator.generate(condition, KVCache(schedule, recorder), guidance=guidance, given=held,
                           generators=seeded(range(seed + done, seed + done + batch), generator.device))
        done += batch
        if heard is not None:
            heard(done)
    return recorder.calibration(generator.model)


def cost(generator: LoadedGenerator, samples: int) -> float:
    """Multiplications and additions of the products with weights, about."""
    tokens = generator.schedule().all_tokens
    weights = sum(p.numel() for p in generator.model.parameters() if p.ndim == 2)
    return 2.0 * weights * tokens * samples * (2 if generator.guidance.active else 1)


def is_affordable(generator: LoadedGenerator, samples: int) -> bool:
    """Whether a calibration may be made without being asked for."""
    return cost(generator, samples) <= AFFORDABLE["cpu" if generator.device.type == "cpu" else "gpu"]
