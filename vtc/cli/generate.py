"""vtc-generate: pictures of classes or texts."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vtc.cli.common import DONE, device_name, emit, guarded, not_empty, say
from vtc.cli.decode import FORMATS, format_of
from vtc.cli.generate_inputs import Conditions, Given, conditions, given_tokens
from vtc.cli.items import make_folder
from vtc.cli.plan import UsageError, check_folder, stage_name
from vtc.errors import ConfigError, FileError
from vtc.files import write_file
from vtc.generators.classes import CALIBRATION
from vtc.generators.kv_cache.specs import POLICIES, STORAGES, PolicySpec, parse_policy, parse_storage
from vtc.models import DEFAULT_GENERATOR

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tqdm import tqdm

    from vtc.generators.kv_cache.calibration import Calibration
    from vtc.generators.kv_cache.schedule import Schedule
    from vtc.generators.pretrained import LoadedGenerator, Progress
    from vtc.generators.sampling import Guidance, Sampling

#: pictures of a calibration that is made on the way
CALIBRATED_ON = 8


def make_parser() -> argparse.ArgumentParser:
    """The arguments of vtc-generate."""
    import vtc

    parser = argparse.ArgumentParser(
        prog="vtc-generate",
        description="Draw pictures of classes or texts, token by token, with a small key-value cache.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cache policies (--kv), of which those marked * need a calibration:\n"
               + "\n".join(f"  {_example(name):<14}{' *'[kind.calibrated]} {kind.about}"
                           for name, kind in POLICIES.items())
               + "\nExit codes: 0 done, 1 stopped or failed, 2 usage.")
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", type=not_empty, default=DEFAULT_GENERATOR,
                        help=f"bundled model, the folder of one, or a Hub repository; default {DEFAULT_GENERATOR}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--class", dest="classes", nargs="+", metavar="C", type=not_empty,
                      help="classes by number or name, drawn in turn; default: all of the model's")
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts, drawn in turn; needs the extra `text`")
    what.add_argument("--features", metavar="FILE", help="safetensors of text features that were made elsewhere")
    parser.add_argument("--text_encoder", metavar="NAME_OR_FOLDER", type=not_empty,
                        help="T5 encoder for --prompt; default: the model's")
    parser.add_argument("-n", "--number", type=_whole, metavar="N", help="pictures in all; default: one of each")
    parser.add_argument("-o", "--output", metavar="PATH", type=not_empty,
                        help="folder; for one picture also a file ending in .png, .jpg or .webp, or '-' (stdout)")
    parser.add_argument("--format", choices=tuple(FORMATS),
                        help="format of the pictures; default: the suffix of -o, else png")
    parser.add_argument("--sheet", metavar="FILE", type=not_empty, help="also all pictures on one sheet, a .png")
    parser.add_argument("--previews", action="store_true",
                        help="also the picture after each scale (or row), as NAME.stage1.png, ...")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N",
                        help="of the first picture; the next ones count on, whatever the batch size; default 0")
    parser.add_argument("--batch_size", type=_whole, default=8, metavar="N", help="pictures drawn at once; default 8")

    draw = parser.add_argument_group("how tokens are drawn, by default as the model's folder says")
    draw.add_argument("--cfg", type=_number, nargs="+", metavar="W",
                      help="weight of guidance, 1 is none; or one for each scale (token of a raster model)")
    draw.add_argument("--cfg_schedule", choices=("ramp", "constant"), help="from 1 up to W, or W at each step")
    draw.add_argument("--cfg_layer", type=_layer, metavar="-I",
                      help="of text-conditional models: guide the output of the I-th block from the end; 0: the logits")
    draw.add_argument("--temperature", type=_number, metavar="T", help="above 1 more varied, below 1 likelier words")
    draw.add_argument("--top_k", type=int, metavar="K", help="only the K likeliest words; 0: all")
    draw.add_argument("--top_p", type=_number, metavar="P", help="only the likeliest words that add up to P; 0: all")
    draw.add_argument("--size", metavar="SIZE", choices=("0.06M", "0.25M", "0.60M", "1M"),
                      help="of text-conditional models: 0.06M, 0.25M, 0.60M or 1M pixels")
    draw.add_argument("--aspect", type=_number, default=1.0, metavar="H/W",
                      help="of text-conditional models: height over width; default 1")
    draw.add_argument("--speculative", type=_whole, metavar="AHEAD",
                      help="raster models with a draft: so many tokens are proposed at a time; the same distribution")

    given = parser.add_argument_group("tokens that are given (inpainting)")
    source = given.add_mutually_exclusive_group()
    source.add_argument("--given", metavar="FILE", type=not_empty,
                        help=".vtc file of the model's own tokenizer, of which lost tokens are drawn; or a picture")
    source.add_argument("--image", metavar="FILE", type=not_empty, help="a picture, of which the middle is taken")
    given.add_argument("--mask", metavar="FILE", type=not_empty, help="a picture that is white where to draw anew")
    given.add_argument("--keep", type=_whole, metavar="K", help="keep the first K scales (rows of a raster model)")

    cache = parser.add_argument_group("the key-value cache")
    cache.add_argument("--kv", type=_policy, default="full", metavar="POLICY",
                       help="what is kept: hack:0.3 keeps 30 %% of the stored tokens, h2o:127t so many; default full")
    cache.add_argument("--kv_storage", type=_storage, metavar="TYPE",
                       help=f"how it is stored: {', '.join(STORAGES)}; also written hack:0.3+int8")
    cache.add_argument("--calibration", metavar="FILE", type=not_empty,
                       help="made by scripts/calibrate_kv.py; default: the folder's, else one is made if quick")

    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the products; default float32")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu (default), cuda, cuda:N, mps or xpu")
    parser.add_argument("--estimate", action="store_true", help="say how much memory it will take, and draw nothing")
    parser.add_argument("--json", action="store_true",
                        help="what was made, seconds and bytes as JSON on stdout, or on stderr if a picture goes there")
    parser.add_argument("--quiet", action="store_true", help="say nothing but failures")
    parser.add_argument("--version", action="version", version=f"%(prog)s {vtc.__version__}")
    return parser


def _example(name: str) -> str:
    return name + {None: "", "scales": ":2", "tokens": ":0.3"}[POLICIES[name].amount]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: a whole number from 0 up")
    return int(text)


def _number(text: str) -> float:
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number")


def _layer(text: str) -> int:
    if not re.fullmatch(r"0|-[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no block from the end: -1 is the last one, 0 the logits")
    return int(text)


def _policy(text: str) -> PolicySpec:
    try:
        return parse_policy(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _storage(text: str) -> str:
    try:
        return parse_storage(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)

    def command() -> int:
        try:
            target = _target(args)
        except UsageError as error:
            parser.error(str(error))
        if args.kv_storage:
            args.kv = parse_policy(str(args.kv), args.kv_storage)
        return _estimate(args) if args.estimate else _generate(args, parser.prog, target)

    return guarded(parser, command)


@dataclass(frozen=True)
class Target:
    """Where pictures go: path(number, name) of one. format: Pillow's. folder: None where it is one file."""

    format: str
    suffix: str
    folder: str | None
    file: str = ""

    def path(self, number: int, name: str) -> str:
        """Of picture number `number`."""
        if self.folder is None:
            return self.file
        return os.path.join(self.folder, f"{number:03d}{f'_{name}' if name else ''}{self.suffix}")


