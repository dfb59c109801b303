"""GLCM score and compression ratio: how much fine texture a large picture holds, as in Diffusion-4K (2503.18352).

The picture is cut into 64x64 patches of 64 grey levels; a grey-level co-occurrence matrix (GLCM) counts which levels
meet at distances 1 to 4 in four directions, 16 matrices a patch. The published score is not their entropy: it is the
entropy of the histogram of the matrices' distinct values (that is what `skimage.measure.shannon_entropy` of a matrix
computes). That form is "upstream" here, and the entropy that textbooks mean is "textbook". Never compare the two.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc.errors import ConfigError, ImageError
from vtc.eval.metric import Metric, check_images
from vtc.images import to_uint8

Form = Literal["upstream", "textbook"]

PATCH, LEVELS = 64, 64
CELLS = LEVELS * LEVELS
MATRICES = 16
#: (rows, columns) between the two pixels of a pair, and how many of the 16 matrices have it: scikit-image rounds
#: distance * (sin, cos) of 0, 45, 90 and 135 degrees, so distances 1 and 2 share their diagonals
OFFSETS = ((0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1), (4, 0, 1),
           (1, 1, 2), (2, 2, 1), (3, 3, 1), (1, -1, 2), (2, -2, 1), (3, -3, 1))
#: pairs of pixels of a patch at each offset
PAIRS = tuple((PATCH - abs(dr)) * (PATCH - abs(dc)) for dr, dc, _ in OFFSETS)

# A patch lies in a frame of 4 pixels whose level leads out of the matrix, so that no border needs a test.
FRAME = 4
STRIDE = PATCH + 2 * FRAME
OUTSIDE = CELLS


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) to 64 levels (H, W): OpenCV's grey in whole numbers, then divided by 4.

    >>> grey_levels(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8))
    array([[19, 37,  7]], dtype=uint8)
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(f"Grey levels are taken from uint8 (H, W, 3), not {pixels.dtype} {pixels.shape}.")
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    grey = (red * 9798 + green * 19235 + blue * 3735 + 16384) >> 15
    return (grey >> 2).astype(np.uint8)


def glcm_patch_scores(levels: np.ndarray, form: Form = "upstream") -> np.ndarray:
    """Score of every whole patch, (H // 64, W // 64) float64, of a picture of 64 levels (H, W).

    With numba (extra `eval`) the patches run in parallel, else in numpy; the same numbers to 1e-9.
    """
    if form not in ("upstream", "textbook"):
        raise ConfigError(f'The GLCM score has the forms "upstream" and "textbook", not {form!r}.')
    rows, columns = levels.shape[0] // PATCH, levels.shape[1] // PATCH
    if not rows or not columns:
        raise ImageError(f"The GLCM score needs at least {PATCH}x{PATCH} pixels, "
                         f"not {levels.shape[1]}x{levels.shape[0]}.")
    if levels.dtype != np.uint8 or levels.max() >= LEVELS:
        raise ImageError(f"The GLCM score needs uint8 levels below {LEVELS}.")
    kernel = _compiled() or _numpy_scores
    return kernel(np.ascontiguousarray(levels), rows, columns, form == "textbook", *_tables())


def glcm_score(pixels: np.ndarray, form: Form = "upstream", size: int | None = None) -> float:
    """Mean of the patches' scores of a picture, uint8 (H, W, 3).

    size: upstream measures the square of this side at the top left, whatever the picture's size; None measures all
    whole patches. ImageError where the picture is smaller.
    """
    if size is not None:
        if size < PATCH or min(pixels.shape[:2]) < size:
            raise ImageError(f"A {pixels.shape[1]}x{pixels.shape[0]} picture has no square of {size} pixels.")
        pixels = pixels[:size, :size]
    return float(glcm_patch_scores(grey_levels(pixels), form).mean())


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What depends on the patch size only.

    classes: (14, most pairs + 1) int32, the number of each value count / pairs; equal fractions share one.
    log_terms: x log2 x for x = 0 .. 65536. steps: offsets in the framed patch. shares: matrices with each offset.
    """
    counts = np.arange(max(PAIRS) + 1)
    values = counts / np.array(PAIRS)[:, None]  # equal fractions are equal floats: division rounds correctly
    _, classes = np.unique(values, return_inverse=True)
    x = np.arange(MATRICES * CELLS + 1, dtype=np.float64)
    log_terms = x * np.log2(np.maximum(x, 1))
    steps = np.array([dr * STRIDE + dc for dr, dc, _ in OFFSETS])
    shares = np.array([share for *_, share in OFFSETS])
    return classes.reshape(values.shape).astype(np.int32), log_terms, steps, shares


def _numpy_scores(levels: np.ndarray, rows: int, columns: int, textbook: bool, classes: np.ndarray,
                  log_terms: np.ndarray, steps: np.ndarray, shares: np.ndarray) -> np.ndarray:
    scores = np.empty((rows, columns))
    first = [np.s_[: PATCH - dr, max(0, -dc) : PATCH - max(0, dc)] for dr, dc, _ in OFFSETS]
    second = [np.s_[dr:, max(0, dc) : PATCH + min(0, dc)] for dr, dc, _ in OFFSETS]
    pairs = np.array(PAIRS)
    for row in range(rows):
        for column in range(columns):
            patch = levels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].astype(np.int64)
            cells = [(patch[a] * LEVELS + patch[b]).ravel() + k * CELLS
                     for k, (a, b) in enumerate(zip(first, second, strict=True))]
            counts = np.bincount(np.concatenate(cells), minlength=len(OFFSETS) * CELLS).reshape(-1, CELLS)
            if textbook:
                entropies = np.log2(pairs) - log_terms[counts].sum(1) / pairs
                scores[row, column] = (entropies * shares).sum() / MATRICES
            else:
                kinds = np.take_along_axis(classes, counts, 1)
                histogram = np.bincount(kinds.ravel(), np.repeat(shares, CELLS)).astype(np.int64)
                scores[row, column] = np.log2(MATRICES * CELLS) - log_terms[histogram].sum() / (MATRICES * CELLS)
    return scores


