"""What the suite asks of one image and of a whole set: the metrics of this folder behind one small interface.

A measure looks at one pair at a time and leaves numbers (`columns`) or arrays (`parts`) behind, which are all that is
kept of a picture. Numbers become results by a function of their means over images (`Statistic`), so a bootstrap can
resample them; arrays are added up by a `Collector` (features for a Frechet distance, the spectrum of the error).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.eval.bits import bits_per_pixel
from vtc.eval.codebook import CodebookUsageMetric
from vtc.eval.dists import DISTS, deep_image_structure_and_texture_similarity
from vtc.eval.feature_sets import FeatureSetMetric
from vtc.eval.features import Inception, PooledFeatures
from vtc.eval.frechet import FeatureStatistics, FrechetDistance
from vtc.eval.glcm import Form, glcm_score, jpeg_bytes
from vtc.eval.kid import KernelDistance, KernelInceptionDistance
from vtc.eval.lattice import LatticeRatio
from vtc.eval.lpips import LPIPS, learned_perceptual_image_patch_similarity
from vtc.eval.metric import Metric, check_images
from vtc.eval.names import MEASURES, SYNONYMS
from vtc.eval.patch_frechet import patches
from vtc.eval.precision_recall import PrecisionRecall, PrecisionRecallMetric
from vtc.eval.protocols import NATIVE, Protocol
from vtc.eval.provenance import tensors_sha256
from vtc.eval.psnr import mean_squared_error, peak_signal_noise_ratio
from vtc.eval.scale_consistency import estimate_shift
from vtc.eval.ssim import (
    multiscale_structural_similarity,
    padded_structural_similarity,
    structural_similarity,
)
from vtc.eval.token_statistics import token_statistics
from vtc.eval.wavelet_bands import band_energies
from vtc.images import to_uint8
from vtc.tokenizers.lpips import Backbone

AnyMetric = TypeVar("AnyMetric", bound=Metric)


@dataclass
class Seen:
    """One image and what a method made of it.

    name: of the image, path: its file. target, preds: (1, 3, H, W) in [0, 1], as the protocol prepares and rounds
    them; unrounded is the reconstruction before that. num_bytes, tokens, facts: see `vtc.eval.suite.Reconstruction`.
    memo: what measures worked out about the original, shared by the methods that are compared on one image.
    own: the same about the reconstruction. grid: rows and columns of the last of the tokens, None where unknown.
    """

    name: str
    path: Path
    target: Tensor
    preds: Tensor
    unrounded: Tensor
    num_bytes: int | None = None
    tokens: np.ndarray | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None


def once(memo: dict[str, Any], key: str, make: Callable[[], Any]) -> Any:
    """`make()`, remembered under `key`."""
    if key not in memo:
        memo[key] = make()
    return memo[key]


class Statistic(NamedTuple):
    """A result: `function` of the means over images of `columns`; numpy arrays or numbers.

    aggregation: "mean_of_images", or "pooled" where sums over all images come first.
    """

    name: str
    columns: tuple[str, ...]
    function: Callable[..., Any] = lambda mean: mean

    @property
    def aggregation(self) -> str:
        return "mean_of_images" if self.columns == (self.name,) else "pooled"


class Collector:
    """Adds up one measure's `parts` over the images of a method."""

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        """One image's."""
        raise NotImplementedError

    def results(self) -> dict[str, Any]:
        """Result name -> number, of everything added; {} or ConfigError where that is too little."""
        raise NotImplementedError


class Measure:
    """One entry of `vtc.eval.names.MEASURES`.

    settings: everything that changes its numbers, for provenance and for the cache's key. set_settings: what changes
    results but nothing of what is kept of an image, for provenance only.
    """

    alias: str
    settings: Mapping[str, Any]
    set_settings: Mapping[str, Any] = MappingProxyType({})
    statistics: tuple[Statistic, ...] = ()

    @property
    def key(self) -> str:
        """Alias and a digest of the settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"{self.alias}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def columns(self, seen: Seen) -> dict[str, float]:
        """Numbers of one image. Raises ImageError where it is not defined for the image, by its size for example."""
        return {}

    def parts(self, seen: Seen) -> dict[str, np.ndarray]:
        """Arrays of one image."""
        return {}

    def applies(self, seen: Seen) -> bool:
        """Whether there is anything to measure: a rate needs bytes, a codebook's usage needs tokens."""
        return True

    def collector(self, description: Mapping[str, Any]) -> Collector | None:
        """What takes the `parts` of a method that describes itself so."""
        return None