def _target(args: argparse.Namespace) -> Target | None:
    """Of -o and --format; None for none. Raises UsageError, and FileError where a folder is missing."""
    if args.kv_storage and args.kv.storage not in (None, args.kv_storage):
        raise UsageError(f"--kv stores in {args.kv.storage} and --kv_storage says {args.kv_storage}; say it once")
    if (args.mask or args.keep) and not (args.given or args.image):
        raise UsageError("--mask and --keep are about tokens that are given: say of what by --image or --given")
    if args.text_encoder and not args.prompt:
        raise UsageError("--text_encoder reads what --prompt says, and there is none")
    if args.cfg_schedule and args.cfg and len(args.cfg) > 1:
        raise UsageError("--cfg with a weight for each step is a schedule already: leave --cfg_schedule out")
    if args.speculative and (args.kv.name != "full" or args.kv.storage or args.given or args.image or args.previews):
        raise UsageError("--speculative takes tokens back, for which the cache has to keep all as it is: it goes with "
                         "neither --kv nor given tokens nor --previews")
    if args.sheet and os.path.splitext(args.sheet)[1].lower() != ".png":
        raise UsageError(f"--sheet {args.sheet} does not end in .png")
    if args.sheet and args.output and os.path.abspath(args.sheet) == os.path.abspath(args.output):
        raise UsageError(f"--sheet and -o are the same file, {args.sheet}")
    if args.sheet and not os.path.isdir(os.path.dirname(args.sheet) or ".") and (
            os.path.dirname(args.sheet) != (args.output or "").rstrip("/" + os.sep)):
        raise FileError(f"The output folder {os.path.dirname(args.sheet)} does not exist; create it first.")
    if args.output is None:
        if not args.sheet and not args.estimate:
            raise UsageError("say where the pictures go: -o FOLDER, or --sheet FILE")
        if args.previews:
            raise UsageError("--previews are written beside the pictures: say where by -o")
        return None
    is_file = args.output == "-" or (os.path.splitext(args.output)[1].lower() in (".png", ".jpg", ".jpeg", ".webp")
                                     and not os.path.isdir(args.output))
    if not is_file:
        check_folder(args.output)
        format, suffix = FORMATS[args.format or "png"]
        return Target(format, suffix, args.output)
    named = args.classes or args.prompt
    count = args.number or (len(named) if named else None)
    if count != 1 and not (count is None and args.features):  # how many features there are, the file says
        raise UsageError(f"-o {args.output} holds one picture: add -n 1, or give -o a folder")
    if args.previews and args.output == "-":
        raise UsageError("--previews writes several pictures, which cannot all go to stdout")
    if args.output != "-" and not os.path.isdir(os.path.dirname(args.output) or "."):
        raise FileError(f"The output folder {os.path.dirname(args.output)} does not exist; create it first.")
    chosen = (args.format or "png") if args.output == "-" else format_of(args.output, args.format)
    return Target(*FORMATS[chosen], None, args.output)


