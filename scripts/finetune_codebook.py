"""Make a model's family: the same tokenizer with 8 ... 4096 codewords, for 0.01 to 0.05 bits per pixel.

    accelerate launch scripts/finetune_codebook.py --model localvq-f16-8192-r3 --train_data_dir photographs/ \\
        --validation_data_dir holdout/ --output_dir runs/family

or plain `python`. Clusters the codebook (K-means over its words), fine-tunes how the decoder reads the new words,
counts the entropy-coding tables, keeps on the validation pictures what the tuning made better, checks that LPIPS falls
and the rate grows with the number of words, and only then writes `family.safetensors` into the model's folder (or to
--output). A run that was stopped goes on: members, finished and half, lie in --output_dir.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from vtc import hub
from vtc.errors import ConfigError, TrainingError
from vtc.files import write_file
from vtc.images import load_image
from vtc.models import FAMILY_SIZES, load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.codebook_clustering import cluster_codebook, with_codebook
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.tokenizers.tokenizer_family import FAMILY, TokenizerFamily
from vtc.training.checkpoints import all_checkpoints
from vtc.training.codebook import CodebookRecipe, count_words, finetune, set_table, start_member
from vtc.training.data import image_files
from vtc.training.loop import (
    add_recipe_flags,
    make_accelerator,
    parse_recipe_args,
    recipe_from,
    seed_everything,
)
from vtc.training.perceptual import PerceptualLoss
from vtc.training.recipe import result_settings
from vtc.training.tokenizer import evaluate


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base: bundled name, or folder of a LocalVQ")
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--validation_data_dir", type=Path, help="pictures to check the order on; none: no check")
    parser.add_argument("--output", type=Path, help=f"the file to make; default {FAMILY} in the model's folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(FAMILY_SIZES))
    parser.add_argument("--unweighted", action="store_true", help="all words count alike in K-means, as in the paper; "
                                                                  "default: as often as they occur")
    parser.add_argument("--lpips_weights", type=Path, help="folder of backbone features; default VTC_LPIPS_WEIGHTS")
    parser.add_argument("--table_images", type=int, help="count the tables on so many pictures, evenly out of the "
                                                         "training folder; default all")
    add_recipe_flags(parser, CodebookRecipe)
    return parse_recipe_args(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, make, write; 0 done, 1 failed (one sentence on stderr), 128 + n stopped by signal n."""
    args = parse_args(arguments)
    return run_script(lambda: make(args), "finetune_codebook")


