"""Face fidelity as in TokBench: is it still the same person?

With antelopev2 the measure is TokBench's F-Sim, the cosine of two vectors. With dlib it is the Euclidean distance, the
share of faces within dlib's threshold of the original, and the cosine after the mean of the originals' vectors has been
taken off; none of them is F-Sim, and none is called so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtc.errors import ConfigError, VtcError
from vtc.eval.engines.base import FaceEngine
from vtc.eval.tokbench import Annotation, Face, Medium, face_ratio
from vtc.eval.tokbench_buckets import BucketMeans, bucket_means, edges


@dataclass(frozen=True)
class FaceRecord:
    """One face of one picture: its vectors in the original and in the reconstruction."""

    image: str
    ratio: float
    original: tuple[float, ...]
    reconstruction: tuple[float, ...]

    @property
    def cosine(self) -> float:
        """Of the two vectors, -1 to 1."""
        return _cosine(np.array(self.original), np.array(self.reconstruction))

    @property
    def distance(self) -> float:
        """Euclidean."""
        return float(np.linalg.norm(np.subtract(self.original, self.reconstruction)))


@dataclass(frozen=True)
class FaceFidelity:
    """measures: "f_sim" of antelopev2; "face_distance", "face_match_rate", "face_centred_cosine" of dlib.

    mean: what was taken off the vectors before "face_centred_cosine".
    """

    measures: dict[str, BucketMeans]
    engine: dict[str, Any]
    settings: dict[str, Any]
    mean: tuple[float, ...] | None = None
    records: tuple[FaceRecord, ...] = ()
    failures: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """For JSON, without the faces."""
        return {**{name: means.describe() for name, means in self.measures.items()}, "engine": self.engine,
                "settings": self.settings, "mean": self.mean, "failures": list(self.failures)}


def annotate_faces(file_name: str, original: np.ndarray, engine: FaceEngine, largest: int | None = 1) -> Annotation:
    """The faces that the engine finds in an original, uint8 (H, W, 3): the `largest` so many, or all for None.

    Sizes are `face_ratio`'s; a picture without a face has no `faces`.
    """
    height, width = original.shape[:2]
    boxes = engine.detect(original)[:largest]
    return Annotation(file_name, height, width, faces=tuple(Face(face_ratio(b, height, width), b) for b in boxes))


def original_faces(annotation: Annotation, original: np.ndarray, engine: FaceEngine) -> list[tuple[Any, np.ndarray]]:
    """Alignment and vector of every annotated face of an original, uint8 (H, W, 3), to be compared with many."""
    annotation.check(original)
    alignments = [engine.align(original, face) for face in annotation.faces]
    return [(alignment, engine.embed(original, alignment)) for alignment in alignments]


def compare_faces(annotation: Annotation, originals: Sequence[tuple[Any, np.ndarray]], reconstruction: np.ndarray,
                  engine: FaceEngine) -> list[FaceRecord]:
    """Every annotated face of one reconstruction, uint8 (H, W, 3); ImageError where its size differs.

    originals: of `original_faces`. The reconstruction is aligned by the original's landmarks: whether a detector still
    finds a face is not asked.
    """
    annotation.check(reconstruction)
    return [FaceRecord(annotation.key, face.ratio, tuple(vector.tolist()),
                       tuple(engine.embed(reconstruction, alignment).tolist()))
            for face, (alignment, vector) in zip(annotation.faces, originals, strict=True)]


def face_fidelity(annotations: Iterable[Annotation], original: Callable[[Annotation], np.ndarray],
                  reconstruction: Callable[[Annotation], np.ndarray], engine: FaceEngine, size: int,
                  medium: Medium = "image", mean: Sequence[float] | None = None) -> FaceFidelity:
    """The engine's measures over a data set in the buckets of the tokenizer's `size`.

    original, reconstruction: give the picture of an annotation, uint8 (H, W, 3), both of the original's size. A
    VtcError of theirs is noted in `failures`, and the other pictures are still compared.
    mean: as `summarise_faces`.
    """
    records: list[FaceRecord] = []
    failures: list[str] = []
    for annotation in annotations:
        try:
            originals = original_faces(annotation, original(annotation), engine)
            records.extend(compare_faces(annotation, originals, reconstruction(annotation), engine))
        except VtcError as error:
            failures.append(f"{annotation.key}: {error}")
    return summarise_faces(records, engine, size, medium, mean, failures)


def summarise_faces(records: Sequence[FaceRecord], engine: FaceEngine, size: int, medium: Medium = "image",
                    mean: Sequence[float] | None = None, failures: Sequence[str] = ()) -> FaceFidelity:
    """Records, of however many pictures and processes, to one row a measure.

    mean: is taken off dlib's vectors before their cosine; by default the mean of the originals at hand, so results that
    are to be compared should be given the same one. It goes into the result. One face by itself has no such cosine.
    """
    ratios, bounds = [r.ratio for r in records], edges("face", size, medium)
    values: dict[str, list[float]]
    centre = None
    if engine.measure == "f_sim":
        values = {"f_sim": [r.cosine for r in records]}
    else:
        threshold = engine.match_threshold
        if threshold is None:
            raise ConfigError(f"The engine {engine.info.name!r} measures distances and has no threshold.")
        values = {"face_distance": [r.distance for r in records],
                  "face_match_rate": [float(r.distance < threshold) for r in records]}
        if mean is not None or len(records) > 1:
            centre = np.mean([r.original for r in records], 0) if mean is None else np.array(mean, dtype=np.float64)
            values["face_centred_cosine"] = [_cosine(np.array(r.original) - centre, np.array(r.reconstruction) - centre)
                                             for r in records]
    settings = {"protocol": "TokBench 855802d", "medium": medium, "size": size,
                "images": len({r.image for r in records}), "faces": len(records),
                "centre": None if centre is None else "given" if mean is not None else "mean of the originals"}
    return FaceFidelity({name: bucket_means(v, ratios, bounds) for name, v in values.items()}, engine.info.describe(),
                        settings, None if centre is None else tuple(centre.tolist()), tuple(records), tuple(failures))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; 0 where one of them is zero (a face that equals the mean).

    >>> round(_cosine(np.array([1.0, 0.0]), np.array([3.0, 4.0])), 12)
    0.6
    """
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0