# ---- what is drawn, and how -----------------------------------------------------------------------------------------

def _settings(args: argparse.Namespace, generator: LoadedGenerator) -> tuple[Sampling, Guidance]:
    chosen = {k: v for k in ("temperature", "top_k", "top_p") if (v := getattr(args, k)) is not None}
    guidance = generator.guidance
    if args.cfg is not None:
        several = len(args.cfg) > 1
        guidance = replace(guidance, weights=tuple(args.cfg) if several else (),
                           **({} if several else {"weight": args.cfg[0]}))
    if args.cfg_schedule:
        guidance = replace(guidance, ramp=args.cfg_schedule == "ramp")
    if args.cfg_layer is not None:
        guidance = replace(guidance, layer=args.cfg_layer)
    return replace(generator.sampling, **chosen), guidance


def _sized(args: argparse.Namespace, generator: LoadedGenerator) -> None:
    """--size and --aspect, which only text-conditional models have."""
    if generator.kind != "infinity":
        if args.size or args.aspect != 1:
            raise ConfigError("This model draws pictures of one size and shape: it takes neither --size nor --aspect.")
    elif args.size:
        generator.config = replace(generator.config, size=args.size)


def _calibration(args: argparse.Namespace, generator: LoadedGenerator, found: Conditions,
                 schedule: Schedule) -> Calibration | None:
    """A file's, the folder's, or one that is made now, where the policy needs one. Before the weights are cast."""
    from vtc.generators.calibrate import calibrate, is_affordable

    spec: PolicySpec = args.kv
    if not spec.needs_calibration:
        return None
    if schedule.raster:
        raise ConfigError(f"{spec.name} is about scales, and a raster model has none: take streaming, h2o, snapkv or "
                          "pyramidkv.")
    known = generator.calibration(args.calibration)
    if known is not None:
        if known.sizes != schedule.sizes:
            raise ConfigError(f"The calibration is of {len(known.sizes)} scales up to {known.sizes[-1]}, and these are "
                              f"{schedule.steps} up to {schedule.sizes[-1]}: make one of this size.")
        return known
    if not is_affordable(generator, CALIBRATED_ON):
        raise ConfigError(f"{spec.name} needs a calibration, which would take long here: make one by "
                          "scripts/calibrate_kv.py and give it by --calibration.")
    if not args.quiet:
        say(f"{spec.name} needs a calibration: {CALIBRATED_ON} pictures are drawn for it first; "
            "scripts/calibrate_kv.py makes one that stays.")
    batches = [range(i, min(i + args.batch_size, CALIBRATED_ON)) for i in range(0, CALIBRATED_ON, args.batch_size)]
    everything = found
    if not args.prompt and not args.features:
        everything = conditions(argparse.Namespace(classes=None, prompt=None, features=None), generator)
    return calibrate(generator, [everything.of(batch) for batch in batches], height_to_width=args.aspect)


