"""Train the prior of a model's token grids: all codebooks of its family in one file of whole numbers.

    python scripts/train_prior.py --model localvq-f16-2560 --train_data_dir photos/ --validation_data_dir holdout/ \\
        --work_dir runs/prior --output vtc/pretrained/localvq-f16-2560/prior.safetensors

The photographs are encoded once and kept in the work folder. A run that was stopped goes on with
--resume_from_checkpoint latest. After a small change of the model, --init_from runs/prior/checkpoint.pt with a few
hundred steps is enough. Runs on the CPU: two hours of one thread are plenty.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch

from vtc.errors import ConfigError, VtcError
from vtc.models import family_of, load_tokenizer
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.data import image_files
from vtc.training.prior import PriorNetwork, PriorRecipe, PriorTrainer, save_prior
from vtc.training.tokens import cached_grids


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, or folder with a family beside its model")
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--validation_data_dir", type=Path, help="pictures to measure on; none: no validation")
    parser.add_argument("--work_dir", type=Path, required=True, help="takes token grids, log and checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="the prior's file, *.safetensors")
    parser.add_argument("--views", type=int, default=4, help="times that each photograph is encoded, each time cut, "
                                                             "shrunk and mirrored otherwise")
    parser.add_argument("--init_from", type=Path, help="checkpoint.pt of an earlier run to start from")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", choices=("latest",))
    for field in dataclasses.fields(PriorRecipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, encode, train, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse_args(arguments)
    try:
        train(args)
    except VtcError as error:
        print(f"train_prior: {error}", file=sys.stderr)
        return 1
    return 0


def members_of(name: str) -> list[LocalVQ]:
    """The model and the smaller members of its family."""
    family = family_of(name)
    members = [load_tokenizer(name), *(load_tokenizer(name, size=size) for size in (family.sizes if family else ()))]
    if not all(isinstance(member, LocalVQ) for member in members):
        raise ConfigError(f"Priors are trained for LocalVQ, and {name!r} is another kind of tokenizer.")
    return cast(list[LocalVQ], members)


def train(args: argparse.Namespace) -> None:
    recipe = PriorRecipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PriorRecipe)})
    torch.manual_seed(recipe.seed)
    members = members_of(args.model)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    views = cached_grids(args.work_dir / "train", members, image_files(args.train_data_dir), args.views, recipe.seed,
                         args.mixed_precision == "bf16")
    validation = None
    if args.validation_data_dir:
        files = image_files(args.validation_data_dir)
        (validation,) = cached_grids(args.work_dir / "validation", members, files, 1, recipe.seed)
    codebooks = {member.quantizer.codebook_size: member.quantizer.codewords for member in members}
    network = PriorNetwork(codebooks, recipe.width, recipe.depth, recipe.dim)
    network.start_from({size: np.bincount(views[0].tokens[size], minlength=size) for size in network.sizes})
    if args.init_from:
        state = torch.load(args.init_from, weights_only=True)["average"]
        tensors = {name.removeprefix("module."): tensor for name, tensor in state.items() if name.startswith("module.")}
        # The codewords are those of the model at hand, which may have changed since.
        network.load_state_dict({name: t for name, t in tensors.items() if not name.startswith("codes_")}, strict=False)
    trainer = PriorTrainer(network, recipe, views, validation, args.work_dir, args.mixed_precision)
    if args.resume_from_checkpoint:
        trainer.resume()
    average = trainer.train(args.checkpointing_steps, args.validation_steps)
    print(f"fingerprint {save_prior(average, args.output).hex()}")


if __name__ == "__main__":
    sys.exit(main())
