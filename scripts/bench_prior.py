"""What a model's learned prior saves over its static tables, and what it costs: every size of codebook, one folder.

    python scripts/bench_prior.py --images kodak/ --threads 2 --output kodak.json

Payloads of whole pictures as `TokenCodec` makes them, with the same tokens; times are medians over pictures of coding
alone, without the tokenizer. A table in Markdown on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import torch

from vtc.codecs import entropy
from vtc.codecs.entropy import StaticTables
from vtc.codecs.prior import TokenPrior
from vtc.errors import ConfigError, VtcError
from vtc.files import write_file
from vtc.models import DEFAULT_MODEL, family_of, load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.base import TokenLayout
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.data import image_files
from vtc.training.tokens import TokenGrids, token_grids, whole_pictures


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; 0 done, 1 failed (one sentence on stderr)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, or folder")
    parser.add_argument("--prior", type=Path, help="its file; default: the one beside the model")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders of pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON with all numbers")
    args = parser.parse_args(arguments)
    return run_script(lambda: report(args), "bench_prior")


def report(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    facts = measure(args)
    if args.output:
        write_file(args.output, json.dumps(facts, indent=2).encode() + b"\n")
    print(table(facts))


def measure(args: argparse.Namespace) -> dict:
    """For every size of codebook that the model and its family have."""
    prior = TokenPrior.load(args.prior) if args.prior else TokenPrior.from_pretrained(args.model)
    family = family_of(args.model)
    members = [load_tokenizer(args.model),
               *(load_tokenizer(args.model, size=size) for size in (family.sizes if family else ()))]
    files = [file for folder in args.images for file in image_files(folder)]
    if not files or not all(isinstance(member, LocalVQ) for member in members):
        raise ConfigError("There are no pictures in the folders, or the model is no LocalVQ.")
    grids = token_grids(cast(list[LocalVQ], members), whole_pictures(files))
    rows = {}
    for member in sorted(members, key=lambda m: m.layout(16, 16).vocab[0]):
        size = member.layout(16, 16).vocab[0]
        frequencies = member.token_frequencies
        if frequencies is None:
            raise ConfigError(f"The member of {size} words has no static tables to compare with.")
        rows[size] = one_size(prior, StaticTables(frequencies.long().numpy()), grids, size)
    return {"model": args.model, "prior": prior.fingerprint.hex(), "images": len(files), "threads": args.threads,
            "tokens": int(grids.shapes.astype(np.int64).prod(1).sum()), "torch": torch.__version__, "sizes": rows}


def one_size(prior: TokenPrior, tables: StaticTables, grids: TokenGrids, size: int) -> dict[str, float]:
    """Mean bytes a picture, and seconds. Every payload is decoded and compared."""
    packed, static, learned, kept, bits, encoding, decoding = [], [], [], [], [], [], []
    for n in range(len(grids)):
        grid = (int(grids.shapes[n, 0]), int(grids.shapes[n, 1]))
        indices = grids.grid(n, size).astype(np.int64).ravel()
        layout = TokenLayout((grid,), (size,))
        packed.append(entropy.packed_size(layout))
        static.append(min(packed[-1], len(entropy.encode_ans(indices[:, None], layout, tables))))
        start = time.perf_counter()
        payload = prior.encode(indices, grid, size)
        middle = time.perf_counter()
        decoded = prior.decode(payload, grid, size)
        encoding.append(middle - start)
        decoding.append(time.perf_counter() - middle)
        if (decoded != indices).any():
            raise VtcError(f"Picture {n} was decoded to other indices.")
        learned.append(len(payload))
        kept.append(min(len(payload), static[-1]))
        bits.append(prior.ideal_bits(indices, grid, size))
    return {"packed_bytes": float(np.mean(packed)), "static_bytes": float(np.mean(static)),
            "prior_bytes": float(np.mean(learned)), "kept_bytes": float(np.mean(kept)),
            "saved": 1 - sum(kept) / sum(static),
            "smallest_saving": min(1 - k / s for k, s in zip(kept, static, strict=True)),
            "bits_per_token": sum(bits) / int(grids.shapes.astype(np.int64).prod(1).sum()),
            "over_ideal": 8 * sum(learned) / sum(bits) - 1,
            "encode_seconds": median(encoding), "decode_seconds": median(decoding)}


def table(facts: dict) -> str:
    """The rows as Markdown."""
    lines = ["| words | packed, bytes | static, bytes | prior, bytes | saved | least of an image | bits a token "
             "| over ideal | encode, s | decode, s |", "|" + "---|" * 10]
    lines += [f"| {size} | {r['packed_bytes']:.1f} | {r['static_bytes']:.1f} | {r['prior_bytes']:.1f} "
              f"| {r['saved']:.1%} | {r['smallest_saving']:.1%} | {r['bits_per_token']:.3f} | {r['over_ideal']:.2%} "
              f"| {r['encode_seconds']:.3f} | {r['decode_seconds']:.3f} |" for size, r in facts["sizes"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
