"""Cluster the codebook of a VQGAN and fine-tune it with frozen networks, for compression to 0.01 to 0.05 bits a pixel.

    accelerate launch scripts/finetune_vqgan_codebook.py --model vqgan_imagenet_f16_16384/ --codebook_size 256 \\
        --train_data_dir photos/ --output_dir runs/vqgan-256

or plain `python`; one run a size. The model is a folder (`vtc-import` makes one of a published checkpoint) of VQGAN,
IBQ or LlamaGenVQ. The codebook, the two 1x1 convolutions beside it and a discriminator train (Mao et al., 2307.08265).
A run that was stopped goes on with --resume_from_checkpoint latest. The finished model lies in OUTPUT_DIR/model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, cast

from vtc.script import run_script
from vtc.training.recipe import add_recipe_flags, parse_recipe_args, recipe_from
from vtc.training.sources import add_data_flags, add_validation_flags, pictures_of


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    from vtc.training.codebook_task import CodebookTaskRecipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a finished model: bundled name, folder, or Hub repository")
    parser.add_argument("--codebook_size", type=int, required=True, help="words after clustering")
    parser.add_argument("--weighted", action="store_true", help="in K-means words count as often as they occur; "
                                                                "default: each once, as published")
    add_validation_flags(parser)
    add_data_flags(parser)
    add_recipe_flags(parser, CodebookTaskRecipe)
    return parse_recipe_args(parser, arguments)


def train(args: argparse.Namespace) -> None:
    from vtc.models import load_tokenizer
    from vtc.tokenizers.discriminators import PatchGAN
    from vtc.tokenizers.lpips import LPIPS
    from vtc.training.codebook_task import CodebookTask, CodebookTaskRecipe, clustered
    from vtc.training.data import RandomCrops
    from vtc.training.loop import Loop, make_accelerator, seed_everything
    from vtc.training.validation import validation_of

    recipe = recipe_from(CodebookTaskRecipe, args)
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    model = clustered(load_tokenizer(args.model), args.codebook_size, args.weighted, recipe.seed)
    validation = validation_of(args, recipe.validation_limit, accelerator.device)
    backbone = cast(Any, recipe.perceptual_backbone)
    perceptual = LPIPS(backbone, args.lpips_weights) if recipe.perceptual_weight else None
    size = recipe.discriminator_channels, recipe.discriminator_layers
    critic = PatchGAN(*size, cast(Any, recipe.discriminator_norm)) if recipe.gan_weight else None
    crops = RandomCrops(pictures_of(args), recipe.resolution, recipe.seed, recipe.min_scale)
    task = CodebookTask(model, recipe, perceptual, critic, validation)
    Loop(task, recipe, accelerator, crops, args.output_dir).run(args.resume_from_checkpoint)
    if crops.broken:
        print(f"{crops.broken} pictures could not be read and were skipped.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 failed with one sentence on stderr, 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: train(args), "finetune_vqgan_codebook")


if __name__ == "__main__":
    sys.exit(main())
