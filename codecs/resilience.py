"""Tokens in chunks: coding each alone, decoding those that arrived, and filling what is lost.

    indices -> parts of a division -> packed, or static tables and seeded ANS -> ChunkedContainer -> bytes

Which tokens stand in which chunk, and the bytes around them, are in `codecs/chunks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtc.codecs import entropy
from vtc.codecs.chunks import ChunkedContainer, Division, steepness
from vtc.codecs.container import Coder
from vtc.codecs.entropy import Indices, StaticTables
from vtc.errors import BitstreamError, ConfigError
from vtc.tokenizers.base import TokenLayout


@dataclass(frozen=True)
class Part:
    """The tokens of one chunk: positions (n,), ascending, and groups."""

    positions: NDArray[np.int64]
    groups: slice


def parts_of(division: Division, scales: tuple[tuple[int, int], ...], groups: int) -> list[Part]:
    """What stands in each chunk; small grids leave some chunks of an interleaved stream empty."""
    counts = [rows * columns for rows, columns in scales]
    if division.by == "groups":
        return [Part(np.arange(sum(counts)), slice(g, g + 1)) for g in range(groups)]
    chunk = np.repeat(np.arange(len(scales)), counts) if division.by else interleave(scales, division.count)
    order = np.argsort(chunk, kind="stable")
    ends = np.cumsum(np.bincount(chunk, minlength=division.chunks(scales, groups)))
    return [Part(positions, slice(0, groups)) for positions in np.split(order, ends[:-1])]


def interleave(scales: tuple[tuple[int, int], ...], chunks: int) -> NDArray[np.int64]:
    """The chunk of each position (L,).

    >>> interleave(((2, 8),), 8).reshape(2, 8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 0, 1, 2]]
    """
    a = steepness(chunks)
    return np.concatenate([((a * np.arange(rows)[:, None] + np.arange(columns) + s) % chunks).reshape(-1)
                           for s, (rows, columns) in enumerate(scales)])


def encode(indices: Indices, layout: TokenLayout, tables: StaticTables | None, division: Division,
           ) -> tuple[Coder, tuple[bytes, ...]]:
    """Indices (L, G) to the payload of each chunk, all by the coder that is shorter in sum.

    Raises as `entropy.encode`, and ConfigError where there are no scales or groups to divide by.
    """
    entropy.check_indices(indices, layout)
    if division.by and division.chunks(layout.scales, layout.groups) < 2:
        raise ConfigError(f"These tokens cannot be divided by {division.by}: there is only one.")
    packed, coded = [], []
    for part in parts_of(division, layout.scales, layout.groups):
        if not part.positions.size:
            packed.append(b"")
            coded.append(b"")
            continue
        own, values = _layout(part, layout), indices[part.positions, part.groups]
        packed.append(entropy.pack(values, own))
        if tables is not None:
            coded.append(entropy.encode_ans(values, own, _tables(part, tables, layout), seeded=True))
    if tables is not None and sum(map(len, coded)) < sum(map(len, packed)):
        return Coder.SEEDED_ANS, tuple(coded)
    return Coder.PACKED, tuple(packed)


def decode(parsed: ChunkedContainer, layout: TokenLayout, tables: StaticTables | None,
           ) -> tuple[Indices, NDArray[np.bool_]]:
    """(indices (L, G), which of them are lost (L, G)); those are 0. A chunk whose payload is no code is lost too.

    Raises ModelError where the chunks need tables that the model lacks.
    """
    indices = np.zeros((layout.length, layout.groups), dtype=np.int64)
    lost = np.ones(indices.shape, dtype=bool)
    parts = parts_of(parsed.division, layout.scales, layout.groups)
    for part, payload in zip(parts, parsed.chunks, strict=True):
        if payload is None or not part.positions.size:
            continue
        own_tables = None if tables is None else _tables(part, tables, layout)
        try:
            values = entropy.decode(parsed.coder, payload, _layout(part, layout), own_tables)
        except BitstreamError:
            continue
        indices[part.positions, part.groups] = values
        lost[part.positions, part.groups] = False
    return indices, lost


def _layout(part: Part, layout: TokenLayout) -> TokenLayout:
    """The chunk as a layout of its own: what it has of each scale in a row, without scales of which it has nothing."""
    return TokenLayout(tuple((1, n) for n in _counts(part, layout) if n), layout.vocab[part.groups])


def _tables(part: Part, tables: StaticTables, layout: TokenLayout) -> StaticTables:
    """The rows of `tables` for the chunk's scales and groups."""
    rows, scales, groups = tables.frequencies, len(layout.scales), layout.groups
    if len(rows) == groups:
        return StaticTables(rows[part.groups])
    if len(rows) == scales * groups:
        chosen = rows.reshape(scales, groups, -1)[np.array(_counts(part, layout)) > 0, part.groups]
        return StaticTables(chosen.reshape(-1, rows.shape[1]))
    return tables  # one for all; or it does not fit, which coding says


def _counts(part: Part, layout: TokenLayout) -> list[int]:
    """Positions that the chunk has of each scale."""
    ends = np.cumsum([rows * columns for rows, columns in layout.scales])
    return np.diff(np.searchsorted(part.positions, ends), prepend=0).tolist()


# ---- filling what is lost -------------------------------------------------------------------------------------------

def fill_from_neighbours(indices: Indices, lost: NDArray[np.bool_], layout: TokenLayout,
                         tables: StaticTables | None = None) -> Indices:
    """A copy of indices (L, G) in which what is lost (L, G) takes the index of a received position.

    It is the nearest in its row or column (the row first where both are as near), else the nearest of a nearest. A grid
    that is lost whole takes the likeliest words.
    """
    out = indices.copy()
    likeliest = np.zeros(out.shape, dtype=np.int64)
    for where, group, table in [] if tables is None else tables.runs(layout):
        likeliest[where, group] = table.argmax()
    start = 0
    for rows, columns in layout.scales:
        part = slice(start, start + rows * columns)
        start = part.stop
        for g in range(layout.groups):
            if g == 0 or (lost[part, g] != lost[part, g - 1]).any():  # mostly a position is lost with all its groups
                source = _nearest(lost[part, g].reshape(rows, columns)).reshape(-1)
            out[part, g] = np.where(source < 0, likeliest[part, g], out[part, g][source])
    return out


def _nearest(lost: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(rows, columns): the flat position that each one takes its indices from; -1 everywhere where all are lost."""
    flat = np.arange(lost.size).reshape(lost.shape)
    source = np.where(lost, -1, flat)
    if lost.all():
        return source
    while (source < 0).any():  # twice at most: after one pass each row has something
        (across, beside), (down, below) = (_along(source, axis) for axis in (1, 0))
        source = np.where(across <= down, beside, below)
    return source


def _along(source: NDArray[np.int64], axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each cell the distance to the nearest one along the axis whose source is known (the earlier of two), and
    that source; a distance beyond the axis and -1 where there is none.
    """
    source = np.moveaxis(source, axis, -1)
    size = source.shape[-1]
    here = np.arange(size)
    known = source >= 0
    before = np.maximum.accumulate(np.where(known, here, -2 * size), axis=-1)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(known, here, 4 * size), -1), axis=-1), -1)
    chosen = np.where(here - before <= after - here, before, after)
    there = (chosen >= 0) & (chosen < size)
    found = np.where(there, np.take_along_axis(source, np.clip(chosen, 0, size - 1), -1), -1)
    distance = np.where(there, np.abs(chosen - here), 1 << 40)
    return np.moveaxis(distance, -1, axis), np.moveaxis(found, -1, axis)
