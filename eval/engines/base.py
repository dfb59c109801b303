"""What an engine that reads words or knows faces has to do, and what each result says of it.

An engine is one file beside this one; `vtc.eval.engines.catalogue.load_engine` makes it by name. Packages are imported
and weights are read when it is made; what is absent is a ModelError that says how to get it.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vtc.errors import ImageError, ModelError
from vtc.eval.tokbench import Box, Face


@dataclass(frozen=True)
class EngineInfo:
    """Goes into every result, so that the numbers of two engines are not taken for one another.

    version: of the package or program. model: what the weights are called. weights: file name -> SHA-256.
    settings: whatever else changes the answers.
    """

    name: str
    version: str
    model: str
    weights: dict[str, str] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class TextEngine(ABC):
    """Reads crops that hold one word each. It recognises; it does not search."""

    info: EngineInfo

    @abstractmethod
    def read(self, crops: Sequence[np.ndarray], truths: Sequence[str] | None = None) -> list[str]:
        """Crops, uint8 RGB (h, w, 3) of any size from 1x1, to what is written there.

        The answer to a crop does not depend on its neighbours, unless `truths` are given: TokBench bounds PARSeq's
        answers by the longest true word of a batch, and only that engine under `compat` takes notice.
        """


class AdaptedTextEngine(TextEngine):
    """An engine whose answers are brought to the conventions of a data set's truths: capitals only, no separators.

    `note` says so in `info.settings`, for such numbers are not those of the engine as it is.
    """

    def __init__(self, engine: TextEngine, adapt: Callable[[str], str], note: str) -> None:
        self._engine, self._adapt = engine, adapt
        self.info = replace(engine.info, settings={**engine.info.settings, "adapted": note})

    def read(self, crops: Sequence[np.ndarray], truths: Sequence[str] | None = None) -> list[str]:
        return [self._adapt(answer) for answer in self._engine.read(crops, truths)]


class FaceEngine(ABC):
    """Turns a face into a vector; a reconstruction is aligned as its original was, so only the identity is judged.

    measure: "f_sim" where cosines are TokBench's F-Sim; "distance" where the Euclidean distance tells people apart.
    match_threshold: for "distance", below it two pictures are called the same person.
    """

    info: EngineInfo
    measure: Literal["f_sim", "distance"]
    match_threshold: float | None = None

    @abstractmethod
    def detect(self, pixels: np.ndarray) -> list[Box]:
        """Boxes of the faces in uint8 RGB (H, W, 3), largest first; ModelError where the engine has no detector."""

    @abstractmethod
    def align(self, original: np.ndarray, face: Face) -> Any:
        """Where the face lies in the original, uint8 RGB (H, W, 3), for `embed`."""

    @abstractmethod
    def embed(self, pixels: np.ndarray, alignment: Any) -> np.ndarray:
        """The face at `alignment` of an original or its reconstruction to a vector, float64 (D,)."""


def required(module: str, engine: str, install: str) -> Any:
    """An optional package, imported; ModelError with `install`, a command, where it is absent or broken."""
    try:
        return import_module(module)
    except Exception as error:  # a package that is there but does not fit its neighbours raises whatever it likes
        raise ModelError(f"The engine {engine!r} needs the package {module}, which cannot be imported "
                         f"({type(error).__name__}: {error}); install it with: {install}.") from error


def package_folder(package: str, engine: str, install: str) -> Path:
    """Where a package of data files lies, found without importing it; ModelError where it is absent."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"The engine {engine!r} needs the package {package}; install it with: {install}.")
    return Path(spec.submodule_search_locations[0])


def weights_file(path: str | os.PathLike[str] | None, engine: str, file_name: str, how: str) -> Path:
    """The file `path`, or `file_name` in the folder `path`; ModelError that says `how` to get it."""
    if path is None:
        raise ModelError(f"The engine {engine!r} needs the weights {file_name}, given by path: {how}")
    found = Path(path) / file_name if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise ModelError(f"The engine {engine!r} finds no weights at {found}: {how}")
    return found


def hashes(*files: Path) -> dict[str, str]:
    """File name -> SHA-256 of its bytes."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def version_of(*packages: str) -> str:
    """'name version' of the first of `packages` that is installed under that name."""
    for package in packages:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return f"{packages[0]} (version unknown)"


def check_pixels(pixels: np.ndarray) -> np.ndarray:
    """Refuse what is no uint8 (h, w, 3) with at least one pixel; contiguous."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ImageError(f"An engine takes uint8 RGB (h, w, 3), not {pixels.dtype} {pixels.shape}.")
    return np.ascontiguousarray(pixels)
