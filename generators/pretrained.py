"""A generator as it lies on disk, and loaded: the model, and all that it needs to draw pictures.

    NAME/  config.json, model.safetensors    the model, VAR, Infinity or LlamaGen, as its `save_pretrained` writes it
           generation_config.json            how it draws unless told otherwise, and what its classes are called
           tokenizer/                        config.json, model.safetensors: whose words it draws
           kv.safetensors                    optional: a calibration, for the cache policies that need one
           draft/                            optional: a smaller raster model, for speculative decoding

    LoadedGenerator(model, tokenizer, GenerationConfig(names)).save("folder")      # after a training
    generator = vtc.load_generator("folder")                                       # a bundled name, a folder, the Hub

Keys are strict everywhere, and what one file says of another is checked when the folder is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from vtc.errors import ConfigError, ModelError, first_sentence
from vtc.files import write_file
from vtc.generators.classes import CALIBRATION, DRAFT, GENERATION_CONFIG, GENERATOR_CLASSES, TOKENIZER
from vtc.generators.generate import Scale
from vtc.generators.infinity import SCALES_OF_SIZE, Infinity, scales_for
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.calibration import Calibration
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.llamagen import LlamaGen
from vtc.generators.patches import cells_of
from vtc.generators.sampling import Generators, Guidance, Sampling
from vtc.generators.var import VAR
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.layers import MultiScaleTokenizer

Generator = VAR | Infinity | LlamaGen
#: what a picture shall be: (B,) labels, or text features (B, T, C) and their mask (B, T)
Condition = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GenerationConfig:
    """What generation_config.json holds.

    class_names: one for each class, in order; () where they have none.
    sampling, guidance: by default those that the model's authors published, of its kind.
    tokenizer: the bundled model whose tokenizer it is, where the folder has none of its own.
    text_encoder: of text-conditional models, a T5 encoder's folder or Hub name. size: of Infinity, see `scales_for`.
    """

    class_names: tuple[str, ...] = ()
    sampling: Sampling | None = None
    guidance: Guidance | None = None
    tokenizer: str | None = None
    text_encoder: str = "google/flan-t5-xl"
    size: str = "1M"

    def __post_init__(self) -> None:
        if len(set(self.class_names)) != len(self.class_names):
            raise ConfigError("Two classes have the same name.")
        if self.size not in SCALES_OF_SIZE:
            raise ConfigError(f"A size is one of {', '.join(SCALES_OF_SIZE)}, not {self.size!r}.")

    def to_json(self) -> str:
        """The file's text; what is as by default is left out."""
        def said(of: Any) -> dict[str, Any]:
            return {f.name: getattr(of, f.name) for f in fields(of) if getattr(of, f.name) != f.default}

        return json.dumps({k: said(v) if isinstance(v, Sampling | Guidance) else v for k, v in said(self).items()},
                          indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What `to_json` wrote. ValueError or TypeError, and ConfigError for numbers out of range."""
        said = json.loads(text)
        if not isinstance(said, dict):
            raise ValueError("it is no object")
        names, strings = said.get("class_names", []), [said[k] for k in ("tokenizer", "text_encoder", "size")
                                                       if k in said]
        if not isinstance(names, list) or not all(isinstance(s, str) for s in [*names, *strings]):
            raise ValueError("a name in it is no text")
        for key, kind in (("sampling", Sampling), ("guidance", Guidance)):
            if key in said:
                said[key] = kind(**said[key])
        return cls(**said | {"class_names": tuple(names)})


@dataclass
class LoadedGenerator:
    """A generator with its tokenizer, both in eval mode, and what else lies in its folder.

    Raises ConfigError where the parts do not fit one another.
    """

    model: Generator
    tokenizer: Tokenizer
    config: GenerationConfig = field(default_factory=GenerationConfig)
    draft: LlamaGen | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        model, names = self.model, self.config.class_names
        if isinstance(model, LlamaGen):
            model.check_tokenizer(self.tokenizer)
        elif not isinstance(self.tokenizer, MultiScaleTokenizer if isinstance(model, VAR) else InfinityVAE):
            raise ConfigError(f"{type(model).__name__} draws scales, and {type(self.tokenizer).__name__} has none that "
                              "it could draw.")
        elif isinstance(model, VAR):
            model.check_tokenizer(self.tokenizer)
        if names and (isinstance(model, Infinity) or len(names) != model.classes):
            raise ConfigError(f"{len(names)} names do not fit a model of {getattr(model, 'classes', 'no')} classes.")
        if self.draft is not None and not isinstance(model, LlamaGen):
            raise ConfigError(f"A draft is for raster models; {type(model).__name__} draws whole scales.")

    @property
    def kind(self) -> str:
        """'var', 'infinity' or 'llamagen'."""
        return type(self.model).__name__.lower()

    @property
    def sampling(self) -> Sampling:
        """How it draws unless told otherwise."""
        return self.config.sampling or self._published("PUBLISHED_SAMPLING")

    @property
    def guidance(self) -> Guidance:
        """How it is guided unless told otherwise."""
        return self.config.guidance or self._published("PUBLISHED_GUIDANCE")

    def _published(self, name: str) -> Any:
        return getattr(import_module(GENERATOR_CLASSES[type(self.model).__name__]), name)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def label(self, name_or_number: str | int) -> int:
        """The number of a class. ConfigError where there is no such class."""
        if isinstance(self.model, Infinity):
            raise ConfigError("This model draws from texts and has no classes.")
        names, text = self.config.class_names, str(name_or_number)
        if text in names:
            return names.index(text)
        lower = [n.lower() for n in names]
        if lower.count(text.lower()) == 1:
            return lower.index(text.lower())
        if not text.isdecimal():
            some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ConfigError(f"There is no class {text!r}: " + (f"the classes are {some}." if names else
                              f"this model's have no names but the numbers 0 to {self.model.classes - 1}."))
        if not int(text) < self.model.classes:
            raise ConfigError(f"There is no class {text}: they go from 0 to {self.model.classes - 1}.")
        return int(text)

    def calibration(self, path: str | Path | None = None) -> Calibration | None:
        """That of a file, or of the folder; None where it has none. FileError, ModelError. Float32 models only."""
        if path is None:
            path = self.folder / CALIBRATION if self.folder else None
            if path is None or not path.is_file():
                return None
        return Calibration.load(path, self.model)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Everything on a device; the model, not the tokenizer, in another type. ConfigError: no such device."""
        try:
            self.tokenizer.to(device)
            for model in (self.model, self.draft):
                if model is not None:
                    model.to(device, dtype)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"The device {device} is not available: {first_sentence(error)}.") from error
        return self

    def schedule(self, height_to_width: float = 1.0) -> Schedule:
        """What a cache needs to know. height_to_width: of the picture, for Infinity, which knows several shapes."""
        if isinstance(self.model, Infinity):
            return self.model.schedule(scales_for(height_to_width, self.config.size))
        return self.model.schedule()

    def layout(self, height_to_width: float = 1.0) -> tuple[TokenLayout, int, int]:
        """The tokens of a picture, its height and its width in pixels."""
        stride = self.tokenizer.downsample
        if isinstance(self.model, LlamaGen):
            side = self.model.side * stride
            return self.tokenizer.layout(side, side), side, side
        cells = cells_of(self.schedule(height_to_width).sizes, getattr(self.model, "patch", 1))
        return TokenLayout(cells, cast(Any, self.tokenizer).vocab), cells[-1][0] * stride, cells[-1][1] * stride

    def encode(self, images: Tensor, height_to_width: float = 1.0) -> Tokens:
        """Images (B, 3, H, W) of `layout`'s size to the tokens that the model would draw for them."""
        if isinstance(self.tokenizer, MultiScaleTokenizer):
            return self.tokenizer.encode(images, self.layout(height_to_width)[0].scales)
        return self.tokenizer.encode(images)

    def generate(self, condition: Condition, cache: KVCache, sampling: Sampling | None = None,
                 guidance: Guidance | None = None, generators: Generators = None,
                 given: tuple[Tensor, Tensor] | None = None,
                 heard: Callable[[Progress], None] | None = None) -> tuple[Tokens, Tensor]:
        """Tokens, and images (B, 3, H, W) in [0, 1], by whichever model it is.

        condition: (B,) labels, or text features (B, T, C) with their mask (B, T). cache: a fresh one of `schedule()`.
        given: indices (B, L, G) and where they are taken, (B, L) bool. heard: is told after each scale or row.
        """
        sampling, guidance = sampling or self.sampling, guidance or self.guidance
        if isinstance(self.model, LlamaGen):
            words = None if given is None else (given[0][..., 0], given[1])
            return self.model.generate(_labels(condition), self.tokenizer, sampling, guidance, cache, generators, words,
                                       None if heard is None else _Rows(self, heard))
        tokenizer = cast(Any, self.tokenizer)  # of the right class, by __post_init__

        def listening(scale: Scale) -> None:
            if heard is not None:
                heard(Progress(scale.number, cache.schedule.steps,
                               lambda: tokenizer.reconstruct(scale.total).clamp(0, 1)))

        if isinstance(self.model, VAR):
            words = None if given is None else (given[0][..., 0], given[1])
            return self.model.generate(_labels(condition), tokenizer, sampling, guidance, cache, generators, words,
                                       listening)
        if isinstance(condition, Tensor):
            raise ConfigError("This model draws from texts and has no classes.")
        return self.model.generate(*condition, tokenizer, cache.schedule.sizes, sampling, guidance, cache, generators,
                                   given, listening)

    def save(self, folder: str | Path) -> None:
        """Write the folder; a calibration is saved into it as `kv.safetensors`. See `PretrainedMixin` for rounding."""
        folder = Path(folder)
        parts: list[tuple[Any, Path]] = [(self.model, folder)]
        if self.config.tokenizer is None:
            parts.append((self.tokenizer, folder / TOKENIZER))
        if self.draft is not None:
            parts.append((self.draft, folder / DRAFT))
        for part, place in parts:
            part.save_pretrained(place)
        write_file(folder / GENERATION_CONFIG, self.config.to_json().encode())


