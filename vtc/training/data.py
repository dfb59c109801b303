"""Photographs for training: crops that depend on nothing but the seed and their number.

Sample n of a run is the same picture, scale, place and flip whatever the number of workers or processes, so a run that
stops and resumes sees exactly the samples it would have seen, without reading those before them.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vtc.errors import ConfigError, TrainingError, first_sentence
from vtc.images import load_image
from vtc.training.sources import IMAGE_SUFFIXES, FolderPictures, Pictures, image_files, open_pictures

__all__ = ["IMAGE_SUFFIXES", "Numbering", "RandomCrops", "image_files", "validation_pictures"]

log = logging.getLogger(__name__)

#: pictures in a row that may be broken before a run gives up
PATIENCE = 100


def validation_pictures(where: str | Path | None, split: str, limit: int = 0) -> list[Tensor]:
    """The first `limit` whole pictures of a source, or all for 0, each (3, H, W) in [0, 1]; none of no source."""
    if not where:
        return []
    pictures = open_pictures(where, split)
    read = (pictures.read(n) for n in range(min(len(pictures), limit or len(pictures))))
    return [load_image(file, name=key).tensor() for key, _, file in read]


class Numbering:
    """Sample numbers without end to pictures: each epoch is a permutation of its own."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.arange(0)

    def __call__(self, n: int) -> tuple[int, int, NDArray[np.int64]]:
        """(epoch, place in it, the epoch's order) of sample n."""
        epoch, place = divmod(n, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return epoch, place, self._order


class GoodPictures:
    """A source whose broken pictures are passed over: each is named once, and counted by all workers together."""

    def __init__(self, source: Pictures) -> None:
        self.source = source
        self._broken = multiprocessing.Value("q", 0)
        self._named: set[int] = set()

    @property
    def broken(self) -> int:
        """Pictures that could not be read so far."""
        return int(self._broken.value)

    def first(self, order: NDArray[np.int64], place: int) -> tuple[int, NDArray[np.uint8]]:
        """(number, pixels (H, W, 3)) of the picture at a place of an epoch's order, or of the first good one behind it.

        TrainingError where a hundred in a row are broken.
        """
        patience = min(PATIENCE, len(order))
        for further in range(patience):
            number = int(order[(place + further) % len(order)])
            key = f"picture {number}"
            try:
                key, _, file = self.source.read(number)
                return number, load_image(file, name=key).pixels
            except MemoryError:
                raise
            except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, ...
                if number not in self._named:
                    self._named.add(number)
                    with self._broken.get_lock():
                        self._broken.value += 1
                    log.warning("%s is skipped: %s.", key, first_sentence(error))
        raise TrainingError(f"{patience} pictures in a row cannot be read, the last one is {key}: look at the data.")


class RandomCrops(Dataset[Tensor]):
    """Sample n: a random square of a random photograph, shrunk by a random factor, mirrored half of the time.

    pictures: files, or any source of `vtc.training.sources`.
    resolution: side of the square in pixels.
    min_scale: a photograph is resized by a factor drawn from [min_scale, 1], but never below the square.
    broken: how many pictures could not be read, by all workers together. Each is named once, and the next one of the
        epoch is cut in its place. TrainingError where a hundred in a row are broken.
    """

    def __init__(self, pictures: Sequence[Path] | Pictures, resolution: int, seed: int, min_scale: float = 0.6) -> None:
        self.pictures = FolderPictures(pictures) if isinstance(pictures, Sequence) else pictures
        if not len(self.pictures):
            raise ConfigError("There are no pictures to train on.")
        self.resolution, self.seed, self.min_scale = resolution, seed, min_scale
        self.numbering = Numbering(len(self.pictures), seed)
        self._good = GoodPictures(self.pictures)

    def __len__(self) -> int:
        return 2**62  # numbered by the sampler, without end

    @property
    def broken(self) -> int:
        """Pictures that could not be read so far."""
        return self._good.broken

    def __getitem__(self, n: int) -> Tensor:
        """(3, resolution, resolution) uint8."""
        epoch, place, order = self.numbering(n)
        rng = np.random.default_rng((self.seed, epoch, place))
        return self.cut(Image.fromarray(self._good.first(order, place)[1]), rng)

    def cut(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """A random square of a picture."""
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
