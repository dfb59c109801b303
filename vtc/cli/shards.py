"""WebDataset shards: a .tar in, a .tar out, member by member and in order; what is not coded is copied as it is.

    0001.jpg 0001.cls 0002.jpg 0002.cls   ->   0001.vtc 0001.cls 0002.vtc 0002.cls

The new shard grows under a temporary name whose letters stand for the old shard and the settings. A run that is killed
leaves it; the next one with --resume reads which members are whole, cuts off what is not, and goes on behind them, so
that the result has the same bytes as if nothing had happened. Nothing is ever unpacked onto the disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from vtc.cli.items import Item, Made, make_folder
from vtc.cli.plan import Task, stage_name
from vtc.errors import FileError, VtcError, first_sentence
from vtc.files import lock, reason
from vtc.tars import BLOCK, DAMAGED, Header, forget, members, read_member


@dataclass(frozen=True)
class Recipe:
    """What becomes of a shard's members.

    suffixes: of the members that are coded; new_suffix: of what they become.
    settings: all that their new bytes depend on, in words.
    resume: go on where a killed run stopped.
    """

    suffixes: tuple[str, ...]
    new_suffix: str
    settings: str
    resume: bool = False


# ---- writing --------------------------------------------------------------------------------------------------------

class Shard:
    """A shard that grows under a temporary name; `finish` gives it its own.

    target: what it will be called. key: all that its bytes depend on. source: closed when it is done with.
    """

    def __init__(self, target: str, key: str, resume: bool, source: IO[bytes] | None = None) -> None:
        self.target, self.failed, self.source = target, False, source
        self.names: set[str] = set()
        self.kept = 0  # members of a killed run that were kept so far
        self._done: deque[tuple[str, int, int]] = deque()  # (name, start, end) of members from a killed run
        self._tar: tarfile.TarFile | None = None
        place = Path(os.path.realpath(target))
        prefix = f".vtc-{_digest(place.name)}-"  # short, as the name itself may have the 255 bytes that there are
        self.path = place.with_name(f"{prefix}{_digest(key)}.part")
        try:
            for other in place.parent.glob(f"{prefix}*.part"):
                if other != self.path or not resume:
                    _remove(other, target)
            self._file = open(self.path, "r+b" if self.path.exists() else "x+b")  # noqa: SIM115  # closed by the end
        except OSError as error:
            raise _unwritable(target, error) from error
        lock(self._file, target)
        self._end = 0
        for name, start, end in _whole_members(self._file):
            self._done.append((name, start, end))

    def has(self, name: str) -> bool:
        """Whether the killed run left a member of that name, with its stages, as the next one; it is kept then."""
        stages = 0
        while stages < len(self._done) and self._done[stages][0] == stage_name(name, stages + 1):
            stages += 1
        if stages == len(self._done) or self._done[stages][0] != name:
            return False
        for _ in range(stages + 1):
            kept, _, self._end = self._done.popleft()
            self.names.add(kept)
            self.kept += 1
        return True

    def add(self, like: tarfile.TarInfo, name: str, data: IO[bytes], size: int) -> None:
        """Append a member with the date and mode of `like`. FileError where there is one, or the disk is full."""
        if name in self.names:
            raise FileError(f"{self.target} has a member {name!r} already: two members become it.")
        new = tarfile.TarInfo(name)
        new.size, new.mode = size, like.mode & 0o777
        new.mtime = int(like.mtime) if 0 <= like.mtime < 2**33 else 0
        new.uid, new.gid, new.uname, new.gname = like.uid, like.gid, like.uname, like.gname
        try:
            if self._tar is None:
                self._done.clear()
                self._file.seek(self._end)
                self._file.truncate()
                self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115
            self._tar.addfile(new, data)
            forget(self._tar)
            self._file.flush()  # so that a kill costs one member
        except (OSError, tarfile.TarError, ValueError) as error:
            self.fail()
            raise _unwritable(self.target, error) from error
        self.names.add(name)

    def finish(self) -> None:
        """All members are there: write the end mark and rename. Raises FileError."""
        try:
            if self._tar is None:
                self._file.seek(self._end)
                self._file.truncate()
                self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._let_go()
            os.replace(self.path, os.path.realpath(self.target))
            self._file.close()
            if self.source is not None:
                self.source.close()
        except OSError as error:
            self.fail()
            raise _unwritable(self.target, error) from error

    def fail(self) -> None:
        """Give up: nothing is left."""
        self.failed = True
        with suppress(OSError):  # what was to be flushed does not matter any more
            self._let_go()
        with suppress(OSError):  # what made it fail is said, and not this
            self.path.unlink(missing_ok=True)
        if self.source is not None:
            self.source.close()
        with suppress(OSError):
            self._file.close()

    def _let_go(self) -> None:
        """Windows renames and removes no open file; elsewhere it is open, and locked, until it has its name."""
        if sys.platform == "win32":
            self._file.close()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _unwritable(target: str, error: Exception) -> FileError:
    return FileError(f"{target} cannot be written: "
                     f"{reason(error) if isinstance(error, OSError) else first_sentence(error)}.")


def _remove(path: Path, target: str) -> None:
    """What a run with other settings left; not while that run goes on."""
    with open(path, "r+b") as file:
        lock(file, target)
        if sys.platform != "win32":
            path.unlink()
    if sys.platform == "win32":  # where no open file can be removed
        path.unlink()


def _whole_members(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of the members of an unfinished shard up to the first that is not all there."""
    size, start = os.fstat(file.fileno()).st_size, 0
    if not size:
        return
    try:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=Header)  # noqa: SIM115
        while (member := tar.next()) is not None:
            forget(tar)
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            if end > size:
                return
            yield member.name, start, end
            start = end
    except DAMAGED:
        return