@dataclass
class PairMeasure(Measure):
    """A number of each pair: `function(preds, target)` to (1,), averaged over images."""

    alias: str
    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.statistics = (Statistic(self.name, (self.name,)),)

    def columns(self, seen: Seen) -> dict[str, float]:
        return {self.name: float(self.function(seen.preds, seen.target))}


class PooledPSNR(Measure):
    """Decibels of the images' mean squared error."""

    alias, settings = "psnr_pooled", {}
    statistics = (Statistic("peak_signal_noise_ratio_pooled", ("mean_squared_error",), lambda mse: _decibels(mse)),)

    def columns(self, seen: Seen) -> dict[str, float]:
        return {"mean_squared_error": float(mean_squared_error(seen.preds, seen.target))}


def _decibels(mse: Any) -> Any:
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mse)


class LPIPSMeasure(Measure):
    """LPIPS; the original's features are computed once for all methods."""

    def __init__(self, backbone: Backbone, weights: str | None, device: str) -> None:
        self.alias = f"lpips_{backbone}"
        self.network = LPIPS(backbone, weights).to(device)
        self.name = f"learned_perceptual_image_patch_similarity_{backbone}"
        self.settings = {"version": "0.1", "tensors_sha256": tensors_sha256(self.network)}
        self.statistics = (Statistic(self.name, (self.name,)),)

    @torch.no_grad()
    def columns(self, seen: Seen) -> dict[str, float]:
        theirs = once(seen.memo, self.key, lambda: self.network.unit_features(seen.target))
        return {self.name: float(learned_perceptual_image_patch_similarity(seen.preds, seen.target, self.network,
                                                                           theirs))}


class Rate(Measure):
    """Bits per pixel of whole files; for a method that writes none, the nominal rate of uniform tokens."""

    def __init__(self, pooled: bool = False) -> None:
        self.alias, self.settings = "bpp_pooled" if pooled else "bpp", {}
        if pooled:
            self.statistics = (Statistic("bits_per_pixel_pooled", ("bits", "pixels"), lambda bits, px: bits / px),)
        else:
            self.statistics = tuple(Statistic(name, (name,)) for name in ("bits_per_pixel", "nominal_bits_per_pixel"))
        self.pooled = pooled

    def applies(self, seen: Seen) -> bool:
        return seen.num_bytes is not None or (not self.pooled and "nominal_bits" in seen.facts)

    def columns(self, seen: Seen) -> dict[str, float]:
        height, width = seen.target.shape[2:]
        if seen.num_bytes is None:
            return {"nominal_bits_per_pixel": float(seen.facts["nominal_bits"]) / (height * width)}
        if self.pooled:
            return {"bits": 8.0 * seen.num_bytes, "pixels": float(height * width)}
        return {"bits_per_pixel": bits_per_pixel(seen.num_bytes, height, width)}


class Seconds(Measure):
    """Wall-clock seconds that the method took."""

    alias, settings = "seconds", {}
    statistics = tuple(Statistic(name, (name,)) for name in ("encode_seconds", "decode_seconds"))

    def applies(self, seen: Seen) -> bool:
        return "encode_seconds" in seen.facts or "decode_seconds" in seen.facts

    def columns(self, seen: Seen) -> dict[str, float]:
        return {name: float(seen.facts[name]) for name in ("encode_seconds", "decode_seconds") if name in seen.facts}


