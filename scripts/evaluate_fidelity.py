"""Can words still be read, and faces still be told apart? TokBench's measures, on its data or on one's own.

    python scripts/evaluate_fidelity.py codecs --model NAME_OR_PATH --text FOLDER --faces FOLDER --output DIR
    python scripts/evaluate_fidelity.py tokbench --data TokBench --reconstructions DIR --kind text --size 256 ...

`codecs` takes pictures through TokBench's resolution protocol and, at each size, through nothing ("resize"), the
tokenizer as a codec, and AVIF and JPEG near its rate; every file is counted whole. FOLDER of text holds
annotations.jsonl (a picture a line, its lines of text as quadrilaterals), FOLDER of faces holds pictures. DIR receives
results.json and results.md.

`tokbench` judges reconstructions that lie on disk as TokBench lays them out, all sets pooled, and prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vtc.codecs.classical import encode_within
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, FileError, VtcError
from vtc.eval.engines.base import AdaptedTextEngine, FaceEngine, TextEngine
from vtc.eval.engines.catalogue import (
    DEFAULT_FACE_ENGINE,
    DEFAULT_TEXT_ENGINE,
    FACE_ENGINES,
    TEXT_ENGINES,
    load_face_engine,
    load_text_engine,
)
from vtc.eval.face_fidelity import (
    FaceRecord,
    annotate_faces,
    compare_faces,
    face_fidelity,
    original_faces,
    summarise_faces,
)
from vtc.eval.provenance import provenance
from vtc.eval.text_fidelity import WordRecord, read_words, readable, summarise_words, text_fidelity
from vtc.eval.text_lines import words_of_line
from vtc.eval.tokbench import (
    SETS,
    Annotation,
    Films,
    Kind,
    Medium,
    annotation_file,
    film_file,
    find_picture,
    original_folder,
    read_annotations,
    reconstruction_folder,
)
from vtc.eval.tokbench_buckets import edges
from vtc.eval.tokbench_canvas import image_canvas
from vtc.files import read_file, write_file
from vtc.images import load_image, to_tensor, to_uint8
from vtc.models import load_codec
from vtc.script import run_script

#: how the truths of each kind of picture are written, and what brings an answer to that
CONVENTIONS: dict[str, tuple[Callable[[str], str], str]] = {
    "document": (str.upper, "capitals only, as the truths of the receipts"),
    "plate": (lambda answer: "".join(filter(str.isalnum, answer)), "letters and digits only, as the truths of plates"),
    "scene": (str, "none"),
}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
#: uint8 canvas to uint8 canvas and the bytes of its file
Codec = Callable[[np.ndarray], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class TextPicture:
    """A picture of a kind of CONVENTIONS, with its words."""

    path: Path
    kind: str
    annotation: Annotation


def main(arguments: list[str] | None = None) -> int:
    """Parse, judge, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse(arguments)
    return run_script(lambda: evaluate(args), "evaluate_fidelity")


