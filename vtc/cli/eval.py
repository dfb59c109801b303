"""vtc-eval: what was lost, image by image, with intervals, next to peers, as a table, JSON, CSV and a page."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.cli.common import DONE, FAILED, device_name, emit, guarded, job_count, say, share_cpus, stopping
from vtc.cli.plan import UsageError
from vtc.errors import ConfigError, ModelError, VtcError, sentence
from vtc.eval.names import DEFAULT, MEASURES

if TYPE_CHECKING:
    from vtc.eval.measures import Measure, Options
    from vtc.eval.pairs import Item, Problem
    from vtc.eval.results import MethodResult
    from vtc.eval.suite import Method, Processes, Suite

PROG = "vtc-eval"
PROTOCOL_NAMES = ("native", "wetok", "adm", "clean-fid", "torch-fidelity")
#: a folder of reconstructions in one of these counts its files' bytes as a rate
CODED_SUFFIXES = (".avif", ".jp2", ".jpeg", ".jpg", ".jxl", ".webp")

EPILOG = """examples:
  vtc-eval originals/ reconstructions/
  vtc-eval --codec localvq-f16-8192-r3 --peers avif,webp --data kodak/ --report out/
  vtc-eval --codec 'localvq-f16-8192-r3*' --peers avif,jxl --rates 0.03 0.06 0.12 --data kodak/ --report out/
  torchrun --nproc-per-node 2 -m vtc.cli.eval --tokenizer folder/ --data imagenet/ --metrics psnr,fid
