"""Train the concealer of a tokenizer and its family: the transformer that fills in lost tokens.

    python scripts/train_concealer.py --model localvq-f16-8192-r3 --train_data_dir photos/ --output_dir runs/concealer

or `accelerate launch`. A run that was stopped goes on with --resume_from_checkpoint latest. The result,
OUTPUT_DIR/concealer.safetensors, goes into the model's folder. The photographs are encoded once and kept in
OUTPUT_DIR/tokens; tokens of smaller codebooks are those of the model's own, each by its nearest codeword. A family that
lies beside the model is trained for as a whole.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

from vtc.codecs.concealer import CONCEALER, Concealer
from vtc.errors import ConfigError
from vtc.models import family_of, load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.tokenizers.vector_quantizer import nearest_codeword
from vtc.training.concealer import BatchNumbers, ConcealerRecipe, ConcealerTask
from vtc.training.data import image_files
from vtc.training.loop import (
    Loop,
    add_recipe_flags,
    make_accelerator,
    parse_recipe_args,
    recipe_from,
    seed_everything,
)
from vtc.training.perceptual import PerceptualLoss
from vtc.training.tokens import TokenGrids, cached_grids


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name or folder of a LocalVQ")
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--validation_data_dir", type=Path, help="pictures to measure on; none: no validation")
    parser.add_argument("--token_cache_dir", type=Path, help="where the photographs' tokens are kept; default "
                        "OUTPUT_DIR/tokens; that of train_prior.py, OUTPUT_DIR/train, serves")
    parser.add_argument("--views", type=int, default=4, help="of each photograph: as it is, and shrunk or mirrored")
    parser.add_argument("--init_from", type=Path, help="a concealer's file to start from")
    parser.add_argument("--lpips_weights", type=Path, help="folder of backbone features; default VTC_LPIPS_WEIGHTS")
    network = Concealer().config
    for name in ("width", "depth", "heads"):
        parser.add_argument(f"--{name}", type=int, default=network[name])
    parser.add_argument("--temperature", type=float, default=1.0, help="of mean codewords, see Concealer")
    parser.add_argument("--gain", type=float, default=1.0, help="of mean codewords, see Concealer")
    add_recipe_flags(parser, ConcealerRecipe)
    return parse_recipe_args(parser, arguments)


def family_members(name: str) -> dict[int, LocalVQ]:
    """The model and all members of its family, by the size of their codebooks."""
    family = family_of(name)
    models = [load_tokenizer(name), *(load_tokenizer(name, size=size) for size in (family.sizes if family else ()))]
    members = {model.quantizer.codebook_size: model for model in models if isinstance(model, LocalVQ)}
    if len(members) < len(models):
        raise ConfigError(f"Concealment is trained for LocalVQ, and {name!r} is a {type(models[0]).__name__}.")
    return members


def train(args: argparse.Namespace) -> None:
    recipe = recipe_from(ConcealerRecipe, args)
    accelerator = make_accelerator(recipe, args.output_dir)
    members = family_members(args.model)
    largest = max(members)
    codebook = members[largest].quantizer.codewords
    maps = {size: nearest_codeword(codebook, member.quantizer.codewords)
            for size, member in members.items() if size != largest}

    def encoded(folder: Path, pictures: Path, views: int, bfloat16: bool = False) -> list[TokenGrids]:
        with accelerator.main_process_first():
            # The views are those of seed 0 whatever the run's, so that runs can share them.
            grids = cached_grids(folder, [members[largest]], image_files(pictures), views, seed=0,
                                 bfloat16=bfloat16)
        return [grid.mapped(largest, maps) for grid in grids]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    views = encoded(args.token_cache_dir or args.output_dir / "tokens", args.train_data_dir, args.views,
                    recipe.mixed_precision == "bf16")
    validation = args.validation_data_dir and encoded(args.output_dir / "validation", args.validation_data_dir, 1)[0]
    seed_everything(recipe.seed)
    model = Concealer.load(args.init_from) if args.init_from else Concealer(
        codebook.shape[1], width=args.width, depth=args.depth, heads=args.heads)
    model.temperature, model.gain = args.temperature, args.gain
    loss = PerceptualLoss(LPIPS("squeeze", args.lpips_weights)) if recipe.picture_steps else None
    task = ConcealerTask(model, recipe, members, views, image_files(args.train_data_dir), loss, validation or None)
    average = Loop(task, recipe, accelerator, BatchNumbers(), args.output_dir).run(args.resume_from_checkpoint)
    if accelerator.is_main_process:
        cast(Concealer, average).save(args.output_dir / CONCEALER, members[largest].fingerprint().hex())


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 failed (one sentence on stderr), 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: train(args), "train_concealer")


if __name__ == "__main__":
    sys.exit(main())
