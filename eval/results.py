"""What the suite found: plain data, as JSON, CSV and tables, and a mark on what was made differently.

A mean is of no use without its circumstances, so each method's results carry the images, the protocol, the settings of
each metric and the versions. `differences` says in words in what two of them differ; tables mark such rows.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtc.errors import ConfigError, FileError
from vtc.eval.bd_rate import bd_rate
from vtc.eval.names import quantity, shown
from vtc.files import read_file

#: of the JSON file
FORMAT = "vtc-eval 1"
#: packages whose version may move a score or a byte; others are recorded and not compared
COMPARED_PACKAGES = ("torch", "pillow", "pillow-jxl-plugin", "numpy")


@dataclass
class Result:
    """One number over a set.

    value: None where it is infinite or could not be computed. n: images behind it. interval: of the bootstrap.
    aggregation: "mean_of_images", "pooled" or "set". note: what else must be said.
    """

    value: float | None
    n: int
    aggregation: str
    interval: tuple[float, float] | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """`confidence_interval` is null where there is none."""
        found: dict[str, Any] = {"value": self.value, "n": self.n, "aggregation": self.aggregation,
                                 "confidence_interval": None if self.interval is None else list(self.interval)}
        return found | ({"note": self.note} if self.note else {})


@dataclass
class MethodResult:
    """What one method reached.

    name: in tables. family: whose rate-distortion curve it is a point of. kind: "codec", "tokenizer", "files".
    description: settings and weights. conditions: what must be equal for two rows to be compared.
    results: by name. extra: more that a metric found (lists, for plots). images, columns: the numbers image by image;
    NaN is what was not measured. origin: the file that it was read from, "" for this run.
    """

    name: str
    family: str
    kind: str
    description: dict[str, Any]
    conditions: dict[str, Any]
    results: dict[str, Result]
    extra: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    origin: str = ""

    @property
    def rate(self) -> float | None:
        """Bits per pixel, where it has one."""
        found = self.results.get("bits_per_pixel")
        return found.value if found else None

    def value(self, name: str) -> float | None:
        """Of a result; None where it was not measured."""
        return self.results[name].value if name in self.results else None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what the conditions `b` differ from `a`, in words; [] where their numbers may stand side by side."""
    found = []
    if a.get("images_sha256") != b.get("images_sha256"):
        found.append(f"other pictures ({b.get('n')} of {b.get('reference_set')} against {a.get('n')} of "
                     f"{a.get('reference_set')})")
    ours, theirs = dict(a.get("protocol", {})), dict(b.get("protocol", {}))
    if ours != theirs:
        keys = [key for key in theirs if key not in ("note", "reference_set") and ours.get(key) != theirs[key]]
        found.append("another protocol: " + ", ".join(f"{key} {theirs[key]} against {ours.get(key)}" for key in keys))
    if a.get("size") != b.get("size"):
        found.append(f"size {b.get('size')} against {a.get('size')}")
    mine, others = a.get("metrics", {}), b.get("metrics", {})
    changed = [alias for alias in others if alias in mine and mine[alias] != others[alias]]
    if changed:
        found.append(f"other settings or weights of {', '.join(changed)}")
    ours, theirs = a.get("packages", {}), b.get("packages", {})
    found += [f"{name} {theirs.get(name)} against {ours.get(name)}" for name in COMPARED_PACKAGES
              if name in ours and name in theirs and ours[name] != theirs[name]]
    if a.get("device") != b.get("device"):
        found.append(f"device {b.get('device')} against {a.get('device')}")
    return found


def marks(methods: Sequence[MethodResult]) -> tuple[list[str], list[str]]:
    """For each method a mark ("", "a", "b", ...), and the footnotes that explain them, in that order.

    The first method is what the others are compared with.
    """
    notes: list[str] = []
    found = []
    for method in methods:
        reasons = differences(methods[0].conditions, method.conditions)
        if not reasons:
            found.append("")
            continue
        text = "Made differently from the first row: " + "; ".join(reasons) + "."
        if text not in notes:
            notes.append(text)
        found.append(letter(notes.index(text)))
    return found, notes


def letter(n: int) -> str:
    """0, 1, ... to a, b, ..., z, aa, ..."""
    return chr(ord("a") + n) if n < 26 else f"{letter(n // 26 - 1)}{letter(n % 26)}"


def result_names(methods: Iterable[MethodResult]) -> list[str]:
    """Every result that some method has, in the order of their appearance."""
    return list(dict.fromkeys(name for method in methods for name in method.results))


@dataclass(frozen=True)
class RateSaving:
    """Bjontegaard delta of one family against another; value None where it is not defined, and why."""

    metric: str
    family: str
    anchor: str
    value: float | None
    overlap_share: float | None = None
    note: str = ""


