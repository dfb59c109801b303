"""A data set's pictures through a tokenizer into token shards, by any number of processes, however often they die.

    picture -> views, (V, 3, S, S) uint8, in the loader's processes -> indices (V, L, G) -> journal -> shard

Shards are shared out by their numbers: process r of n makes shards r, r + n, ... Batches never cross the border of a
shard and always begin at the same pictures of it, so a run that was killed makes the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from vtc.errors import ConfigError, FileError, TrainingError, VtcError
from vtc.files import reason
from vtc.images import load_image
from vtc.tokenizers.base import Tokenizer
from vtc.training.token_shards import Sample, ShardWriter, Storage, TokenSet

#: "center": the square in the middle; "flip": it and its mirror image; "ten_crop": four corners and the middle of a
#: larger square, and their mirror images. The last two are LlamaGen's.
Views = Literal["center", "flip", "ten_crop"]
VIEW_COUNTS: dict[str, int] = {"center": 1, "flip": 2, "ten_crop": 10}


class Source(Protocol):
    """Pictures by number."""

    def __len__(self) -> int: ...

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        """(key, label or NO_LABEL, file) of picture n; the key is another for each."""
        ...


def center_square(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(H, W, 3) to (side, side, 3): the largest square in the middle, resampled once (Lanczos) where it must be."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    if shorter == side:
        return pixels[int(top) : int(top) + side, int(left) : int(left) + side]
    box = (left, top, left + shorter, top + shorter)
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS, box=box))


def views_of(pixels: NDArray[np.uint8], side: int, views: Views, crop_range: float = 1.1) -> NDArray[np.uint8]:
    """(V, 3, side, side) uint8 of a picture (H, W, 3).

    crop_range: side of the square that ten crops are taken from, in sides of a crop.
    """
    if views == "ten_crop":
        large = max(side, int(side * crop_range))
        square, rest = center_square(pixels, large), large - side
        middle = round(rest / 2)
        corners = [(0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)]
        cut = [square[y : y + side, x : x + side] for y, x in corners]
    else:
        cut = [center_square(pixels, side)]
    if views != "center":
        cut += [part[:, ::-1] for part in cut]
    return np.stack(cut).transpose(0, 3, 1, 2)


def source_digest(source: Source, sample: int = 1000) -> str:
    """Tells one data set from another, and is quick: the number of pictures and the keys of some, evenly spread."""
    digest = hashlib.sha256(str(len(source)).encode())
    for n in np.unique(np.linspace(0, len(source) - 1, min(sample, len(source))).astype(np.int64)).tolist():
        digest.update(source.read(n)[0].encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


# ---- loading --------------------------------------------------------------------------------------------------------

class _Loaded(NamedTuple):
    key: str
    label: int
    pixels: NDArray[np.uint8] | None
    problem: str


class _Pictures(Dataset[_Loaded]):
    """The views of picture n of the source; one that cannot be read is named, and no reason to stop."""

    def __init__(self, source: Source, side: int, views: Views, crop_range: float) -> None:
        self.source, self.side, self.views, self.crop_range = source, side, views, crop_range

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, n: int) -> _Loaded:
        key, label = f"number {n}", -1
        try:
            key, label, file = self.source.read(n)
            pixels = load_image(file, name=key).pixels
        except VtcError as error:
            return _Loaded(key, label, None, str(error))
        return _Loaded(key, label, views_of(pixels, self.side, self.views, self.crop_range), "")


class _Batches(Sampler[list[int]]):
    """Numbers of pictures, batch by batch: for each shard what is left of it, cut where a whole run would cut it."""

    def __init__(self, parts: Sequence[range], size: int) -> None:
        self.parts, self.size = parts, size

    def __len__(self) -> int:
        return sum(-(-len(part) // self.size) for part in self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(part[i : i + self.size]) for part in self.parts for i in range(0, len(part), self.size))


def _as_it_is(batch: list[_Loaded]) -> list[_Loaded]:
    return batch


# ---- the run --------------------------------------------------------------------------------------------------------

@dataclass
class Tokenized:
    """What a process did. pictures, shards: that it made now; kept: pictures that were there already."""

    pictures: int = 0
    shards: int = 0
    kept: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    def tell_problems(self) -> None:
        """A line on stderr for each picture that could not be read."""
        for key, problem in sorted(self.problems.items()):
            print(f"{key} is left out: {problem}", file=sys.stderr)


@dataclass
class DatasetTokenizer:
    """Makes the shards of a source.

    source, tokenizer (on its device), folder: of the shards; made where it is missing.
    resolution: side of the squares in pixels. views, crop_range: as of `views_of`.
    storage: of the shards. shard_size: pictures of each. batch_size: pictures that are encoded at once.
    num_workers: processes that read pictures. precision: "no" or "bf16" for the encoder, twice as fast on many
        devices; a few tokens in a hundred then come out otherwise.
    """

    source: Source
    tokenizer: Tokenizer
    folder: Path
    resolution: int
    views: Views = "center"
    crop_range: float = 1.1
    storage: Storage = "safetensors"
    shard_size: int = 1024
    batch_size: int = 16
    num_workers: int = 0
    precision: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        for name, lowest in (("resolution", 1), ("shard_size", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} is at least {lowest}, not {getattr(self, name)}.")
        if self.views not in VIEW_COUNTS or self.storage not in get_args(Storage):
            raise ConfigError(f"views are one of {', '.join(VIEW_COUNTS)}, and storage is one of "
                              f"{', '.join(get_args(Storage))}; not {self.views!r} and {self.storage!r}.")
        if not self.crop_range >= 1:
            raise ConfigError(f"Crops are taken from a square of at least their side, not of {self.crop_range} sides.")
        if not len(self.source):
            raise ConfigError("There are no pictures to make tokens of.")
        settings: dict[str, Any] = {"resolution": self.resolution, "views": self.views, "precision": self.precision,
                                    "source": source_digest(self.source)}
        if self.views == "ten_crop":
            settings["crop_range"] = self.crop_range
        self.facts = TokenSet.of(self.tokenizer, self.resolution, VIEW_COUNTS[self.views], len(self.source),
                                 self.shard_size, settings)

    def run(self, rank: int = 0, count: int = 1, quiet: bool = False) -> Tokenized:
        """Make what is missing of the shards of process `rank` of `count`.

        Raises ConfigError where the folder holds shards of something else, TrainingError where a reading process died
        or not one picture could be read.
        """
        self._prepare_folder()
        done, parts = Tokenized(), dict[int, range]()
        for shard in range(rank, self.facts.shards, count):
            members = self.facts.members(shard)
            there = len(members) if self.facts.path(self.folder, shard, self.storage).exists() else self._begun(shard)
            done.kept += there
            if there < len(members) or not self.facts.path(self.folder, shard, self.storage).exists():
                parts[shard] = members[there:]
        total = sum(map(len, parts.values()))
        bar = tqdm(total=total, unit="image", disable=quiet or rank > 0)
        with bar:
            self._make(parts, done, bar)
        if done.problems and done.pictures == len(done.problems) and not done.kept:
            key, problem = next(iter(done.problems.items()))
            raise TrainingError(f"None of {done.pictures} pictures could be read; {key}: {problem}")
        return done

    def _begun(self, shard: int) -> int:
        """How many samples of an unfinished shard a run before left, in whole batches."""
        if not ShardWriter.journal_of(self.facts.path(self.folder, shard, self.storage)).exists():
            return 0
        with ShardWriter(self.facts, self.folder, shard, self.storage) as writer:
            if len(writer.samples) < len(self.facts.members(shard)):
                writer.keep(len(writer.samples) // self.batch_size * self.batch_size)
            return len(writer.samples)

    def _make(self, parts: dict[int, range], done: Tokenized, bar: Any) -> None:
        pictures = _Pictures(self.source, self.resolution, self.views, self.crop_range)
        batches = iter(DataLoader(pictures, batch_sampler=_Batches(list(parts.values()), self.batch_size),
                                  num_workers=self.num_workers, collate_fn=_as_it_is))
        for shard, part in parts.items():
            with ShardWriter(self.facts, self.folder, shard, self.storage) as writer:
                self._fill(writer, part, batches, done, bar)
            done.shards += 1

    def _fill(self, writer: ShardWriter, part: range, batches: Iterator[list[_Loaded]], done: Tokenized,
              bar: Any) -> None:
        """What is left of one shard."""
        for _ in range(0, len(part), self.batch_size):
            try:
                batch = next(batches)
            except RuntimeError as error:
                if "worker" not in str(error):
                    raise
                raise TrainingError("A process that reads pictures died, perhaps for lack of memory; run the same "
                                    "command again, with fewer --num_workers.") from error
            writer.append(self.encode(batch))
            done.pictures += len(batch)
            done.problems |= {loaded.key: loaded.problem for loaded in batch if loaded.pixels is None}
            bar.update(len(batch))
        writer.finish()

    @torch.inference_mode()
    def encode(self, batch: Sequence[_Loaded]) -> list[Sample]:
        """The samples of a batch, in its order."""
        good = [loaded.pixels for loaded in batch if loaded.pixels is not None]
        rows: Iterator[NDArray[Any]] = iter(())
        if good:
            device = next((t.device for t in self.tokenizer.state_dict().values()), torch.device("cpu"))
            images: Tensor = torch.from_numpy(np.stack(good)).to(device).float().div_(255)
            parts = []
            for view in images.unbind(1):  # batch_size at once, however many views there are
                with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    parts.append(self.tokenizer.encode(view).indices)
            rows = iter(torch.stack(parts, 1).cpu().numpy().astype(self.facts.dtype))
        return [Sample(loaded.key, loaded.label, None if loaded.pixels is None else next(rows), loaded.problem)
                for loaded in batch]

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"The folder {self.folder} cannot be made: {reason(error)}.") from error
        for path in sorted(self.folder.glob("tokens-*-of-*.*")):
            theirs = TokenSet.of_file(path)
            if theirs != self.facts:
                changed = [name for name in ("encoding", "decoding", "views", "height", "pictures", "shard_size",
                                             "settings") if getattr(theirs, name) != getattr(self.facts, name)]
                raise ConfigError(f"{path} was made with another {', '.join(changed) or 'layout'}; choose an empty "
                                  "folder, or the settings of before.")
            break  # all of a folder are alike, or its reader says so