@dataclass(frozen=True)
class Progress:
    """What `heard` is told: number (from 0) of `count` scales or rows is done.

    picture: makes images (B, 3, H, W) in [0, 1] of what there is so far; rows that are not yet drawn are grey.
    """

    number: int
    count: int
    picture: Callable[[], Tensor]


class _Rows:
    """Collects the tokens of a raster model and tells each row that is complete."""

    def __init__(self, generator: LoadedGenerator, heard: Callable[[Progress], None]) -> None:
        assert isinstance(generator.model, LlamaGen)
        self.side, self.tokenizer, self.heard = generator.model.side, generator.tokenizer, heard
        self.words: list[Tensor] = []

    def __call__(self, number: int, words: Tensor) -> None:
        self.words.append(words)
        if (number + 1) % self.side == 0:
            self.heard(Progress(number // self.side, self.side, self.picture))

    def picture(self) -> Tensor:
        rows, stride = len(self.words) // self.side, self.tokenizer.downsample
        layout = self.tokenizer.layout(rows * stride, self.side * stride)
        drawn = torch.stack(self.words, 1)[..., None]
        images = self.tokenizer.decode(Tokens(drawn, layout, rows * stride, self.side * stride))
        return torch.nn.functional.pad(images, (0, 0, 0, (self.side - rows) * stride), value=0.5)


def _labels(condition: Condition) -> Tensor:
    if not isinstance(condition, Tensor):
        raise ConfigError("This model draws classes and reads no texts.")
    return condition


def read_config(folder: Path) -> GenerationConfig:
    """That of a folder, or the defaults where it has none. ModelError where it is damaged."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return GenerationConfig()
    try:
        return GenerationConfig.from_json(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {first_sentence(error)}.") from error
