"""Train LocalVQ, the photograph tokenizer that vtc ships.

    accelerate launch scripts/train_tokenizer.py --train_data_dir photos/ --output_dir runs/localvq

or plain `python`. A run that was stopped goes on with --resume_from_checkpoint latest.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image

from vtc.tokenizers.codebook_clustering import cluster_codebook, with_codebook
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.training.data import image_files
from vtc.training.tokenizer import TokenizerRecipe, TokenizerTrainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--validation_data_dir", type=Path, help="whole pictures to measure on; none: no validation")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--lpips_weights", type=Path, help="folder of backbone features; default VTC_LPIPS_WEIGHTS")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--validation_steps", type=int, default=1000)
    parser.add_argument("--resume_from_checkpoint", choices=("latest",))
    parser.add_argument("--codebook_size", type=int, default=2560)
    parser.add_argument("--init_from", help="a finished model to start from; a larger codebook of its is clustered, "
                                            "by K-means weighted with its token frequencies, to --codebook_size")
    for field in dataclasses.fields(TokenizerRecipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args()


def started_from(name_or_path: str, codebook_size: int) -> LocalVQ:
    """A finished model with a codebook of `codebook_size` words, ready to be trained on."""
    model = LocalVQ.from_pretrained(name_or_path).train()
    if codebook_size == model.quantizer.codebook_size:
        return model
    usage = None if model.token_frequencies is None else model.token_frequencies[0].float()
    family = cluster_codebook(model.quantizer.codebook, [codebook_size], usage)
    return with_codebook(model, family.codebooks[codebook_size], family.maps[codebook_size])


def main() -> None:
    args = parse_args()
    recipe = TokenizerRecipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TokenizerRecipe)})
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.cuda.is_available())
    set_seed(recipe.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model = started_from(args.init_from, args.codebook_size) if args.init_from else LocalVQ(args.codebook_size)
    validation = [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1).float() / 255
                  for p in (image_files(args.validation_data_dir) if args.validation_data_dir else [])]
    trainer = TokenizerTrainer(
        model, recipe, accelerator, image_files(args.train_data_dir), args.output_dir,
        perceptual=LPIPS("squeeze", args.lpips_weights),
        judge=LPIPS("alex", args.lpips_weights) if validation else None, validation=validation)
    if args.resume_from_checkpoint:
        accelerator.load_state(str(args.output_dir / "checkpoint"))
    average = trainer.train(args.checkpointing_steps, args.validation_steps)
    if accelerator.is_main_process:
        average.save_pretrained(args.output_dir / "model")


if __name__ == "__main__":
    main()
