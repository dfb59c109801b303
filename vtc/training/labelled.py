"""Pictures with a class each, as tensors: any source of `vtc.training.sources` that has classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtc.errors import ConfigError
from vtc.images import load_image
from vtc.training.sources import Pictures, open_pictures
from vtc.training.tokenizing import center_square


class LabelledImages:
    """A source whose pictures all have a class. labels: (N,) int64. classes: their names, in order."""

    def __init__(self, source: Pictures) -> None:
        self.source, self.classes = source, tuple(source.classes)
        known = getattr(source, "labels", None)  # a pack, and shards, know them all without reading a picture
        labels = [source.read(n)[1] for n in range(len(source))] if known is None else known
        self.labels = np.array(labels, np.int64)
        if not self.classes or self.labels.min() < 0:
            raise ConfigError("These pictures have no classes: give a folder with one sub-folder a class, or a pack or "
                              "dataset with labels.")

    def __len__(self) -> int:
        return len(self.source)

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        """Of the source."""
        return self.source.read(n)

    def picture(self, n: int, side: int) -> Tensor:
        """(3, side, side) uint8, see `square`."""
        key, _, file = self.source.read(n)
        return square(load_image(file, name=key).pixels, side)

    def pictures(self, side: int) -> Tensor:
        """All of them, (N, 3, side, side) uint8."""
        return torch.stack([self.picture(i, side) for i in range(len(self))])


def square(pixels: NDArray[np.uint8], side: int) -> Tensor:
    """(H, W, 3) to (3, side, side) uint8: the largest square in the middle, resized where its side is another."""
    return torch.from_numpy(np.ascontiguousarray(center_square(pixels, side))).permute(2, 0, 1)


def labelled_images(where: str | Path, split: str = "train") -> LabelledImages:
    """The pictures of one split; see `vtc.training.sources.open_pictures`."""
    return LabelledImages(open_pictures(where, split))
