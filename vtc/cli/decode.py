"""vtc-decode: .vtc files to pictures, or to what their headers say."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vtc.cli.common import (
    DONE,
    FAILED,
    Part,
    add_arguments,
    emit,
    guarded,
    jobs_for,
    load_codec,
    not_called,
    run,
    say,
    sentence,
    share_cpus,
    todo,
)
from vtc.cli.items import Made
from vtc.cli.plan import Task, UsageError, apart_from_stages, plan
from vtc.cli.shards import Recipe, coded_members
from vtc.errors import FileError, ModelError, VtcError
from vtc.models import FINGERPRINTS, RETIRED_IDS, in_streams, name_of, size_of

if TYPE_CHECKING:
    from vtc.codecs.chunks import ChunkedContainer
    from vtc.codecs.container import Container
    from vtc.codecs.token_codec import Received, TokenCodec

#: --format -> (Pillow's name, suffix of files that get their name from the input)
FORMATS = {"png": ("PNG", ".png"), "jpeg": ("JPEG", ".jpg"), "webp": ("WEBP", ".webp")}
#: suffix of -o -> --format
FORMAT_OF = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def make_parser() -> argparse.ArgumentParser:
    """The arguments of vtc-decode."""
    parser = argparse.ArgumentParser(
        prog="vtc-decode", description="Turn .vtc files back into pictures.",
        epilog="Exit codes: 0 done, 1 stopped, or a file failed (the others are done), 2 usage.")
    add_arguments(parser, output_help="file ending in .png, .jpg or .webp, '-' (stdout), or a folder: one that exists, "
                                      "ends in a slash, or is needed for several inputs; "
                                      "default: next to the input, ending in .decoded.png (or .jpg, .webp)",
                  model_help="bundled model or the folder of one; default: the bundled one that the stream names")
    parser.add_argument("--format", choices=tuple(FORMATS),
                        help="format of the pictures; default: the suffix of -o, else png")
    parser.add_argument("--strict", action="store_true",
                        help="refuse a stream of which something is lost; otherwise lost tokens are guessed")
    parser.add_argument("--progressive", action="store_true",
                        help="also write what the first scales or levels of the tokens show, as NAME.stage1.png, ...")
    parser.add_argument("--info", action="store_true",
                        help="say on stdout what the headers hold and decode nothing; needs no model")
    return parser


def main(argv: Sequence[str] | None = None, part: Part | None = None) -> int:
    """The command, or the share of it that falls to one process of several; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)

    def command() -> int:
        mine = part or Part()
        args.device = mine.device(args.device)
        try:
            if args.info and args.output:
                raise UsageError("--info writes to stdout and takes no -o")
            if args.progressive and args.output == "-":
                raise UsageError("--progressive writes several pictures, which cannot all go to stdout")
            chosen = args.format or "png"
            suffix = FORMATS[chosen][1] if args.output else ".decoded" + FORMATS[chosen][1]  # a.png may be the original
            tasks = plan(args.inputs, args.output, (".vtc",), suffix, ".decoded.tar")
            if args.progressive:
                tasks = apart_from_stages(tasks)
            if args.info:
                return _info(tasks[mine.rank :: mine.count], args.json)
            if len(tasks) == 1 and tasks[0].target == args.output != "-" and not tasks[0].is_shard:
                chosen = format_of(args.output, args.format)
        except UsageError as error:
            parser.error(str(error))
        format, suffix = FORMATS[chosen]
        tasks, done = todo(tasks, mine, args.resume)
        jobs = jobs_for(tasks, args.jobs)
        work = not_called if all(task.problem for task in tasks) else _decoder(args, format, jobs)
        settings = " ".join(map(str, (args.model, format, args.strict, args.progressive)))
        recipe = Recipe((".vtc",), suffix, settings, args.resume)
        code = run(mine.name(parser.prog), tasks, work, jobs, args, recipe, mine, done)
        mine.wait()
        return code

    return guarded(parser, command)


def format_of(path: str, wanted: str | None) -> str:
    """--format by the suffix of -o. UsageError where they contradict each other, or nothing says it."""
    suffix = os.path.splitext(path)[1].lower()
    by_suffix = FORMAT_OF.get(suffix)
    if wanted is None and by_suffix is None:
        raise UsageError(f"-o {path} ends in none of {', '.join(FORMAT_OF)}; give another name or --format")
    if wanted and by_suffix and wanted != by_suffix:
        raise UsageError(f"-o {path} and --format {wanted} contradict each other")
    return wanted or by_suffix or "png"


