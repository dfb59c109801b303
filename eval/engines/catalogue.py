"""The engines by name."""

from __future__ import annotations

import os
from importlib import import_module

from vtc.errors import ConfigError
from vtc.eval.engines.base import FaceEngine, TextEngine

#: name -> (module, class)
TEXT_ENGINES = {
    "rapidocr": ("vtc.eval.engines.rapidocr", "RapidOCREngine"),
    "tesseract": ("vtc.eval.engines.tesseract", "TesseractEngine"),
    "parseq": ("vtc.eval.engines.parseq", "PARSeqEngine"),
}
FACE_ENGINES = {
    "dlib": ("vtc.eval.engines.dlib", "DlibEngine"),
    "antelopev2": ("vtc.eval.engines.antelopev2", "AntelopeV2Engine"),
}
#: both work without the network, once their packages are installed
DEFAULT_TEXT_ENGINE = "rapidocr"
DEFAULT_FACE_ENGINE = "dlib"


def load_text_engine(name: str = DEFAULT_TEXT_ENGINE, weights: str | os.PathLike[str] | None = None) -> TextEngine:
    """An engine that reads words.

    weights: a path, for engines whose weights no package brings along. Raises ConfigError for another name, ModelError
    where the package or the weights are absent.
    """
    engine = _make(name, TEXT_ENGINES, weights)
    assert isinstance(engine, TextEngine)
    return engine


def load_face_engine(name: str = DEFAULT_FACE_ENGINE, weights: str | os.PathLike[str] | None = None) -> FaceEngine:
    """An engine that knows faces; as `load_text_engine`."""
    engine = _make(name, FACE_ENGINES, weights)
    assert isinstance(engine, FaceEngine)
    return engine


def _make(name: str, table: dict[str, tuple[str, str]], weights: str | os.PathLike[str] | None) -> object:
    if name not in table:
        raise ConfigError(f"The engines are {', '.join(table)}, not {name!r}.")
    module, class_name = table[name]
    return getattr(import_module(module), class_name)(weights)
