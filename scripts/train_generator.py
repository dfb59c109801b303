"""Train a generator on the tokens of a finished tokenizer: VAR, a raster model (LlamaGen), or Infinity.

    python scripts/train_generator.py --kind var --tokenizer runs/tokenizer/model --train_data_dir imagenet/ \\
        --depth 16 --width 1024 --heads 16 --output_dir runs/var-d16
    python scripts/train_generator.py --kind llamagen --tokenizer ... --tokens imagenet-tokens/ --output_dir ...
    python scripts/train_generator.py --kind infinity --tokenizer ... --train_data_dir ... --text_features t5.st

or `accelerate launch`. Pictures lie in a folder for each class, below train/ and val/, or in one .npz pack; their
tokens are made once, into the output folder, or come from scripts/tokenize_dataset.py with --tokens. Infinity reads
pictures, and a row of text features for each picture or class. The finished folder is for `vtc-generate` and
`load_generator`. A run that was stopped goes on with --resume_from_checkpoint latest. Launch lines, and what they cost:
docs/training-generators.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtc.errors import ConfigError
from vtc.generators.infinity import SCALES_OF_SIZE, Infinity, scales_for
from vtc.generators.llamagen import LlamaGen
from vtc.generators.pretrained import GenerationConfig
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.var import VAR
from vtc.models import load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.layers import MultiScaleTokenizer
from vtc.training.generator import (
    GeneratorRecipe,
    GeneratorTask,
    InfinityTask,
    RasterTask,
    TextFeatures,
    TrainingPictures,
    VARTask,
)
from vtc.training.labelled import LabelledImages, labelled_images
from vtc.training.loop import Loop, add_recipe_flags, make_accelerator, parse_recipe_args, recipe_from
from vtc.training.token_shards import TokenShards, TrainingTokens
from vtc.training.tokenizing import DatasetTokenizer


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("var", "llamagen", "infinity"), default="var")
    parser.add_argument("--tokenizer", required=True, help="bundled name, folder, or Hub repository")
    parser.add_argument("--train_data_dir", type=Path, help="folder of classes, with train/ and val/, or an .npz pack")
    parser.add_argument("--tokens", type=Path, help="token shards of scripts/tokenize_dataset.py, instead of pictures")
    parser.add_argument("--validation_tokens", type=Path, help="with --tokens")
    parser.add_argument("--text_features", type=Path, help="Infinity: 'features' (N, T, C) and 'mask' (N, T)")
    parser.add_argument("--resolution", type=int, help="of the pictures; default what the tokenizer was trained at")
    parser.add_argument("--views", choices=("center", "flip", "ten_crop"), default="flip", help="of each picture")
    parser.add_argument("--classes", type=int, help="with --tokens; default the largest label and one")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--hidden", type=int, help="LlamaGen: of the feed-forward")
    parser.add_argument("--shared_modulation", action="store_true", help="VAR: one adaptive layer for all blocks")
    parser.add_argument("--init_from", help="a finished generator of the same kind and shape to start from")
    parser.add_argument("--guidance", type=float, default=2.0, help="how the finished model is guided by default")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    add_recipe_flags(parser, GeneratorRecipe)
    return parse_recipe_args(parser, arguments)


def resolution_of(args: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """The pictures' side."""
    if args.resolution:
        return args.resolution
    return tokenizer.sides[-1] * tokenizer.downsample if isinstance(tokenizer, MultiScaleTokenizer) else 256


def shards(args: argparse.Namespace, tokenizer: Tokenizer, accelerator: Any,
           ) -> tuple[TokenShards, TokenShards | None, tuple[str, ...]]:
    """Training and validation tokens, made where pictures are given, and the names of the classes."""
    if args.tokens is not None:
        validation = TokenShards(args.validation_tokens, tokenizer, labels=True) if args.validation_tokens else None
        return TokenShards(args.tokens, tokenizer, labels=True), validation, ()
    if args.train_data_dir is None:
        raise ConfigError("Give pictures with --train_data_dir, or their tokens with --tokens.")
    found: list[TokenShards] = []
    images = labelled_images(args.train_data_dir)
    for split, pictures in (("train", images), ("val", held_out(args.train_data_dir, images.classes))):
        if pictures is not None:
            folder = args.output_dir / "tokens" / split
            tokenizer.to(accelerator.device).eval()
            done = DatasetTokenizer(pictures, tokenizer, folder, resolution_of(args, tokenizer), batch_size=32,
                                    views=args.views if split == "train" else "center",
                                    ).run(accelerator.process_index, accelerator.num_processes)
            done.tell_problems()
            accelerator.wait_for_everyone()
            found.append(TokenShards(folder, tokenizer, labels=True))
    return found[0], found[1] if len(found) > 1 else None, images.classes


def held_out(path: Path, classes: tuple[str, ...]) -> LabelledImages | None:
    """The pictures of the split "val", where there is one. ConfigError where its classes, which are numbered by their
    names, are not those of the training pictures.
    """
    if not path.is_file() and not (path / "val").is_dir():
        return None
    images = labelled_images(path, "val")
    if images.classes != classes:
        raise ConfigError(f"The classes of train and val in {path} differ: {len(classes)} and {len(images.classes)}; "
                          "their folders must have the same names.")
    return images


