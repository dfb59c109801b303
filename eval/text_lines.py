"""Words from annotated lines: where a data set has one box for several words, the line is cut at its blanks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vtc.errors import ImageError
from vtc.eval.tokbench import Box, Word, text_ratio

#: how far from its place in an evenly spaced line a blank is looked for, in characters
REACH = 4.0
#: what a word of twice or no width costs, where a column full of ink costs 1
STRETCH = 0.3


def words_of_line(pixels: np.ndarray, box: Box, text: str) -> list[Word]:
    """The words of a horizontal line of text, uint8 (H, W, 3), each with its part of the line's box.

    The cuts are those that together have the least ink under them and leave the words about as wide as their letters
    are many: dynamic programming over the columns. A word by itself keeps the whole box.
    Raises ImageError where the box has fewer columns than the text has letters.
    """
    height, width = pixels.shape[:2]
    words = text.split()
    if not words:
        return []
    boxes = [box] if len(words) == 1 else _cut(pixels, box, words)
    return [Word(part, word, text_ratio(part, word, height, width)) for word, part in zip(words, boxes, strict=True)]


def _cut(pixels: np.ndarray, box: Box, words: list[str]) -> list[Box]:
    left, top, right, bottom = (max(0, int(v)) for v in box)
    line = pixels[top:bottom, left:right]
    length = len(" ".join(words))
    if line.shape[0] < 1 or line.shape[1] < length:
        raise ImageError(f"The box {box} is too small for {' '.join(words)!r}.")
    pitch = line.shape[1] / length
    ink = _smoothed(_ink(line), max(1, round(0.8 * pitch)))
    # A cut lies in the middle of a blank. The line begins and ends with half a blank beyond its box.
    ends = np.cumsum([len(word) + 1 for word in words]) * pitch - pitch / 2  # where even spacing has the cuts
    places = [np.array([-pitch / 2])]
    costs, came_from = [np.zeros(1)], []
    for number, word in enumerate(words):
        if number < len(words) - 1:
            here = np.arange(max(1, int(ends[number] - REACH * pitch)),
                             min(len(ink) - 1, int(ends[number] + REACH * pitch) + 1)).astype(np.float64)
            own = ink[here.astype(int)]
        else:
            here, own = np.array([len(ink) + pitch / 2]), np.zeros(1)
        relative = (here[None, :] - places[-1][:, None]) / ((len(word) + 1) * pitch)
        step = costs[-1][:, None] + STRETCH * (relative - 1) ** 2 + np.where(relative > 0.4, 0, 1e6)
        came_from.append(step.argmin(0))
        costs.append(step.min(0) + own)
        places.append(here)
    cuts, at = [], 0
    for here, back in zip(reversed(places), [*reversed(came_from), None], strict=True):
        cuts.append(float(here[at]))
        at = 0 if back is None else int(back[at])
    cuts.reverse()
    margin = 0.1 * pitch  # little: blanks of proportional fonts are narrow
    return [(max(left + start + margin, left), box[1], min(left + end - margin, right), box[3])
            for start, end in pairwise(cuts)]


def _ink(line: np.ndarray) -> np.ndarray:
    """How much each column differs from the most common grey, (w,), 0 to 1."""
    grey = line.astype(np.float64).mean(2)
    difference = np.abs(grey - np.median(grey))
    return difference.mean(0) / max(1.0, float(difference.mean(0).max()))


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean of the same length; beyond the ends lies paper."""
    return np.convolve(values, np.ones(window) / window, mode="same")[: len(values)]
