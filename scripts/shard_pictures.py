"""Shrink photographs and put them into WebDataset shards of at most so many bytes, to travel to another machine.

    python scripts/shard_pictures.py --train_data_dir photos/ --output_dir shards/ --side 384 --shard_bytes 20000000
    python scripts/train_tokenizer.py --train_data_dir 'shards/*.tar' ...

Pictures are shuffled first, so that every shard, also a single one, is a fair sample of all. Those whose shorter side
is longer than --side are shrunk to it, and all are stored as WebP, N.webp, with their label, if any, in N.cls. The same
pictures and flags give the same bytes. Pictures that cannot be read are named and left out.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vtc.errors import ConfigError, FileError, ImageError
from vtc.files import write_file
from vtc.images import load_image
from vtc.script import run_script
from vtc.training.sources import Pictures, add_data_flags, pictures_of

#: of a member's header and padding, at most, and of a shard's end
OVERHEAD, END = 1024, 11264


def main(arguments: list[str] | None = None) -> int:
    """Parse, shrink, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse_args(arguments)
    return run_script(lambda: shard(args), "shard_pictures")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--output_dir", required=True, type=Path, help="takes 000.tar, 001.tar, ...")
    parser.add_argument("--side", type=int, default=384, help="longest shorter side, in pixels (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=80, help="of WebP, up to 100 (default: %(default)s)")
    parser.add_argument("--shard_bytes", type=int, default=20_000_000, help="of a shard at most (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="so many pictures, of the shuffled ones; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def shard(args: argparse.Namespace) -> None:
    """The whole job."""
    if args.side < 16 or not 1 <= args.quality <= 100 or args.shard_bytes < 2 * END or args.limit < 0:
        raise ConfigError("Shards take a --side of at least 16, a --quality from 1 to 100 and --shard_bytes of at "
                          f"least {2 * END}.")
    pictures = pictures_of(args)
    order = np.random.default_rng(args.seed).permutation(len(pictures))[: args.limit or None]
    count, members = 0, list[tuple[str, bytes]]()
    size = END
    for place, (label, data) in enumerate(shrunk(pictures, order, args)):
        added = [(f"{place:07d}.webp", data)] + ([(f"{place:07d}.cls", str(label).encode())] if label >= 0 else [])
        more = sum(len(part) + OVERHEAD for _, part in added)
        if members and size + more > args.shard_bytes:
            write(args.output_dir, count, members)
            count, members, size = count + 1, [], END
        members += added
        size += more
    if not members:
        raise ImageError("None of the pictures can be read.")
    write(args.output_dir, count, members)


def shrunk(pictures: Pictures, order: np.ndarray, args: argparse.Namespace) -> Iterator[tuple[int, bytes]]:
    """(label or a negative number, WebP) of each picture that can be read."""
    for number in tqdm(order, disable=args.quiet, unit="picture", file=sys.stderr):
        key, label, file = pictures.read(int(number))
        try:
            image = Image.fromarray(load_image(file, name=key).pixels)
        except (ImageError, FileError) as error:
            print(f"shard_pictures: left out: {error}", file=sys.stderr)
            continue
        factor = args.side / min(image.size)
        if factor < 1:
            width, height = (max(args.side, round(side * factor)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=args.quality, method=4)
        yield label, stream.getvalue()


def write(folder: Path, number: int, members: list[tuple[str, bytes]]) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The folder {folder} cannot be made: {error.strerror}.") from error
    write_file(folder / f"{number:03d}.tar", stream.getvalue())


if __name__ == "__main__":
    sys.exit(main())
