"""Where pictures for training come from. Each source has a length and `read(n) -> (key, label, file)`.

    open_pictures("photos/")                          a folder with all below it; classes where it has class folders
    open_pictures("imagenette.npz", "train")          one packed file, see `PackedPictures`
    open_pictures("shards/") or "s/{000..127}.tar"    WebDataset shards, read where they lie
    open_pictures("dataset/") or "owner/name"         a Hugging Face dataset, on disk or on the Hub (needs `datasets`)

`file` is a path or the bytes of a picture file, the label -1 where there is none. Nothing is decoded here.
"""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vtc.errors import ConfigError, FileError
from vtc.files import reason
from vtc.tars import members, read_member

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
NO_LABEL = -1


def image_files(folder: str | Path) -> list[Path]:
    """The pictures below a folder, in an order that does not depend on the file system."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


class Pictures(Protocol):
    """Pictures by number. `classes`: names of the labels, none where there are no labels."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        """(key, label or -1, path or bytes of the file) of picture n; the key names it in messages."""
        ...


class FolderPictures:
    """Files. With `classes`, the label of a file is the number of the folder that it lies in."""

    def __init__(self, files: Sequence[Path], root: Path | None = None, classes: Sequence[str] = ()) -> None:
        self.files, self.root, self.classes = list(files), root, tuple(classes)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        file = self.files[n]
        key = file if self.root is None else file.relative_to(self.root)
        label = self.classes.index(key.parts[0]) if self.classes else NO_LABEL
        return key.as_posix(), label, file


class PackedPictures:
    """One split of an `.npz`: `{split}_bytes` (all files, uint8), `{split}_offsets` (N + 1), `{split}_labels` (N).

    `classes`, the names, may be missing.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        try:
            with np.load(path, allow_pickle=False) as pack:
                self.data, self.offsets = pack[f"{split}_bytes"], pack[f"{split}_offsets"].astype(np.int64)
                labels = pack.get(f"{split}_labels")
                names = pack.get("classes")
        except (OSError, ValueError, KeyError) as error:
            raise FileError(f"{path} is no pack of pictures with a split {split!r}: {error}.") from error
        count = len(self.offsets) - 1
        self.labels = np.full(count, NO_LABEL) if labels is None else labels.astype(np.int64)
        if count < 1 or len(self.labels) != count or self.offsets[-1] > len(self.data) or (
                (np.diff(self.offsets) < 0).any()):
            raise FileError(f"{path} is a damaged pack: {len(self.labels)} labels, {count + 1} offsets, "
                            f"{len(self.data)} bytes.")
        last = int(self.labels.max())
        self.classes = tuple(map(str, range(last + 1))) if names is None else tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        return (f"{self.path.name}/{self.split}/{n}", int(self.labels[n]),
                self.data[self.offsets[n] : self.offsets[n + 1]].tobytes())