def _estimate(args: argparse.Namespace) -> int:
    """Say what the memory will be. Shapes alone are read."""
    import torch

    from vtc.generators.memory import estimate_memory
    from vtc.models import load_generator

    generator = load_generator(args.model, weights=False)
    _sized(args, generator)
    sampling, guidance = _settings(args, generator)
    count, text_tokens = _how_many(args, generator)
    batch = min(args.batch_size, args.number or count)
    if args.speculative and generator.draft is None:
        raise ConfigError(f"{args.model} has no draft/, which --speculative needs.")
    if args.speculative:
        batch = 1
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    found = estimate_memory(generator, batch, args.kv, sampling, guidance, dtype, height_to_width=args.aspect,
                            text_tokens=text_tokens, ahead=args.speculative or 0)
    if args.calibration and not os.path.isfile(args.calibration):
        raise FileError(f"There is no file {args.calibration}.")
    kept = args.calibration or (generator.folder and (generator.folder / CALIBRATION).is_file())
    if args.kv.needs_calibration and not kept and not args.quiet:
        say(f"{args.kv.name} needs a calibration; made on the way, that takes more memory than this.")
    if args.json:
        emit(json.dumps({"model": args.model, "kv": str(args.kv), "batch_size": batch, "dtype": args.dtype,
                         "weights_bytes": found.weights, "cache_peak_bytes": found.cache,
                         "activations_bytes": found.activations, "total_bytes": found.total}), sys.stdout)
    else:
        emit(f"{args.model}, {batch} at a time, {args.kv}: {found}", sys.stdout)
    return DONE


def _how_many(args: argparse.Namespace, generator: LoadedGenerator) -> tuple[int, int]:
    """Pictures that --class, --prompt or --features ask for, one of each, and the tokens of a text."""
    from vtc.generators.infinity import Infinity
    from vtc.generators.memory import TEXT_TOKENS

    model = generator.model
    if args.features and isinstance(model, Infinity):
        from vtc.generators.text import load_features

        features, _ = load_features(args.features, model.text_width)
        return len(features), features.shape[1]
    named = args.classes or args.prompt
    return len(named) if named else getattr(model, "classes", 1), TEXT_TOKENS


@dataclass
class Run:
    """What a run has taken so far. steps: seconds of each scale or row, over all batches."""

    steps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cache: int = 0
    cache_peak: int = 0
    passes: int = 0
    accepted: int = 0
    proposed: int = 0


def _generate(args: argparse.Namespace, prog: str, target: Target | None) -> int:
    import torch
    from tqdm import tqdm

    from vtc.generators.inference import prepare
    from vtc.images import contact_sheet, encode_image
    from vtc.models import load_generator

    generator = load_generator(args.model)
    _sized(args, generator)
    sampling, guidance = _settings(args, generator)
    if args.speculative and generator.draft is None:
        raise ConfigError(f"{args.model} has no draft/, which --speculative needs.")
    generator.to(args.device)
    found = conditions(args, generator)
    schedule = generator.schedule(args.aspect)
    policy = args.kv.build(schedule, _calibration(args, generator, found, schedule))
    given = given_tokens(args, generator, args.aspect)
    count = args.number or len(found)
    if target is not None and target.folder is None and count > 1:
        raise ConfigError(f"-o {args.output} holds one picture, and there are {count}: add -n 1, or give -o a folder.")
    for note in () if args.quiet or given is None else given.notes:
        say(note)
    for model in (generator.model, generator.draft):
        if model is not None:
            prepare(model, torch.bfloat16 if args.dtype == "bfloat16" else None)
    if generator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(generator.device)

    run, pictures, facts = Run(), list[Any](), list[dict[str, Any]]()
    batches = [range(i, min(i + args.batch_size, count)) for i in range(0, count, args.batch_size)]
    steps = schedule.columns if schedule.raster else schedule.steps  # a square grid has as many rows
    unit = "picture" if args.speculative else "row" if schedule.raster else "scale"
    total = count if args.speculative else steps * len(batches)
    with tqdm(total=total, unit=unit, file=sys.stderr, disable=args.quiet) as bar:
        for batch in batches:
            condition = found.of(batch)
            seeds = [args.seed + i for i in batch]
            stages: list[list[np.ndarray]] = []
            if args.speculative:
                images = _speculate(args, generator, condition, seeds, sampling, guidance, run, bar)
            else:
                images, stages = _draw(args, generator, condition, seeds, policy, sampling, guidance, given, run, bar)
            for row, number in enumerate(batch):
                which = number % len(found)
                fact = found.facts[which] | {"seed": seeds[row]}
                if target is not None:
                    fact = {"output": (path := target.path(number, found.names[which]))} | fact
                    if target.folder is not None:
                        make_folder(path)
                    for stage, drawn in enumerate(stages, 1):
                        write_file(stage_name(path, stage), encode_image(drawn[row], target.format))
                    write_file(path, encode_image(images[row], target.format))
                facts.append(fact)
            if args.sheet:
                pictures += images
    if args.sheet:
        write_file(args.sheet, encode_image(contact_sheet(pictures), "PNG"))
    _report(args, prog, generator, run, facts, unit)
    return DONE


