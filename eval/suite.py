"""The suite: every image through every method, every measure on what comes out; streaming, resumable, in processes.

    items -> read, prepare by the protocol -> method -> round by the protocol -> measures -> record -> results

Only records stay, some hundred bytes for an image and method, so memory holds a few pictures at a time whatever their
number. The records are added up in the order of the items by one process, so that the numbers do not depend on how many
threads and processes worked: bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vtc.errors import ConfigError, ImageError, VtcError, sentence
from vtc.eval.bootstrap import bootstrap_interval
from vtc.eval.cache import Record, RecordCache, digest
from vtc.eval.measures import Collector, Measure, Seen, Statistic
from vtc.eval.pairs import Item, Problem
from vtc.eval.protocols import NATIVE, Protocol
from vtc.eval.provenance import versions
from vtc.eval.results import MethodResult, Result
from vtc.files import read_file
from vtc.images import load_image, to_tensor, to_uint8

T = TypeVar("T")
R = TypeVar("R")

#: goes into every record's key; raise it when a measure's numbers change
REVISION = 2
#: the fact of an image for which a method has no reconstruction
NOT_REACHED = "not_reached"
#: how often the images are drawn anew for an interval
RESAMPLES = 2000


@dataclass
class Reconstruction:
    """What a method made of one picture.

    image: (3, H, W) in [0, 1]. num_bytes: of the whole file, None where the method writes none.
    tokens: integers (L, groups), scale after scale; None without. facts: numbers to be kept by image (down-sampling,
    quality, seconds). grid: rows and columns of the last scale of the tokens, where they have any.
    """

    image: Tensor
    num_bytes: int | None = None
    tokens: np.ndarray | None = None
    facts: dict[str, float] = field(default_factory=dict)
    grid: tuple[int, int] | None = None


class Method:
    """Something that turns a picture into a worse one: a codec at a rate, a tokenizer, a folder of files.

    name: in tables, unlike all others. family: its curve. kind: "codec", "tokenizer" or "files".
    description: everything that its results depend on, as JSON can hold it; part of the records' keys.
    """

    name: str
    family: str
    kind: str
    description: dict[str, Any]

    def content(self, item: Item) -> str:
        """What else the result for this image depends on: the digest of a file."""
        return ""

    def has(self, item: Item) -> bool:
        """Whether there is a reconstruction of this image at all; what lacks one was reported before."""
        return True

    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction | None:
        """image: the prepared original, (1, 3, H, W) in [0, 1]. Raises VtcError where it cannot be done.

        None: the method has no such point, a codec no file that small; the row then has fewer images, and says so.
        """
        raise NotImplementedError


@dataclass
class Files(Method):
    """Reconstructions that exist: name of the item -> file, from `vtc.eval.pairs.match`.

    rate: whether the files' bytes count as the method's rate.
    """

    name: str
    files: Mapping[str, Path]
    rate: bool = False
    family: str = ""
    kind: str = "files"

    def __post_init__(self) -> None:
        self.family = self.family or self.name
        self.description = {"kind": "files", "bytes_count": self.rate}

    def content(self, item: Item) -> str:
        return hashlib.sha256(read_file(self.files[item.name])).hexdigest()

    def has(self, item: Item) -> bool:
        return item.name in self.files

    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction:
        path = self.files[item.name]
        data = read_file(path)
        return Reconstruction(read_picture(data, str(path)), len(data) if self.rate else None)


def read_picture(data: bytes, name: str) -> Tensor:
    """(3, H, W) in [0, 1]. Values that are not finite are an error here, where `load_image` makes them black."""
    loaded = load_image(data, name=name)
    if any("not finite" in note for note in loaded.notes):
        raise ImageError(f"{name} holds values that are not finite (NaN or infinity); write it again without them.")
    return to_tensor(loaded.pixels)


class Processes:
    """The processes of `accelerate launch`, or this one alone."""

    def __init__(self, cpu: bool = True) -> None:
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            from accelerate import PartialState

            state = PartialState(cpu=cpu)
            self.rank, self.count = state.process_index, state.num_processes

    @property
    def is_main(self) -> bool:
        """The one that adds up and writes."""
        return self.rank == 0

    def gather(self, values: list[Any]) -> list[Any]:
        """Everybody's lists, one after the other."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return list(gather_object(values))


