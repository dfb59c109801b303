"""vtc-encode: pictures to .vtc files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from vtc.cli.common import Made, add_arguments, guarded, load_model, not_called, run, share_cpus
from vtc.cli.plan import Task, UsageError, plan
from vtc.models import DEFAULT_MODEL

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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)

    def command() -> int:
        try:
            tasks = plan(args.inputs, args.output, PICTURE_SUFFIXES, ".vtc")
        except UsageError as error:
            parser.error(str(error))
        jobs = min(args.jobs, len(tasks))
        work = not_called if all(task.problem for task in tasks) else _encoder(args.model, args.device, jobs)
        return run(parser.prog, tasks, work, jobs, args.json, args.quiet)

    return guarded(parser, command)


def _encoder(model: str, device: str, jobs: int) -> Callable[[Task], Made]:
    from vtc.codecs.token_codec import TokenCodec
    from vtc.files import read_file
    from vtc.images import load_image

    share_cpus(jobs)
    codec = TokenCodec(load_model(model, device))

    def work(task: Task) -> Made:
        name = "stdin" if task.source == "-" else task.source
        image = load_image(read_file(task.source), name=name)
        (stream,) = codec.compress(image.tensor()[None])
        return Made(stream, image.width, image.height, len(stream), image.notes)

    return work
