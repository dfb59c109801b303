"""vtc-encode: pictures to .vtc files."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vtc.cli.common import Part, add_arguments, guarded, jobs_for, load_codec, not_called, run, share_cpus, todo
from vtc.cli.items import Made
from vtc.cli.plan import Task, UsageError, plan
from vtc.cli.shards import Recipe
from vtc.models import DEFAULT_MODEL, family_of

if TYPE_CHECKING:
    from vtc.codecs.token_codec import TokenCodec

#: what a folder is searched for; a file that is named may be anything that Pillow reads
PICTURE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tga",
                    ".tif", ".tiff", ".webp")


def make_parser() -> argparse.ArgumentParser:
    """The arguments of vtc-encode."""
    parser = argparse.ArgumentParser(
        prog="vtc-encode", description="Compress pictures to discrete tokens: a photograph to some two kilobytes.",
        epilog="Exit codes: 0 done, 1 stopped, or a file failed (the others are done), 2 usage.")
    add_arguments(parser, output_help="file, '-' (stdout), or a folder: one that exists, ends in a slash, or is needed "
                                      "for several inputs; default: next to the input, ending in .vtc",
                  model_help=f"bundled model or the folder of one; default {DEFAULT_MODEL}")
    parser.set_defaults(model=DEFAULT_MODEL)
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("-q", "--quality", type=_whole, metavar="N",
                      help="1 (smallest files) to 11 (the default); each step is one of the model's family")
    rate.add_argument("--bpp", type=_rate, metavar="X",
                      help="the highest quality whose whole file has at most X bits per pixel")
    rate.add_argument("--bytes", type=_whole, metavar="N",
                      help="the highest quality whose whole file has at most N bytes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--resilience", type=_chunks, default=0, metavar="N",
                      help="interleave the tokens over N chunks that are decoded alone, so that damage costs only what "
                           "it hits; without the learned prior, so a file is about half as large again")
    form.add_argument("--progressive", action="store_true",
                      help="order the tokens so that a cut file is a coarser picture; for models of several scales")
    return parser


def _chunks(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of chunks from 1 to 4096")
    return int(text)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _rate(text: str) -> float:
    if not re.fullmatch(r"[0-9]{0,4}\.?[0-9]{0,40}", text) or not re.search(r"[1-9]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of bits per pixel")
    return float(text)


def main(argv: Sequence[str] | None = None, part: Part | None = None) -> int:
    """The command, or the share of it that falls to one process of several; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)

    def command() -> int:
        mine = part or Part()
        args.device = mine.device(args.device)
        try:
            tasks = plan(args.inputs, args.output, PICTURE_SUFFIXES, ".vtc", ".vtc.tar")
        except UsageError as error:
            parser.error(str(error))
        tasks, done = todo(tasks, mine, args.resume)
        jobs = jobs_for(tasks, args.jobs)
        work, settings = (not_called, "") if all(task.problem for task in tasks) else _encoder(args, jobs)
        recipe = Recipe(PICTURE_SUFFIXES, ".vtc", settings, args.resume)
        code = run(mine.name(parser.prog), tasks, work, jobs, args, recipe, mine, done)
        mine.wait()
        return code

    return guarded(parser, command)


def _encoder(args: argparse.Namespace, jobs: int) -> tuple[Callable[[Task], Made], str]:
    """What encodes a task, and all that its bytes depend on."""
    from vtc.codecs.rates import RateControl
    from vtc.images import load_image

    share_cpus(jobs)
    family = family_of(args.model)
    sizes = (*family.sizes, None) if family else (None,)  # by quality; the last is the model itself
    loaded: dict[int, TokenCodec] = {}
    loading, waited = threading.Lock(), threading.local()

    def codec_of(quality: int) -> TokenCodec:
        start = time.perf_counter()
        with loading:
            if quality not in loaded:
                loaded[quality] = load_codec(args.model, args.device, sizes[quality - 1])
        waited.seconds = getattr(waited, "seconds", 0.0) + time.perf_counter() - start
        return loaded[quality]

    rates = RateControl(codec_of, len(sizes), args.resilience, args.progressive)
    # A model that cannot be loaded is one failure, not one for each file.
    codec = rates.codec(args.quality or rates.qualities)

    def work(task: Task) -> Made:
        name = "stdin" if task.source == "-" else task.source
        image = load_image(task.read(), name=name)
        waited.seconds = 0.0
        if args.bytes is not None:
            stream, quality = rates.compress_within(image, args.bytes)
        elif args.bpp is not None:
            stream, quality = rates.compress_at(image, args.bpp)
        else:
            quality = args.quality or rates.qualities
            stream = rates.compress(image, quality)
        return Made(stream, image.width, image.height, len(stream), image.notes, waited.seconds,
                    quality if family else None)

    settings = (codec.fingerprint.hex(), codec.prior.fingerprint.hex() if codec.prior else "", args.model, args.quality,
                args.bpp, args.bytes, args.resilience, args.progressive)
    return work, " ".join(map(str, settings))


if __name__ == "__main__":
    sys.exit(main(part=Part.of_launch()))
