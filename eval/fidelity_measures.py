"""Words and faces inside the suite: `vtc.eval.text_fidelity` and `face_fidelity` as measures of one picture at a time.

The pictures are read as they are: TokBench's resolution protocol, which shrinks them first, is
`scripts/evaluate_fidelity.py`'s. An engine's name, version and weights are in the settings, so in every result.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtc.errors import FileError
from vtc.eval.engines.base import FaceEngine, TextEngine
from vtc.eval.face_fidelity import FaceRecord, annotate_faces, compare_faces, original_faces, summarise_faces
from vtc.eval.measures import Collector, Measure, Seen, once
from vtc.eval.provenance import sha256
from vtc.eval.text_fidelity import WordRecord, read_words, summarise_words
from vtc.eval.text_lines import words_of_line
from vtc.eval.tokbench import Annotation, read_annotations
from vtc.files import read_file
from vtc.images import to_uint8

#: gives the words of a picture, by its name and pixels; None where nothing is annotated
Words = Callable[[str, np.ndarray], Annotation | None]


def words_from(path: str | Path) -> Words:
    """The words that a file tells: TokBench's JSON, or a line of JSON a picture (.jsonl) with lines of text.

    A .jsonl line has `image` and `words`, each with `text`, `polygon` (x, y, x, y, ...) and `ignore`; lines of several
    words are cut at their blanks. Raises FileError where the file is neither.
    """
    if Path(path).suffix != ".jsonl":
        found = {Path(annotation.file_name).with_suffix("").as_posix(): annotation
                 for annotation in read_annotations(path, "text")}
        return lambda name, pixels: found.get(name)
    lines: dict[str, list[tuple[list[float], str]]] = {}
    try:
        for text in read_file(path).splitlines():
            entry = json.loads(text)
            lines[Path(entry["image"]).with_suffix("").as_posix()] = [
                (list(map(float, word["polygon"])), str(word["text"])) for word in entry["words"]
                if word["text"] and not word.get("ignore")]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is not annotations, a picture a line: {type(error).__name__}: {error}.") from error

    def words(name: str, pixels: np.ndarray) -> Annotation | None:
        found = []
        for polygon, text in lines.get(name, ()):
            x, y = polygon[::2], polygon[1::2]
            found += words_of_line(pixels, (min(x), min(y), max(x), max(y)), text)
        return Annotation(name, pixels.shape[0], pixels.shape[1], tuple(found)) if found else None

    return words


class TextMeasure(Measure):
    """Can the words still be read? Shares of words over all pictures, and TokBench's buckets for `size`."""

    def __init__(self, engine: TextEngine, annotations: str | Path, size: int) -> None:
        self.engine, self.words, self.size = engine, words_from(annotations), size
        self.alias = f"text_{engine.info.name}"
        self.settings = {"engine": engine.info.describe(), "size": size, "annotations_sha256": sha256(annotations)}
        self._lock = threading.Lock()  # engines make no promise about threads

    def parts(self, seen: Seen) -> dict[str, np.ndarray]:
        annotation = once(seen.memo, self.key, lambda: self.words(seen.name, to_uint8(seen.target)))
        if annotation is None or not annotation.words:
            return {}
        with self._lock:
            records = read_words(annotation, to_uint8(seen.preds), self.engine)
        return {"image": np.array([seen.name] * len(records)), "truth": np.array([r.truth for r in records]),
                "answer": np.array([r.answer for r in records]), "ratio": np.array([r.ratio for r in records]),
                "t_acc": np.array([r.t_acc for r in records]), "t_ned": np.array([r.t_ned for r in records])}

    def collector(self, description: Mapping[str, Any]) -> Collector:
        return _Words(self.engine, self.size)


class _Words(Collector):
    def __init__(self, engine: TextEngine, size: int) -> None:
        self.engine, self.size = engine, size
        self.records: list[WordRecord] = []

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        columns = (parts[name].tolist() for name in ("image", "truth", "answer", "ratio", "t_acc", "t_ned"))
        self.records += [WordRecord(image, number, truth, answer, ratio, acc, ned) for number, (
            image, truth, answer, ratio, acc, ned) in enumerate(zip(*columns, strict=True))]

    def results(self) -> dict[str, Any]:
        found = summarise_words(self.records, self.engine.info.describe(), self.size)
        name = self.engine.info.name
        return {f"text_accuracy_{name}": found.t_acc.micro, f"text_edit_similarity_{name}": found.t_ned.micro,
                f"text_fidelity_{name}": found.describe()}


class FaceMeasure(Measure):
    """Is it still the same person? Of the largest face that the engine finds in each original."""

    def __init__(self, engine: FaceEngine, size: int) -> None:
        self.engine, self.size = engine, size
        self.alias = f"face_{engine.info.name}"
        self.settings = {"engine": engine.info.describe(), "size": size, "faces": "largest of each original"}
        self._lock = threading.Lock()

    def parts(self, seen: Seen) -> dict[str, np.ndarray]:
        with self._lock:
            annotation, originals = once(seen.memo, self.key, lambda: self._originals(seen))
            records = compare_faces(annotation, originals, to_uint8(seen.preds), self.engine) if originals else []
        if not records:
            return {}
        return {"image": np.array([seen.name] * len(records)), "ratio": np.array([r.ratio for r in records]),
                "original": np.array([r.original for r in records]),
                "reconstruction": np.array([r.reconstruction for r in records])}

    def _originals(self, seen: Seen) -> tuple[Annotation, list[tuple[Any, np.ndarray]]]:
        pixels = to_uint8(seen.target)
        annotation = annotate_faces(seen.name, pixels, self.engine)
        return annotation, original_faces(annotation, pixels, self.engine)

    def collector(self, description: Mapping[str, Any]) -> Collector:
        return _Faces(self.engine, self.size)


class _Faces(Collector):
    def __init__(self, engine: FaceEngine, size: int) -> None:
        self.engine, self.size = engine, size
        self.records: list[FaceRecord] = []

    def add(self, parts: Mapping[str, np.ndarray]) -> None:
        columns = (parts[name].tolist() for name in ("image", "ratio", "original", "reconstruction"))
        self.records += [FaceRecord(image, ratio, tuple(a), tuple(b))
                         for image, ratio, a, b in zip(*columns, strict=True)]

    def results(self) -> dict[str, Any]:
        found = summarise_faces(self.records, self.engine, self.size)
        name = self.engine.info.name
        return {**{f"{measure}_{name}": means.micro for measure, means in found.measures.items()},
                f"face_fidelity_{name}": found.describe()}