def _decoder(args: argparse.Namespace, format: str, jobs: int) -> Callable[[Task], Made]:
    from vtc.codecs import chunks
    from vtc.codecs.container import Coder
    from vtc.images import MAX_PIXELS, Canvas, encode_image, to_uint8

    model: str | None = args.model
    share_cpus(jobs)
    codecs: dict[tuple[str, int | None], TokenCodec] = {}
    loading = threading.Lock()

    def codec_for(name: str, size: int | None = None) -> TokenCodec:
        with loading:
            if (name, size) not in codecs:
                codecs[name, size] = load_codec(name, args.device, size, MAX_PIXELS)
            return codecs[name, size]

    if model is not None:
        codec_for(model)  # a model that cannot be loaded is one failure, not one for each file

    def work(task: Task) -> Made:
        stream = task.read()
        header = chunks.read(stream, MAX_PIXELS)
        if header.coder == Coder.LATENTS:
            raise ModelError("The stream holds continuous latents, not tokens: decode it in Python, with the "
                             "vtc.LatentCodec that made it.")
        start = time.perf_counter()
        if model:
            codec = codec_for(model, size_of(model, header.fingerprint, header.coder == Coder.PRIOR))
        else:
            codec = codec_for(_bundled_model(header))
        loading = time.perf_counter() - start
        received = codec.receive(stream)
        notes = [loss] if (loss := _loss(received)) else []
        coarser: list[bytes] = []
        if args.progressive:
            *stages, image = codec.draw_stages(received, args.strict)
            coarser = [encode_image(stage, format) for stage in stages]
            pixels = to_uint8(image)
        else:
            canvas = Canvas(header.height, header.width)  # tiles at once as bytes: 100 megapixels are 1.2 GB of floats
            codec.draw_tiles(received, canvas.put, strict=args.strict)
            pixels = canvas.pixels
        return Made(encode_image(pixels, format), header.width, header.height, len(stream), notes, loading,
                    stages=coarser)

    return work


def _loss(received: Received) -> str:
    """What of a stream is lost, in words; '' where nothing is."""
    if not received.lost.any():
        return ""
    if received.stages is None:
        return f"{received.share_lost:.1%} of the tokens were lost and are guessed"
    return f"{received.share_lost:.1%} of the tokens were lost: it is shown up to stage {received.stages}"


def _bundled_model(header: Container | ChunkedContainer) -> str:
    from vtc.codecs.container import Coder

    name = name_of(header.model_id)
    if header.model_id == 0:  # the model was given as a folder, which may hold a copy of a bundled one
        learned = header.coder == Coder.PRIOR
        name = next((name for name, known in FINGERPRINTS.items()
                     if in_streams(known, name, learned) == header.fingerprint), None)
    if name is None or name in RETIRED_IDS:
        which = name or (f"model number {header.model_id}" if header.model_id else "a model of its own")
        raise ModelError(f"The stream was made with {which} (fingerprint {header.fingerprint.hex()}), which this "
                         "version of vtc does not ship; give the model's folder by --model.")
    return name


def _info(tasks: Sequence[Task], as_json: bool) -> int:
    """Print the facts of each header."""
    from vtc.codecs import chunks

    code = DONE
    for name, read in _streams(tasks):
        try:
            stream = read()
            facts = _facts(name, stream, chunks.read(stream))
        except Exception as error:
            code = FAILED
            facts = {"input": name, "error": sentence(error, name)}
            say(facts["error"])
        if as_json:
            emit(json.dumps(facts), sys.stdout)
        elif "error" not in facts:
            emit("\n".join(f"{key + ':':<15} {_text(value)}" for key, value in facts.items()), sys.stdout)
    return code


def _streams(tasks: Sequence[Task]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, how to read it) of each stream, those in shards too."""
    def failing(error: VtcError) -> bytes:
        raise error

    for task in tasks:
        if task.problem and not task.target:
            yield task.source, partial(failing, VtcError(task.problem))
        elif not task.is_shard:
            yield task.source, task.read
        else:
            try:
                yield from coded_members(task.source, (".vtc",))
            except FileError as error:
                yield task.source, partial(failing, error)


def _facts(source: str, stream: bytes, header: Container | ChunkedContainer) -> dict[str, Any]:
    from vtc.codecs import chunks, container

    facts: dict[str, Any] = {
        "input": source, "version": container.VERSION, "width": header.width, "height": header.height,
        "bytes": len(stream), "bpp": 8 * len(stream) / (header.width * header.height),
        "scales": [list(scale) for scale in header.scales], "groups": header.groups,
        "coder": header.coder.name.lower(), "payload_bytes": 0, "model_id": header.model_id,
        "model": name_of(header.model_id), "fingerprint": header.fingerprint.hex()}
    if isinstance(header, chunks.ChunkedContainer):
        facts |= {"version": chunks.VERSION, "payload_bytes": sum(map(len, filter(None, header.chunks))),
                  "chunks": len(header.chunks), "chunks_of": header.division.by or "interleaved tokens",
                  "chunks_lost": list(header.lost), "headers_intact": header.headers}
    else:
        facts["payload_bytes"] = len(header.payload)
    return facts


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join("x".join(map(str, part)) if isinstance(part, list) else str(part) for part in value) or "none"
    if isinstance(value, float):
        return f"{value:.4f}"
    return "not bundled" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main(part=Part.of_launch()))