def token_task(args: argparse.Namespace, recipe: GeneratorRecipe, tokenizer: Tokenizer, config: dict[str, Any],
               accelerator: Any) -> tuple[GeneratorTask, TrainingTokens]:
    """VAR and the raster model."""
    side = resolution_of(args, tokenizer)
    layout = tokenizer.layout(side, side)
    if len(layout.vocab) > 1 or (args.kind == "llamagen" and len(layout.scales) > 1):
        raise ConfigError(f"--kind {args.kind} cannot draw the tokens of a {type(tokenizer).__name__}.")
    train, validation, names = shards(args, tokenizer, accelerator)
    classes = len(names) or args.classes or int(train.labels.max()) + 1
    (vocab,) = layout.vocab
    settings = GenerationConfig(class_names=names, **config)
    shape = {"depth": args.depth, "width": args.width, "heads": args.heads, "classes": classes, "codebook_size": vocab}
    task: GeneratorTask
    if args.kind == "var":
        if not isinstance(tokenizer, MultiScaleTokenizer):
            raise ConfigError(f"VAR draws scales, and {type(tokenizer).__name__} has none.")
        model = VAR.from_pretrained(args.init_from) if args.init_from else VAR(
            **shape, code_dim=tokenizer.quantizer.dim, sides=[rows for rows, _ in train.facts.layout.scales],
            shared_modulation=args.shared_modulation)
        task = VARTask(model.train(), tokenizer, recipe, validation, settings)
    else:
        (grid,) = train.facts.layout.scales
        raster = LlamaGen.from_pretrained(args.init_from) if args.init_from else LlamaGen(
            **shape, hidden=args.hidden, side=grid[0])
        task = RasterTask(raster.train(), tokenizer, recipe, validation, settings)
    return task, TrainingTokens(train, recipe.seed)


def infinity_task(args: argparse.Namespace, recipe: GeneratorRecipe, tokenizer: Tokenizer, config: dict[str, Any],
                  ) -> tuple[GeneratorTask, TrainingPictures]:
    if not isinstance(tokenizer, InfinityVAE) or args.train_data_dir is None or args.text_features is None:
        raise ConfigError("Infinity is trained on pictures (--train_data_dir), with an InfinityVAE as --tokenizer and "
                          "--text_features.")
    images, side = labelled_images(args.train_data_dir), resolution_of(args, tokenizer)
    texts = TextFeatures(args.text_features, len(images), len(images.classes))
    model = Infinity.from_pretrained(args.init_from) if args.init_from else Infinity(
        args.depth, args.width, args.heads, bits=tokenizer.quantizer.dim, text_width=texts.features.shape[2],
        text_tokens=texts.features.shape[1], levels=15, chunks=1)
    size = drawn_size(side, tokenizer.downsample * model.patch)
    held = held_out(args.train_data_dir, images.classes) if texts.by_class else None
    validation = [] if held is None else batches(held, texts, side, recipe)
    return (InfinityTask(model.train(), tokenizer, recipe, scales_for(1.0, size), validation,
                         GenerationConfig(**config, size=size)),
            TrainingPictures(images, texts, side, recipe.seed, flip=args.views != "center"))


def drawn_size(side: int, stride: int) -> str:
    """The size whose squares have `side` pixels, `stride` a cell: what is trained is what will be drawn."""
    sizes = {scales_for(1.0, size)[-1][0] * stride: size for size in SCALES_OF_SIZE}
    if side not in sizes:
        known = ", ".join(map(str, sizes))
        raise ConfigError(f"Infinity draws squares of {known} pixels with this tokenizer, and --resolution is {side}.")
    return sizes[side]


def batches(images: LabelledImages, texts: TextFeatures, side: int, recipe: GeneratorRecipe) -> list[Any]:
    """Validation pictures with their texts, as many as the recipe says, evenly spread."""
    count = min(recipe.validation_samples or len(images), len(images))
    numbers = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()
    made = []
    for first in range(0, count, recipe.train_batch_size):
        part = numbers[first : first + recipe.train_batch_size]
        rows = [texts.of(n, int(images.labels[n])) for n in part]
        made.append((torch.stack([images.picture(n, side) for n in part]), torch.stack([f for f, _ in rows]),
                     torch.stack([m for _, m in rows])))
    return made


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    recipe = recipe_from(GeneratorRecipe, args)
    accelerator = make_accelerator(recipe, args.output_dir)
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer(args.tokenizer).eval()
    config = {"sampling": Sampling(args.temperature, args.top_k, args.top_p), "guidance": Guidance(args.guidance)}
    task: GeneratorTask
    data: Any
    if args.kind == "infinity":
        task, data = infinity_task(args, recipe, tokenizer, config)
    else:
        task, data = token_task(args, recipe, tokenizer, config, accelerator)
    Loop(task, recipe, accelerator, data, args.output_dir).run(args.resume_from_checkpoint)


if __name__ == "__main__":
    sys.exit(run_script(main, "train_generator"))
