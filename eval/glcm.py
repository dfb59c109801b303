"""GLCM score and compression ratio: how much fine texture a large picture holds, as in Diffusion-4K (2503.18352).

The picture is cut into 64x64 patches of 64 grey levels; a grey-level co-occurrence matrix (GLCM) counts which levels
meet at distances 1 to 4 in four directions, 16 matrices a patch. The published score is not their entropy: it is the
entropy of the histogram of the matrices' distinct values (that is what `skimage.measure.shannon_entropy` of a matrix
computes). That form is "upstream" here, and the entropy that textbooks mean is "textbook". Never compare the two.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
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
    if levels.ndim != 2:
        raise ImageError(f"The GLCM score needs levels (H, W), not {levels.shape}; grey_levels makes them of RGB.")
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
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """What depends on the patch size only.

    classes: (14, most pairs + 1) int32, the number of each value count / pairs; equal fractions share one.
    log_terms: x log2 x for x = 0 .. 65536.
    """
    counts = np.arange(max(PAIRS) + 1)
    values = counts / np.array(PAIRS)[:, None]  # equal fractions are equal floats: division rounds correctly
    _, classes = np.unique(values, return_inverse=True)
    x = np.arange(MATRICES * CELLS + 1, dtype=np.float64)
    log_terms = x * np.log2(np.maximum(x, 1))
    return classes.reshape(values.shape).astype(np.int32), log_terms


def _numpy_scores(levels: np.ndarray, rows: int, columns: int, textbook: bool, classes: np.ndarray,
                  log_terms: np.ndarray) -> np.ndarray:
    scores = np.empty((rows, columns))
    first = [np.s_[: PATCH - dr, max(0, -dc) : PATCH - max(0, dc)] for dr, dc, _ in OFFSETS]
    second = [np.s_[dr:, max(0, dc) : PATCH + min(0, dc)] for dr, dc, _ in OFFSETS]
    pairs, shares = np.array(PAIRS), np.array([share for *_, share in OFFSETS])
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

    pairs = np.array(PAIRS, dtype=np.float64)
    shares = tuple(share for *_, share in OFFSETS)
    kinds = int(_tables()[0].max()) + 1
    (right1, right2, right3, right4, down1, down2, down3, down4,
     diagonal1, diagonal2, diagonal3, other1, other2, other3) = (dr * STRIDE + dc for dr, dc, _ in OFFSETS)
    # A table's second half counts pairs with the frame. The 148 counters more keep the tables from lying a multiple of
    # 4 KiB apart, where the processor takes a load for one of a store to another table and waits: three times faster.
    table = 2 * CELLS + 148
    t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13 = (np.uint32(k * table) for k in range(1, 14))

    @numba.njit
    def count(framed, counts):  # type: ignore[no-untyped-def]  # numba compiles it
        one = np.uint16(1)
        for row in range(FRAME, FRAME + PATCH):
            for i in range(row * STRIDE + FRAME, row * STRIDE + FRAME + PATCH):
                first = framed[i] << np.uint32(6)
                # Written out, and the tables in turn: in a flat area one table would wait for its own last store.
                counts[first + framed[i + right1]] += one
                counts[t1 + first + framed[i + right2]] += one
                counts[t2 + first + framed[i + right3]] += one
                counts[t3 + first + framed[i + right4]] += one
                counts[t4 + first + framed[i + down1]] += one
                counts[t5 + first + framed[i + down2]] += one
                counts[t6 + first + framed[i + down3]] += one
                counts[t7 + first + framed[i + down4]] += one
                counts[t8 + first + framed[i + diagonal1]] += one
                counts[t9 + first + framed[i + diagonal2]] += one
                counts[t10 + first + framed[i + diagonal3]] += one
                counts[t11 + first + framed[i + other1]] += one
                counts[t12 + first + framed[i + other2]] += one
                counts[t13 + first + framed[i + other3]] += one

    @numba.njit
    def upstream_score(packed, classes, log_terms, histogram, seen):  # type: ignore[no-untyped-def]  # numba compiles it
        occupied, num_seen = 0, 0
        for k in range(len(shares)):
            for j in range(k * table // 4, (k * table + CELLS) // 4):
                word = packed[j]  # four counters: most are zero
                packed[j] = np.uint64(0)
                while word:
                    value = word & np.uint64(0xFFFF)
                    word >>= np.uint64(16)
                    if value:
                        kind = np.uint32(classes[k, value])
                        if histogram[kind] == 0:
                            seen[num_seen] = kind
                            num_seen += 1
                        histogram[kind] += shares[k]
                        occupied += shares[k]
        total = log_terms[MATRICES * CELLS - occupied]
        for kind in seen[:num_seen]:
            total += log_terms[histogram[kind]]
            histogram[kind] = 0
        return np.log2(MATRICES * CELLS) - total / (MATRICES * CELLS)

    @numba.njit
    def textbook_score(counts, log_terms):  # type: ignore[no-untyped-def]  # numba compiles it
        total = 0.0
        for k in range(len(shares)):
            entropy = 0.0
            for cell in range(k * table, k * table + CELLS):
                entropy += log_terms[counts[cell]]
                counts[cell] = 0
            total += shares[k] * (np.log2(pairs[k]) - entropy / pairs[k])
        return total / MATRICES

    @numba.njit(parallel=True)
    def scores(levels, rows, columns, textbook, classes, log_terms):  # type: ignore[no-untyped-def]  # numba compiles it
        result = np.empty((rows, columns))
        for row in numba.prange(rows):
            framed = np.full(STRIDE * STRIDE, OUTSIDE, dtype=np.uint32)
            counts = np.zeros(len(shares) * table, dtype=np.uint16)
            packed = counts.view(np.uint64)
            histogram = np.zeros(kinds, dtype=np.int64)
            seen = np.empty(kinds, dtype=np.uint32)
            for column in range(columns):
                for r in range(PATCH):
                    for c in range(PATCH):
                        framed[(r + FRAME) * STRIDE + FRAME + c] = levels[row * PATCH + r, column * PATCH + c]
                count(framed, counts)
                if textbook:
                    result[row, column] = textbook_score(counts, log_terms)
                else:
                    result[row, column] = upstream_score(packed, classes, log_terms, histogram, seen)
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
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(f"A JPEG is written of uint8 (H, W, 3), not {pixels.dtype} {pixels.shape}.")
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.tell()


def compression_ratio(pixels: Sequence[np.ndarray], quality: int = 95) -> float:
    """Raw bytes of pictures, uint8 (H, W, 3), over the bytes of their JPEG files: a ratio of sums.

    >>> flat = np.full((64, 64, 3), 128, dtype=np.uint8)
    >>> compression_ratio([flat]) > 10 and compression_ratio([flat, flat]) == compression_ratio([flat])
    True
    """
    if not pixels:
        raise ConfigError("There are no pictures to compress.")
    return sum(picture.size for picture in pixels) / sum(jpeg_bytes(picture, quality) for picture in pixels)


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
