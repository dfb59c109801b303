"""Count what changes with the number of threads: encoded indices, bytes of the same indices, decoded pixels.

    python scripts/check_determinism.py --model NAME_OR_PATH --images FOLDER --threads 1 2

A process for each number of threads encodes every image, codes the indices that the first process found, and decodes
them. Indices may flip where a latent lies between two codewords: that is counted. The same indices must give the
same bytes, and their pixels must agree within one level of 255; otherwise the exit status is 1. JSON on stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, VtcError
from vtc.images import load_image, to_tensor
from vtc.models import DEFAULT_MODEL, load_tokenizer
from vtc.tokenizers.base import Tokens
from vtc.tokenizers.tiling import encode_tiled
from vtc.training.data import image_files


def main(arguments: list[str] | None = None) -> int:
    """Run the workers and compare; 0 where bytes and pixels agree, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, folder, or repository on the Hub")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument("--output", type=Path, help="the JSON goes to this file, too")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "REFERENCE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        files = image_files(args.images)[: args.limit]
        if not files:
            raise ConfigError(f"There are no pictures in {args.images}.")
        if args.worker:
            work(args.model, files, args.threads[0], *map(Path, args.worker))
            return 0
        facts = compare(args, files)
    except VtcError as error:
        print(f"check_determinism: {error}", file=sys.stderr)
        return 1
    text = json.dumps(facts, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    agreed = facts["streams_that_differ"] == 0 and facts["max_difference_of_rounded_pixels"] <= 1
    return 0 if agreed else 1


def work(model: str, files: list[Path], threads: int, folder: Path, reference: Path) -> None:
    """Write indices, stream hash and pixels of each image to folder/N.npz; `reference` gives the indices to code."""
    torch.set_num_threads(threads)
    codec = TokenCodec(load_tokenizer(model))
    for n, file in enumerate(files):
        with torch.inference_mode():
            tokens = encode_tiled(codec.tokenizer, to_tensor(load_image(file).pixels)[None])
        indices = tokens.indices
        if reference != folder:
            indices = torch.from_numpy(np.load(reference / f"{n}.npz")["indices"])
        (stream,) = codec.compress_tokens(Tokens(indices, tokens.layout, tokens.height, tokens.width))
        (image,) = codec.decompress([stream])
        digest = np.frombuffer(hashlib.sha256(stream).digest(), dtype=np.uint8)
        np.savez(folder / f"{n}.npz", indices=tokens.indices.numpy(), digest=digest, pixels=image.numpy())


def compare(args: argparse.Namespace, files: list[Path]) -> dict:
    """Everything that the workers found, against the first number of threads."""
    facts = {"model": args.model, "fingerprint": load_tokenizer(args.model).fingerprint().hex(),
             "threads": args.threads, "images": len(files),
             "indices": 0, "indices_that_flipped": 0, "images_with_flips": 0,
             "streams_that_differ": 0, "max_difference_of_pixels_in_levels": 0.0, "max_difference_of_rounded_pixels": 0,
             "torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
             "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(n) for n in range(len(args.threads))]
        for folder, threads in zip(folders, args.threads, strict=True):
            folder.mkdir()
            command = [sys.executable, __file__, "--model", args.model, "--images", str(args.images),
                       "--threads", str(threads), "--limit", str(len(files)), "--worker", str(folder), str(folders[0])]
            if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode:
                raise VtcError(f"The process with {threads} threads failed.")
        for n in range(len(files)):
            first = np.load(folders[0] / f"{n}.npz")
            facts["indices"] += first["indices"].size
            for folder in folders[1:]:
                other = np.load(folder / f"{n}.npz")
                flips = int((first["indices"] != other["indices"]).sum())
                a, b = 255.0 * first["pixels"].astype(np.float64), 255.0 * other["pixels"].astype(np.float64)
                facts["indices_that_flipped"] += flips
                facts["images_with_flips"] += flips > 0
                facts["streams_that_differ"] += bool((first["digest"] != other["digest"]).any())
                facts["max_difference_of_pixels_in_levels"] = max(facts["max_difference_of_pixels_in_levels"],
                                                                  float(np.abs(a - b).max()))
                facts["max_difference_of_rounded_pixels"] = max(facts["max_difference_of_rounded_pixels"],
                                                                int(np.abs(a.round() - b.round()).max()))
    return facts


if __name__ == "__main__":
    sys.exit(main())
