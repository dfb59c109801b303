"""Train a tokenizer: any of our networks, on pictures of your own.

    accelerate launch scripts/train_tokenizer.py --train_data_dir photos/ --output_dir runs/localvq
    accelerate launch scripts/train_tokenizer.py --config var.yaml --train_data_dir 'shards/{000..127}.tar'
    python scripts/train_tokenizer.py --model wetok --model_args channels=64 groups=4 --gan_weight 0.1 ...
    python scripts/train_tokenizer.py --model vqgan --quantizer fsq --quantizer_args 'levels=[8,8,8,5,5]' ...

or plain `python`. Pictures: a folder, a pack (.npz), WebDataset shards, or a Hugging Face dataset. A run that was
stopped goes on with --resume_from_checkpoint latest. The finished model lies in OUTPUT_DIR/model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vtc.errors import ConfigError
from vtc.training.recipe import NameValue, add_recipe_flags, parse_recipe_args, recipe_from
from vtc.training.sources import add_data_flags, pictures_of
from vtc.training.tokenizer_recipe import TokenizerRecipe

if TYPE_CHECKING:
    from vtc.tokenizers.base import Tokenizer
    from vtc.tokenizers.local_vq import LocalVQ


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="local_vq", help="local_vq (default), pyramid_vq, vqgan, ibq, llamagen, "
                                                            "wetok, open_magvit2, var_vqvae, infinity_vae, ...")
    parser.add_argument("--model_args", nargs="+", action=NameValue, default={}, metavar="NAME=VALUE",
                        help="arguments of its constructor; values as in JSON")
    parser.add_argument("--quantizer", help="another quantizer in the network of local_vq, vqgan or wetok: vq, "
                                            "gradient_vq, ibq, lfq, group_lfq, bsq, fsq, product, residual, "
                                            "multi_scale_vq, multi_scale_bsq")
    parser.add_argument("--quantizer_args", nargs="+", action=NameValue, default={}, metavar="NAME=VALUE",
                        help="arguments of its constructor")
    parser.add_argument("--codebook_size", type=int, help="short for --model_args codebook_size=N")
    parser.add_argument("--init_from", help="a finished model to start from; LocalVQ's codebook is clustered to "
                                            "--codebook_size, by K-means weighted with its token frequencies")
    parser.add_argument("--validation_data_dir", help="whole pictures to measure on; none: no validation")
    parser.add_argument("--validation_split", default="val", help="of a pack or dataset (default: %(default)s)")
    parser.add_argument("--lpips_weights", type=Path, help="folder of backbone features; default VTC_LPIPS_WEIGHTS")
    add_data_flags(parser)
    add_recipe_flags(parser, TokenizerRecipe)
    return parse_recipe_args(parser, arguments)


def started_from(name_or_path: str, codebook_size: int | None = None) -> Tokenizer:
    """A finished model, ready to be trained on; a LocalVQ with a codebook of `codebook_size` words."""
    from vtc.models import load_tokenizer
    from vtc.tokenizers.local_vq import LocalVQ

    model = load_tokenizer(name_or_path).train()
    if codebook_size is None:
        return model
    if not isinstance(model, LocalVQ):
        raise ConfigError("--init_from with a --codebook_size is for LocalVQ.")
    return clustered(model, codebook_size)


def clustered(model: LocalVQ, codebook_size: int) -> LocalVQ:
    """The model with its codebook clustered to `codebook_size` words."""
    from vtc.tokenizers.codebook_clustering import cluster_codebook, with_codebook

    if codebook_size == model.quantizer.codebook_size:
        return model
    usage = None if model.token_frequencies is None else model.token_frequencies[0].float()
    family = cluster_codebook(model.quantizer.codebook, [codebook_size], usage)
    return with_codebook(model, family.codebooks[codebook_size], family.maps[codebook_size]).train()


def model_of(args: argparse.Namespace) -> Tokenizer:
    """The model that the flags ask for."""
    from vtc.tokenizers.composed import compose
    from vtc.training.tokenizer import make_tokenizer

    size = {} if args.codebook_size is None else {"codebook_size": args.codebook_size}
    model: Tokenizer
    if args.init_from:
        model = started_from(args.init_from, args.codebook_size)
    elif args.quantizer:
        model = compose(args.model, args.quantizer, args.model_args, args.quantizer_args | size)
    else:
        model = make_tokenizer(args.model, args.model_args | size)
    if args.stage2 and hasattr(model, "to_generative") and not getattr(model, "generative", True):
        stage1: Any = model
        model = stage1.to_generative()
    return model


def train(args: argparse.Namespace) -> None:
    from vtc.tokenizers.lpips import LPIPS
    from vtc.training.data import RandomCrops, validation_pictures
    from vtc.training.loop import Loop, make_accelerator, seed_everything
    from vtc.training.tokenizer import TokenizerTask

    recipe = recipe_from(TokenizerRecipe, args)
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    model = model_of(args)
    pictures = pictures_of(args)
    validation = validation_pictures(args.validation_data_dir, args.validation_split, recipe.validation_limit)
    perceptual = LPIPS(cast(Any, recipe.perceptual_backbone), args.lpips_weights) if (
        recipe.perceptual_weight) else None
    judge = LPIPS("alex", args.lpips_weights) if validation else None
    task = TokenizerTask(model, recipe, perceptual, judge, validation)
    crops = RandomCrops(pictures, recipe.resolution, recipe.seed, recipe.min_scale)
    Loop(task, recipe, accelerator, crops, args.output_dir).run(args.resume_from_checkpoint)
    if crops.broken:
        print(f"{crops.broken} pictures could not be read and were skipped.", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 failed with one sentence on stderr, 128 + n stopped by signal n."""
    args = parse_args(arguments)
    from vtc.training.loop import run_script

    return run_script(lambda: train(args), "train_tokenizer")


if __name__ == "__main__":
    sys.exit(main())
