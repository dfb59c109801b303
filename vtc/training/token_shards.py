"""Token shards: the pictures of a data set as tokens, encoded once and read by every training of a generator.

    tokens-00003-of-00040.safetensors    indices (N, V, L, G), labels (N,), and in the metadata what made them
    tokens-00003-of-00040.tar            the same as WebDataset: KEY.tokens.npy (V, L, G), KEY.cls

V views of each picture are there: cut or mirrored otherwise, as LlamaGen stores them (2406.06525). While a shard is
being made its samples stand in a journal beside it, each with a checksum, so a run that was killed goes on behind the
last batch. Which samples a shard holds depends on its number alone, and neither on the processes nor on the kills.

    tokens = TokenShards("imagenet-tokens/", tokenizer)     # refused where another tokenizer made them
    indices, label = tokens[17]                             # (L, G) int64 of the first view, int
    indices, label = tokens.sample(17, view=1)
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import Dataset

from vtc.errors import ConfigError, FileError, ModelError
from vtc.files import lock, reason, write_file
from vtc.hub import fingerprint
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens
from vtc.training.sources import NO_LABEL

FORMAT = "vtc token shard 1"
#: how shards are stored, and the suffixes of their files
Storage = Literal["safetensors", "webdataset"]
SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "webdataset": ".tar"}
#: where a .tar says what made it; readers of WebDataset pass over names of this form
ABOUT = "__vtc__/about.json"


def encoding_fingerprint(tokenizer: Tokenizer) -> str:
    """Of all that decides which index a picture gets, in hexadecimal: every tensor but those that decoding alone reads.

    A tokenizer whose decoder was trained on keeps it, and its tokens stay good.
    """
    names = [name for name in tokenizer.state_dict() if name != "token_frequencies"]
    read = tuple(prefix for prefix in tokenizer.decoding_prefixes if prefix and not prefix.startswith("quantizer"))
    encoding = [name for name in names if not (read and name.startswith(read))]
    return fingerprint(tokenizer, tuple(encoding)).hex() if encoding else ""


@dataclass(frozen=True)
class TokenSet:
    """What all shards of a folder have in common, as it stands in each of them.

    layout, height, width: as of `Tokens`. views: of each picture.
    tokenizer: its class. encoding, decoding: its fingerprints, of what gives a picture its indices and of what decoding
        them reads, in hexadecimal.
    settings: how the pictures were cut, in words that a reader of the file understands.
    pictures: in the source. shard_size: pictures of a shard; the last one may have fewer.
    """

    layout: TokenLayout
    height: int
    width: int
    views: int
    tokenizer: str
    encoding: str
    decoding: str
    pictures: int
    shard_size: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ConfigError("There are no pictures to make tokens of.")
        if self.shard_size < 1 or self.views < 1:
            raise ConfigError("A shard has at least one picture and a picture at least one view.")

    @classmethod
    def of(cls, tokenizer: Tokenizer, resolution: int, views: int, pictures: int, shard_size: int,
           settings: dict[str, Any]) -> TokenSet:
        """That of square pictures of `resolution` pixels a side, by this tokenizer."""
        return cls(tokenizer.layout(resolution, resolution), resolution, resolution, views, type(tokenizer).__name__,
                   encoding_fingerprint(tokenizer), tokenizer.fingerprint().hex(), pictures, shard_size, settings)

    @property
    def shards(self) -> int:
        """How many there are."""
        return math.ceil(self.pictures / self.shard_size)

    def members(self, shard: int) -> range:
        """The numbers of a shard's pictures in the source."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.pictures))

    def path(self, folder: Path, shard: int, storage: Storage) -> Path:
        """Where a finished shard lies."""
        return folder / f"tokens-{shard:05}-of-{self.shards:05}{SUFFIXES[storage]}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest that holds every index."""
        largest = max(self.layout.vocab) - 1
        return np.dtype(next(t for t in (np.uint8, np.int16, np.int32, np.int64) if largest <= np.iinfo(t).max))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(V, L, G) of one picture."""
        return self.views, self.layout.length, self.layout.groups

    def text(self) -> str:
        """As one line of JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def parse(cls, text: str | None, path: Path) -> TokenSet:
        """The inverse of `text`; ModelError where `path` holds something else."""
        try:
            facts = json.loads(text or "")
            if facts.pop("format") != FORMAT:
                raise ValueError("another format")
            layout = facts.pop("layout")
            scales = tuple((int(rows), int(columns)) for rows, columns in layout["scales"])
            return cls(TokenLayout(scales, tuple(map(int, layout["vocab"]))), **facts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is no token shard of vtc, or of another version.") from error

    @classmethod
    def of_file(cls, path: Path) -> TokenSet:
        """That of a finished shard. ModelError where it is something else."""
        return _open(path).facts


class Sample(NamedTuple):
    """One picture: its key in the source, its label or NO_LABEL, and its (V, L, G) indices.

    A picture that could not be read has none, and `problem` says why.
    """

    key: str
    label: int
    indices: NDArray[Any] | None
    problem: str = ""


# ---- writing --------------------------------------------------------------------------------------------------------

_HEAD, _CHECK = struct.Struct("<BqHI"), struct.Struct("<I")


class ShardWriter:
    """One shard in the making; `samples` are those that a run before this one left.

    A batch is on its way to the disk when `append` returns, so a killed process loses the batch in work and no more.
    Use it in a `with` block, which lets the file go. Raises FileError where another process writes the same shard, or
    the disk is full.
    """

    def __init__(self, facts: TokenSet, folder: Path, shard: int, storage: Storage) -> None:
        self.facts, self.storage = facts, storage
        self.target = facts.path(folder, shard, storage)
        self.journal = self.journal_of(self.target)
        self.samples: list[Sample] = []
        try:
            self._file = open(self.journal, "r+b" if self.journal.exists() else "x+b")  # noqa: SIM115  # until the end
            lock(self._file, str(self.target))
            data = self._file.read()
            identity = _record(Sample(facts.text(), shard, None))
            end = len(identity)
            if data[:end] == identity:
                for sample, size in _records(data[end:], facts):
                    self.samples.append(sample)
                    end += size
            else:  # new, or of other settings
                self._file.seek(0)
                self._file.truncate()
                self._file.write(identity)
            self._file.seek(end)
            self._file.truncate()
        except OSError as error:
            raise self._unwritable(error) from error

    @staticmethod
    def journal_of(target: Path) -> Path:
        """Where an unfinished shard's samples lie."""
        return target.with_name(f".{target.name}.journal")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def keep(self, count: int) -> None:
        """Forget all samples but the first `count`."""
        size = len(_record(Sample(self.facts.text(), 0, None))) + sum(len(_record(s)) for s in self.samples[:count])
        del self.samples[count:]
        self._file.seek(size)
        self._file.truncate()

    def append(self, samples: Iterable[Sample]) -> None:
        """The next ones, in their order."""
        samples = list(samples)
        try:
            self._file.write(b"".join(map(_record, samples)))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self.samples += samples

    def finish(self) -> None:
        """All samples are there: write the shard under its name and remove the journal."""
        made = _safetensors if self.storage == "safetensors" else _tar
        write_file(self.target, made(self.facts, self.samples))
        self._file.close()
        self.journal.unlink()

    def _unwritable(self, error: OSError) -> FileError:
        return error if isinstance(error, FileError) else FileError(f"{self.target} cannot be written: "
                                                                    f"{reason(error)}.")


def _record(sample: Sample) -> bytes:
    key = sample.key.encode("utf-8", "surrogateescape")
    data = sample.problem.encode("utf-8", "surrogateescape") if sample.indices is None else sample.indices.tobytes()
    record = _HEAD.pack(sample.indices is not None, sample.label, len(key), len(data)) + key + data
    return record + _CHECK.pack(zlib.crc32(record))


def _records(data: bytes, facts: TokenSet) -> Iterator[tuple[Sample, int]]:
    """Samples and the lengths of their records, up to the first that is not whole."""
    start = 0
    while start + _HEAD.size <= len(data):
        there, label, key_size, size = _HEAD.unpack_from(data, start)
        middle = start + _HEAD.size + key_size
        end = middle + size
        if end + _CHECK.size > len(data) or _CHECK.unpack_from(data, end)[0] != zlib.crc32(data[start:end]):
            return
        key = data[start + _HEAD.size : middle].decode("utf-8", "surrogateescape")
        if there:
            indices = np.frombuffer(data[middle:end], facts.dtype).reshape(facts.shape)
            yield Sample(key, label, indices), end + _CHECK.size - start
        else:
            problem = data[middle:end].decode("utf-8", "surrogateescape")
            yield Sample(key, label, None, problem), end + _CHECK.size - start
        start = end + _CHECK.size


def _safetensors(facts: TokenSet, samples: list[Sample]) -> bytes:
    good = [sample for sample in samples if sample.indices is not None]
    stacked = [sample.indices for sample in good if sample.indices is not None]
    indices = np.stack(stacked) if stacked else np.zeros((0, *facts.shape), facts.dtype)
    about = {"facts": facts.text(), "keys": [sample.key for sample in good],
             "left_out": {sample.key: sample.problem for sample in samples if sample.indices is None}}
    # one entry: safetensors writes several in an order of its own, another one each time
    return save({"indices": indices, "labels": np.array([sample.label for sample in good], np.int64)},
                {"vtc": json.dumps(about)})


def _tar(facts: TokenSet, samples: list[Sample]) -> bytes:
    """A .tar with no dates and no owners: the same samples give the same bytes."""
    stream = io.BytesIO()
    left_out = {sample.key: sample.problem for sample in samples if sample.indices is None}
    taken: set[str] = set()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))

        add(ABOUT, json.dumps({"facts": facts.text(), "left_out": left_out}).encode())
        for sample in samples:
            if sample.indices is not None:
                array = io.BytesIO()
                np.save(array, sample.indices)
                key = member_key(sample.key)
                if key in taken:  # a.jpg and a.png
                    key = f"{key}-{len(taken)}"
                taken.add(key)
                add(f"{key}.tokens.npy", array.getvalue())
                if sample.label != NO_LABEL:
                    add(f"{key}.cls", str(sample.label).encode())
    return stream.getvalue()


