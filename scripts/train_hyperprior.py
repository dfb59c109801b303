"""Train a codec of continuous latents: a small VAE and its hyperprior together, or the hyperprior of a given KL-VAE.

    python scripts/train_hyperprior.py --train_data_dir photos/ --validation_data_dir holdout/ \\
        --work_dir runs/hyperprior --output runs/hyperprior/codec --mixed_precision bf16

One run gives all qualities, one for each of --lambdas (the loss is lambda 255^2 MSE + bits per pixel; more lambda,
more bits). --output is a folder for `LatentCodec.from_pretrained`. With --autoencoder, a folder or a Hub repository of
diffusers' AutoencoderKL, AutoencoderDC or SC-VAE, that one stays as it is and only hyperprior and gains are trained;
--lambdas then weigh the error of latents of unit variance, and want to be some hundred times smaller. A run that was
stopped goes on with --resume_from_checkpoint latest. Runs under `accelerate launch` too. Needs the extra `compressai`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from vtc.codecs.hyperprior import HYPER_STRIDE, Hyperprior
from vtc.codecs.latent_codec import LatentCodec
from vtc.images import load_image
from vtc.script import run_script
from vtc.tokenizers.patch_vae import PatchVAE
from vtc.training.data import RandomCrops, image_files
from vtc.training.hyperprior import HyperpriorRecipe, HyperpriorTask, first_gains
from vtc.training.loop import (
    Loop,
    add_recipe_flags,
    make_accelerator,
    parse_recipe_args,
    recipe_from,
    seed_everything,
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--validation_data_dir", type=Path, help="pictures to measure on; none: no validation")
    parser.add_argument("--validation_limit", type=int, default=14, help="only the first so many, by name")
    parser.add_argument("--output", type=Path, required=True, help="folder for the codec")
    parser.add_argument("--autoencoder", help="a KL-VAE that stays as it is; default: a new PatchVAE, trained too")
    parser.add_argument("--channels", type=int, default=48, help="of PatchVAE's latents")
    parser.add_argument("--width", type=int, default=128, help="of PatchVAE")
    parser.add_argument("--depth", type=int, default=3, help="of PatchVAE")
    add_recipe_flags(parser, HyperpriorRecipe, ("work_dir",))
    return parse_recipe_args(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, write; 0 done, 1 failed (one sentence on stderr), 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: train(args), "train_hyperprior")


def new_codec(args: argparse.Namespace, recipe: HyperpriorRecipe) -> LatentCodec:
    """An untrained codec, its gains where they should start."""
    autoencoder: nn.Module
    if args.autoencoder:
        from vtc.tokenizers.diffusers_adapters import DiffusersAutoencoder
        autoencoder = DiffusersAutoencoder.from_pretrained(args.autoencoder)
        side = autoencoder.downsample * HYPER_STRIDE
        channels = autoencoder.encode(torch.zeros(1, 3, side, side)).values.shape[1]
    else:
        autoencoder, channels = PatchVAE(args.channels, args.width, args.depth), args.channels
    hyperprior = Hyperprior(channels, recipe.hyper_channels, recipe.hyper_width, len(recipe.weights))
    hyperprior.log_gain.data = first_gains(recipe, channels, autoencoder.downsample, bool(args.autoencoder))
    return LatentCodec(autoencoder, hyperprior)


def train(args: argparse.Namespace) -> None:
    recipe = recipe_from(HyperpriorRecipe, args)
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    codec = new_codec(args, recipe)
    validation = []
    if args.validation_data_dir:
        validation = [load_image(path).tensor()
                      for path in image_files(args.validation_data_dir)[: args.validation_limit]]
    crops = RandomCrops(image_files(args.train_data_dir), recipe.resolution, recipe.seed)
    task = HyperpriorTask(codec, recipe, crops, validation, freeze_autoencoder=bool(args.autoencoder))
    loop = Loop(task, recipe, accelerator, crops, args.output_dir)
    if args.resume_from_checkpoint:
        loop.resume(args.resume_from_checkpoint)
    loop.train()
    if accelerator.is_main_process:
        task.whole().save_pretrained(args.output)
        saved = LatentCodec.from_pretrained(args.output)  # float16 rounds: the fingerprint is that of the file
        print(f"fingerprint {saved.fingerprint().hex()}")


if __name__ == "__main__":
    sys.exit(main())
