"""What a batch consists of: one file, or one member of a shard, from its bytes to where its result goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vtc.cli.plan import Task, stage_name
from vtc.errors import FileError
from vtc.files import reason, write_file


@dataclass(frozen=True)
class Made:
    """What became of one file: its new bytes, facts for --json, and what was done to it on the way.

    loading: seconds of the work that went into loading a model, or waiting for it; they are not the file's.
    quality: that an encoder chose or was told, where its model has several.
    stages: coarser pictures of a decoder, coarse to fine, which are written beside the file.
    """

    data: bytes
    width: int
    height: int
    coded_bytes: int
    notes: Sequence[str] = field(default=())
    loading: float = 0.0
    quality: int | None = None
    stages: Sequence[bytes] = field(default=())


@dataclass(frozen=True)
class Item:
    """One step of a batch. Steps are worked on in threads, and written and reported in their order.

    source, target: as reports name them.
    task: what is made in a thread before `write`; None where nothing has to be made, nor reported unless it fails.
    write: puts what was made where it belongs, and returns the names of the stages that it wrote.
    dropped: whether the step is not wanted any more, because what it belongs to has failed.
    """

    source: str
    target: str
    task: Task | None
    write: Callable[[Made | None], Sequence[str]]
    dropped: Callable[[], bool] = lambda: False


def file_item(task: Task) -> Item:
    """A task whose result is a file of its own."""
    def write(made: Made | None) -> Sequence[str]:
        if made is None:
            return ()
        if task.make_folder:
            make_folder(task.target)
        stages = [stage_name(task.target, number) for number in range(1, len(made.stages) + 1)]
        for name, data in zip(stages, made.stages, strict=True):
            write_file(name, data)
        write_file(task.target, made.data)
        return stages

    return Item(task.source, task.target, task, write)


def make_folder(target: str) -> None:
    """Create the folder that `target` lies in. Raises FileError."""
    folder = os.path.dirname(target)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise FileError(f"The output folder {folder} cannot be created: {reason(error)}.") from error
