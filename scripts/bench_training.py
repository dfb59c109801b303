"""Speed and memory of training steps, and whether the data keeps up with them.

    python scripts/bench_training.py --train_data_dir photos/ --output docs/results/training_speed.md
    python scripts/bench_training.py --train_data_dir photos/ --threads 1 2                       # of a CPU
    python scripts/bench_training.py --train_data_dir photos/ --case vae --peak_tflops 989        # on an H100

Three cases: a tokenizer (LocalVQ), an autoencoder with a discriminator (AutoencoderKL), a generator (VAR on tokens);
larger ones where there is a GPU. Each runs in a process of its own, once for every number of --threads: first on
batches in memory, then on real pictures as a training reads them, then the readers alone. Steps are taken as they are
in `vtc.training.loop`, and the median counts. Operations are counted by torch (a multiplication and an addition are
two); their share of the peak needs --peak_tflops or a known GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vtc.files import write_file
from vtc.script import run_script

CASES = ("tokenizer", "vae", "generator")
#: dense bfloat16 TFLOP/s by the maker, by a part of the device's name
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True, help="pictures, as for a training")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, nargs="+", help="of torch; a row for each; default: as torch has it")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures")
    parser.add_argument("--tiny", action="store_true", help="networks and batches for a test of this script")
    parser.add_argument("--peak_tflops", type=float, help="of the device, in the precision of the steps")
    parser.add_argument("--output", type=Path, help="markdown; default: stdout")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    if args.worker:
        print(json.dumps(measure(args)))
        return 0
    if min(args.steps, args.warmup + 1, args.workers + 1, *(args.threads or [1])) < 1:
        print("bench_training: --steps and --threads are at least 1, --warmup and --workers at least 0.",
              file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    failed = False
    for case in args.case:
        for threads in args.threads or [None]:
            command = [sys.executable, __file__, "--worker", case, "--train_data_dir", args.train_data_dir, "--steps",
                       str(args.steps), "--warmup", str(args.warmup), "--workers", str(args.workers),
                       *(["--tiny"] if args.tiny else []), *(["--threads", str(threads)] if threads else [])]
            setting = {"OMP_NUM_THREADS": str(threads)} if threads else {}
            made = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                                  env=os.environ | setting | {"VTC_QUIET": "1"})
            if made.returncode:
                print(f"bench_training: the case {case} failed.", file=sys.stderr)
                failed = True
                continue
            results.append(json.loads(made.stdout.splitlines()[-1]))
    if results:
        text = page(results, args)
        if args.output:
            write_file(args.output, text.encode())
        else:
            print(text)
    return int(failed)


# ---- one case, in a process of its own ------------------------------------------------------------------------------

def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What the page says of one case."""
    import resource

    import torch
    from accelerate import Accelerator
    from torch.utils.flop_counter import FlopCounterMode

    from vtc.training.loop import Loop

    gpu = torch.cuda.is_available()
    if args.threads:
        torch.set_num_threads(args.threads[0])
    task, recipe, memory_data, real_data = case_of(args, gpu)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision, cpu=not gpu)
    rows: dict[str, Any] = {}
    for name, data in (("memory", memory_data), ("pictures", real_data)):
        with tempfile.TemporaryDirectory() as folder:
            loop = Loop(task, recipe, accelerator, data, folder)
            marks: list[tuple[float, float]] = []
            before = task.before_step

            def marked(step: int, before: Any = before, marks: Any = marks) -> None:
                if gpu:
                    torch.cuda.synchronize()
                marks.append((time.perf_counter(), time.process_time()))
                before(step)

            task.before_step = marked
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            loop.train()
            task.before_step = before
        counted = marks[args.warmup :]
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counted)]
        rows[name] = statistics.median(wall for wall, _ in steps)
        rows[f"{name}_cpu"] = statistics.median(cpu for _, cpu in steps)
    rows["gib"] = (torch.cuda.max_memory_allocated() / 2**30 if gpu
                   else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    loader = loop._loader(3 * args.steps)
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    count = sum(1 for _ in iterator)
    rows["loader"] = count * recipe.train_batch_size / (time.perf_counter() - start)
    start = time.process_time()
    for n in range(recipe.train_batch_size):
        real_data[n]
    rows["reading_cpu"] = time.process_time() - start
    batch = next(iter(replace_loader(memory_data, recipe.train_batch_size)))
    batch = [part.to(accelerator.device) for part in batch] if isinstance(batch, list) else batch.to(accelerator.device)
    with FlopCounterMode(display=False) as counter, accelerator.autocast():
        for player in task.players:
            terms = task.losses(player, batch, recipe.max_train_steps)
            if terms:
                torch.stack([term.float() for term in terms.values()]).sum().backward()
    return {"case": args.worker, "batch": recipe.train_batch_size, "steps": len(steps), **rows,
            "flops": counter.get_total_flops(), "precision": recipe.mixed_precision, "what": task.what,
            "device": torch.cuda.get_device_name() if gpu else "cpu", "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for player in task.players.values() for p in player.parameters())}


def replace_loader(data: Any, size: int) -> Any:
    """Batches of a dataset in memory."""
    from torch.utils.data import DataLoader

    return DataLoader(data, size, sampler=range(size))


def case_of(args: argparse.Namespace, gpu: bool) -> tuple[Any, Any, Any, Any]:
    """(task, recipe, data in memory, data as a training reads it)."""
    import torch

    from vtc.training.data import RandomCrops
    from vtc.training.sources import open_pictures

    torch.manual_seed(0)
    common: dict[str, Any] = dict(max_train_steps=args.warmup + args.steps + 1, validation_steps=0, lr_warmup_steps=0,
                                  checkpointing_steps=10**9, logging_steps=10**9, report_to="none",
                                  dataloader_num_workers=args.workers, mixed_precision="bf16" if gpu else "no")
    pictures = open_pictures(args.train_data_dir)
    if args.worker == "tokenizer":
        from vtc.tokenizers.local_vq import LocalVQ
        from vtc.training.tokenizer import TokenizerTask
        from vtc.training.tokenizer_recipe import TokenizerRecipe

        small: dict[str, Any] = dict(codebook_size=16, dim=4, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                                     decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4)
        side, batch = (32, 2) if args.tiny else (224, 64 if gpu else 2)
        recipe: Any = TokenizerRecipe(**common, resolution=side, train_batch_size=batch, continuous_steps=0,
                                      perceptual_weight=0.0, gan_weight=0.1, discriminator_norm="group",
                                      discriminator_channels=8 if args.tiny else 64)
        task: Any = TokenizerTask(LocalVQ(**(small if args.tiny else {})), recipe)
        task.what = f"LocalVQ, {side} px, PatchGAN, no LPIPS"
    elif args.worker == "vae":
        from vtc.tokenizers.diffusers_adapters import AutoencoderKL
        from vtc.tokenizers.discriminators import PatchGAN
        from vtc.training.vae import KLAutoencoder, KLTask
        from vtc.training.vae_recipe import KLRecipe

        widths = (8, 8) if args.tiny else (128, 256, 512, 512) if gpu else (32, 64, 128)
        side, batch = (32, 2) if args.tiny else (256, 16) if gpu else (128, 2)
        recipe = KLRecipe(**common, resolution=side, train_batch_size=batch, perceptual_weight=0.0,
                          discriminator_start=0, discriminator_norm="group")
        model = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * len(widths), latent_channels=4,
                              up_block_types=("UpDecoderBlock2D",) * len(widths), block_out_channels=widths,
                              layers_per_block=2 if gpu else 1, norm_num_groups=min(32, widths[0] // 2))
        task = KLTask(KLAutoencoder(model), recipe, PatchGAN(8 if args.tiny else 64, 2, "group"), None)
        task.what = f"AutoencoderKL of widths {widths}, {side} px, PatchGAN, no LPIPS"
    else:
        return generator_case(args, gpu, common, pictures)
    crops = RandomCrops(pictures, side, 0)
    held = torch.stack([crops[n] for n in range(batch)])
    return task, recipe, InMemory(held), crops


def generator_case(args: argparse.Namespace, gpu: bool, common: dict[str, Any], pictures: Any,
                   ) -> tuple[Any, Any, Any, Any]:
    """VAR on token shards: its data are read from the shards that are made of some pictures first."""
    from vtc.generators.var import VAR
    from vtc.tokenizers.var_vqvae import VARVQVAE
    from vtc.training.generator import GeneratorRecipe, VARTask
    from vtc.training.token_shards import TokenShards, TrainingTokens
    from vtc.training.tokenizing import DatasetTokenizer

    sides = (1, 2, 4) if args.tiny else (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    depth, width, batch = (2, 32, 2) if args.tiny else (16, 1024, 64) if gpu else (6, 256, 2)
    tokenizer = VARVQVAE(channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1, sides=sides,
                         attention=False, mid_attention=False, codebook_size=64 if args.tiny else 4096).eval()
    recipe = GeneratorRecipe(**common, train_batch_size=batch)
    model = VAR(depth=depth, width=width, heads=width // 32 if args.tiny else width // 64, classes=10, sides=sides,
                codebook_size=tokenizer.quantizer.codebook_size)
    task: Any = VARTask(model, tokenizer, recipe)
    task.what = f"VAR of {depth} blocks of {width}, {sum(s * s for s in sides)} tokens, from shards"
    folder = Path(tempfile.mkdtemp(prefix="vtc-bench-"))
    some = Labelled(pictures, 4 * batch)
    DatasetTokenizer(some, tokenizer, folder, 16 * sides[-1], batch_size=4, shard_size=64).run(quiet=True)
    tokens = TrainingTokens(TokenShards(folder, tokenizer))
    held = [tokens[n] for n in range(batch)]
    return task, recipe, InMemory(held), tokens


class InMemory:
    """Items that are there already."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __getitem__(self, n: int) -> Any:
        return self.items[n % len(self.items)]


class Labelled:
    """The first pictures of a source, with labels below ten."""

    def __init__(self, pictures: Any, count: int) -> None:
        self.pictures, self.count = pictures, min(count, len(pictures))

    def __len__(self) -> int:
        return self.count

    def read(self, n: int) -> tuple[str, int, Any]:
        key, _, file = self.pictures.read(n)
        return key, n % 10, file


# ---- the page -------------------------------------------------------------------------------------------------------

def page(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The results as markdown."""
    first = results[0]
    peak = args.peak_tflops or next((value for name, value in PEAKS.items() if name in first["device"]), None)
    lines = ["# Speed of training steps", "",
             f"`python scripts/bench_training.py --steps {args.steps} --warmup {args.warmup} --workers {args.workers}"
             f"{' --threads ' + ' '.join(map(str, args.threads)) if args.threads else ''}` on {first['device']}, "
             f"torch {first['torch']}, precision {first['precision']}; medians of {first['steps']} steps after "
             f"{args.warmup}. A step: all players forward and backward, clipping, AdamW, the average of the weights. "
             "\"Images/s\" are of the wall: a batch over the median step. \"Loader\": the samples that the same "
             f"{args.workers} reader processes give when nobody computes beside them, and how often that is what the "
             "steps take; above 1, data are not the bottleneck. \"Readers needed\": processor seconds that reading a "
             "batch takes, over the seconds of a step.", "",
             "| | threads | batch | step (s) | its CPU seconds | images/s, data in memory | images/s, real data | "
             "loader, images/s | loader over step | readers needed | memory (GiB) | TFLOP a step | GFLOP/s | "
             "share of peak |",
             "|---|" + "---|" * 13]
    for r in results:
        speed, real = r["batch"] / r["memory"], r["batch"] / r["pictures"]
        share = f"{r['flops'] / 1e12 / r['memory'] / peak:.1%}" if peak else "peak unknown"
        # on a processor that others use as well, its own seconds say more than the wall's
        step = r["memory"] if r["device"] != "cpu" else r["memory_cpu"]
        lines.append(f"| {r['what']} ({r['parameters'] / 1e6:.1f} M) | {r['threads']} | {r['batch']} | "
                     f"{r['memory']:.3f} | {r['memory_cpu']:.3f} | {speed:.2f} | {real:.2f} | {r['loader']:.0f} | "
                     f"{r['loader'] / speed:.1f} | {r['reading_cpu'] / step:.3f} | {r['gib']:.2f} | "
                     f"{r['flops'] / 1e12:.3f} | {r['flops'] / 1e9 / r['memory']:.0f} | {share} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_script(main, "bench_training"))