def member_key(key: str) -> str:
    """A key as the members of a .tar have it: WebDataset's ends at the first dot of the file name.

    >>> member_key("n01440764/10026.b.JPEG")
    'n01440764/10026_b'
    """
    folder, _, name = key.rpartition("/")
    stem = os.path.splitext(name)[0].replace(".", "_")
    return f"{folder}/{stem}" if folder else stem


# ---- reading --------------------------------------------------------------------------------------------------------

class TokenShards(Dataset[tuple[Tensor, int]]):
    """The tokens of a folder of finished shards, by number; item n is (indices (L, G) int64 of its view 0, label).

    tokenizer: whose tokens they have to be; None asks for none.
    labels: whether each picture must have one.
    Nothing is kept in memory: indices are read where they lie.

    Raises ModelError where another tokenizer made them, and FileError where shards are missing.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None, labels: bool = False) -> None:
        self.folder = Path(folder)
        self.paths = sorted(p for suffix in SUFFIXES.values() for p in self.folder.glob(f"tokens-*-of-*{suffix}"))
        if not self.paths:
            raise FileError(f"There are no token shards in {folder}; scripts/tokenize_dataset.py makes them.")
        self._shards = [_open(path) for path in self.paths]
        self.facts = self._shards[0].facts
        for path, shard in zip(self.paths, self._shards, strict=True):
            if shard.facts != self.facts:
                raise ModelError(f"{path} and {self.paths[0]} were made with different settings or tokenizers; "
                                 "make one folder for each.")
        wanted = {self.facts.path(self.folder, n, "safetensors").stem for n in range(self.facts.shards)}
        names = [path.stem for path in self.paths]
        if len(set(names)) < len(names):
            raise FileError(f"{folder} has shards twice, as .safetensors and as .tar; remove one kind.")
        if missing := sorted(wanted.difference(names)):
            raise FileError(f"{folder} lacks {len(missing)} of {len(wanted)} shards, {missing[0]} first; run "
                            "scripts/tokenize_dataset.py again, which makes what is missing.")
        if tokenizer is not None:
            self.check(tokenizer)
        self.starts = np.cumsum([0, *(len(shard.labels) for shard in self._shards)])
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in self._shards])
        if labels and (self.labels == NO_LABEL).any():
            raise ConfigError(f"{int((self.labels == NO_LABEL).sum())} of {len(self)} pictures in {folder} have no "
                              "label; make the shards from a source with classes.")

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ModelError where the tokens are not this tokenizer's."""
        ours = encoding_fingerprint(tokenizer)
        if ours != self.facts.encoding:
            raise ModelError(f"The tokens in {self.folder} were made by a {self.facts.tokenizer} with the fingerprint "
                             f"{self.facts.encoding}, and this {type(tokenizer).__name__} has {ours}; make them again "
                             "with it, or give the tokenizer that made them.")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        return self.sample(n)

    def sample(self, n: int, view: int = 0) -> tuple[Tensor, int]:
        """(indices (L, G) int64, label or NO_LABEL) of a view of picture n."""
        if not 0 <= n < len(self) or not 0 <= view < self.facts.views:
            raise IndexError(f"There are {len(self)} pictures with {self.facts.views} views, not {n} and {view}.")
        shard, place = self._place(n)
        indices = shard.read(place)[view]
        return torch.from_numpy(indices.astype(np.int64)), int(self.labels[n])

    def key(self, n: int) -> str:
        """What picture n is called in the source."""
        shard, place = self._place(n)
        return shard.keys[place]

    def _place(self, n: int) -> tuple[_Shard, int]:
        shard = int(np.searchsorted(self.starts, n, side="right")) - 1
        return self._shards[shard], n - int(self.starts[shard])

    @property
    def left_out(self) -> dict[str, str]:
        """The pictures that could not be read, and why."""
        return {key: problem for shard in self._shards for key, problem in shard.left_out.items()}

    def tokens(self, indices: Tensor) -> Tokens:
        """(B, L, G) indices of a batch as `Tokens`, for `Tokenizer.decode`."""
        return Tokens(indices, self.facts.layout, self.facts.height, self.facts.width)