def evaluate(args: argparse.Namespace) -> int:
    """0 where every picture was judged."""
    failures = evaluate_codecs(args) if args.command == "codecs" else evaluate_tokbench(args)
    for failure in failures:
        print(f"evaluate_fidelity: not judged: {failure}", file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    codecs = commands.add_parser("codecs", help="reconstruct pictures and judge them")
    codecs.add_argument("--model", required=True, help="bundled name, folder, or repository on the Hub")
    codecs.add_argument("--text", type=Path, help="folder with annotations.jsonl")
    codecs.add_argument("--faces", type=Path, help="folder of pictures, the largest face of each is judged")
    codecs.add_argument("--output", required=True, type=Path, help="folder for the results")
    codecs.add_argument("--text_engines", nargs="+", default=[DEFAULT_TEXT_ENGINE], choices=list(TEXT_ENGINES))
    codecs.add_argument("--face_engine", default=DEFAULT_FACE_ENGINE, choices=list(FACE_ENGINES))
    codecs.add_argument("--text_sizes", nargs="+", type=int, default=[256, 512, 1024])
    codecs.add_argument("--face_sizes", nargs="+", type=int, default=[256, 512, 1024])
    codecs.add_argument("--every_picture", type=int, default=1, help="take one picture of so many, of each kind")
    codecs.add_argument("--every_line", type=int, default=1, help="take one line of a document of so many")
    codecs.add_argument("--quiet", action="store_true", help="no progress bar")
    tokbench = commands.add_parser("tokbench", help="judge reconstructions on disk")
    tokbench.add_argument("--data", required=True, type=Path, help="the folder TokBench")
    tokbench.add_argument("--reconstructions", required=True, type=Path,
                          help="folder with text_data/<set>_<size> or face_data/<set>_<size>, as PNG")
    tokbench.add_argument("--kind", required=True, choices=["text", "face"])
    tokbench.add_argument("--medium", default="image", choices=["image", "video"])
    tokbench.add_argument("--size", required=True, type=int)
    tokbench.add_argument("--sets", nargs="+", help="only these sets; by default all that have annotations there")
    tokbench.add_argument("--engine", help=f"{', '.join([*TEXT_ENGINES, *FACE_ENGINES])}; TokBench's own are parseq "
                          "and antelopev2")
    tokbench.add_argument("--weights", type=Path, help="for parseq and antelopev2")
    tokbench.add_argument("--compat", action="store_true", help="reconstructions under the very names, JPEG and .mp4 "
                          "included, and words in TokBench's batches")
    return parser.parse_args(arguments)


# -- pictures of one's own, through codecs ---------------------------------------------------------------------------


def evaluate_codecs(args: argparse.Namespace) -> list[str]:
    """The whole job of `codecs`; returns what could not be judged."""
    codec = load_codec(args.model)
    report: dict = {"model": {"name": Path(args.model).name, "fingerprint": codec.fingerprint.hex()},
                    "settings": {"every_picture": args.every_picture, "every_line": args.every_line,
                                 "bpp": "bytes of the file over size x size pixels of the canvas, padding included",
                                 "peers": "AVIF at most our bytes and at most 4 times our bytes, JPEG at most 4 "
                                          "times, each at half size, or at a quarter where it does not fit"},
                    "provenance": provenance()}
    failures: list[str] = []
    if not args.text and not args.faces:
        raise ConfigError("There is nothing to judge: give --text, --faces, or both.")
    if args.text:
        text_engines = [load_text_engine(name) for name in args.text_engines]
        pictures = text_pictures(args.text, args.every_picture, args.every_line, failures)
        report["text"] = {"pictures": len(pictures), "originals": {}, "rows": [],
                          "conventions": {kind: note for kind, (_, note) in CONVENTIONS.items()}}
        for _ in judge_text(report["text"], pictures, text_engines, args.text_sizes, codec, args.quiet):
            write_report(args.output, report)
    if args.faces:
        engine = load_face_engine(args.face_engine)
        faces = face_pictures(args.faces, engine, args.every_picture, failures, args.quiet)
        report["faces"] = {"pictures": len(faces), "with_a_face": sum(bool(a.faces) for a in faces.values()),
                           "rows": []}
        for _ in judge_faces(report["faces"], faces, engine, args.face_sizes, codec, args.quiet):
            write_report(args.output, report)
    return failures


def write_report(folder: Path, report: dict) -> None:
    """After each size: what a run that is stopped has measured stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The output folder {folder} cannot be made: {error.strerror}.") from error
    write_file(folder / "results.json", json.dumps(report, indent=1).encode() + b"\n")
    write_file(folder / "results.md", markdown(report).encode())


def text_pictures(folder: Path, every_picture: int, every_line: int, failures: list[str]) -> list[TextPicture]:
    """Of annotations.jsonl, what has legible lines; lines of several words are cut at their blanks."""
    try:
        entries = [json.loads(line) for line in read_file(folder / "annotations.jsonl").splitlines()]
    except ValueError as error:
        raise FileError(f"{folder / 'annotations.jsonl'} is not JSON, a picture a line: {error}.") from error
    pictures: list[TextPicture] = []
    seen: dict[str, int] = defaultdict(int)
    for entry in entries:
        kind = entry["kind"]
        lines = [line for line in entry["words"] if line["text"] and not line["ignore"]]
        if not lines:
            continue
        seen[kind] += 1
        if (seen[kind] - 1) % every_picture:
            continue
        if kind == "document":
            lines = lines[::every_line]
        path = folder / entry["image"]
        words = []
        try:
            pixels = load_image(path).pixels
            for line in lines:
                corners = np.array(line["polygon"], dtype=float).reshape(-1, 2)
                (x1, y1), (x2, y2) = corners.min(0).tolist(), corners.max(0).tolist()
                words.extend(words_of_line(pixels, (x1, y1, x2, y2), line["text"]))
        except VtcError as error:
            failures.append(str(error).replace(str(path), path.name))
            continue
        pictures.append(TextPicture(path, kind, Annotation(path.name, pixels.shape[0], pixels.shape[1], tuple(words))))
    if not pictures:
        raise ConfigError(f"{folder} holds no picture with legible words.")
    return pictures


def judge_text(section: dict, pictures: list[TextPicture], engines: list[TextEngine], sizes: list[int],
               codec: TokenCodec, quiet: bool) -> Iterator[None]:
    """For each engine: what it reads in the originals, then every codec on the words that it read.

    Fills `section` and yields after each size.
    """
    adapted = {(e.info.name, kind): AdaptedTextEngine(e, *rule) for e in engines for kind, rule in CONVENTIONS.items()}
    originals: dict[str, dict[str, list[WordRecord]]] = {e.info.name: defaultdict(list) for e in engines}
    legible: dict[tuple[str, str], Annotation] = {}
    for picture in tqdm(pictures, "originals", disable=quiet, file=sys.stderr):
        pixels = load_image(picture.path).pixels
        for engine in engines:
            records = read_words(picture.annotation, pixels, adapted[engine.info.name, picture.kind])
            originals[engine.info.name][picture.kind].extend(records)
            for annotation in readable([picture.annotation], records):
                legible[engine.info.name, annotation.file_name] = annotation
    section["originals"] = {
        name: {kind: {"words": len(r), "t_acc": mean(x.t_acc for x in r), "t_ned": mean(x.t_ned for x in r)}
               for kind, r in kinds.items()} for name, kinds in originals.items()}
    for size in sizes:
        lowest = edges("text", size)[0]
        found: dict[tuple[str, str], list[WordRecord]] = defaultdict(list)
        num_bytes: dict[str, list[int]] = defaultdict(list)
        for picture in tqdm(pictures, f"text at {size}", disable=quiet, file=sys.stderr):
            wanted = {}
            for engine in engines:
                read = legible.get((engine.info.name, picture.annotation.file_name))
                words = tuple(w for w in read.words if w.ratio >= lowest) if read else ()
                if read and words:
                    wanted[engine.info.name] = replace(read, words=words)
            if not wanted:
                continue
            pixels = load_image(picture.path).pixels
            for method, reconstruction, count in reconstructions(pixels, size, codec):
                num_bytes[method].append(count)
                for name, annotation in wanted.items():
                    found[name, method].extend(read_words(annotation, reconstruction, adapted[name, picture.kind]))
        for engine in engines:
            for method, counts in num_bytes.items():
                result = summarise_words(found[engine.info.name, method], engine.info.describe(), size)
                section["rows"].append({"size": size, "codec": method, "pictures": len(counts), **rate(counts, size),
                                        **result.describe()})
        yield


def face_pictures(folder: Path, engine: FaceEngine, every_picture: int, failures: list[str],
                  quiet: bool) -> dict[Path, Annotation]:
    """The pictures of a folder with the largest face of each; no face where none was found."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"{folder} holds no pictures.")
    files = files[::every_picture]
    annotations = {}
    for file in tqdm(files, "faces", disable=quiet, file=sys.stderr):
        try:
            annotation = annotate_faces(file.name, load_image(file).pixels, engine)
        except VtcError as error:
            failures.append(str(error).replace(str(file), file.name))
            continue
        annotations[file] = annotation
    return annotations


def judge_faces(section: dict, pictures: dict[Path, Annotation], engine: FaceEngine, sizes: list[int],
                codec: TokenCodec, quiet: bool) -> Iterator[None]:
    """Every codec on the largest face of each picture. Fills `section` and yields after each size."""
    originals: dict[Path, list] = {}
    for size in sizes:
        found: dict[str, list[FaceRecord]] = defaultdict(list)
        num_bytes: dict[str, list[int]] = defaultdict(list)
        for file, annotation in tqdm(pictures.items(), f"faces at {size}", disable=quiet, file=sys.stderr):
            if not annotation.faces or annotation.faces[0].ratio < edges("face", size)[0]:
                continue
            pixels = load_image(file).pixels
            if file not in originals:
                originals[file] = original_faces(annotation, pixels, engine)
            for method, reconstruction, count in reconstructions(pixels, size, codec):
                num_bytes[method].append(count)
                found[method].extend(compare_faces(annotation, originals[file], reconstruction, engine))
        for method, counts in num_bytes.items():
            result = summarise_faces(found[method], engine, size)
            section["rows"].append({"size": size, "codec": method, "pictures": len(counts), **rate(counts, size),
                                    **result.describe()})
        yield


def reconstructions(pixels: np.ndarray, size: int, codec: TokenCodec) -> Iterator[tuple[str, np.ndarray, int]]:
    """(codec, reconstruction at the original's size, bytes of the file); 0 bytes for "resize", which has no file.

    A peer whose smallest file is larger than allowed is left out for that picture.
    """
    canvas = image_canvas(pixels.shape[0], pixels.shape[1], size)
    placed = canvas.place(pixels)
    yield "resize", canvas.restore(placed), 0
    (data,) = codec.compress(to_tensor(placed)[None])
    (decoded,) = codec.decompress([data])
    yield "ours", canvas.restore(to_uint8(decoded)), len(data)
    for peer, times in (("avif", 1), ("avif", 4), ("jpeg", 4)):
        streams = (encode_within(peer, placed, times * len(data), factor) for factor in (2, 4))
        stream = next((s for s in streams if s is not None), None)
        if stream is not None:
            label = f"{peer}, our bytes" if times == 1 else f"{peer}, {times} x our bytes"
            yield label, canvas.restore(stream.decode()), len(stream.data)


def rate(counts: list[int], size: int) -> dict[str, float | None]:
    """Mean bytes of a file, and over the pixels of the canvas; None where there is no file."""
    if not any(counts):
        return {"bytes": None, "bpp": None}
    return {"bytes": sum(counts) / len(counts), "bpp": 8 * sum(counts) / len(counts) / size**2}


def mean(values: Iterable[float]) -> float | None:
    """None for nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


# -- TokBench's own pictures and films -------------------------------------------------------------------------------


def evaluate_tokbench(args: argparse.Namespace) -> list[str]:
    """The whole job of `tokbench`; returns what could not be judged."""
    kind: Kind = args.kind
    medium: Medium = args.medium
    edges(kind, args.size, medium)  # an unknown size is told before an engine is loaded
    files = {name: annotation_file(args.data, kind, name, medium) for name in args.sets or SETS[kind, medium]}
    present = {name: file for name, file in files.items() if file.is_file()}
    if not present or (args.sets and len(present) < len(files)):
        missing = next(file for name, file in files.items() if name not in present)
        raise FileError(f"{args.data} has no annotations {missing.name}: fetch the data set Junfeng5/TokBench.")
    failures: list[str] = []
    result: dict
    if kind == "text":
        reader = load_text_engine(args.engine or DEFAULT_TEXT_ENGINE, args.weights)
        words: list[WordRecord] = []
        for name, file in present.items():
            rebuilt = pictures_of(reconstruction_folder(args.reconstructions, kind, name, args.size, medium), medium,
                                  args.compat)
            part = text_fidelity(read_annotations(file, kind, medium), rebuilt, reader, args.size, medium, args.compat)
            words.extend(part.records)
            failures.extend(part.failures)
        result = summarise_words(words, reader.info.describe(), args.size, medium, failures, args.compat).describe()
    else:
        judge = load_face_engine(args.engine or DEFAULT_FACE_ENGINE, args.weights)
        faces: list[FaceRecord] = []
        for name, file in present.items():
            original = pictures_of(original_folder(args.data, kind, name, medium), medium, True)
            rebuilt = pictures_of(reconstruction_folder(args.reconstructions, kind, name, args.size, medium), medium,
                                  args.compat)
            found = face_fidelity(read_annotations(file, kind, medium), original, rebuilt, judge, args.size, medium)
            faces.extend(found.records)
            failures.extend(found.failures)
        result = summarise_faces(faces, judge, args.size, medium, None, failures).describe()
    print(json.dumps({"sets": list(present), **result, "provenance": provenance()}, indent=1))
    return failures


def pictures_of(folder: Path, medium: Medium, compat: bool) -> Callable[[Annotation], np.ndarray]:
    """The picture or the frame of an annotation."""
    if medium == "video":
        return Films(lambda name: film_file(folder, name, compat))
    return lambda annotation: load_image(find_picture(folder, annotation.file_name, compat)).pixels


# -- tables ----------------------------------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    """Tables of both kinds, a row a codec and size."""
    lines = [f"# Words and faces through {report['model']['name']}", "",
             f"Resolution protocol and buckets of TokBench (855802d); tokenizer with fingerprint "
             f"`{report['model']['fingerprint']}`. Reconstructions are not saved as JPEG in between. bpp is "
             f"{report['settings']['bpp']}. {report['settings']['peers']}. A mean of fewer than 50 carries a dagger; "
             "n stands behind it.", ""]
    if text := report.get("text"):
        lines += ["## Text", "", f"{text['pictures']} pictures. Answers are adapted to how the truths are written: "
                  f"{'; '.join(f'{kind}: {note}' for kind, note in text['conventions'].items())}. As in TokBench, only "
                  "words that the engine reads exactly in the original are judged, and only those within the size's "
                  "buckets.", "", "What the engines read in the originals:", "",
                  "| engine | kind | words | read exactly | 1 - NED |", "|-|-|-|-|-|"]
        for engine, kinds in text["originals"].items():
            lines += [f"| {engine} | {kind} | {o['words']} | {percent(o['t_acc'])} | {percent(o['t_ned'])} |"
                      for kind, o in kinds.items()]
        for engine in text["originals"]:
            rows = [row for row in text["rows"] if row["engine"]["name"] == engine]
            lines += ["", f"### {describe_engine(rows)}", ""]
            lines += table(rows, {"t_acc": ("T-ACC", percent), "t_ned": ("T-NED", percent)})
    if faces := report.get("faces"):
        measures = {"f_sim": ("F-Sim", decimal), "face_distance": ("distance", decimal),
                    "face_match_rate": ("same person", percent), "face_centred_cosine": ("centred cosine", decimal)}
        rows = faces["rows"]
        lines += ["", "## Faces", "", f"{faces['pictures']} pictures, a face was found in {faces['with_a_face']}. "
                  "Distance is Euclidean (lower is better); same person: share with a distance below the engine's "
                  "threshold; centred cosine: after the originals' mean was taken off. None of these is F-Sim.", "",
                  f"### {describe_engine(rows)}", ""]
        lines += table(rows, {m: f for m, f in measures.items() if any(m in row for row in rows)})
    return "\n".join(lines) + "\n"


def table(rows: list[dict], measures: dict) -> list[str]:
    """A measure has four columns: its buckets with n, and their mean."""
    head = ["size", "codec", "bpp"]
    for title, _ in measures.values():
        head += [f"{title} S", "M", "L", "mean"]
    lines = [f"| {' | '.join(head)} |", "|" + "-|" * len(head)]
    for row in rows:
        most = max(r["pictures"] for r in rows if r["size"] == row["size"])
        short = "" if row["pictures"] == most else f" ({row['pictures']} of {most} pictures: not comparable)"
        cells = [str(row["size"]), row["codec"] + short, "-" if row["bpp"] is None else f"{row['bpp']:.4f}"]
        for measure, (_, form) in measures.items():
            if measure not in row:  # the mean to take off needs more than one face
                cells += ["-"] * 4
                continue
            for bucket in ("small", "medium", "large"):
                part = row[measure][bucket]
                cells.append(f"{form(part['mean'])}{'†' if part['few'] else ''} ({part['n']})")
            cells.append(form(row[measure]["mean_of_buckets"]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def describe_engine(rows: list[dict]) -> str:
    """Version and model of the engine of these rows."""
    return f"{rows[0]['engine']['version']}, {rows[0]['engine']['model']}" if rows else "nothing within the buckets"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