def rate_savings(methods: Sequence[MethodResult], anchor: str, names: Sequence[str]) -> list[RateSaving]:
    """BD-rate (pchip over the logarithm of the rate) of every family with two rates or more against `anchor`."""
    curves = families(methods)
    found = []
    for name in names:
        base = _points(curves.get(anchor, []), name)
        for family, members in curves.items():
            points = _points(members, name)
            if family == anchor or len(points) < 2 or len(base) < 2:
                continue
            try:
                delta = bd_rate([r for r, _ in base], [q for _, q in base], [r for r, _ in points],
                                [q for _, q in points])
            except ConfigError as error:
                found.append(RateSaving(name, family, anchor, None, note=str(error)))
            except ImportError:
                found.append(RateSaving(name, family, anchor, None, note="needs scipy: install the extra eval"))
            else:
                found.append(RateSaving(name, family, anchor, delta.value, delta.overlap_share))
    return found


def _points(members: Sequence[MethodResult], name: str) -> list[tuple[float, float]]:
    pairs = [(method.rate, method.value(name)) for method in members]
    # a model at a rate that all its files reach is the model itself: one point
    return sorted({(rate, value) for rate, value in pairs if rate is not None and value is not None})


def families(methods: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    """Methods that have a rate, by family, in order of the rate; those of a kind that were made alike only."""
    found: dict[str, list[MethodResult]] = {}
    for method in methods:
        if method.rate is not None:
            label = method.family if not differences(methods[0].conditions, method.conditions) else (
                f"{method.family} ({method.origin or 'other conditions'})")
            found.setdefault(label, []).append(method)
    return {family: sorted(members, key=lambda m: m.rate or 0) for family, members in found.items()}


# Files


def to_json(methods: Sequence[MethodResult], about: Mapping[str, Any]) -> str:
    """The results file; `about` holds provenance, seeds, problems. Infinity and NaN become null."""
    found = [{"name": m.name, "family": m.family, "kind": m.kind, "origin": m.origin, "description": m.description,
              "conditions": m.conditions, "results": {name: r.to_json() for name, r in m.results.items()},
              "extra": m.extra} for m in methods]
    return json.dumps(finite({"format": FORMAT, **about, "methods": found}), indent=1)


def from_json(path: str | Path) -> list[MethodResult]:
    """The methods of a results file. Raises FileError where it is none."""
    try:
        data = json.loads(read_file(path))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        return [MethodResult(m["name"], m["family"], m["kind"], m["description"], m["conditions"],
                             {name: Result(r["value"], r["n"], r["aggregation"],
                                           tuple(r["confidence_interval"]) if r["confidence_interval"] else None,
                                           r.get("note", "")) for name, r in m["results"].items()},
                             m["extra"], origin=m["origin"] or Path(path).name) for m in data["methods"]]
    except FileError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is not a results file of vtc-eval: {error}.") from error


def finite(value: Any) -> Any:
    """The same with null for infinities and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(methods: Sequence[MethodResult]) -> str:
    """A row an image and method of this run; empty is what was not measured."""
    columns = list(dict.fromkeys(name for method in methods for name in method.columns))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["image", "method", *columns])
    for method in methods:
        known = [method.columns.get(name) for name in columns]
        for row, image in enumerate(method.images):
            cells = ["" if column is None or math.isnan(column[row]) else _cell(float(column[row]))
                     for column in known]
            writer.writerow([image, method.name, *cells])
    return stream.getvalue()


def _cell(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def table(methods: Sequence[MethodResult], with_intervals: bool = False) -> str:
    """Markdown: a row a method, a column a result, then the marks' footnotes."""
    names = result_names(methods)
    signs, notes = marks(methods)
    heads = [f"{quantity(name).title} {quantity(name).unit}".strip() for name in names]
    lines = ["| method | n | " + " | ".join(heads) + " |", "|" + "-|" * (len(names) + 2)]
    for method, sign in zip(methods, signs, strict=True):
        cells = []
        for name in names:
            result = method.results.get(name)
            cells.append(cell_text(name, result, method.conditions["n"], with_intervals))
        label = method.name + (f" [{sign}]" if sign else "")
        lines.append(f"| {label} | {method.conditions['n']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(f"\n[{letter(i)}] {note}" for i, note in enumerate(notes))]) + "\n"


def cell_text(name: str, result: Result | None, n: int, with_interval: bool = False) -> str:
    """A result as a table shows it: its n where it is not the row's, and the interval if asked for."""
    if result is None:
        return "-"
    text = "inf" if result.value is None and "infinite" in result.note else shown(name, result.value)
    if with_interval and result.interval is not None:
        text += f" ({shown(name, result.interval[0])} to {shown(name, result.interval[1])})"
    return text if result.n == n else f"{text} (n={result.n})"