# ---- a shard's part of a batch --------------------------------------------------------------------------------------

#: the shards that are being written, for the message of a run that is stopped
unfinished: dict[str, Shard] = {}


def items(task: Task, recipe: Recipe) -> Iterator[Item]:
    """The steps of making one shard: its members in order, and its end."""
    try:
        # Closed with the new shard: what is copied is read when it is its turn, and that may be after the last step.
        file = open(task.source, "rb")  # noqa: SIM115
        yield from _steps(task, recipe, file)
    except OSError as error:
        shard = unfinished.pop(task.source, None)
        if shard is not None:
            shard.fail()
        problem = str(error) if isinstance(error, FileError) else f"{task.source} cannot be read: {reason(error)}."
        yield Item(task.source, task.target, None, partial(_refuse, problem))


def _steps(task: Task, recipe: Recipe, file: IO[bytes]) -> Iterator[Item]:
    about = os.fstat(file.fileno())
    if task.make_folder:
        make_folder(task.target)
    key = "\n".join((recipe.settings, recipe.new_suffix, os.path.basename(task.source), str(about.st_size),
                     str(about.st_mtime_ns)))
    shard = unfinished[task.source] = Shard(task.target, key, recipe.resume, file)
    for member, objection in members(task.source, file):
        if shard.failed:
            return
        name = f"{task.source}/{member.name}"
        step = partial(Item, name, dropped=lambda: shard.failed)
        if objection:
            problem = f"{name} is left out: {objection}."
            yield step(target=task.target, task=None, write=partial(_refuse, problem))
            continue
        root, suffix = os.path.splitext(member.name)
        if suffix.lower() not in recipe.suffixes:
            if not shard.has(member.name):
                yield step(target=task.target, task=None, write=partial(_copy, shard, file, member))
            continue
        new = root + recipe.new_suffix
        if shard.has(new):
            continue
        target = f"{task.target}/{new}"
        try:
            part = replace(task, source=name, target=target, data=read_member(task.source, file, member))
        except FileError as error:
            yield step(target=target, task=None, write=partial(_refuse, str(error)))
            continue
        yield step(target=target, task=part, write=partial(_put, shard, shard.kept, member, new))

    def end(made: Made | None) -> Sequence[str]:
        shard.finish()
        unfinished.pop(task.source, None)
        return ()

    yield Item(task.source, task.target, None, end, lambda: shard.failed)


def _refuse(problem: str, made: Made | None) -> Sequence[str]:
    raise FileError(problem)


def _copy(shard: Shard, file: IO[bytes], member: tarfile.TarInfo, made: Made | None) -> Sequence[str]:
    file.seek(member.offset_data)
    shard.add(member, member.name, file, member.size)
    return ()


def _put(shard: Shard, kept: int, member: tarfile.TarInfo, name: str, made: Made | None) -> Sequence[str]:
    if made is None:
        raise VtcError(f"Nothing was made of {name}.")
    if shard.kept != kept:  # the run before left it out as a failure, and went on
        raise FileError(f"{shard.target}/{name} failed in the run before and would now come behind what followed it; "
                        "make the shard anew, without --resume.")
    stages = [stage_name(name, number) for number in range(1, len(made.stages) + 1)]
    for new, data in zip([*stages, name], [*made.stages, made.data], strict=True):
        shard.add(member, new, io.BytesIO(data), len(data))
    return [f"{shard.target}/{stage}" for stage in stages]


def coded_members(path: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, how to read it) of the members of a shard that have one of `suffixes`. Raises FileError."""
    try:
        with open(path, "rb") as file:
            for member, objection in members(path, file):
                if not objection and member.name.lower().endswith(suffixes):
                    yield f"{path}/{member.name}", partial(read_member, path, file, member)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be read: {reason(error)}.") from error
