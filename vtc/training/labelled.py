"""Pictures with a class each: a folder with a sub-folder a class, or one packed `.npz`.

A pack holds, for each split ("train", "val"), `{split}_bytes` (the files one after another, uint8), `{split}_offsets`
(N + 1 numbers) and `{split}_labels` (N), and `classes`, the names. A folder holds `train/NAME/*.jpg`, `val/NAME/*.jpg`,
as ImageNet does, or the class folders themselves where there is one split only.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vtc.errors import FileError
from vtc.training.data import image_files


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """files: path, or the file's bytes, of each picture. labels: (N,) int64. classes: their names, in order."""

    files: list[Path | bytes]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        """Key, label and file of picture n: the pictures as a source of `vtc.training.tokenizing`."""
        file, label = self.files[n], int(self.labels[n])
        name = f"{self.classes[label]}/" + (f"{n:07}" if isinstance(file, bytes) else file.name)
        return name, label, file

    def picture(self, number: int, side: int) -> Tensor:
        """(3, side, side) uint8: the largest square in the middle, resized where its side is another."""
        file = self.files[number]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image = opened.convert("RGB")
        shorter = min(image.size)
        left, top = ((s - shorter) / 2 for s in image.size)
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + shorter, top + shorter))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def pictures(self, side: int) -> Tensor:
        """All of them, (N, 3, side, side) uint8."""
        return torch.stack([self.picture(i, side) for i in range(len(self))])


def labelled_images(path: str | Path, split: str = "train") -> LabelledImages:
    """The pictures of one split. FileError where there are none."""
    path = Path(path)
    if path.is_file():
        return _packed(path, split)
    root = path / split if (path / split).is_dir() else path
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir())) if root.is_dir() else ()
    files = [(file, label) for label, name in enumerate(classes) for file in image_files(root / name)]
    if not files:
        raise FileError(f"{root} holds no folders of pictures, one for each class, and is no .npz pack.")
    return LabelledImages([file for file, _ in files], np.array([label for _, label in files], np.int64), classes)


def _packed(path: Path, split: str) -> LabelledImages:
    try:
        with np.load(path, allow_pickle=False) as pack:
            data, offsets, labels = (pack[f"{split}_{part}"] for part in ("bytes", "offsets", "labels"))
            classes = tuple(map(str, pack["classes"]))
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"{path} cannot be read as a pack of pictures with a split {split!r}: {error}.") from error
    if len(offsets) != len(labels) + 1 or offsets[-1] > len(data):
        raise FileError(f"{path} is a damaged pack: {len(labels)} labels, {len(offsets)} offsets, {len(data)} bytes.")
    files: list[Path | bytes] = [data[a:b].tobytes() for a, b in pairwise(offsets)]
    return LabelledImages(files, labels.astype(np.int64), classes)
