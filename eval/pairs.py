"""Which original belongs to which reconstruction: files by their names without the suffix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtc.errors import ConfigError
from vtc.files import reason

#: what a folder is searched for
SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".jxl", ".pgm", ".png", ".pnm", ".ppm", ".tga",
            ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Item:
    """An original. name: its path below the folder, without suffix, with '/'. path: the file."""

    name: str
    path: Path


@dataclass(frozen=True)
class Problem:
    """Why something was not measured: one sentence about one image, and about one method or all ("")."""

    image: str
    method: str
    sentence: str


def find_items(source: str | Path) -> tuple[list[Item], list[Problem]]:
    """The pictures of a folder and of those below it, by name, or the one file.

    Two files that differ in their suffix only are a problem, since a pair could not be told.
    Raises ConfigError where there is no such path, where it cannot be read, or holds no picture.
    """
    source = Path(source)
    if source.is_file():
        return [Item(source.stem, source)], []
    if not source.is_dir():
        raise ConfigError(f"There is no file or folder {source}.")
    problems: list[Problem] = []
    found: dict[str, Path] = {}
    doubled: dict[str, list[str]] = {}
    for path in _pictures(source, problems):
        name = path.relative_to(source).with_suffix("").as_posix()
        if name in found:
            doubled.setdefault(name, [found[name].name]).append(path.name)
        else:
            found[name] = path
    for name, files in doubled.items():
        del found[name]
        problems.append(Problem(name, "", f"{name} stands for {' and '.join(files)} in {source}; keep one of them."))
    if not found and not problems:
        raise ConfigError(f"The folder {source} holds no pictures ({', '.join(SUFFIXES)}).")
    return [Item(name, found[name]) for name in sorted(found)], problems


def _pictures(folder: Path, problems: list[Problem]) -> list[Path]:
    def unreadable(error: OSError) -> None:
        name = str(error.filename)
        problems.append(Problem(name, "", f"The folder {name} cannot be read: {reason(error)}."))

    return sorted(Path(root) / file for root, _, files in os.walk(folder, onerror=unreadable, followlinks=True)
                  for file in files if file.lower().endswith(SUFFIXES))


def match(items: Sequence[Item], source: str | Path, method: str) -> tuple[dict[str, Path], list[Problem]]:
    """The reconstruction of each original in `source`, a folder or a file: name of the item -> file.

    Two single files are a pair whatever they are called. What has no partner, on either side, is a problem.
    """
    theirs, problems = find_items(source)
    problems = [Problem(p.image, method, p.sentence) for p in problems]
    if Path(source).is_file() and len(items) == 1:
        return {items[0].name: theirs[0].path}, problems
    files = {item.name: item.path for item in theirs}
    told = {p.image for p in problems}
    problems += [Problem(item.name, method, f"{item.name} has no reconstruction in {source}.")
                 for item in items if item.name not in files and item.name not in told]
    known = {item.name for item in items}
    problems += [Problem(name, method, f"{path} has no original of that name.")
                 for name, path in files.items() if name not in known]
    return {name: path for name, path in files.items() if name in known}, problems