class ShardPictures:
    """The pictures in WebDataset shards, KEY.jpg and the like, with KEY.cls as labels where they are there.

    Their places are found once, by reading the headers; a picture is then read where it lies, so any number can be
    the next and a run may begin anywhere.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        self.places: list[tuple[int, int, int, str]] = []  # shard, where it begins, bytes, name
        labels: dict[tuple[int, str], int] = {}
        for number, path in enumerate(self.shards):
            try:
                with open(path, "rb") as file:
                    for member, objection in members(str(path), file):
                        if objection:
                            continue
                        stem, _, suffix = member.name.rpartition(".")
                        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                            self.places.append((number, member.offset_data, member.size, member.name))
                        elif suffix == "cls":
                            labels[number, stem] = _label(read_member(str(path), file, member), path, member.name)
            except OSError as error:
                if isinstance(error, FileError):
                    raise
                raise FileError(f"{path} cannot be read: {reason(error)}.") from error
        if not self.places:
            raise FileError(f"There are no pictures in {len(self.shards)} shards, beginning with {shards[0]}.")
        self.labels = [labels.get((number, name.rpartition(".")[0]), NO_LABEL) for number, _, _, name in self.places]
        self.classes = tuple(map(str, range(max(self.labels) + 1)))

    def __len__(self) -> int:
        return len(self.places)

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        number, start, size, name = self.places[n]
        path = self.shards[number]
        try:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {reason(error)}.") from error
        return f"{path.name}/{name}", self.labels[n], data


def _label(data: bytes, path: Path, name: str) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise FileError(f"{path}/{name} is no number of a class.") from error


class DatasetPictures:
    """A Hugging Face dataset with a column of pictures, and perhaps one of labels."""

    def __init__(self, dataset: Any, image_column: str = "", label_column: str = "") -> None:
        from datasets import ClassLabel, Image, Value

        features = dataset.features
        images = [name for name, kind in features.items() if isinstance(kind, Image)]
        self.image_column = image_column or (images[0] if images else "")
        if self.image_column not in images:
            raise ConfigError(f"The dataset has the picture columns {', '.join(images) or 'none'}, not "
                              f"{self.image_column!r}; choose by --image_column.")
        labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        self.label_column = label_column or (labels[0] if labels else "")
        if self.label_column and self.label_column not in features:
            raise ConfigError(f"The dataset has no column {self.label_column!r}, but {', '.join(features)}.")
        kind = features.get(self.label_column)
        if kind is not None and not isinstance(kind, ClassLabel | Value):
            raise ConfigError(f"The column {self.label_column!r} holds no labels.")
        self.dataset = dataset.cast_column(self.image_column, Image(decode=False))
        self.classes = tuple(kind.names) if isinstance(kind, ClassLabel) else ()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        row = self.dataset[n]
        image = row[self.image_column]
        label = int(row[self.label_column]) if self.label_column else NO_LABEL
        if image is None or (not image.get("bytes") and not image.get("path")):
            raise FileError(f"Row {n} of the dataset has no picture.")
        file = image["bytes"] if image.get("bytes") else Path(image["path"])
        return f"row {n}" + (f" ({Path(image['path']).name})" if image.get("path") else ""), label, file


def open_pictures(where: str | Path, split: str = "train", image_column: str = "", label_column: str = "",
                  config_name: str | None = None) -> Pictures:
    """The source that `where` names, see the top of this file. ConfigError or FileError where there are no pictures.

    split: of a pack, of a dataset, and of a folder that has sub-folders named "train", "val" and the like.
    """
    path, text = Path(where), str(where)
    if text.endswith(".tar") and not path.exists():
        return ShardPictures(_expand(text))
    if path.is_file():
        if path.suffix == ".npz":
            return PackedPictures(path, split)
        if path.suffix == ".tar":
            return ShardPictures([path])
        raise ConfigError(f"{path} is neither a folder, nor a pack (.npz), nor a shard (.tar).")
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _from_disk(path, split, image_column, label_column)
        shards = sorted(path.glob("*.tar"))
        if shards:
            return ShardPictures(shards)
        return _folder(path, split)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith((".", "/")):
        return _from_hub(text, split, image_column, label_column, config_name)
    raise ConfigError(f"There is no {where}: give a folder, an .npz, .tar shards, or a dataset of the Hub.")


def _folder(path: Path, split: str) -> FolderPictures:
    root = path / split if (path / split).is_dir() else path
    files = image_files(root)
    if not files:
        raise ConfigError(f"There are no pictures in {root}.")
    parts = {file.relative_to(root).parts for file in files}
    labelled = all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) > 1
    return FolderPictures(files, root, sorted({p[0] for p in parts}) if labelled else ())


def _expand(pattern: str) -> list[Path]:
    """shard-{000..127}.tar and globs."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match:
        first, last = match.groups()
        names = [pattern[: match.start()] + str(i).zfill(len(first)) + pattern[match.end() :]
                 for i in range(int(first), int(last) + 1)]
        found = [path for name in names for path in (_expand(name) if "{" in name else [Path(name)])]
        missing = [path for path in found if not path.is_file()]
        if missing:
            raise FileError(f"{len(missing)} of {len(found)} shards are missing, the first is {missing[0]}.")
    else:
        found = [Path(name) for name in sorted(glob.glob(pattern))]
    if not found:
        raise FileError(f"There are no shards {pattern}.")
    return found


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hugging Face datasets need the package 'datasets': pip install datasets.") from error
    return datasets


