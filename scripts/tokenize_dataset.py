"""Encode a data set's pictures once, into token shards, which trainings of generators read.

    accelerate launch scripts/tokenize_dataset.py --tokenizer runs/tokenizer/model --train_data_dir imagenet/ \\
        --resolution 256 --views flip --output_dir imagenet-tokens/

or plain `python`, or a process a machine with --rank R --world_size N. Pictures come from a folder (labels from its
sub-folders), a pack (.npz), WebDataset shards, or a Hugging Face dataset. The same command again goes on where a run
was killed, behind the last batch that it encoded; finished shards are left alone. Pictures that cannot be read are
named, and left out. `TokenShards("imagenet-tokens/", tokenizer)` reads the result, and refuses another tokenizer.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vtc.cli.common import Part, device_name
from vtc.errors import ConfigError
from vtc.script import run_script
from vtc.training.recipe import parse_recipe_args
from vtc.training.sources import add_data_flags, pictures_of


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML or JSON file of flags; the command line overrides it")
    parser.add_argument("--tokenizer", required=True, help="bundled name, folder, or Hub repository")
    parser.add_argument("--output_dir", type=Path, required=True, help="takes the shards")
    add_data_flags(parser)
    parser.add_argument("--resolution", type=int, default=256, help="side of the square that is encoded, in pixels")
    parser.add_argument("--views", choices=("center", "flip", "ten_crop"), default="center",
                        help="of each picture: the middle; it and its mirror image; ten crops (default: %(default)s)")
    parser.add_argument("--crop_range", type=float, default=1.1, help="side of the square that ten crops are taken "
                                                                      "from, in sides of a crop (default: %(default)s)")
    parser.add_argument("--storage", choices=("safetensors", "webdataset"), default="safetensors")
    parser.add_argument("--shard_size", type=int, default=1024, help="pictures of a shard (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at once (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read pictures, for each process "
                                                                   "that encodes (default: %(default)s)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no",
                        help="bf16 is faster on a GPU; a few tokens in a hundred then come out otherwise")
    parser.add_argument("--device", type=device_name, help="default: cuda where there is one, else cpu")
    parser.add_argument("--rank", type=int, help="number of this process; default what accelerate launch says")
    parser.add_argument("--world_size", type=int, help="number of all processes")
    parser.add_argument("--quiet", action="store_true", help="say nothing but failures")
    args = parse_recipe_args(parser, arguments)
    if (args.rank is None) != (args.world_size is None):
        parser.error("--rank and --world_size go together")
    if args.rank is not None and not 0 <= args.rank < args.world_size:
        parser.error("--rank counts from 0 to below --world_size")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    part = Part.of_launch() if args.rank is None else Part(args.rank, args.world_size)

    import torch

    from vtc.models import load_tokenizer
    from vtc.training.tokenizing import DatasetTokenizer

    device = part.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        tokenizer = load_tokenizer(args.tokenizer).to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {device} is not available: {' '.join(str(error).split())}") from error
    making = DatasetTokenizer(pictures_of(args), tokenizer, args.output_dir, args.resolution, args.views,
                              args.crop_range, args.storage, args.shard_size, args.batch_size, args.num_workers,
                              args.mixed_precision)
    start = time.perf_counter()
    done = making.run(part.rank, part.count, args.quiet)
    seconds = time.perf_counter() - start
    done.tell_problems()
    if not args.quiet:
        good = done.pictures - len(done.problems)
        print(f"{part.name('tokenize_dataset')}: {good} pictures in {done.shards} shards, "
              f"{good / max(seconds, 1e-9):.1f} a second; {done.kept} were there already, {len(done.problems)} could "
              "not be read.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(main, "tokenize_dataset"))