exit codes: 0 done, 1 stopped, or something was not measured (the rest is), 2 usage."""


def make_parser() -> argparse.ArgumentParser:
    """The arguments of vtc-eval."""
    import vtc

    metrics = ", ".join(f"{name} ({text})" for name, text in MEASURES.items())
    parser = argparse.ArgumentParser(
        prog=PROG, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Measure reconstructions against their originals: pictures that exist, or what a codec or a\n"
                    "tokenizer makes of a folder, next to classical peers.")
    parser.add_argument("pairs", nargs="*", metavar="PATH", help="REF REC [REC ...]: files, or folders of pairs, which "
                        "are matched by name without suffix")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--codec", metavar="NAME", type=_words, action="extend", default=[],
                      help="bundled model ('*' stands for any part of its name), model folder, jpeg, webp, avif, jxl, "
                           "j2k, or compressai:ARCHITECTURE:WEIGHTS; several with commas")
    what.add_argument("--tokenizer", metavar="NAME", type=_words, action="extend", default=[],
                      help="bundled model or model folder, without a file: encode and decode")
    what.add_argument("--data", metavar="DIR", help="originals for --codec and --tokenizer")
    what.add_argument("--peers", metavar="NAMES", type=_words, action="extend", default=[],
                      help="classical peers, as in --codec")
    what.add_argument("--rates", metavar="BPP", nargs="+", type=_rate, default=[],
                      help="bits per pixel of the peers and of models with a family, whole files; 'match' gives the "
                           "peers the bytes of the first model, image by image, which is the default beside one")
    what.add_argument("--downsample", metavar="N,N", type=_whole_numbers, default=[1, 2, 4],
                      help="factors by which peers may shrink the picture first; default 1,2,4")
    what.add_argument("--best-by", choices=["lpips", "psnr"], help="how a peer's factor is chosen; default lpips "
                      "where its weights are found")
    what.add_argument("--limit", metavar="N", type=_positive, help="the first so many pictures, by name")
    how = parser.add_argument_group("how")
    how.add_argument("--metrics", metavar="NAMES", type=_words, action="extend", default=[],
                     help=f"with commas, or all; default {','.join(DEFAULT)}. They are: {metrics}")
    how.add_argument("--engines", metavar="NAMES", type=_words, action="extend", default=[],
                     help="what reads words (rapidocr, tesseract, parseq; needs --annotations) and knows faces (dlib, "
                          "antelopev2; the largest in each original); NAME:WEIGHTS where weights come by path")
    how.add_argument("--annotations", metavar="FILE", help="the words: TokBench's JSON, or .jsonl with a picture a "
                     "line; default annotations.jsonl among the originals")
    how.add_argument("--protocol", choices=PROTOCOL_NAMES, default="native", help="resize, crop and rounding as an "
                     "evaluator has them; default native: the pictures as they are")
    how.add_argument("--size", metavar="PIXELS", type=_positive, help="side of the crop, where the protocol crops")
    how.add_argument("--reference", metavar="FILE", help="statistics (.npz) for fid in place of the originals")
    how.add_argument("--lpips-weights", metavar="PATH", help="folder or file with the networks of LPIPS, DISTS and "
                     "the AlexNet and SqueezeNet distances; default VTC_LPIPS_WEIGHTS, torchvision's downloads")
    how.add_argument("--fid-weights", metavar="PATH", help="FID's Inception; default VTC_FID_WEIGHTS, then torch's "
                     "downloads")
    how.add_argument("--download", action="store_true", help="fetch FID's Inception where it is not found")
    how.add_argument("--seed", type=int, default=0, help="of the bootstrap, KID's subsets and the kept samples")
    how.add_argument("--device", type=device_name, default="cpu", help="cpu (default), cuda, cuda:N, mps or xpu")
    how.add_argument("-j", "--jobs", type=job_count, default=1, metavar="N",
                     help="pictures in work at the same time; 0: one a processor; default 1, which uses all processors")
    how.add_argument("--cache", metavar="DIR", help="where measured pictures are remembered; default ~/.cache/vtc/eval")
    how.add_argument("--no-cache", action="store_true", help="remember nothing")
    how.add_argument("--fresh", action="store_true", help="measure again what is remembered")
    out = parser.add_argument_group("what is written")
    out.add_argument("--report", metavar="DIR", help="a folder with index.html, results.json and results.csv")
    out.add_argument("--json", action="store_true", help="all results on stdout, in place of the table")
    out.add_argument("--csv", metavar="FILE", help="a row an image and method; '-' is stdout, in place of the table")
    out.add_argument("--add", metavar="FILE", action="append", default=[],
                     help="results.json of an earlier run, to stand in the same tables; a mark says what differs")
    out.add_argument("--samples", metavar="FILE", help="the first method's reconstructions as the .npz that ADM's "
                     "evaluator reads; goes with a protocol that crops")
    out.add_argument("--title", help="of the report")
    out.add_argument("--gallery", metavar="N", type=_positive, default=24, help="pictures in the report; default 24")
    out.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--version", action="version", version=f"%(prog)s {vtc.__version__}")
    return parser


def _words(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("it is empty")
    return found


def _rate(text: str) -> list[float | str]:
    found: list[float | str] = []
    for part in _words(text):
        try:
            value: float | str = "match" if part == "match" else float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number of bits per pixel") from None
        if not isinstance(value, str) and not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r} is not a rate")
        found.append(value)
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _whole_numbers(text: str) -> list[int]:
    return [_positive(part) for part in _words(text)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)

    def command() -> int:
        try:
            check(args)
            return evaluate(args)
        except UsageError as error:
            parser.error(str(error))

    return guarded(parser, command)


def check(args: argparse.Namespace) -> None:
    """Raises UsageError where arguments contradict one another."""
    models = args.codec or args.tokenizer or args.peers
    if args.pairs and models:
        raise UsageError("give either REF and REC, or --codec, --tokenizer and --peers with --data")
    if args.pairs and args.data:
        raise UsageError("--data goes with --codec and --tokenizer; REF is the data of REC")
    if args.pairs and len(args.pairs) < 2:
        raise UsageError("REF needs at least one REC")
    if not args.pairs and not models:
        raise UsageError("nothing to measure: give REF and REC, or --codec or --tokenizer with --data")
    if models and not args.data:
        raise UsageError("--codec, --tokenizer and --peers need --data")
    if args.engines and args.protocol != "native":
        raise UsageError("--engines read the pictures as they are: leave --protocol native")
    if args.json and args.csv == "-":
        raise UsageError("--json and --csv - both go to stdout")


def evaluate(args: argparse.Namespace) -> int:
    """The whole job; the exit code."""
    from vtc.eval import measures as m
    from vtc.eval.report import make_folder
    from vtc.eval.results import from_json
    from vtc.eval.suite import Processes

    try:
        names = m.parse_names(args.metrics or list(DEFAULT))
    except ConfigError as error:
        raise UsageError(str(error)) from error
    processes = Processes(cpu=args.device == "cpu")
    share_cpus(args.jobs)
    problems: list[Problem] = []
    with ExitStack() as stack:
        items, methods = _methods(args, problems)
        options = _options(args, methods)
        measures = _measures(names, options, asked=set(args.metrics), problems=problems)
        measures += _fidelity(args, problems)
        if not measures:
            raise _nothing(problems, "No metric is available; see --metrics.")
        suite = _suite(args, methods, measures, options, processes, stack)
        added = [result for path in args.add for result in from_json(path)]
        if args.report:
            make_folder(args.report)
        results, more = _run(suite, items, processes, args)
        if not processes.is_main:
            return DONE
        problems += more
        return _write(args, suite, items, results, added, problems)


def _options(args: argparse.Namespace, methods: list[Method]) -> Options:
    from vtc.eval.frechet import load_statistics
    from vtc.eval.measures import Options
    from vtc.eval.protocols import protocol

    reference = load_statistics(args.reference) if args.reference else None
    strides = [method.description["downsample"] for method in methods if "downsample" in method.description]
    period = max(2, strides[0]) if strides else Options.period  # one for all rows, the first network's
    return Options(args.device, args.lpips_weights, args.fid_weights, args.download, protocol(args.protocol), reference,
                   period, args.seed)


def _methods(args: argparse.Namespace, problems: list[Problem]) -> tuple[list[Item], list[Method]]:
    """What is measured and on which pictures. Raises VtcError where nothing is left."""
    from vtc.cli import eval_methods
    from vtc.eval.pairs import Problem, find_items, match
    from vtc.eval.suite import Files

    items, found = find_items(args.pairs[0] if args.pairs else args.data)
    problems += found
    methods: list[Method] = []

    def failed(name: str, error: Exception) -> None:
        problems.append(Problem("", name, sentence(error, name)))

    for label, source in zip(eval_methods.labels(args.pairs[1:]), args.pairs[1:], strict=True):
        try:
            files, found = match(items, source, label)
        except VtcError as error:
            failed(label, error)
            continue
        problems += found
        coded = bool(files) and all(path.suffix.lower() in CODED_SUFFIXES for path in files.values())
        methods.append(Files(label, files, rate=coded))
    if args.codec or args.peers or args.tokenizer:
        methods += eval_methods.codec_methods([*args.codec, *_peers(args.peers)], [r for rs in args.rates for r in rs],
                                              args.downsample, _distance(args), args.device, failed)
        tokenizers = eval_methods.expanded(args.tokenizer)
        for name, label in zip(tokenizers, eval_methods.labels(tokenizers), strict=True):
            try:
                methods.append(eval_methods.TokenizerMethod(name, args.device, label))
            except Exception as error:
                failed(name, error)
    if not methods:
        raise _nothing(problems, "There is nothing to measure.")
    return items[: args.limit], methods


def _nothing(problems: Sequence[Problem], otherwise: str) -> VtcError:
    """What to raise where nothing is left to measure: the last problem, after the others were said."""
    for problem in problems[:-1]:
        say(problem.sentence)
    return VtcError(problems[-1].sentence if problems else otherwise)


def _peers(names: Sequence[str]) -> list[str]:
    from vtc.cli.eval_methods import PEERS

    if unknown := [name for name in names if name not in PEERS]:
        raise UsageError(f"--peers takes {', '.join(PEERS)}, not {', '.join(unknown)}")
    return list(names)


def _distance(args: argparse.Namespace) -> Any:
    from vtc.cli.eval_methods import Distance
    from vtc.tokenizers.lpips import LPIPS

    if args.best_by == "psnr":
        return Distance(None)
    try:
        return Distance(LPIPS("alex", args.lpips_weights).to(args.device))
    except ModelError:
        if args.best_by == "lpips":
            raise
        return Distance(None)


def _measures(names: Sequence[str], options: Options, asked: set[str], problems: list[Problem]) -> list[Measure]:
    """What can be built. A metric that was asked for by name and lacks its weights is a problem, else a remark."""
    from vtc.eval.measures import SYNONYMS, build
    from vtc.eval.pairs import Problem

    wanted = {SYNONYMS.get(name, name) for name in asked}
    found = []
    for name in names:
        try:
            found.append(build(name, options))
        except ModelError as error:
            if name in wanted:
                problems.append(Problem("", "", f"{name}: {error}"))
            else:
                say(f"{PROG}: {name} is not measured: {error}")
    return found


def _fidelity(args: argparse.Namespace, problems: list[Problem]) -> list[Measure]:
    """A measure for each engine; one that is absent is a problem."""
    if not args.engines:
        return []
    from vtc.eval.engines.catalogue import FACE_ENGINES, TEXT_ENGINES, load_face_engine, load_text_engine
    from vtc.eval.fidelity_measures import FaceMeasure, TextMeasure
    from vtc.eval.pairs import Problem

    size = args.size or 1024  # of TokBench's buckets
    originals = Path(args.pairs[0] if args.pairs else args.data)
    annotations = Path(args.annotations) if args.annotations else originals / "annotations.jsonl"
    found: list[Measure] = []
    for word in args.engines:
        name, _, weights = word.partition(":")
        try:
            if name in FACE_ENGINES:
                found.append(FaceMeasure(load_face_engine(name, weights or None), size))
            elif name in TEXT_ENGINES:
                if not args.annotations and not annotations.is_file():
                    raise ConfigError(f"The engine {name} needs the words that stand in the pictures: give them by "
                                      f"--annotations; there is no {annotations}.")
                found.append(TextMeasure(load_text_engine(name, weights or None), annotations, size))
            else:
                raise UsageError(f"--engines takes {', '.join((*TEXT_ENGINES, *FACE_ENGINES))}, not {name!r}")
        except VtcError as error:
            problems.append(Problem("", "", sentence(error, name)))
    return found


def _suite(args: argparse.Namespace, methods: list[Method], measures: list[Measure], options: Options,
           processes: Processes, stack: ExitStack) -> Suite:
    from vtc.eval.cache import RecordCache
    from vtc.eval.suite import Suite

    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = args.cache or os.path.join(home, "vtc", "eval")
    if args.no_cache:
        if processes.count > 1:  # they hand their records over on disk
            folders = processes.gather([stack.enter_context(tempfile.TemporaryDirectory(prefix="vtc-eval-"))])
            folder = folders[0]
        else:
            folder = None
    source = args.pairs[0] if args.pairs else args.data
    return Suite(methods, measures, options.protocol, args.size, RecordCache(folder), args.fresh, args.jobs,
                 args.device, Path(os.path.normpath(source)).name, args.seed)


def _run(suite: Suite, items: list[Item], processes: Processes,
         args: argparse.Namespace) -> tuple[list[MethodResult], list[Problem]]:
    from tqdm import tqdm

    own = len(range(processes.rank, len(items), processes.count)) * len(suite.methods)
    reused = 0
    with tqdm(total=own, unit="image", file=sys.stderr, disable=args.quiet or not processes.is_main) as bar:
        def progress(done: int, known: int) -> None:
            nonlocal reused
            reused += known
            bar.set_postfix_str(f"{reused} known" if reused else "", refresh=False)
            bar.update(done)

        with stopping(PROG, args.jobs):
            return suite.run(items, processes, progress)


def _write(args: argparse.Namespace, suite: Suite, items: list[Item], results: list[MethodResult],
           added: list[MethodResult], problems: list[Problem]) -> int:
    """Table, JSON, CSV, report, and at the end what was not measured."""
    from vtc.eval.provenance import provenance
    from vtc.eval.results import table, to_csv, to_json
    from vtc.eval.suite import RESAMPLES
    from vtc.files import write_file

    sentences, unwritten = [problem.sentence for problem in problems], []

    def told(name: str, write: Callable[..., object], *values: object) -> None:
        """Write; where that fails, say so at the end, for what was measured is still to be shown."""
        try:
            write(*values)
        except VtcError as error:
            unwritten.append(sentence(error, name))

    about = {"title": args.title or "", "num_images": len(items), "problems": [_anonymous(s) for s in sentences],
             "bootstrap": {"resamples": RESAMPLES, "level": 0.95, "seed": args.seed, "interval": "percentile"},
             "provenance": provenance()}
    everything = [*results, *added]
    if everything:
        if args.report:
            from vtc.eval.report import write_report

            told(args.report, write_report, args.report, everything, suite, items, about, args.gallery,
                 _bar("report", args.quiet))
        if args.samples and results:
            told(args.samples, _samples, args, suite, items, results[0])
        if args.csv:
            told(args.csv, write_file, args.csv, to_csv(results).encode())
        if args.json:
            emit(to_json(everything, about), sys.stdout)
        elif args.csv != "-":
            emit(table(everything, with_intervals=len(everything) == 1), sys.stdout)
    if sentences:
        say(f"{PROG}: {len(sentences)} {'things were' if len(sentences) > 1 else 'thing was'} not measured:")
    for text in (*sentences, *unwritten):
        say(text)
    return FAILED if sentences or unwritten or not results else DONE


def _samples(args: argparse.Namespace, suite: Suite, items: list[Item], result: MethodResult) -> None:
    """Made once more, one at a time, and written as they were judged."""
    from vtc.eval.protocols import export_samples
    from vtc.images import to_uint8

    method = next(method for method in suite.methods if method.name == result.name)
    measured = set(result.images)
    own = [item for item in items if item.name in measured]
    bar = _bar("samples", args.quiet)
    made = (suite.reconstructed(item, method, suite.prepared(item)) for item in bar(own))
    export_samples(args.samples, (to_uint8(image) for image in made if image is not None), len(own))


def _anonymous(text: str) -> str:
    """Without the folders of absolute paths: they are nobody's business."""
    return " ".join(os.path.basename(word) if word.startswith("/") else word for word in text.split(" "))


def _bar(label: str, quiet: bool) -> Callable[[Sequence[Any]], Any]:
    from tqdm import tqdm

    return lambda things: tqdm(things, desc=label, unit="image", file=sys.stderr, disable=quiet)


if __name__ == "__main__":
    sys.exit(main())
