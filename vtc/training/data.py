"""Photographs for training: crops that depend on nothing but the seed and their number.

Sample n of a run is the same picture, scale, place and flip whatever the number of workers or processes, so a run that
stops and resumes sees exactly the samples it would have seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def image_files(folder: str | Path) -> list[Path]:
    """The pictures below a folder, in an order that does not depend on the file system."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


class RandomCrops(Dataset[Tensor]):
    """Sample n: a random square of a random photograph, shrunk by a random factor, mirrored half of the time.

    resolution: side of the square in pixels.
    min_scale: a photograph is resized by a factor drawn from [min_scale, 1], but never below the square.
    """

    def __init__(self, files: list[Path], resolution: int, seed: int, min_scale: float = 0.6) -> None:
        self.files, self.resolution, self.seed, self.min_scale = files, resolution, seed, min_scale

    def __len__(self) -> int:
        return 2**62  # numbered by the sampler, without end

    def __getitem__(self, n: int) -> Tensor:
        """(3, resolution, resolution) uint8."""
        epoch, place = divmod(n, len(self.files))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.files))
        rng = np.random.default_rng((self.seed, epoch, place))
        with Image.open(self.files[order[place]]) as file:
            image = file.convert("RGB")
        side = self.resolution
        smallest = max(self.min_scale, side / min(image.size))
        scale = rng.uniform(smallest, 1.0) if smallest < 1 else smallest
        width, height = (max(side, round(s * scale)) for s in image.size)
        left, top = rng.integers(width - side + 1), rng.integers(height - side + 1)
        box = (left / scale, top / scale, min((left + side) / scale, image.width),
               min((top + side) / scale, image.height))
        crop = np.array(image.resize((side, side), Image.Resampling.LANCZOS, box=box))
        if rng.random() < 0.5:
            crop = np.ascontiguousarray(crop[:, ::-1])
        return torch.from_numpy(crop).permute(2, 0, 1)
