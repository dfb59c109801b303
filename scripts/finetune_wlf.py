"""Fine-tune a flow-matching transformer of diffusers (SD3, Flux) by the wavelet loss on latents, WLF.

    accelerate launch scripts/finetune_wlf.py --transformer flux/ --transformer_subfolder transformer \\
        --vae runs/sc_vae/model --prompt_embeddings prompts.safetensors --train_data_dir photos/ --output_dir runs/wlf

The latents are those of any AutoencoderKL, or of an SC-VAE, whose folder --vae names. Prompts are embedded beforehand:
`save_prompt_embeddings` of `vtc.training.wlf` writes the file, a row for each picture, by its path, or one row for all.
With equal --band_weights, as published, the loss is the plain squared error on clean latents; see
`tokenizers/wavelet_loss.py`. A run that was stopped goes on with --resume_from_checkpoint latest. The finished
transformer lies in OUTPUT_DIR/model, a folder of diffusers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vtc.errors import ConfigError
from vtc.script import run_script
from vtc.training.recipe import add_recipe_flags, parse_recipe_args, recipe_from
from vtc.training.sources import add_data_flags, pictures_of
from vtc.training.wlf_recipe import WLFRecipe


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer", help="SD3Transformer2DModel or FluxTransformer2DModel: a folder or a "
                                              "repository on the Hub")
    parser.add_argument("--transformer_subfolder", help="of it, such as transformer")
    parser.add_argument("--transformer_config", type=Path,
                        help="instead: a JSON file with _class_name and arguments, for random weights")
    parser.add_argument("--vae", required=True, help="AutoencoderKL or ScaleConsistentVAE: a folder or a repository")
    parser.add_argument("--vae_subfolder", help="of it, such as vae")
    parser.add_argument("--prompt_embeddings", type=Path, required=True, help="file of save_prompt_embeddings")
    parser.add_argument("--validation_data_dir", help="pictures to measure bands on; none: no validation")
    parser.add_argument("--validation_split", default="val", help="of a pack or dataset (default: %(default)s)")
    add_data_flags(parser)
    add_recipe_flags(parser, WLFRecipe)
    return parse_recipe_args(parser, arguments)


def train(args: argparse.Namespace) -> None:
    import torch

    from vtc.tokenizers.diffusers_adapters import DiffusersAutoencoder
    from vtc.training.loop import Loop, make_accelerator, seed_everything
    from vtc.training.sources import open_pictures
    from vtc.training.wlf import FlowTransformer, PromptedPictures, PromptEmbeddings, WLFTask

    recipe = recipe_from(WLFRecipe, args)
    if bool(args.transformer) == bool(args.transformer_config):
        raise ConfigError("Give --transformer, or --transformer_config for one with random weights.")
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    prompts = PromptEmbeddings(args.prompt_embeddings)
    data = PromptedPictures(pictures_of(args), prompts, recipe.resolution, recipe.seed, recipe.min_scale)
    validation = None
    if args.validation_data_dir:
        held_out = PromptedPictures(open_pictures(args.validation_data_dir, args.validation_split), prompts,
                                    recipe.resolution, 0, 1.0)
        samples = [held_out[n] for n in range(min(4, len(held_out.crops.pictures)))]
        validation = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    transformer = (FlowTransformer.from_pretrained(args.transformer, args.transformer_subfolder, recipe.guidance)
                   if args.transformer else FlowTransformer.from_config(args.transformer_config, recipe.guidance))
    autoencoder = DiffusersAutoencoder.from_pretrained(args.vae, args.vae_subfolder)
    task = WLFTask(transformer, autoencoder, recipe, validation)
    task.check(prompts)
    Loop(task, recipe, accelerator, data, args.output_dir).run(args.resume_from_checkpoint)
    if data.crops.broken:
        print(f"{data.crops.broken} pictures could not be read and were skipped.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 failed with one sentence on stderr, 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: train(args), "finetune_wlf")


if __name__ == "__main__":
    sys.exit(main())
