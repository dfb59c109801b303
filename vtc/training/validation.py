"""Validation of tokenizers and autoencoders while they train, by the evaluation suite (`vtc.eval.suite`).

    measures = validation_measures(["psnr", "ssim", "lpips_alex", "codebook"], Options(lpips_weights="weights/"))
    validation = Validation(pictures, measures)
    validation.of_tokenizer(model)          # {"psnr": 22.1, "ssim": 0.61, ..., "codebook_usage": 0.98}

The numbers are what `vtc-eval` would say of the same pictures and the finished model: whole pictures, reconstructions
rounded to 8 bits, means over pictures. What differs is that pictures are held in memory, that each process that asks
measures all of them, and that tokens are counted and not studied as a language, which takes longer than all the rest.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtc.errors import ModelError, first_sentence
from vtc.eval.codebook import MAX_WORDS, CodebookUsageMetric
from vtc.eval.lpips import learned_perceptual_image_patch_similarity
from vtc.eval.measures import (
    Codebook,
    Collector,
    Features,
    Measure,
    Options,
    PairMeasure,
    alone,
    build,
    parse_names,
)
from vtc.eval.pairs import Item
from vtc.eval.suite import Method, Processes, Reconstruction, Suite
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.lpips import LPIPS
from vtc.training.data import validation_pictures

__all__ = ["Options", "Validation", "lpips_by", "validation_measures", "validation_of"]

log = logging.getLogger(__name__)

#: what is reported under another name than that of its measure, or than the suite's where the measure has several
_SHORT = {"stride_lattice_ratio": "lattice_ratio", "codebook_entropy": "codebook_entropy_bits"}
#: left out of the report: not a measure of the model
_OMITTED = ("codebook_tokens", "codebook_entropy_corrected")


class CountedWords(Codebook):
    """Usage, entropy and perplexity of a codebook."""

    def collector(self, description: Mapping[str, Any]) -> Collector | None:
        return _Counts(tuple(description["vocab"])) if "vocab" in description else None


class _Counts(Collector):
    def __init__(self, vocab: tuple[int, ...]) -> None:
        self.metric = alone(CodebookUsageMetric(vocab))

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        self.metric.update(torch.from_numpy(parts["tokens"]))

    def results(self) -> dict[str, Any]:
        found = self.metric.compute()
        return {"codebook_usage": found.usage, "codebook_entropy": found.entropy_bits,
                "codebook_perplexity": found.perplexity}


def validation_measures(names: Sequence[str], options: Options) -> list[Measure]:
    """The measures of `--validation_metrics`, by the names of `vtc-eval --metrics`. ConfigError for other names.

    Those whose weights are nowhere to be found are named in a warning and left out, the others are measured.
    """
    found: list[Measure] = []
    for name in parse_names(names):
        try:
            found.append(CountedWords() if name == "codebook" else build(name, options))
        except ModelError as error:
            _say("The validation goes without %s: %s.", name, first_sentence(error))
    return found


def _say(text: str, *values: object) -> None:
    """A warning, by the first of a run's processes."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(text, *values)


@dataclass
class _Held(Suite):
    """The suite over pictures in memory; an item's name is its number."""

    pictures: Sequence[Tensor] = field(default_factory=tuple)

    def read(self, item: Item) -> bytes:
        return item.name.encode()

    def _prepared(self, data: bytes, item: Item) -> Tensor:
        return self.pictures[int(item.name)][None]


class _Alone(Processes):
    """The suite would share pictures out over the processes of a run, of which only the main one validates."""

    def __init__(self) -> None:
        self.rank, self.count = 0, 1


class _Model(Method):
    """A model in training: image (1, 3, H, W) in [0, 1] and its number to what it becomes."""

    name = family = "model"
    kind = "tokenizer"

    def __init__(self, function: Callable[[Tensor, int], Reconstruction], vocab: Sequence[int] = ()) -> None:
        self.function = function
        self.description = {"vocab": list(vocab)} if 0 < sum(vocab) <= MAX_WORDS else {}

    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction:
        return self.function(image, int(item.name))


class Validation:
    """Pictures (3, H, W) in [0, 1], and what is measured on their reconstructions."""

    def __init__(self, pictures: Sequence[Tensor], measures: Sequence[Measure], device: str = "cpu") -> None:
        self.pictures, self.measures, self.device = list(pictures), list(measures), device
        for measure in self.measures:
            features = int(getattr(measure.extractor, "num_features", 0)) if isinstance(measure, Features) else 0
            if len(self.pictures) <= features and isinstance(measure, Features) and measure.size is None:
                _say("%s of %d pictures over %d features says little: compare it within this run only.",
                     measure.alias, len(self.pictures), features)

    def of_tokenizer(self, model: Tokenizer) -> dict[str, float]:
        """What a tokenizer makes of the pictures, and how it uses its codebook."""
        device = next(model.parameters()).device

        @torch.no_grad()
        def through(image: Tensor, number: int) -> Reconstruction:
            tokens = model.encode(image.to(device))
            output = model.decode(tokens, torch.Generator(device).manual_seed(number))
            return Reconstruction(output[0].cpu(), tokens=tokens.indices[0].cpu().numpy())

        measures = [build("lattice", Options(period=model.downsample)) if m.alias == "lattice" else m
                    for m in self.measures]
        return self._run(_Model(through, model.layout(64, 64).vocab), measures)

    def of_autoencoder(self, reconstruct: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """What images (1, 3, H, W) in [0, 1] become by a function."""

        @torch.no_grad()
        def through(image: Tensor, number: int) -> Reconstruction:
            return Reconstruction(reconstruct(image.to(device))[0].cpu())

        return self._run(_Model(through), self.measures)

    def _run(self, model: _Model, measures: Sequence[Measure]) -> dict[str, float]:
        if not self.pictures or not measures:
            return {}
        items = [Item(str(n), Path(str(n))) for n in range(len(self.pictures))]
        suite = _Held([model], measures, device=self.device, pictures=self.pictures)
        results, problems = suite.run(items, _Alone())
        if problems:
            _say("%d of the validation's measurements failed, the first one: %s", len(problems), problems[0].sentence)
        names = dict(_SHORT)
        for measure in measures:
            of_measure = [s.name for s in measure.statistics] or list(getattr(measure, "metrics", {}))
            if len(of_measure) == 1:
                names[of_measure[0]] = measure.alias
        found = results[0].results if results else {}
        return {names.get(name, name): result.value for name, result in found.items()
                if result.value is not None and name not in _OMITTED}


def validation_of(args: argparse.Namespace, limit: int, device: torch.device) -> Validation | None:
    """What the flags of `add_validation_flags` ask for, on the first `limit` pictures, 0 for all; None without them."""
    parse_names(args.validation_metrics)  # a wrong name is told before pictures are read
    pictures = validation_pictures(args.validation_data_dir, args.validation_split, limit)
    if not pictures:
        return None
    lpips, fid = (None if path is None else str(path) for path in (args.lpips_weights, args.fid_weights))
    measures = validation_measures(args.validation_metrics, Options(str(device), lpips, fid))
    return Validation(pictures, measures, str(device))


def lpips_by(judge: LPIPS) -> Measure:
    """LPIPS by a network that is there already."""
    name = f"learned_perceptual_image_patch_similarity_{judge.backbone}"
    return PairMeasure(f"lpips_{judge.backbone}", name,
                       lambda a, b: learned_perceptual_image_patch_similarity(a, b, judge))
