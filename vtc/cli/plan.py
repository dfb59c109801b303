"""Which file becomes which: inputs and `-o` to a list of tasks, before anything is read or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vtc.errors import FileError
from vtc.files import read_file, reason

#: suffix of a WebDataset shard, whose members are the files
SHARD = ".tar"


class UsageError(Exception):
    """Arguments that contradict one another: exit code 2."""


@dataclass(frozen=True)
class Task:
    """One file to be made.

    source, target: paths, or '-' for stdin and stdout.
    make_folder: whether the target's folder may be created (it lies in a folder given by -o).
    problem: why this task fails without being tried; '' where it does not.
    data: the bytes of a source that is no file of its own but a member of a shard.
    """

    source: str
    target: str
    make_folder: bool = False
    problem: str = ""
    data: bytes | None = field(default=None, repr=False)

    @property
    def is_shard(self) -> bool:
        """Whether this is a .tar, whose members are coded."""
        return is_shard(self.source)

    def read(self) -> bytes:
        """The bytes of the source. Raises FileError."""
        return read_file(self.source) if self.data is None else self.data


def is_shard(path: str) -> bool:
    """Whether a file is a shard by its name."""
    return path.lower().endswith(SHARD)


def plan(inputs: Sequence[str], output: str | None, suffixes: Sequence[str], new_suffix: str,
         new_shard_suffix: str = SHARD) -> list[Task]:
    """Tasks in the order of the inputs; folders are walked, sorted, and stand for their files with one of `suffixes`
    and their shards.

    output: None puts each result next to its input with `new_suffix`, or `new_shard_suffix`, by which a folder's shards
    are known as results and left alone. '-' is stdout. A folder (one that exists, or ends in a slash, or is needed for
    several inputs) receives the results under their inputs' names, and files of an input folder keep their place below
    it; its last part is created where it is missing. Else it is the file to write.

    No two tasks write the same file and none writes onto an input: the later one has a `problem` instead.
    Raises UsageError, and FileError where the output folder cannot be one.
    """
    several = len(inputs) > 1 or any(os.path.isdir(name) for name in inputs)
    if "-" in inputs and several:
        raise UsageError("'-' (stdin) has to be the only input")
    if output == "-" and several:
        raise UsageError("'-o -' (stdout) takes a single input file")
    is_folder = output not in (None, "-") and (several or os.path.isdir(output) or output.endswith(("/", os.sep)))
    if is_folder and "-" in inputs:
        raise UsageError("input from stdin has no name; give -o a file, not a folder")
    folder = output if is_folder else None
    if output not in (None, "-") and not os.path.isdir(output) and not output.endswith(("/", os.sep)):
        if several and is_shard(output):
            raise UsageError(f"-o {output} names a shard, and several inputs need a folder")
        if not several and is_shard(output) != is_shard(inputs[0]):
            raise UsageError("a .tar becomes a .tar, and nothing else does: give -o another name, or a folder")
    if output == "-" and is_shard(inputs[0]):
        raise UsageError("a .tar becomes a .tar, which is not written to stdout")
    if folder is not None:
        check_folder(folder)
    elif output not in (None, "-") and not os.path.isdir(os.path.dirname(output) or "."):
        raise FileError(f"The output folder {os.path.dirname(output)} does not exist; create it first.")

    tasks: list[Task] = []
    sources = {os.path.realpath(name) for name in inputs if name != "-"}
    writer: dict[str, str] = {}  # real path of a target -> the source that writes it
    for source, place, unreadable in _expanded(inputs, suffixes, new_shard_suffix):
        if unreadable:
            tasks.append(Task(source, "", problem=unreadable))
            continue
        if not place:
            tasks.append(Task(source, "", problem=f"The folder {source} has no files in {', '.join(suffixes)}."))
            continue
        if folder is not None:
            target = os.path.join(folder, place if is_shard(place) else os.path.splitext(place)[0] + new_suffix)
        elif output is not None:
            target = output
        else:
            suffix = new_shard_suffix if is_shard(source) else new_suffix
            target = "-" if source == "-" else os.path.splitext(source)[0] + suffix
        real = "-" if target == "-" else os.path.realpath(target)
        sources.add(os.path.realpath(source))
        if real in writer and os.path.realpath(writer[real]) == os.path.realpath(source):
            continue  # the same file was named twice
        problem = ""
        if source != "-" and not os.path.lexists(source):
            problem = f"{source} does not exist."
        elif real in writer:
            problem = (f"{source} would overwrite {target}, which {writer[real]} becomes; "
                       "rename one of them, or use -o for it alone.")
        tasks.append(Task(source, target, folder is not None, problem))
        writer.setdefault(real, source)
    return [task if task.problem or os.path.realpath(task.target) not in sources or task.target == "-" else
            Task(task.source, task.target, problem=f"{task.source} would be written onto the input {task.target}; "
                                                   "choose another name with -o.") for task in tasks]


def apart_from_stages(tasks: Sequence[Task]) -> list[Task]:
    """The tasks, of which those have a `problem` whose result another one's coarser pictures could overwrite."""
    writer = {os.path.realpath(task.target): task.source for task in tasks if task.target and not task.is_shard}

    def checked(task: Task) -> Task:
        whole = stage_of(task.target)
        other = writer.get(os.path.realpath(whole)) if whole else None
        if task.problem or task.is_shard or other is None:
            return task
        return replace(task, problem=f"{task.source} would become {task.target}, which is also a stage of what {other} "
                                     "becomes; rename one of them, or use -o for it alone.")

    return [checked(task) for task in tasks]


def stage_name(target: str, number: int) -> str:
    """Where a coarser picture goes: beside the final one.

    >>> stage_name("a.decoded.png", 1)
    'a.decoded.stage1.png'
    """
    root, suffix = os.path.splitext(target)
    return f"{root}.stage{number}{suffix}"


def stage_of(name: str) -> str:
    """The final picture's name, of that of a stage; '' of any other."""
    root, suffix = os.path.splitext(name)
    whole = re.sub(r"\.stage[1-9]\d*$", "", root)
    return whole + suffix if whole != root else ""


def check_folder(folder: str) -> None:
    """FileError where an output folder is a file, or cannot be made in an existing one."""
    if os.path.isdir(folder):
        return
    if os.path.exists(folder):
        raise FileError(f"The output {folder} is a file, and a folder is needed here.")
    parent = os.path.dirname(folder.rstrip("/" + os.sep)) or "."
    if not os.path.isdir(parent):
        raise FileError(f"The output folder {folder} cannot be made, because {parent} does not exist; create it first.")


def _expanded(inputs: Sequence[str], suffixes: Sequence[str], new_shard_suffix: str) -> Iterator[tuple[str, str, str]]:
    """(path, its place below the input it came from, why it cannot be read).

    The place is '' for a folder that holds nothing or cannot be read; the reason is '' for all but the latter.
    """
    for name in inputs:
        if not os.path.isdir(name):
            yield name, os.path.basename(name), ""
            continue
        found = False
        errors: list[OSError] = []
        for root, folders, files in os.walk(name, onerror=errors.append):
            folders.sort()
            for file in sorted(files):
                made_here = new_shard_suffix != SHARD and file.endswith(new_shard_suffix)
                if file.lower().endswith((*suffixes, SHARD)) and not made_here:
                    found = True
                    path = os.path.join(root, file)
                    yield path, os.path.relpath(path, name), ""
        for error in errors:
            yield str(error.filename), "", f"The folder {error.filename} cannot be read: {reason(error)}."
        if not found and not errors:
            yield name, "", ""
