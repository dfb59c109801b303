"""Train the prior of a model's token grids: all codebooks of its family in one file of whole numbers.

    python scripts/train_prior.py --model localvq-f16-8192-r3 --train_data_dir photos/ --validation_data_dir holdout/ \\
        --work_dir runs/prior --output vtc/pretrained/localvq-f16-8192-r3/prior.safetensors

The photographs are encoded once and kept in the work folder. A run that was stopped goes on with
--resume_from_checkpoint latest. After a change of the model, --init_from with the earlier model's name, or with
runs/prior/checkpoint-3000, and a few hundred steps are enough, also where the codebooks have other sizes. Runs on the
CPU: two hours of one thread are plenty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from vtc import hub
from vtc.codecs.prior import FILE, read_prior
from vtc.errors import ConfigError
from vtc.models import family_of, load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.checkpoints import AVERAGE, STATE, read_checkpoint
from vtc.training.data import image_files
from vtc.training.loop import (
    Loop,
    add_recipe_flags,
    make_accelerator,
    parse_recipe_args,
    recipe_from,
    seed_everything,
)
from vtc.training.prior import GridCrops, PriorNetwork, PriorRecipe, PriorTask, save_prior, state_of
from vtc.training.tokens import cached_grids


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, or folder with a family beside its model")
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--validation_data_dir", type=Path, help="pictures to measure on; none: no validation")
    parser.add_argument("--output", type=Path, required=True, help="the prior's file, *.safetensors")
    parser.add_argument("--views", type=int, default=4, help="times that each photograph is encoded, each time cut, "
                                                             "shrunk and mirrored otherwise")
    parser.add_argument("--init_from", help="prior to start from: of a bundled name, a folder or a Hub repository, or "
                                            "checkpoint-N of an earlier run")
    add_recipe_flags(parser, PriorRecipe, ("work_dir",))
    return parse_recipe_args(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, encode, train, write; 0 done, 1 failed (one sentence on stderr), 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: train(args), "train_prior")


def members_of(name: str) -> list[LocalVQ]:
    """The model and the smaller members of its family."""
    family = family_of(name)
    members = [load_tokenizer(name), *(load_tokenizer(name, size=size) for size in (family.sizes if family else ()))]
    if not all(isinstance(member, LocalVQ) for member in members):
        raise ConfigError(f"Priors are trained for LocalVQ, and {name!r} is another kind of tokenizer.")
    return cast(list[LocalVQ], members)


def earlier_state(name_or_path: str) -> dict[str, Tensor]:
    """The network of a checkpoint, or of the finished prior beside a model."""
    if Path(name_or_path, STATE).is_file():
        return read_checkpoint(Path(name_or_path))[0].get(AVERAGE, {})
    return state_of(read_prior(hub.fetch(name_or_path, FILE)))


def train(args: argparse.Namespace) -> None:
    recipe = recipe_from(PriorRecipe, args)
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    members = members_of(args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    validation = None
    with accelerator.main_process_first():  # the others find its grids
        views = cached_grids(args.output_dir / "train", members, image_files(args.train_data_dir), args.views,
                             recipe.seed, recipe.mixed_precision == "bf16")
        if args.validation_data_dir:
            files = image_files(args.validation_data_dir)
            (validation,) = cached_grids(args.output_dir / "validation", members, files, 1, recipe.seed)
    codebooks = {member.quantizer.codebook_size: member.quantizer.codewords for member in members}
    network = PriorNetwork(codebooks, recipe.width, recipe.depth, recipe.dim)
    counts = {size: np.bincount(views[0].tokens[size], minlength=size) for size in network.sizes}
    if args.init_from:
        network.go_on_from(earlier_state(args.init_from), counts)
    else:
        network.start_from(counts)
    task = PriorTask(network, recipe, validation)
    loop = Loop(task, recipe, accelerator, GridCrops(views, network.sizes, recipe), args.output_dir)
    average = loop.run(args.resume_from_checkpoint)
    if accelerator.is_main_process:
        print(f"fingerprint {save_prior(cast(PriorNetwork, average), args.output).hex()}")


if __name__ == "__main__":
    sys.exit(main())