class TrainingTokens(Dataset[tuple[Tensor, int]]):
    """Sample n of a training run without end: a random picture of the epoch that is due, in a random view.

    It depends on the seed and n alone, so a run that was stopped sees what it would have seen; each epoch has every
    picture once. Item: (indices (L, G) int64, label).
    """

    def __init__(self, shards: TokenShards, seed: int = 0) -> None:
        self.shards, self.seed = shards, seed

    def __len__(self) -> int:
        return 2**62  # numbered by the sampler, without end

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        epoch, place = divmod(n, len(self.shards))
        view = int(np.random.default_rng((self.seed, epoch, place)).integers(self.shards.facts.views))
        return self.shards.sample(int(_order(self.seed, epoch, len(self.shards))[place]), view)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


class _Shard(NamedTuple):
    """A finished shard: what it says of itself, and where the indices of each sample begin in it."""

    path: Path
    facts: TokenSet
    keys: list[str]
    labels: NDArray[np.int64]
    left_out: dict[str, str]
    offsets: NDArray[np.int64]

    def read(self, n: int) -> NDArray[Any]:
        """(V, L, G) of its sample n. FileError where the file is cut."""
        count = math.prod(self.facts.shape)
        try:
            indices = np.fromfile(self.path, self.facts.dtype, count, offset=int(self.offsets[n]))
        except OSError as error:
            raise FileError(f"{self.path} cannot be read: {reason(error)}.") from error
        if len(indices) < count:
            raise FileError(f"{self.path} is cut; remove it and run scripts/tokenize_dataset.py again.")
        return indices.reshape(self.facts.shape)