class Texture(Measure):
    """GLCM score, or the compression ratio: of the reconstruction and, to compare with, of the original."""

    def __init__(self, alias: str, form: Form = "upstream") -> None:
        self.alias, self.form = alias, form
        self.settings = {"patch": 64, "levels": 64, "form": form} if alias != "compression_ratio" else {
            "quality": 95, "subsampling": "4:2:0"}
        self.name = {"glcm": "glcm_score", "glcm_entropy": "glcm_entropy"}.get(alias, alias)
        if alias == "compression_ratio":  # a ratio of sums
            self.statistics = tuple(Statistic(f"{self.name}{side}", (f"raw_bytes{side}", f"jpeg_bytes{side}"),
                                              lambda raw, coded: raw / coded) for side in ("", "_of_references"))
        else:
            self.statistics = tuple(Statistic(f"{self.name}{side}", (f"{self.name}{side}",))
                                    for side in ("", "_of_references"))

    def columns(self, seen: Seen) -> dict[str, float]:
        theirs = once(seen.memo, self.key, lambda: self._of(seen.target, "_of_references"))
        return {**self._of(seen.preds, ""), **theirs}

    def _of(self, image: Tensor, side: str) -> dict[str, float]:
        pixels = to_uint8(image)
        if self.alias == "compression_ratio":
            return {f"raw_bytes{side}": float(pixels.size), f"jpeg_bytes{side}": float(jpeg_bytes(pixels))}
        return {f"{self.name}{side}": glcm_score(pixels, self.form)}


class Shift(Measure):
    """Pixels by which the reconstruction lies below and right of the original."""

    alias, settings = "shift", {"max_shift": 8}
    statistics = (Statistic("shift_down", ("shift_down",)), Statistic("shift_right", ("shift_right",)))

    def columns(self, seen: Seen) -> dict[str, float]:
        down, right = estimate_shift(seen.preds.cpu(), seen.target.cpu())[0].tolist()
        return {"shift_down": down, "shift_right": right}


class Bands(Measure):
    """Energy of the error in each Haar band over the original's energy there: ratios of sums."""

    alias = "bands"

    def __init__(self, levels: int = 3) -> None:
        self.levels, self.settings = levels, {"levels": levels, "wavelet": "haar"}
        self.bands = list(band_energies(torch.zeros(1, 1, 2, 2), levels))
        self.statistics = tuple(Statistic(f"wavelet_error_{band}", (f"error_energy_{band}", f"energy_{band}"),
                                          _ratio) for band in self.bands)

    def columns(self, seen: Seen) -> dict[str, float]:
        error = band_energies(seen.preds.double() - seen.target.double(), self.levels)
        energy = once(seen.memo, self.key, lambda: band_energies(seen.target, self.levels))
        return {f"{kind}_{band}": found[band] for kind, found in (("error_energy", error), ("energy", energy))
                for band in self.bands}