def _draw(args: argparse.Namespace, generator: LoadedGenerator, condition: Any, seeds: Sequence[int], policy: Any,
          sampling: Sampling, guidance: Guidance, given: Given | None, run: Run,
          bar: tqdm[Any]) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """One batch: uint8 pictures, and those after each scale where they are wanted."""
    from vtc.generators.kv_cache.cache import KVCache
    from vtc.generators.sampling import seeded
    from vtc.images import to_uint8

    cache = KVCache(generator.schedule(args.aspect), *policy)
    stages: list[list[np.ndarray]] = []
    wait = _waiter(generator.device)
    wait()
    start = last = time.perf_counter()
    paused = 0.0

    def heard(progress: Progress) -> None:
        nonlocal last, paused
        wait()
        now = time.perf_counter()
        if len(run.steps) <= progress.number:
            run.steps.append(0.0)
        run.steps[progress.number] += now - last
        bar.update()
        if args.previews and progress.number + 1 < progress.count:
            stages.append([to_uint8(image) for image in progress.picture()])
        last = time.perf_counter()
        paused += last - now

    _, images = generator.generate(condition, cache, sampling, guidance, seeded(seeds, generator.device),
                                   None if given is None else given.of(len(seeds)), heard)
    wait()
    run.seconds += time.perf_counter() - start - paused
    run.cache, run.cache_peak = max(run.cache, cache.nbytes()), max(run.cache_peak, cache.peak_nbytes())
    return [to_uint8(image) for image in images], stages


def _speculate(args: argparse.Namespace, generator: LoadedGenerator, condition: Any, seeds: Sequence[int],
               sampling: Sampling, guidance: Guidance, run: Run, bar: tqdm[Any]) -> list[np.ndarray]:
    """One batch, picture by picture."""
    from vtc.generators.llamagen import LlamaGen
    from vtc.generators.sampling import seeded
    from vtc.generators.speculative import generate_speculatively
    from vtc.images import to_uint8

    assert isinstance(generator.model, LlamaGen) and generator.draft is not None
    images, wait = [], _waiter(generator.device)
    for label, random in zip(condition.tolist(), seeded(seeds, generator.device), strict=True):
        start = time.perf_counter()
        result = generate_speculatively(generator.model, generator.draft, label, generator.tokenizer, args.speculative,
                                        sampling, guidance, random)
        wait()
        run.seconds += time.perf_counter() - start
        run.passes += result.passes
        run.accepted += result.accepted
        run.proposed += result.proposed
        images.append(to_uint8(result.images[0]))
        bar.update()
    return images


def _waiter(device: torch.device) -> Callable[[], None]:
    """Waits until a device has done what it was told, so that a clock is read at the right time."""
    import torch

    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def _report(args: argparse.Namespace, prog: str, generator: LoadedGenerator, run: Run, facts: list[dict[str, Any]],
            unit: str) -> None:
    import torch

    where = args.output or args.sheet
    if args.json:
        on_gpu = generator.device.type == "cuda"
        report: dict[str, Any] = {
            "model": args.model, "kv": str(args.kv), "dtype": args.dtype, "device": str(generator.device),
            "batch_size": args.batch_size, "seconds": round(run.seconds, 4), "process_peak_bytes": process_peak(),
            "gpu_peak_bytes": torch.cuda.max_memory_allocated(generator.device) if on_gpu else None}
        if args.speculative:
            report |= {"tokens_per_pass": generator.layout()[0].length * len(facts) / run.passes,
                       "accepted": run.accepted, "proposed": run.proposed}
        else:
            report |= {f"{unit}_seconds": [round(s, 4) for s in run.steps], "cache_bytes": run.cache,
                       "cache_peak_bytes": run.cache_peak}
        if args.sheet:
            report["sheet"] = args.sheet
        emit(json.dumps(report | {"pictures": facts}), sys.stderr if args.output == "-" else sys.stdout)
    elif not args.quiet:
        cache = "" if args.speculative else f", cache {run.cache / 2**20:.2f} MiB"
        say(f"{prog}: {len(facts)} picture{'s' * (len(facts) > 1)} -> {where}, {run.seconds:.2f} s{cache}")


def process_peak() -> int | None:
    """The most memory that the program has held so far, bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
