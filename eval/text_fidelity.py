"""Text fidelity as in TokBench: can the words still be read in the reconstruction?

T-ACC is the share of words read exactly, T-NED the mean of 1 - Levenshtein distance / longer length (higher is better,
its name notwithstanding). Both respect case and accents. Source: TokBench (Wu et al., 2505.18142), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vtc.errors import ImageError, VtcError
from vtc.eval.engines.base import TextEngine
from vtc.eval.tokbench import Annotation, Medium, Word
from vtc.eval.tokbench_buckets import BucketMeans, bucket_means, edges

#: words that are read in one call
BATCH = 64


@dataclass(frozen=True)
class WordRecord:
    """One word of one picture, its `number`-th: what stands there, what was read, and the two scores."""

    image: str
    number: int
    truth: str
    answer: str
    ratio: float
    t_acc: int
    t_ned: float

    def describe(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return asdict(self)


@dataclass(frozen=True)
class TextFidelity:
    """t_acc, t_ned: TokBench's rows, 0 to 1. engine, settings: who read, and how. failures: what could not be."""

    t_acc: BucketMeans
    t_ned: BucketMeans
    engine: dict[str, Any]
    settings: dict[str, Any]
    records: tuple[WordRecord, ...] = ()
    failures: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """For JSON, without the words."""
        return {"t_acc": self.t_acc.describe(), "t_ned": self.t_ned.describe(), "engine": self.engine,
                "settings": self.settings, "failures": list(self.failures)}


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn `a` into `b`.

    >>> levenshtein("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def t_ned(truth: str, answer: str) -> float:
    """1 - distance / longer length, 0 to 1; two empty words are equal (TokBench divides by zero).

    >>> t_ned("Hello", "hello")
    0.8
    """
    longer = max(len(truth), len(answer))
    return 1 - levenshtein(truth, answer) / longer if longer else 1.0


def score_word(image: str, number: int, word: Word, answer: str) -> WordRecord:
    """The two scores of one answer."""
    return WordRecord(image, number, word.truth, answer, word.ratio, int(answer == word.truth),
                      t_ned(word.truth, answer))


def readable(annotations: Iterable[Annotation], records: Iterable[WordRecord]) -> list[Annotation]:
    """Only the words that were read exactly in the originals, which `records` are of, and the pictures that keep some.

    TokBench made its annotations so: what a reader misses in a reconstruction is then the tokenizer's doing.
    """
    right = {(r.image, r.number) for r in records if r.t_acc}
    kept = (replace(a, words=tuple(w for i, w in enumerate(a.words) if (a.key, i) in right)) for a in annotations)
    return [annotation for annotation in kept if annotation.words]


def read_words(annotation: Annotation, reconstruction: np.ndarray, engine: TextEngine) -> list[WordRecord]:
    """Every annotated word of one reconstruction, uint8 (H, W, 3) of the original's size.

    The crop is the box, its corners cut to whole pixels, without a margin. Raises ImageError where the size differs.
    """
    annotation.check(reconstruction)
    answers = engine.read([crop(annotation, word, reconstruction) for word in annotation.words])
    return [score_word(annotation.key, number, word, answer)
            for number, (word, answer) in enumerate(zip(annotation.words, answers, strict=True))]


def crop(annotation: Annotation, word: Word, pixels: np.ndarray) -> np.ndarray:
    """The pixels of a word's box; ImageError where it holds none."""
    x1, y1, x2, y2 = (max(0, int(v)) for v in word.box)
    pixels = pixels[y1:y2, x1:x2]
    if pixels.size == 0:
        raise ImageError(f"The box {word.box} of {word.truth!r} in {annotation.key} holds no pixels.")
    return pixels


def text_fidelity(annotations: Iterable[Annotation], reconstruction: Callable[[Annotation], np.ndarray],
                  engine: TextEngine, size: int, medium: Medium = "image", compat: bool = False) -> TextFidelity:
    """T-ACC and T-NED of a data set in the buckets of the tokenizer's `size`.

    reconstruction: gives the picture of an annotation, uint8 (H, W, 3) of the original's size. It is asked in order,
    once for each; a VtcError of it is noted in `failures`, and the other pictures are still read.
    compat: words go in TokBench's batches of 64, in order across pictures, with the true words (see PARSeqEngine);
    in films, crops of one pixel in width or height are left out.
    """
    records: list[WordRecord] = []
    failures: list[str] = []
    waiting: list[tuple[str, int, Word, np.ndarray]] = []

    def read_waiting() -> None:
        truths = [word.truth for _, _, word, _ in waiting]
        answers = engine.read([pixels for *_, pixels in waiting], truths if compat else None)
        records.extend(score_word(key, number, word, answer)
                       for (key, number, word, _), answer in zip(waiting, answers, strict=True))

    for annotation in annotations:
        try:
            pixels = reconstruction(annotation)
            annotation.check(pixels)
            crops = [(annotation.key, number, word, crop(annotation, word, pixels).copy())  # no view of the picture
                     for number, word in enumerate(annotation.words)]
        except VtcError as error:
            failures.append(f"{annotation.key}: {error}")
            continue
        if compat and medium == "video":
            crops = [entry for entry in crops if min(entry[3].shape[:2]) > 1]
        for entry in crops:
            waiting.append(entry)
            if len(waiting) == BATCH:
                read_waiting()
                waiting.clear()
    if waiting:
        read_waiting()
    return summarise_words(records, engine.info.describe(), size, medium, failures=failures, compat=compat)


def summarise_words(records: Sequence[WordRecord], engine: dict[str, Any], size: int, medium: Medium = "image",
                    failures: Sequence[str] = (), compat: bool = False) -> TextFidelity:
    """Records, of however many pictures and processes, to TokBench's rows."""
    ratios, bounds = [r.ratio for r in records], edges("text", size, medium)
    settings = {"protocol": "TokBench 855802d", "medium": medium, "size": size, "compat": compat,
                "images": len({r.image for r in records}), "words": len(records)}
    return TextFidelity(bucket_means([r.t_acc for r in records], ratios, bounds),
                        bucket_means([r.t_ned for r in records], ratios, bounds), engine, settings, tuple(records),
                        tuple(failures))
