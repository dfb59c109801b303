"""Train an autoencoder with continuous latents: a KL-VAE, an EQ-VAE, or the decoder of an SC-VAE.

    accelerate launch scripts/train_vae.py --train_data_dir photos/ --output_dir runs/vae            # AutoencoderKL
    python scripts/train_vae.py --network patch_vae --model_args channels=32 --train_data_dir photos/ ...
    python scripts/train_vae.py --init_from vae/ --eq_prior 0.5 ...                                  # EQ-VAE
    python scripts/train_vae.py --objective scale_consistent --init_from flux/ --subfolder vae ...   # SC-VAE

Each objective has flags of its own: --objective scale_consistent --help lists the second one's. Pictures: a folder, a
pack (.npz), WebDataset shards, or a Hugging Face dataset. A run that was stopped goes on with --resume_from_checkpoint
latest. The finished model lies in OUTPUT_DIR/model, a folder of diffusers (patch_vae: of vtc).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import ConfigError, first_sentence
from vtc.script import run_script
from vtc.training.recipe import NameValue, add_recipe_flags, parse_recipe_args, read_config, recipe_from
from vtc.training.sources import add_data_flags, add_validation_flags, pictures_of
from vtc.training.vae_recipe import KLRecipe, ScaleConsistentRecipe, VAERecipe

if TYPE_CHECKING:
    from vtc.tokenizers.scale_consistent_vae import ScaleConsistentVAE
    from vtc.training.vae import KLAutoencoder, PatchAutoencoder, VAETask
    from vtc.training.validation import Validation

OBJECTIVES: dict[str, type[VAERecipe]] = {"kl": KLRecipe, "scale_consistent": ScaleConsistentRecipe}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="kl")
    parser.add_argument("--network", choices=("autoencoder_kl", "patch_vae"), default="autoencoder_kl")
    parser.add_argument("--model_args", nargs="+", action=NameValue, default={}, metavar="NAME=VALUE",
                        help="arguments of the network's constructor; values as in JSON")
    parser.add_argument("--init_from", help="a finished model to start from: a folder or a repository on the Hub")
    parser.add_argument("--subfolder", help="of --init_from and --teacher")
    parser.add_argument("--teacher", help="scale_consistent: the frozen teacher; default --init_from")
    parser.add_argument("--alignment", choices=("upstream", "centered"), default="centered",
                        help="scale_consistent: upstream learns the published decoder's shift of one pixel, which "
                             "its weights need (default: %(default)s)")
    add_validation_flags(parser)
    add_data_flags(parser)
    add_recipe_flags(parser, OBJECTIVES[objective_of(arguments)])
    return parse_recipe_args(parser, arguments)


def objective_of(arguments: Sequence[str] | None) -> str:
    """What the command line says, or the file that it names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective")
    first.add_argument("--config", type=Path)
    known = first.parse_known_args(arguments)[0]
    try:
        name = known.objective or (read_config(known.config) if known.config else {}).get("objective")
    except ConfigError:
        name = None  # said by the parser, which reads the file again
    return name if name in OBJECTIVES else "kl"


def autoencoder_of(args: argparse.Namespace, step: float) -> KLAutoencoder | PatchAutoencoder:
    """The model that the flags ask for."""
    from vtc.tokenizers.diffusers_adapters import AutoencoderKL, DiffusersAutoencoder
    from vtc.tokenizers.patch_vae import PatchVAE
    from vtc.training.vae import KLAutoencoder, PatchAutoencoder

    if args.init_from and args.model_args:
        raise ConfigError("--init_from brings the model's arguments along; leave --model_args out.")
    if args.network == "patch_vae":
        model = PatchVAE.from_pretrained(args.init_from) if args.init_from else made(PatchVAE, args.model_args)
        return PatchAutoencoder(model, step)
    if args.init_from:
        network = DiffusersAutoencoder.from_pretrained(args.init_from, args.subfolder).model
        if not isinstance(network, AutoencoderKL):
            raise ConfigError(f"{args.init_from} holds a {type(network).__name__}; an AutoencoderKL is needed.")
        return KLAutoencoder(network)
    return KLAutoencoder(made(AutoencoderKL, args.model_args))


def made(kind: Any, arguments: dict[str, Any]) -> Any:
    """A network with random weights."""
    try:
        return kind(**arguments)
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{kind.__name__} cannot be made of {arguments}: {first_sentence(error)}.") from error


def student_and_teacher(args: argparse.Namespace) -> tuple[ScaleConsistentVAE, ScaleConsistentVAE]:
    """Both from the same weights, at strides 2 and 1."""
    from vtc.tokenizers.diffusers_adapters import DiffusersAutoencoder
    from vtc.tokenizers.scale_consistent_vae import ScaleConsistentVAE

    if not args.init_from or args.model_args or args.network != "autoencoder_kl":
        raise ConfigError("Scale-consistent training starts from an AutoencoderKL: give its folder as --init_from, and "
                          "no --model_args.")

    def loaded(path: str) -> Any:
        return DiffusersAutoencoder.from_pretrained(path, args.subfolder, stride=2, alignment=args.alignment).model

    student, same = loaded(args.init_from), loaded(args.teacher or args.init_from)
    config = {name: value for name, value in same.config.items() if not name.startswith("_")}
    teacher = ScaleConsistentVAE(**{**config, "stride": 1})
    teacher.load_state_dict(same.state_dict())
    return student, teacher


def task_of(args: argparse.Namespace, recipe: VAERecipe, validation: Validation | None) -> VAETask:
    from vtc.tokenizers.discriminators import PatchGAN, SpectralDiscriminator
    from vtc.tokenizers.lpips import LPIPS
    from vtc.training.vae import KLTask, ScaleConsistentStudent, ScaleConsistentTask

    backbone: Any = recipe.perceptual_backbone
    perceptual = LPIPS(backbone, args.lpips_weights) if recipe.perceptual_weight else None
    size = recipe.discriminator_channels, recipe.discriminator_layers
    if isinstance(recipe, ScaleConsistentRecipe):
        student, teacher = student_and_teacher(args)
        critic = SpectralDiscriminator(*size) if recipe.adversarial_weight else None
        return ScaleConsistentTask(ScaleConsistentStudent(student), teacher, recipe, critic, perceptual, validation)
    assert isinstance(recipe, KLRecipe)
    norm: Any = recipe.discriminator_norm
    judge = PatchGAN(*size, norm) if recipe.adversarial_weight else None
    return KLTask(autoencoder_of(args, recipe.quantization_step), recipe, judge, perceptual, validation)


def train(args: argparse.Namespace) -> None:
    from vtc.training.data import RandomCrops
    from vtc.training.loop import Loop, make_accelerator, seed_everything
    from vtc.training.validation import validation_of

    recipe = recipe_from(OBJECTIVES[args.objective], args)
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    validation = validation_of(args, recipe.validation_limit, accelerator.device)
    crops = RandomCrops(pictures_of(args), recipe.resolution, recipe.seed, recipe.min_scale)
    task = task_of(args, recipe, validation)
    Loop(task, recipe, accelerator, crops, args.output_dir).run(args.resume_from_checkpoint)
    if crops.broken:
        print(f"{crops.broken} pictures could not be read and were skipped.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 failed with one sentence on stderr, 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: train(args), "train_vae")


if __name__ == "__main__":
    sys.exit(main())