def _open(path: Path) -> _Shard:
    """The head of a finished shard. ModelError where it is something else or damaged."""
    try:
        return _open_safetensors(path) if path.suffix == SUFFIXES["safetensors"] else _open_tar(path)
    except (OSError, SafetensorError, tarfile.TarError, ValueError, KeyError, EOFError) as error:
        if isinstance(error, FileError):
            raise
        raise ModelError(f"{path} cannot be read as a token shard ({error}); remove it and run "
                         "scripts/tokenize_dataset.py again.") from error


def _open_safetensors(path: Path) -> _Shard:
    with safe_open(path, "np") as file:
        about = json.loads((file.metadata() or {}).get("vtc", "{}"))
        labels = file.get_tensor("labels")
    facts = TokenSet.parse(about.get("facts"), path)
    with open(path, "rb") as stream:
        head = int.from_bytes(stream.read(8), "little")
        start = 8 + head + json.loads(stream.read(head))["indices"]["data_offsets"][0]
    size = math.prod(facts.shape) * facts.dtype.itemsize
    return _Shard(path, facts, about["keys"], labels, about["left_out"],
                  start + size * np.arange(len(labels), dtype=np.int64))


def _open_tar(path: Path) -> _Shard:
    keys: list[str] = []
    labels: dict[str, int] = {}
    offsets: list[int] = []
    with tarfile.open(path, "r:") as tar:
        first = tar.next()
        if first is None or first.name != ABOUT:
            raise ModelError(f"{path} is no token shard of vtc.")
        about = json.loads(cast(Any, tar.extractfile(first)).read())
        facts = TokenSet.parse(about["facts"], path)
        expected = math.prod(facts.shape) * facts.dtype.itemsize
        for member in tar:
            if member.name.endswith(".tokens.npy"):
                keys.append(member.name.removesuffix(".tokens.npy"))
                offsets.append(member.offset_data + member.size - expected)  # behind the head of the array
            elif member.name.endswith(".cls"):
                labels[member.name.removesuffix(".cls")] = int(cast(Any, tar.extractfile(member)).read())
    return _Shard(path, facts, keys, np.array([labels.get(key, NO_LABEL) for key in keys], np.int64),
                  about["left_out"], np.array(offsets, np.int64))
