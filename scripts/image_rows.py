"""What the scripts that measure codecs image by image share: the files, a row of scores for each, the CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from vtc.errors import ConfigError, ModelError
from vtc.eval.bits import bits_per_pixel
from vtc.eval.lpips import learned_perceptual_image_patch_similarity
from vtc.eval.psnr import peak_signal_noise_ratio
from vtc.eval.ssim import MS_SSIM_MIN_SIDE, multiscale_structural_similarity
from vtc.images import to_tensor
from vtc.tokenizers.lpips import LPIPS

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}


@dataclass
class Row:
    """One image through one codec; None is what was not measured."""

    image: str
    codec: str
    width: int
    height: int
    num_bytes: int
    bpp: float
    psnr: float
    ms_ssim: float | None
    lpips_alex: float | None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    downsample: int = 1
    quality: float | None = None


class Judge:
    """Scores a reconstruction; both pictures are uint8 (H, W, 3): what is judged is what would be saved."""

    def __init__(self, lpips: LPIPS | None) -> None:
        self.lpips = lpips

    def row(self, image: str, codec: str, original: np.ndarray, decoded: np.ndarray, num_bytes: int) -> Row:
        height, width = original.shape[:2]
        target, preds = (to_tensor(pixels)[None] for pixels in (original, decoded))
        ms_ssim = lpips = None
        if min(height, width) >= MS_SSIM_MIN_SIDE:
            ms_ssim = multiscale_structural_similarity(preds, target).item()
        if self.lpips is not None:
            lpips = learned_perceptual_image_patch_similarity(preds, target, self.lpips).item()
        return Row(image, codec, width, height, num_bytes, bits_per_pixel(num_bytes, height, width),
                   peak_signal_noise_ratio(preds, target).item(), ms_ssim, lpips)


def picture_files(folder: Path, limit: int | None) -> list[Path]:
    """The pictures of a folder, by name."""
    if not folder.is_dir():
        raise ConfigError(f"--images takes a folder, and {folder} is none.")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)[:limit]
    if not files:
        raise ConfigError(f"The folder {folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return files


def find_lpips(weights: str | None) -> tuple[LPIPS | None, str]:
    """AlexNet LPIPS and what to say of it; weights that were named must be there."""
    try:
        return LPIPS("alex", weights), "AlexNet, version 0.1"
    except ModelError as error:
        if weights:
            raise
        return None, f"not measured: {error}"


def table_csv(rows: Sequence[Row]) -> str:
    """One line a row, with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return stream.getvalue()


def number(value: float | None, digits: int) -> str:
    """For a table; a dash where nothing was measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