def make(args: argparse.Namespace) -> None:
    """Cluster, tune, count, check, write."""
    recipe = recipe_from(CodebookRecipe, args)
    accelerator = make_accelerator(recipe, args.output_dir)
    seed_everything(recipe.seed)
    base = load_tokenizer(args.model)
    if not isinstance(base, LocalVQ):
        raise ConfigError(f"Families are made of LocalVQ; {args.model} is a {type(base).__name__}.")
    files = image_files(args.train_data_dir)
    if not files:
        raise ConfigError(f"There are no pictures in {args.train_data_dir}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    members = tuned_members(args, recipe, base, accelerator, files)
    if not accelerator.is_main_process:
        return
    step = -(-len(files) // (args.table_images or len(files)))
    for size, counts in count_words(members, files[::step]).items():
        set_table(members[size], counts)
    made = args.output_dir / FAMILY
    TokenizerFamily.of(base, dict(members)).save(made)
    if args.validation_data_dir:
        choose(base, made, recipe, args)
    output = args.output or hub.fetch(args.model, hub.WEIGHTS).parent / FAMILY
    if output.resolve() != made.resolve():
        write_file(output, made.read_bytes())
    print(f"{made.stat().st_size} bytes, {len(members)} members -> {output.name}")


def tuned_members(args: argparse.Namespace, recipe: CodebookRecipe, base: LocalVQ, accelerator: Accelerator,
                  files: list[Path]) -> dict[int, LocalVQ]:
    """Members by size, largest first; those that an earlier run of the same recipe finished are read."""
    usage = None if args.unweighted or base.token_frequencies is None else base.token_frequencies[0].float()
    clustered = cluster_codebook(base.quantizer.codebook, args.sizes, usage, seed=recipe.seed)
    perceptual = PerceptualLoss(LPIPS("squeeze", args.lpips_weights)).to(accelerator.device)
    identity = json.dumps({"base": base.fingerprint().hex(), "sizes": sorted(args.sizes),
                           "unweighted": args.unweighted, **result_settings(recipe)})
    members: dict[int, LocalVQ] = {}
    larger: LocalVQ | None = None
    for size in sorted(args.sizes, reverse=True):
        member = start_member(base, clustered.codebooks[size], larger)
        finished = args.output_dir / f"member_{size}.safetensors"
        tensors = finished_tensors(finished, identity)
        accelerator.wait_for_everyone()  # all have looked before the first one writes
        if tensors is not None:
            member.load_state_dict(tensors)
        else:
            work = args.output_dir / f"member_{size}"
            finetune(member, recipe, accelerator, files, perceptual, work)
            if accelerator.is_main_process:
                tensors = {name: tensor.contiguous() for name, tensor in member.state_dict().items()}
                write_file(finished, save(tensors, {"identity": identity}))
                for checkpoint in all_checkpoints(work):  # the member is finished
                    shutil.rmtree(checkpoint)
            accelerator.wait_for_everyone()
        members[size] = larger = member.eval()
    return members


def finished_tensors(path: Path, identity: str) -> dict[str, Tensor] | None:
    """The state of a member that the same recipe finished before."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("identity") != identity:
            raise ConfigError(f"{path} is of another recipe or base; choose an empty --output_dir.")
    return load_file(path)


def choose(base: LocalVQ, made: Path, recipe: CodebookRecipe, args: argparse.Namespace) -> None:
    """Measure all members on the validation pictures, and those that were tuned also with the base's decoder.

    A member whose tuning did not lower LPIPS keeps that decoder; its tokens and table are the same. Rewrites `made`,
    writes report.json, and raises TrainingError where more words are not better in the end.
    """
    pictures = [load_image(path).tensor() for path in image_files(args.validation_data_dir)]
    if not pictures:
        raise ConfigError(f"There are no pictures in {args.validation_data_dir}.")
    judge = LPIPS("alex", args.lpips_weights)
    family = TokenizerFamily.load(made)
    kept: dict[int, Tokenizer] = {}
    report: dict[int, dict[str, float | bool]] = {}
    for size in (*family.about.sizes, base.quantizer.codebook_size):
        model = family.member(base, size) if size in family.members else base
        result: dict[str, float | bool] = {**evaluate(model, pictures, judge), "tuned": False}
        if size in family.members and recipe.steps(size):
            plain = with_codebook(base, model.quantizer.codebook).eval()
            plain.token_frequencies = model.token_frequencies
            untuned = evaluate(plain, pictures, judge)
            result |= {"tuned": result["lpips_alex"] < untuned["lpips_alex"],
                       "lpips_alex_tuned": result["lpips_alex"], "lpips_alex_untuned": untuned["lpips_alex"]}
            if not result["tuned"]:
                model, result = plain, {**result, **untuned}
        kept[size], report[size] = model, result
        print(f"S={size}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()), flush=True)
    TokenizerFamily.of(base, {size: kept[size] for size in family.about.sizes}).save(made)
    write_file(args.output_dir / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    for small, large in pairwise(sorted(report)):
        for measure, sign in (("lpips_alex", -1), ("codebook_entropy_bits", 1)):
            if sign * (report[large][measure] - report[small][measure]) <= 0:
                raise TrainingError(f"{measure} does not get {'larger' if sign > 0 else 'smaller'} from {small} to "
                                    f"{large} words ({report[small][measure]:.4f} to {report[large][measure]:.4f}); "
                                    f"the family stays in {args.output_dir}: train the smaller member less.")


if __name__ == "__main__":
    sys.exit(main())