@cache
def _compiled() -> Callable[..., np.ndarray] | None:
    """The same in machine code, or None without numba."""
    try:
        import numba
    except ImportError:
        return None

    offsets = len(OFFSETS)
    pairs = np.array(PAIRS, dtype=np.float64)
    kinds = int(_tables()[0].max()) + 1

    @numba.njit(parallel=True, cache=False)
    def scores(levels, rows, columns, textbook, classes, log_terms, steps, shares):  # type: ignore[no-untyped-def]
        result = np.empty((rows, columns))
        for row in numba.prange(rows):
            framed = np.full(STRIDE * STRIDE, OUTSIDE, dtype=np.int64)
            counts = np.zeros((offsets, 2 * CELLS), dtype=np.uint16)  # the second half counts pairs with the frame
            packed = counts.view(np.uint64)  # four counters at a time: most are zero
            histogram = np.zeros(kinds, dtype=np.int64)
            seen = np.empty(kinds, dtype=np.int64)
            for column in range(columns):
                for r in range(PATCH):
                    for c in range(PATCH):
                        framed[(r + FRAME) * STRIDE + FRAME + c] = levels[row * PATCH + r, column * PATCH + c]
                for r in range(FRAME, PATCH + FRAME):
                    for i in range(r * STRIDE + FRAME, r * STRIDE + FRAME + PATCH):
                        first = framed[i] * LEVELS
                        # Fourteen tables in turn: in a flat area one table would wait for its own last store.
                        for k in range(offsets):
                            counts[k, first + framed[i + steps[k]]] += np.uint16(1)
                total, occupied, num_seen = 0.0, 0, 0
                for k in range(offsets):
                    entropy_sum = 0.0
                    for j in range(CELLS // 4):
                        if packed[k, j]:
                            for cell in range(4 * j, 4 * j + 4):
                                count = counts[k, cell]
                                if count:
                                    if textbook:
                                        entropy_sum += log_terms[count]
                                    else:
                                        kind = classes[k, count]
                                        if histogram[kind] == 0:
                                            seen[num_seen] = kind
                                            num_seen += 1
                                        histogram[kind] += shares[k]
                                        occupied += shares[k]
                            packed[k, j] = 0
                    if textbook:
                        total += shares[k] * (np.log2(pairs[k]) - entropy_sum / pairs[k])
                if textbook:
                    result[row, column] = total / MATRICES
                else:
                    total = log_terms[MATRICES * CELLS - occupied]
                    for s in range(num_seen):
                        total += log_terms[histogram[seen[s]]]
                        histogram[seen[s]] = 0
                    result[row, column] = np.log2(MATRICES * CELLS) - total / (MATRICES * CELLS)
        return result

    return cast("Callable[..., np.ndarray]", scores)


class GLCMScore(Metric):
    """Mean GLCM score of images; more texture is higher.

    form, size: see `glcm_score`.

    >>> metric = GLCMScore()
    >>> metric.update(torch.full((1, 3, 64, 64), 0.5))
    >>> metric.compute()
    tensor(0.0033, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, form: Form = "upstream", size: int | None = None) -> None:
        super().__init__()
        if form not in ("upstream", "textbook"):
            raise ConfigError(f'The GLCM score has the forms "upstream" and "textbook", not {form!r}.')
        self.form, self.size = form, size
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def metric_name(self) -> str:
        """"glcm_score" for the published form, "glcm_entropy" for the textbook's."""
        return "glcm_score" if self.form == "upstream" else "glcm_entropy"

    def update(self, images: Tensor) -> None:
        """Add images (B, 3, H, W) in [0, 1]; they are rounded to 8 bits."""
        check_images(images)
        for image in images:
            self.total += glcm_score(to_uint8(image), self.form, self.size)
            self.count += 1

    def compute(self) -> Tensor:
        """Mean over images, float64."""
        return self.total / self.count


def jpeg_bytes(pixels: np.ndarray, quality: int = 95) -> int:
    """Bytes of the JPEG file that Pillow writes of uint8 (H, W, 3), colour subsampled 4:2:0, as upstream does."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.tell()


class CompressionRatio(Metric):
    """Raw bytes of all images over the bytes of all their JPEG files: a ratio of sums; less texture is higher.

    >>> metric = CompressionRatio()
    >>> metric.update_bytes(100, height=10, width=20)
    >>> metric.update_bytes(50, height=10, width=10)
    >>> metric.compute()
    tensor(6., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    raw: Tensor
    coded: Tensor

    def __init__(self, quality: int = 95) -> None:
        super().__init__()
        self.quality = quality
        for name in ("raw", "coded"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Encode and add images (B, 3, H, W) in [0, 1]."""
        check_images(images)
        for image in images:
            self._add(jpeg_bytes(to_uint8(image), self.quality), image.shape[1], image.shape[2])

    def update_bytes(self, num_bytes: int, height: int, width: int) -> None:
        """Add a file that exists; upstream measures PNG or other files by their own bytes, which is another number."""
        self._computed, self._update_count = None, max(1, self._update_count)
        self._add(num_bytes, height, width)

    def _add(self, num_bytes: int, height: int, width: int) -> None:
        if num_bytes < 1:
            raise ConfigError(f"A file of {num_bytes} bytes makes no ratio.")
        self.raw += 3 * height * width
        self.coded += num_bytes

    def compute(self) -> Tensor:
        """The ratio, float64."""
        return self.raw.double() / self.coded