def _ratio(a: Any, b: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(a, b)


class Lattice(Measure):
    """Peaks of the error's spectrum at the method's stride."""

    alias = "lattice"

    def __init__(self, period: int = 16) -> None:
        self.period, self.settings = period, {"period": period}

    def parts(self, seen: Seen) -> dict[str, np.ndarray]:
        metric = LatticeRatio(self.period)
        metric.update(seen.preds.cpu(), seen.target.cpu())
        return {"spectrum": metric.spectrum.numpy()}

    def collector(self, description: Mapping[str, Any]) -> Collector:
        return _Spectrum(self.period)


def alone(metric: AnyMetric) -> AnyMetric:
    """A metric that one process adds up for all: in `compute`, torchmetrics would wait for the others for ever."""
    metric.sync_on_compute = metric._to_sync = False
    return metric


class _Spectrum(Collector):
    def __init__(self, period: int) -> None:
        self.metric = alone(LatticeRatio(period))

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        self.metric.spectrum += torch.from_numpy(parts["spectrum"])
        self.metric._update_count = 1

    def results(self) -> dict[str, Any]:
        value = self.metric.compute().item()
        return {} if math.isnan(value) else {"stride_lattice_ratio": value}


class Codebook(Measure):
    """How much of its codebook a tokenizer uses, and the statistics of its tokens as of a language."""

    alias, settings = "codebook", {}

    def applies(self, seen: Seen) -> bool:
        return seen.tokens is not None

    def parts(self, seen: Seen) -> dict[str, np.ndarray]:
        assert seen.tokens is not None
        found = {"tokens": seen.tokens.astype(np.int32)}
        return found if seen.grid is None else found | {"grid": np.array(seen.grid, dtype=np.int32)}

    def collector(self, description: Mapping[str, Any]) -> Collector | None:
        return _Words(tuple(description["vocab"])) if "vocab" in description else None


#: what statistics of tokens are made of: pictures until there are so many tokens, codebooks of at most so many words
MOST_TOKENS, MOST_WORDS = 2**20, 2**20


class _Words(Collector):
    """Of several groups of tokens the first is the language, of several scales the last, which is the finest."""

    def __init__(self, vocab: tuple[int, ...]) -> None:
        self.metric = alone(CodebookUsageMetric(vocab))
        self.vocab, self.tokens = vocab[0], 0
        self.documents: list[np.ndarray] = []

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        self.metric.update(torch.from_numpy(parts["tokens"]))
        if self.tokens < MOST_TOKENS and self.vocab <= MOST_WORDS:
            rows, columns = parts["grid"].tolist() if "grid" in parts else (1, len(parts["tokens"]))
            self.documents.append(parts["tokens"][-rows * columns :, 0].reshape(rows, columns))
            self.tokens += rows * columns

    def results(self) -> dict[str, Any]:
        found = self.metric.compute()
        results: dict[str, Any] = {
            "codebook_usage": found.usage, "codebook_entropy": found.entropy_bits,
            "codebook_entropy_corrected": found.entropy_bits_corrected, "codebook_perplexity": found.perplexity,
            "codebook_tokens": found.tokens}
        if self.documents:
            results["token_statistics"] = token_statistics(self.documents, self.vocab).to_json()
        return results


class Features(Measure):
    """Distances between the sets of originals and of reconstructions over the features of a network.

    metrics: result name -> what makes a metric of `vtc.eval.frechet` or `feature_sets` from the extractor.
    size: None for whole pictures, or the side of patches.
    """

    def __init__(self, alias: str, extractor: nn.Module, metrics: Mapping[str, Callable[[nn.Module], Any]],
                 protocol: Protocol, weights: Mapping[str, Any], size: int | None = None,
                 set_settings: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.alias, self.extractor, self.metrics, self.set_settings = alias, extractor, metrics, set_settings
        self.protocol, self.size = protocol, size
        self.settings = {"network": str(extractor.name), **weights, "rounding": protocol.feature_rounding,
                         "resize": protocol.feature_resize} | ({"patch": size} if size else {})

    def parts(self, seen: Seen) -> dict[str, np.ndarray]:
        key = f"features {self.settings}"  # metrics over the same network share them
        return {"real": once(seen.memo, key, lambda: self._of(seen.target)),
                "fake": once(seen.own, key, lambda: self._of(seen.unrounded))}

    @torch.no_grad()
    def _of(self, image: Tensor) -> np.ndarray:
        check_images(image)
        images = patches(image, self.size) if self.size else image
        return torch.cat([self.extractor(self.protocol.for_features(part))
                          for part in images.split(32)]).float().cpu().numpy()

    def collector(self, description: Mapping[str, Any]) -> Collector:
        return _Clouds({name: alone(make(self.extractor)) for name, make in self.metrics.items()})


class _Clouds(Collector):
    def __init__(self, metrics: dict[str, FrechetDistance | FeatureSetMetric]) -> None:
        self.metrics = metrics

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        for metric in self.metrics.values():
            for side, real in (("real", True), ("fake", False)):
                if not (real and getattr(metric, "reference", None) is not None):
                    metric.update_features(torch.from_numpy(parts[side]), real=real)

    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            value = metric.compute()
            if isinstance(value, KernelDistance):
                found |= {name: value.mean, f"{name}_std": value.std}
            elif isinstance(value, PrecisionRecall):
                found |= {f"precision_{name}": value.precision, f"recall_{name}": value.recall}
            else:
                found[name] = value.item()
        return found


@dataclass(frozen=True)
class Options:
    """What measures are built with.

    lpips_weights, fid_weights: paths, see `vtc.tokenizers.lpips.LPIPS` and `vtc.eval.features.Inception`.
    reference: statistics to compare with in place of the originals' features (ADM's .npz).
    period: the stride whose lattice is looked for.
    """

    device: str = "cpu"
    lpips_weights: str | None = None
    fid_weights: str | None = None
    download: bool = False
    protocol: Protocol = NATIVE
    reference: FeatureStatistics | None = None
    period: int = 16
    seed: int = 0


def parse_names(text: str | Sequence[str]) -> list[str]:
    """Aliases from "psnr,ms-ssim" or a list, in the order of tables; "all" is every one. ConfigError for others."""
    asked = [part.strip().lower() for part in (text.split(",") if isinstance(text, str) else text) if part.strip()]
    asked = [SYNONYMS.get(name, name) for name in asked]
    if unknown := [name for name in asked if name not in MEASURES and name != "all"]:
        raise ConfigError(f"There is no metric {', '.join(unknown)}; the metrics are all, {', '.join(MEASURES)}.")
    return [name for name in MEASURES if name in asked or "all" in asked]


def build(alias: str, options: Options | None = None) -> Measure:
    """The measure of that name. Raises ModelError where its weights are not found."""
    o = options or Options()
    if alias.startswith("lpips_"):
        return LPIPSMeasure(alias.removeprefix("lpips_"), o.lpips_weights, o.device)  # type: ignore[arg-type]  # MEASURES names no others
    if alias == "dists":
        network = DISTS(o.lpips_weights).to(o.device)
        return PairMeasure(alias, "deep_image_structure_and_texture_similarity",
                           lambda a, b: deep_image_structure_and_texture_similarity(a, b, network),
                           {"tensors_sha256": tensors_sha256(network), "resize": "none"})
    if alias in ("fid", "patch_fid", "kid", "precision_recall") or alias.endswith(("_alexnet", "_squeezenet")):
        return _features(alias, o)
    simple: dict[str, Callable[[], Measure]] = {
        "psnr": lambda: PairMeasure(alias, "peak_signal_noise_ratio", peak_signal_noise_ratio),
        "ssim": lambda: PairMeasure(alias, "structural_similarity", structural_similarity),
        "ssim_padded": lambda: PairMeasure(alias, "padded_structural_similarity", padded_structural_similarity),
        "ms_ssim": lambda: PairMeasure(alias, "multiscale_structural_similarity", multiscale_structural_similarity),
        "psnr_pooled": PooledPSNR, "bpp": Rate, "bpp_pooled": lambda: Rate(pooled=True), "seconds": Seconds,
        "glcm": lambda: Texture(alias), "glcm_entropy": lambda: Texture(alias, "textbook"),
        "compression_ratio": lambda: Texture(alias), "shift": Shift, "bands": Bands,
        "lattice": lambda: Lattice(o.period), "codebook": Codebook}
    return simple[alias]()


def _features(alias: str, o: Options) -> Measure:
    extractor: PooledFeatures | Inception
    if alias.endswith(("_alexnet", "_squeezenet")):
        kind, _, network = alias.rpartition("_")
        extractor = _pooled("alex" if network == "alexnet" else "squeeze", o.lpips_weights, o.device)
        weights = {"tensors_sha256": tensors_sha256(extractor)}
        suffix = str(extractor.name)
        frechet, kernel = f"frechet_distance_{suffix}", f"kernel_distance_{suffix}"
    else:
        kind = {"fid": "fd", "patch_fid": "patch_fd", "kid": "kd"}.get(alias, alias)
        extractor = _inception(o.fid_weights, o.protocol.feature_network, o.download, o.device)
        weights = {"weights_sha256": str(extractor.sha256), "convention": str(extractor.convention)}
        frechet, kernel, suffix = "frechet_inception_distance", "kernel_inception_distance", "inception"
    if kind == "fd" and o.reference is not None:
        weights["reference_statistics_sha256"] = hashlib.sha256(o.reference.covariance.numpy().tobytes()).hexdigest()
    metrics: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
        "fd": (frechet, lambda network: FrechetDistance(network, o.reference)),
        "patch_fd": (f"patch_{frechet}", FrechetDistance),
        "kd": (kernel, lambda network: KernelInceptionDistance(network, seed=o.seed)),
        "precision_recall": (suffix, lambda network: PrecisionRecallMetric(network, seed=o.seed))}
    return Features(alias, extractor, dict([metrics[kind]]), o.protocol, weights, 256 if kind == "patch_fd" else None,
                    {"seed": o.seed} if kind in ("kd", "precision_recall") else {})


@cache
def _pooled(backbone: Literal["alex", "squeeze"], weights: str | None, device: str) -> PooledFeatures:
    return PooledFeatures(backbone, weights).to(device)


@cache
def _inception(weights: str | None, convention: Literal["pytorch-fid", "torch-fidelity", "clean-fid"], download: bool,
               device: str) -> Inception:
    return Inception(weights, convention, download=download).to(device)