@dataclass
class Outcome:
    """One item: its hash, and for each method the record's key and the record, or None where it failed."""

    item: Item
    sha256: str = ""
    keys: list[str | None] = field(default_factory=list)
    records: list[Record | None] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    reused: int = 0


@dataclass
class Suite:
    """What is measured, and how.

    methods, measures: in the order of the tables. protocol, size: see `vtc.eval.protocols`; size where it crops.
    cache: of records; needed with several processes, which share it. fresh: measure again what the cache holds.
    jobs: images in work at a time, in threads. device: where measures compute. reference_set: the pictures' name.
    seed: of the bootstrap.
    """

    methods: Sequence[Method]
    measures: Sequence[Measure]
    protocol: Protocol = NATIVE
    size: int | None = None
    cache: RecordCache = field(default_factory=lambda: RecordCache(None))
    fresh: bool = False
    jobs: int = 1
    device: str = "cpu"
    reference_set: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"Two methods are called {', '.join(sorted(repeated))}: name each once.")
        if not self.measures:
            raise ConfigError("There is nothing to measure: no metric is available.")
        if self.protocol.crop != "none" and not self.size:
            raise ConfigError(f"The protocol {self.protocol.name} crops: say by --size to how many pixels.")

    def run(self, items: Sequence[Item], processes: Processes | None = None,
            progress: Callable[[int, int], None] = lambda done, reused: None) -> tuple[list[MethodResult],
                                                                                       list[Problem]]:
        """The methods' results, and what could not be measured. Other processes than the main one get no results.

        progress: called after each image with the number of records it took and of those that the cache held.
        """
        processes = processes or Processes()
        if processes.count == 1:
            return self._add_up(self._with_progress(items, progress))
        if self.cache.folder is None:
            raise ConfigError("Several processes need a cache folder that all of them can write.")
        mine: list[tuple[int, Outcome]] = []
        own = range(processes.rank, len(items), processes.count)
        for number, outcome in zip(own, self._with_progress([items[n] for n in own], progress), strict=True):
            outcome.records = []  # they are on disk
            mine.append((number, outcome))
        outcomes = [outcome for _, outcome in sorted(processes.gather(mine), key=lambda pair: pair[0])]
        return self._add_up(self._from_cache(outcome) for outcome in outcomes) if processes.is_main else ([], [])

    def prepared(self, item: Item) -> Tensor:
        """The original as it was judged, (1, 3, H, W): for a picture in a report."""
        return self._prepared(self.read(item), item)

    def read(self, item: Item) -> bytes:
        """The original's file."""
        return read_file(item.path)

    def reconstructed(self, item: Item, method: Method, original: Tensor) -> Tensor | None:
        """The reconstruction as it was judged, (3, H, W)."""
        made = method.reconstruct(item, original)
        return None if made is None else self.protocol.for_pixels(made.image[None])[0].cpu()

    def _with_progress(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> Iterator[Outcome]:
        for outcome in in_order(self._measured, items, self.jobs):
            progress(len(outcome.records), outcome.reused)
            yield outcome

    def _from_cache(self, outcome: Outcome) -> Outcome:
        outcome.records = [self.cache.get(key) if key else None for key in outcome.keys]
        return outcome

    # One image

    def _measured(self, item: Item) -> Outcome:
        outcome = Outcome(item)
        try:
            data = self.read(item)
        except VtcError as error:
            return self._failed(outcome, error)
        outcome.sha256 = hashlib.sha256(data).hexdigest()
        original: Tensor | None = None
        memo: dict[str, Any] = {}
        for method in self.methods:
            outcome.keys.append(None)
            outcome.records.append(None)
            if not method.has(item):
                continue
            try:
                key = self._key(outcome.sha256, method, item)
                record = (None if self.fresh else self.cache.get(key)) or Record()
                missing = [measure for measure in self.measures if not record.has(measure.key)]
                if missing:
                    if original is None:
                        try:
                            original = self._prepared(data, item)
                        except Exception as error:
                            return self._failed(outcome, error)
                    self._measure(record, missing, method, item, original, memo)
                    self.cache.put(key, record)
                else:
                    outcome.reused += 1
            except Exception as error:
                outcome.problems.append(Problem(item.name, method.name, sentence(error, item.name)))
            else:
                outcome.keys[-1], outcome.records[-1] = key, record
        return outcome

    def _failed(self, outcome: Outcome, error: Exception) -> Outcome:
        outcome.problems = [Problem(outcome.item.name, "", sentence(error, str(outcome.item.path)))]
        outcome.keys = [None] * len(self.methods)
        outcome.records = [None] * len(self.methods)
        return outcome

    def _key(self, sha256: str, method: Method, item: Item) -> str:
        return digest(REVISION, sha256, method.name if method.kind == "files" else "", method.description,
                      method.content(item), self.protocol.describe(), self.size, self.device, versions())

    def _prepared(self, data: bytes, item: Item) -> Tensor:
        image = read_picture(data, str(item.path))
        if self.protocol.resize != "none" or self.protocol.crop != "none":
            image = to_tensor(np.ascontiguousarray(self.protocol.prepare(to_uint8(image), self.size or 0)))
        return image[None]

    def _measure(self, record: Record, measures: Sequence[Measure], method: Method, item: Item, original: Tensor,
                 memo: dict[str, Any]) -> None:
        made = method.reconstruct(item, original)
        if made is None:
            record.facts = {NOT_REACHED: 1}
            record.skipped |= {measure.key: "" for measure in measures}
            return
        image = made.image[None].float()
        if image.shape != original.shape:
            raise ImageError(f"{item.name}: the original has {original.shape[3]}x{original.shape[2]} pixels and the "
                             f"reconstruction {image.shape[3]}x{image.shape[2]}; crop or resize one of them.")
        if not bool(image.isfinite().all()):
            raise ImageError(f"{item.name}: {method.name} gave values that are not finite (NaN or infinity).")
        target, image = original.to(self.device), image.to(self.device)
        seen = Seen(item.name, item.path, target, self.protocol.for_pixels(image), image.clamp(0, 1), made.num_bytes,
                    made.tokens, made.facts, memo, grid=made.grid)
        record.facts = {"height": original.shape[2], "width": original.shape[3],
                        **({} if made.num_bytes is None else {"num_bytes": made.num_bytes}), **made.facts}
        for measure in measures:
            if not measure.applies(seen):
                record.skipped[measure.key] = ""
                continue
            try:
                columns, parts = measure.columns(seen), measure.parts(seen)
            except ImageError as error:
                record.skipped[measure.key] = str(error)
                continue
            if bad := [name for name, value in columns.items() if math.isnan(value)]:
                raise ImageError(f"{item.name}: {', '.join(bad)} of {method.name} is not a number.")
            record.columns[measure.key] = columns
            if parts:
                record.parts[measure.key] = parts

    # All images

    def _add_up(self, outcomes: Iterator[Outcome]) -> tuple[list[MethodResult], list[Problem]]:
        tallies = [Tally(method, self.measures) for method in self.methods]
        problems: list[Problem] = []
        for outcome in outcomes:
            problems += outcome.problems
            for tally, record in zip(tallies, outcome.records, strict=True):
                if record is not None:
                    try:
                        tally.add(outcome, record)
                    except VtcError as error:
                        name = outcome.item.name
                        problems.append(Problem(name, tally.method.name, sentence(error, name)))
        found = []
        for tally in tallies:
            if tally.images or tally.not_reached:
                result, troubles = tally.result(self._conditions(tally), self.seed)
                found.append(result)
                problems += troubles
        return found, problems

    def _conditions(self, tally: Tally) -> dict[str, Any]:
        return {"reference_set": self.reference_set, "images_sha256": tally.digest.hexdigest(), "n": len(tally.images),
                "protocol": self.protocol.describe(), "size": self.size, "device": self.device,
                "metrics": {m.alias: {**m.settings, **m.set_settings} for m in self.measures}, "packages": versions()}


class Tally:
    """The numbers of one method, image by image, and what its collectors have added up."""

    def __init__(self, method: Method, measures: Sequence[Measure]) -> None:
        self.method, self.measures = method, measures
        self.images: list[str] = []
        self.digest = hashlib.sha256()
        self.columns: dict[str, array[float]] = {}
        self.collectors: dict[str, tuple[Collector, int]] = {}
        self.skipped: dict[str, list[str]] = {}
        self.not_reached = 0
        for measure in measures:
            collector = measure.collector(method.description)
            if collector is not None:
                self.collectors[measure.alias] = (collector, 0)

    def add(self, outcome: Outcome, record: Record) -> None:
        """One image's record."""
        if NOT_REACHED in record.facts:
            self.not_reached += 1
            return
        self.digest.update(f"{outcome.item.name} {outcome.sha256}\n".encode())
        found = {name: float(value) for name, value in record.facts.items()}
        for measure in self.measures:
            found |= record.columns.get(measure.key, {})
            if reason := record.skipped.get(measure.key):
                self.skipped.setdefault(measure.alias, []).append(reason)
            if measure.alias in self.collectors and measure.key in record.parts:
                collector, count = self.collectors[measure.alias]
                collector.add(record.parts[measure.key])
                self.collectors[measure.alias] = (collector, count + 1)
        for name in [name for name in found if name not in self.columns]:  # in order: the CSV's columns are these
            self.columns[name] = array("d", [math.nan]) * len(self.images)
        self.images.append(outcome.item.name)
        for name, column in self.columns.items():
            column.append(found.get(name, math.nan))

    def result(self, conditions: dict[str, Any], seed: int) -> tuple[MethodResult, list[Problem]]:
        """Means, intervals and what the collectors say; and collectors that had too little."""
        columns = {name: np.frombuffer(column, dtype=np.float64) for name, column in self.columns.items()}
        results: dict[str, Result] = {}
        extra: dict[str, Any] = {NOT_REACHED: self.not_reached} if self.not_reached else {}
        problems = []
        for measure in self.measures:
            for statistic in measure.statistics:
                if all(name in columns for name in statistic.columns):
                    results[statistic.name] = _summary(statistic, [columns[name] for name in statistic.columns], seed)
            if measure.alias in self.skipped:
                reasons = self.skipped[measure.alias]
                extra.setdefault("skipped", {})[measure.alias] = {"images": len(reasons), "first": reasons[0]}
            if measure.alias in self.collectors:
                collector, count = self.collectors[measure.alias]
                if not count:
                    continue
                try:
                    found = collector.results()
                except ConfigError as error:
                    problems.append(Problem("", self.method.name, f"{measure.alias} of {self.method.name}: {error}"))
                    continue
                for name, value in found.items():
                    if isinstance(value, int | float):
                        results[name] = Result(float(value), count, "set")
                    else:
                        extra[name] = value
        method = self.method
        return MethodResult(method.name, method.family, method.kind, method.description, conditions, results, extra,
                            self.images, _for_images(columns, self.measures)), problems


def _summary(statistic: Statistic, columns: list[np.ndarray], seed: int) -> Result:
    measured = ~np.isnan(np.stack(columns)).any(0)
    columns = [column[measured] for column in columns]
    n = int(measured.sum())
    if not n:
        return Result(None, 0, statistic.aggregation)
    value = float(statistic.function(*(column.mean() for column in columns)))
    infinite = int(sum((~np.isfinite(column)).sum() for column in columns))
    if not math.isfinite(value):
        return Result(None, n, statistic.aggregation,
                      note=f"infinite for {infinite} images" if infinite else "infinite")
    return Result(value, n, statistic.aggregation,
                  bootstrap_interval(columns, statistic.function, resamples=RESAMPLES, seed=seed))


def _for_images(columns: dict[str, np.ndarray], measures: Sequence[Measure]) -> dict[str, np.ndarray]:
    """What is shown image by image: the facts, and each statistic of the image alone; not what is only summed."""
    facts = [name for name in ("height", "width", "num_bytes") if name in columns]
    statistics = {s.name: s for measure in measures for s in measure.statistics}
    summed = {name for s in statistics.values() for name in s.columns} | set(facts)
    found: dict[str, np.ndarray] = {name: columns[name] for name in facts}
    for name, statistic in statistics.items():
        if all(column in columns for column in statistic.columns):
            found[name] = np.asarray(statistic.function(*(columns[column] for column in statistic.columns)))
    return found | {name: column for name, column in columns.items() if name not in summed}


def in_order(work: Callable[[T], R], inputs: Sequence[T], jobs: int) -> Iterator[R]:
    """`work(x)` for each input, in their order, `jobs` at a time; no more than `2 * jobs` results wait in memory."""
    if jobs == 1:
        yield from map(work, inputs)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        waiting: deque[Future[R]] = deque()
        for x in inputs:
            waiting.append(pool.submit(work, x))
            if len(waiting) == 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def timed(function: Callable[[], R]) -> tuple[R, float]:
    """Result and wall-clock seconds."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
