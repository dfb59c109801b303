"""Measured images on disk, so that a run that was stopped goes on and a further metric costs only itself.

A record is what one method and one image left behind, never pixels: a small JSON file whose name is the SHA-256 of all
that its numbers depend on (the files' bytes, the method's settings and weights, the protocol, the packages' versions).
Several processes may share a folder: files are written whole and renamed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtc.errors import FileError
from vtc.files import reason, write_file


@dataclass
class Record:
    """One image through one method.

    facts: what the method said about it (bytes, settings, seconds) and the size.
    columns, parts: what each measure left, by the measure's key. skipped: why a measure does not apply to the image.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        """Whether the measure of that key was tried."""
        return key in self.columns or key in self.skipped

    def to_json(self) -> str:
        """One line; numbers keep every bit."""
        parts = {key: {name: _packed(array) for name, array in arrays.items()} for key, arrays in self.parts.items()}
        return json.dumps({"facts": self.facts, "columns": self.columns, "parts": parts, "skipped": self.skipped})

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError, KeyError or TypeError where that is not a record."""
        data = json.loads(text)
        parts = {key: {name: _unpacked(text) for name, text in arrays.items()}
                 for key, arrays in data["parts"].items()}
        return cls(data["facts"], data["columns"], parts, data["skipped"])


def _packed(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return base64.b85encode(stream.getvalue()).decode()


def _unpacked(text: str) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(base64.b85decode(text)), allow_pickle=False)
    return array


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class RecordCache:
    """Records below a folder, by key; None keeps nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, key: str) -> Record | None:
        """The record, or None where there is none or its file is damaged."""
        if self.folder is None:
            return None
        try:
            return Record.from_json(self._path(key).read_text())
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, record: Record) -> None:
        """Raises FileError where the folder cannot be written."""
        if self.folder is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"The cache folder {path.parent} cannot be made: {reason(error)}; "
                            "choose another with --cache.") from error
        write_file(path, record.to_json().encode())

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key[2:]}.json"