def _from_disk(path: Path, split: str, image_column: str, label_column: str) -> DatasetPictures:
    try:
        dataset = _datasets().load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"The dataset {path} cannot be read: {' '.join(str(error).split())[:200]}.") from error
    if hasattr(dataset, "keys"):
        if split not in dataset:
            raise ConfigError(f"The dataset {path} has the splits {', '.join(dataset)}, not {split!r}.")
        dataset = dataset[split]
    return DatasetPictures(dataset, image_column, label_column)


def _from_hub(name: str, split: str, image_column: str, label_column: str, config_name: str | None) -> DatasetPictures:
    datasets = _datasets()
    try:
        dataset = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # of the network, of the Hub, of the dataset's files: they have no common base
        raise ConfigError(f"{name!r} is no folder here, and the Hub gave no dataset of that name with a split {split!r}"
                          f" ({type(error).__name__}).") from error
    return DatasetPictures(dataset, image_column, label_column)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where pictures are; `pictures_of` opens them."""
    parser.add_argument("--train_data_dir", help="folder, pack (.npz), .tar shards ('x-{000..127}.tar') or dataset "
                                                 "saved to disk")
    parser.add_argument("--dataset_name", help="dataset of the Hub instead")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--image_column", default="", help="of a dataset; default: the first column of pictures")
    parser.add_argument("--label_column", default="", help="of a dataset; default: the first column of classes")
    parser.add_argument("--train_split", default="train", help="of a dataset or pack (default: %(default)s)")


def add_validation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `vtc.training.validation.validation_of`, and the weights of LPIPS, in a loss as well."""
    parser.add_argument("--validation_data_dir", help="whole pictures to measure on; none: no validation")
    parser.add_argument("--validation_split", default="val", help="of a pack or dataset (default: %(default)s)")
    parser.add_argument("--validation_metrics", nargs="+", metavar="NAME",
                        default=["psnr", "ssim", "lpips_alex", "lattice", "codebook"],
                        help="as of vtc-eval --metrics; those whose weights are not there are left out, fid and "
                             "fd_alexnet want thousands of pictures (default: %(default)s)")
    parser.add_argument("--lpips_weights", type=Path, help="folder of backbone features; default VTC_LPIPS_WEIGHTS")
    parser.add_argument("--fid_weights", type=Path, help="FID's Inception: file or folder; default VTC_FID_WEIGHTS")


def pictures_of(args: argparse.Namespace) -> Pictures:
    """The training pictures that the flags name."""
    where = args.train_data_dir or args.dataset_name
    if not where:
        raise ConfigError("Give --train_data_dir or --dataset_name.")
    if args.dataset_name and not args.train_data_dir:
        return _from_hub(where, args.train_split, args.image_column, args.label_column, args.dataset_config_name)
    return open_pictures(where, args.train_split, args.image_column, args.label_column, args.dataset_config_name)


def pack_pictures(path: str | Path, splits: dict[str, Sequence[tuple[bytes, int]]], classes: Sequence[str]) -> None:
    """Write a pack: for each split the files' bytes and labels."""
    arrays: dict[str, Any] = {"classes": np.array(list(classes))}
    for split, items in splits.items():
        sizes = [len(data) for data, _ in items]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(data for data, _ in items), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *sizes], dtype=np.int64)
        arrays[f"{split}_labels"] = np.array([label for _, label in items], np.int64)
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {reason(error)}.") from error
