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
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from vtc.errors import ConfigError
from vtc.script import run_script
from vtc.training.recipe import NameValue, add_recipe_flags, parse_recipe_args, recipe_from
from vtc.training.sources import add_data_flags, add_validation_flags, pictures_of
from vtc.training.tokenizer_recipe import TokenizerRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from vtc.tokenizers.base import Tokenizer
    from vtc.tokenizers.local_vq import LocalVQ
    from vtc.training.data import RandomCrops


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
    parser.add_argument("--init_from", help="a finished model to start from, without --continuous_steps; LocalVQ's "
                                            "codebook follows --codebook_size: to fewer words by K-means over its "
                                            "words, to more by K-means over its latents of training pictures")
    parser.add_argument("--init_networks", help="a finished model whose encoder and decoder to start from, with a "
                                                "quantizer of its own: other words, other scales")
    add_validation_flags(parser)
    add_data_flags(parser)
    add_recipe_flags(parser, TokenizerRecipe)
    return parse_recipe_args(parser, arguments)


def started_from(name_or_path: str, codebook_size: int | None, crops: RandomCrops | None) -> Tokenizer:
    """A finished model, ready to be trained on; a LocalVQ with a codebook of `codebook_size` words.

    crops: of the training pictures, where the words are to become more; None: they come from a checkpoint.
    """
    from vtc.models import load_tokenizer
    from vtc.tokenizers.local_vq import LocalVQ

    model = load_tokenizer(name_or_path).train()
    if codebook_size is None:
        return model
    if not isinstance(model, LocalVQ):
        raise ConfigError("--init_from with a --codebook_size is for LocalVQ.")
    return (grown(model, codebook_size, crops) if codebook_size > model.quantizer.codebook_size
            else clustered(model, codebook_size))


def clustered(model: LocalVQ, codebook_size: int) -> LocalVQ:
    """The model with its codebook clustered to `codebook_size` words."""
    from vtc.tokenizers.codebook_clustering import cluster_codebook, with_codebook

    if codebook_size == model.quantizer.codebook_size:
        return model
    usage = None if model.token_frequencies is None else model.token_frequencies[0].float()
    family = cluster_codebook(model.quantizer.codebook, [codebook_size], usage)
    return with_codebook(model, family.codebooks[codebook_size], family.maps[codebook_size]).train()


def grown(model: LocalVQ, codebook_size: int, crops: RandomCrops | None, share: int = 24) -> LocalVQ:
    """The model with `codebook_size` words, K-means centres of about `share` latents of training pictures each; zeros
    where there are no pictures.
    """
    import torch

    from vtc.tokenizers.codebook_clustering import with_codebook

    larger = with_codebook(model, model.quantizer.codebook.new_zeros(codebook_size, model.quantizer.dim)).train()
    if crops is None:
        return larger
    latents: list[Tensor] = []
    found = 0
    with torch.no_grad():
        while found < share * codebook_size:
            z = model.latents(crops[len(latents)][None].float() / 255)
            latents.append(z.flatten(2)[0].T)
            found += len(latents[-1])
    larger.quantizer.start_from(torch.cat(latents), torch.Generator().manual_seed(crops.seed))
    return larger


def networks_taken(model: Tokenizer, name_or_path: str) -> Tokenizer:
    """`model` with the encoder and decoder of a finished one; its quantizer stays as it is."""
    from vtc.models import load_tokenizer

    def networks(of: Tokenizer) -> dict[str, Tensor]:
        return {k: v for k, v in cast(Any, of).state_dict().items() if k.startswith(("encoder.", "decoder."))}

    wanted, found = networks(model), networks(load_tokenizer(name_or_path))
    shapes = [{k: tuple(v.shape) for k, v in tensors.items()} for tensors in (wanted, found)]
    if not found or shapes[0] != shapes[1]:
        raise ConfigError(f"The encoder and decoder of {name_or_path} are not of the shapes that the flags ask for.")
    cast(Any, model).load_state_dict(found, strict=False)
    return model


def model_of(args: argparse.Namespace, crops: RandomCrops | None) -> Tokenizer:
    """The model that the flags ask for; `crops` are those that it will be trained on, None where a checkpoint is to
    bring its weights.
    """
    from vtc.tokenizers.composed import compose
    from vtc.training.tokenizer import make_tokenizer

    size = {} if args.codebook_size is None else {"codebook_size": args.codebook_size}
    model: Tokenizer
    if args.init_from:
        model = started_from(args.init_from, args.codebook_size, crops)
    elif args.quantizer:
        model = compose(args.model, args.quantizer, args.model_args, args.quantizer_args | size)
    else:
        model = make_tokenizer(args.model, args.model_args | size)
    if args.init_networks:
        if args.init_from:
            raise ConfigError("--init_from takes the quantizer too, --init_networks does not: give one of them.")
        model = networks_taken(model, args.init_networks)
    if args.stage2 and hasattr(model, "to_generative") and not getattr(model, "generative", True):
        stage1: Any = model
        model = stage1.to_generative()
    return model


def smaller_codebooks(name_or_path: str | None) -> list[Tensor]:
    """Those of the family in a model's folder."""
    from vtc import hub
    from vtc.tokenizers.tokenizer_family import FAMILY, TokenizerFamily

    if name_or_path is None:
        raise ConfigError("--family_share needs --init_from: a finished model with a family.")
    family = TokenizerFamily.load(hub.fetch(name_or_path, FAMILY))
    return [family.members[size]["quantizer.codebook"] for size in family.about.sizes]


def train(args: argparse.Namespace) -> None:
    from vtc.tokenizers.lpips import LPIPS
    from vtc.training.checkpoints import find_checkpoint
    from vtc.training.data import RandomCrops
    from vtc.training.loop import Loop, make_accelerator, seed_everything
    from vtc.training.tokenizer import TokenizerTask
    from vtc.training.validation import validation_of

    recipe = recipe_from(TokenizerRecipe, args)
    if args.init_from:
        recipe = replace(recipe, continuous_steps=0)  # a finished model has its words, and would lose them
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    crops = RandomCrops(pictures_of(args), recipe.resolution, recipe.seed, recipe.min_scale)
    goes_on = args.resume_from_checkpoint and find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    model = model_of(args, None if goes_on else crops)
    validation = validation_of(args, recipe.validation_limit, accelerator.device)
    perceptual = LPIPS(cast(Any, recipe.perceptual_backbone), args.lpips_weights) if (
        recipe.perceptual_weight) else None
    codebooks = smaller_codebooks(args.init_from) if recipe.family_share else []
    task = TokenizerTask(model, recipe, perceptual, validation, codebooks)
    Loop(task, recipe, accelerator, crops, args.output_dir).run(args.resume_from_checkpoint)
    if crops.broken:
        print(f"{crops.broken} pictures could not be read and were skipped.", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 failed with one sentence on stderr, 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: train(args), "train_tokenizer")


if __name__ == "__main__":
    sys.exit(main())
