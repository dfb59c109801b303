"""Encoding and decoding in tiles, so that memory is bounded by the tile and not by the picture.

A local network's output at a place depends on its input within the halo around that place. A tile that brings its halo
along, and is cut off where the picture really ends (so that padding happens where it happens for the whole), gives the
same values as the whole up to the order of additions. A network that is not local runs on the whole picture, and a
RuntimeWarning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens

#: side in pixels of a tile without its halo: activations of some 400 MB for the bundled model
DEFAULT_TILE = 1024


def encode_tiled(tokenizer: Tokenizer, images: Tensor, tile: int = DEFAULT_TILE) -> Tokens:
    """`tokenizer.encode(images)`, tile by tile where the tokenizer is local and the images are larger than a tile.

    tile: side in pixels, without the halo that is read around it; rounded down to whole tokens.
    """
    _check(tokenizer, tile)
    height, width = images.shape[-2:]
    layout = tokenizer.layout(height, width)
    if max(height, width) <= tile + 2 * tokenizer.halo or not _can_tile(tokenizer, layout):
        return tokenizer.encode(images)
    f, halo = tokenizer.downsample, _in_tokens(tokenizer.halo, tokenizer.downsample)
    ((rows, columns),) = layout.scales
    indices = torch.empty(len(images), rows, columns, layout.groups, dtype=torch.int64, device=images.device)
    for inner_rows, outer_rows in _spans(rows, tile // f, halo):
        for inner_columns, outer_columns in _spans(columns, tile // f, halo):
            (grid,) = tokenizer.encode(images[..., _scaled(outer_rows, f), _scaled(outer_columns, f)]).grids()
            indices[:, inner_rows, inner_columns] = grid[:, _within(inner_rows, outer_rows),
                                                         _within(inner_columns, outer_columns)]
    return Tokens(indices.flatten(1, 2), layout, height, width)


def decode_tiled(tokenizer: Tokenizer, tokens: Tokens, generator: torch.Generator | None = None,
                 tile: int = DEFAULT_TILE) -> Tensor:
    """`tokenizer.decode(tokens)`, tile by tile where the tokenizer is local and the images are larger than a tile.

    tile: as of `encode_tiled`.
    """
    _check(tokenizer, tile)
    height, width = tokens.height, tokens.width
    if max(height, width) <= tile + 2 * tokenizer.halo or not _can_tile(tokenizer, tokens.layout):
        return tokenizer.decode(tokens, generator=generator)
    f, halo = tokenizer.downsample, _in_tokens(tokenizer.halo, tokenizer.downsample)
    ((rows, columns),) = tokens.layout.scales
    (grid,) = tokens.grids()
    images = torch.empty(len(tokens), 3, height, width, device=grid.device)
    for inner_rows, outer_rows in _spans(rows, tile // f, halo):
        for inner_columns, outer_columns in _spans(columns, tile // f, halo):
            part = grid[:, outer_rows, outer_columns]
            size = (min(outer_rows.stop * f, height) - outer_rows.start * f,
                    min(outer_columns.stop * f, width) - outer_columns.start * f)
            layout = TokenLayout(((part.shape[1], part.shape[2]),), tokens.layout.vocab)
            pixels = tokenizer.decode(Tokens(part.flatten(1, 2), layout, *size), generator=generator)
            y, x = (slice(s.start * f, s.stop * f) for s in (inner_rows, inner_columns))
            images[..., y, x] = pixels[..., _within(y, _scaled(outer_rows, f)), _within(x, _scaled(outer_columns, f))]
    return images


def warn_of_tiles(network: nn.Module) -> None:
    """A RuntimeWarning to whoever called what calls this: tiles of this network do not add up to the whole."""
    warnings.warn(f"{type(network).__name__} is not local: group norm and attention see their tile only, so tiles "
                  "change its result; tiling_error says by how much.", RuntimeWarning, stacklevel=3)


def _check(tokenizer: Tokenizer, tile: int) -> None:
    if tile < tokenizer.downsample:
        raise ConfigError(f"A tile's side is at least the {tokenizer.downsample} pixels of one token, not {tile}.")


def _can_tile(tokenizer: Tokenizer, layout: TokenLayout) -> bool:
    if tokenizer.is_local and len(layout.scales) == 1:
        return True
    warnings.warn(f"{type(tokenizer).__name__} is not local, so tiles would change its result: it works on the whole "
                  "image at once, and memory grows with the image.", RuntimeWarning, stacklevel=3)
    return False


def _in_tokens(pixels: int, downsample: int) -> int:
    return -(-pixels // downsample)


def _spans(length: int, tile: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Cut 0..length into tiles; each as (without halo, with halo)."""
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        yield slice(start, stop), slice(max(0, start - halo), min(length, stop + halo))


def _within(inner: slice, outer: slice) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


def _scaled(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)
