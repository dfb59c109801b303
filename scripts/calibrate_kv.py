"""Measure a generator's heads and layers, once: what HACK, ScaleKV, HeatKV and Ada-KV build on.

    python scripts/calibrate_kv.py --model var-d6-128 --samples 50 --output kv.safetensors
    python scripts/calibrate_kv.py --model folder/ --samples 50 --images data/ --output folder/kv.safetensors

Pictures are drawn, classes in turn, as the model draws by default; or they are real ones, whose tokens are read without
guidance, which takes half as long. Text-conditional models read --prompt or --features. The file holds the heads'
variance (HACK's two kinds), the layers' selectivity (ScaleKV's), and what each head gives each scale (HeatKV's), and
the model's fingerprint: another model refuses it. In the model's folder, as kv.safetensors, it is found by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vtc.cli.generate_inputs import Conditions, conditions
from vtc.errors import ConfigError, FileError
from vtc.generators.calibrate import calibrate
from vtc.generators.infinity import Infinity
from vtc.generators.kv_cache.calibration import Calibration
from vtc.generators.pretrained import Condition, LoadedGenerator
from vtc.images import load_image, to_tensor
from vtc.models import DEFAULT_GENERATOR, load_generator
from vtc.script import run_script
from vtc.training.sources import open_pictures
from vtc.training.tokenizing import center_square


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse_args(arguments)
    return run_script(lambda: calibrate_model(args), "calibrate_kv")


def calibrate_model(args: argparse.Namespace) -> None:
    if args.samples < 1 or args.batch_size < 1:
        raise ConfigError("--samples and --batch_size are at least 1.")
    if not args.output.parent.is_dir():  # said before the pictures are drawn
        raise FileError(f"The output folder {args.output.parent} does not exist; create it first.")
    generator = load_generator(args.model).to(args.device)
    measured = measure(args, generator)
    measured.save(args.output)
    print(json.dumps(facts(measured)))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_GENERATOR, help="bundled name, folder, or Hub repository")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--samples", type=int, default=50, help="pictures")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture that is drawn")
    parser.add_argument("--images", type=Path, help="real pictures instead: a folder, one a class, or a pack")
    parser.add_argument("--split", default="train", help="of the real pictures")
    parser.add_argument("--classes", nargs="+", help="numbers or names, in turn; default all")
    parser.add_argument("--prompt", nargs="+", help="of a text-conditional model, in turn")
    parser.add_argument("--features", help="of a text-conditional model, instead of prompts")
    parser.add_argument("--text_encoder", help="for --prompt; default: the model's")
    parser.add_argument("--aspect", type=float, default=1.0, help="height over width, of a text-conditional model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace, generator: LoadedGenerator) -> Calibration:
    found = conditions(args, generator)
    batches = [range(i, min(i + args.batch_size, args.samples)) for i in range(0, args.samples, args.batch_size)]
    with tqdm(total=args.samples, unit="picture", file=sys.stderr, disable=args.quiet) as bar:
        def heard(done: int) -> None:
            bar.update(done - bar.n)

        if args.images is None:
            return calibrate(generator, [found.of(batch) for batch in batches], args.seed, None, heard, args.aspect)
        labels, words = zip(*(real(args, generator, found, batch) for batch in batches), strict=True)
        return calibrate(generator, labels, args.seed, words, heard, args.aspect)


def real(args: argparse.Namespace, generator: LoadedGenerator, found: Conditions,
         batch: range) -> tuple[Condition, Tensor]:
    """Some real pictures, spread over all there are: their classes, or the text, and their tokens."""
    pictures = open_pictures(args.images, args.split)
    chosen = [i * len(pictures) // args.samples for i in batch]
    _, height, width = generator.layout(args.aspect)
    images: list[Tensor] = []
    labels: list[int] = []
    for number in chosen:
        key, label, file = pictures.read(number)
        if height != width:
            raise ConfigError("Real pictures are read as squares: leave --aspect at 1.")
        images.append(to_tensor(center_square(load_image(file, name=key).pixels, height)))
        labels.append(class_of(generator, tuple(pictures.classes), label))
    words = generator.encode(torch.stack(images).to(generator.device), args.aspect).indices
    if isinstance(generator.model, Infinity):
        return found.of(batch), words
    return torch.tensor(labels, device=generator.device), words


def class_of(generator: LoadedGenerator, names: tuple[str, ...], label: int) -> int:
    """The model's number of a picture's class: by name, by number where there are as many, else that of no class."""
    assert not isinstance(generator.model, Infinity)
    known = generator.config.class_names
    if 0 <= label < len(names) and names[label] in known:
        return known.index(names[label])
    return label if len(names) == generator.model.classes and label >= 0 else generator.model.classes


def facts(measured: Calibration) -> dict[str, Any]:
    """What the file says, in short."""
    contextual = [len(heads) for heads in measured.contextual()]
    return {"model": measured.model, "samples": measured.samples, "layers": len(contextual),
            "heads": measured.variance.shape[1], "scales": len(measured.sizes), "contextual_heads": contextual,
            "drafting_layers": [list(layers) for layers in measured.drafters()]}


if __name__ == "__main__":
    sys.exit(main())
