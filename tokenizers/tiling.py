"""Encoding and decoding in tiles, so that memory is bounded by the tile and not by the picture.

A local network's output at a place depends on its input within the halo around that place. A tile that brings its halo
along, and is cut off where the picture really ends (so that padding happens where it happens for the whole), gives the
same values as the whole up to the order of additions. A network that is not local runs on the whole picture, and a
RuntimeWarning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens

#: side in pixels of a tile without its halo: activations of some 400 MB for the bundled model
DEFAULT_TILE = 1024

#: gives the pixels (B, 3, h, w) in [0, 1] of some rows and columns of the images
Read = Callable[[slice, slice], Tensor]
#: takes them
Write = Callable[[slice, slice, Tensor], None]


def encode_tiled(tokenizer: Tokenizer, images: Tensor, tile: int = DEFAULT_TILE) -> Tokens:
    """`tokenizer.encode(images)`, tile by tile where the tokenizer is local and the images are larger than a tile.

    tile: side in pixels, without the halo that is read around it; rounded down to whole tokens.
    """
    height, width = images.shape[-2:]
    return encode_tiles(tokenizer, lambda rows, columns: images[..., rows, columns], height, width, tile)


def encode_tiles(tokenizer: Tokenizer, read: Read, height: int, width: int, tile: int = DEFAULT_TILE) -> Tokens:
    """As `encode_tiled`, of images that are never in memory as a whole: `read` gives one tile with its halo at a time.

    Of a tokenizer that is not local, and of images no larger than a tile, it is asked for everything at once.
    """
    _check(tokenizer, tile)
    layout = tokenizer.layout(height, width)
    if max(height, width) <= tile + 2 * tokenizer.halo or not _can_tile(tokenizer, layout):
        return tokenizer.encode(read(slice(0, height), slice(0, width)))
    f, halo = tokenizer.downsample, _in_tokens(tokenizer.halo, tokenizer.downsample)
    ((rows, columns),) = layout.scales
    strips = []
    for inner_rows, outer_rows in _spans(rows, tile // f, halo):
        strip = []
        for inner_columns, outer_columns in _spans(columns, tile // f, halo):
            images = read(_scaled(outer_rows, f, height), _scaled(outer_columns, f, width))
            (grid,) = tokenizer.encode(images).grids()
            strip.append(grid[:, _within(inner_rows, outer_rows), _within(inner_columns, outer_columns)])
        strips.append(torch.cat(strip, 2))
    return Tokens(torch.cat(strips, 1).flatten(1, 2), layout, height, width)


def decode_tiled(tokenizer: Tokenizer, tokens: Tokens, generator: torch.Generator | None = None,
                 tile: int = DEFAULT_TILE) -> Tensor:
    """`tokenizer.decode(tokens)`, tile by tile where the tokenizer is local and the images are larger than a tile.

    tile: as of `encode_tiled`.
    """
    images: list[Tensor] = []

    def write(rows: slice, columns: slice, pixels: Tensor) -> None:
        if (rows.stop - rows.start, columns.stop - columns.start) == (tokens.height, tokens.width):
            images.append(pixels)
            return
        if not images:
            images.append(pixels.new_empty(len(tokens), 3, tokens.height, tokens.width))
        images[0][..., rows, columns] = pixels

    decode_tiles(tokenizer, tokens, write, generator, tile)
    return images[0]


def decode_tiles(tokenizer: Tokenizer, tokens: Tokens, write: Write, generator: torch.Generator | None = None,
                 tile: int = DEFAULT_TILE) -> None:
    """As `decode_tiled`, of images that are never in memory as a whole: `write` takes one tile at a time."""
    _check(tokenizer, tile)
    height, width = tokens.height, tokens.width
    if max(height, width) <= tile + 2 * tokenizer.halo or not _can_tile(tokenizer, tokens.layout):
        write(slice(0, height), slice(0, width), tokenizer.decode(tokens, generator=generator))
        return
    f, halo = tokenizer.downsample, _in_tokens(tokenizer.halo, tokenizer.downsample)
    ((rows, columns),) = tokens.layout.scales
    (grid,) = tokens.grids()
    for inner_rows, outer_rows in _spans(rows, tile // f, halo):
        for inner_columns, outer_columns in _spans(columns, tile // f, halo):
            part = grid[:, outer_rows, outer_columns]
            y, x = _scaled(inner_rows, f, height), _scaled(inner_columns, f, width)
            outer_y, outer_x = _scaled(outer_rows, f, height), _scaled(outer_columns, f, width)
            layout = TokenLayout(((part.shape[1], part.shape[2]),), tokens.layout.vocab)
            pixels = tokenizer.decode(Tokens(part.flatten(1, 2), layout, outer_y.stop - outer_y.start,
                                             outer_x.stop - outer_x.start), generator=generator)
            write(y, x, pixels[..., _within(y, outer_y), _within(x, outer_x)])


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
                  "image at once, and memory grows with the image.", RuntimeWarning, stacklevel=4)
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


def _scaled(span: slice, factor: int, end: int) -> slice:
    """Of tokens to pixels, of which there are `end`."""
    return slice(span.start * factor, min(span.stop * factor, end))
