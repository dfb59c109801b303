"""Count what changes with threads, processors' instructions and precisions: encoded indices, bytes, decoded pixels.

    python scripts/check_determinism.py --model NAME_OR_PATH --images FOLDER --threads 1 2
    python scripts/check_determinism.py --model NAME_OR_PATH --images FOLDER FOLDER --coding --sizes 8192 256 8

The first form runs a process for each number of threads. Each encodes every image, codes the indices that the first
process found, and decodes them. Indices may flip where a latent lies between two codewords: that is counted. The same
indices must give the same bytes, and their pixels must agree within one level of 255; otherwise the exit status is 1.

The second form is about coding alone, with the model's learned prior. The first process encodes every image for every
size of codebook; then one process for each of the settings below (the GPU's where there is one) decodes its streams
and codes its indices again. Everything must agree. JSON on stdout.
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
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vtc.codecs import container
from vtc.codecs.container import Coder
from vtc.codecs.prior import TokenPrior
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, VtcError
from vtc.files import write_file
from vtc.images import load_image, to_tensor
from vtc.models import DEFAULT_MODEL, load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.base import Tokens
from vtc.tokenizers.tiling import encode_tiled
from vtc.training.data import image_files
from vtc.training.tokens import token_grids, whole_pictures


@dataclass(frozen=True)
class Setting:
    """How a process runs: its environment, its threads, the model's type, the prior's device."""

    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"


#: the first one makes the streams
SETTINGS = {
    "1 thread": Setting(),
    "1 thread, another process": Setting(),
    "2 threads": Setting(threads=2),
    "ATEN_CPU_CAPABILITY=default": Setting({"ATEN_CPU_CAPABILITY": "default"}),
    "ATEN_CPU_CAPABILITY=avx2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}),
    "ONEDNN_MAX_CPU_ISA=SSE41": Setting({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "ONEDNN_MAX_CPU_ISA=AVX2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "MKL_CBWR=COMPATIBLE": Setting({"MKL_CBWR": "COMPATIBLE"}),
    "bfloat16 model, autocast, 'medium' products": Setting(dtype="bfloat16"),
    "prior on the GPU": Setting(device="cuda"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the workers and compare; 0 where bytes and pixels agree, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, folder, or repository on the Hub")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders of pictures")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument("--coding", action="store_true", help="check the coding of tokens in many settings instead")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="with --coding: sizes of the codebooks; "
                                                                         "default: the model's own")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="the JSON goes to this file, too")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "REFERENCE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    return run_script(lambda: check(args), "check_determinism")


def check(args: argparse.Namespace) -> int:
    """A worker's part, or all of them and their comparison; 0 where they agree."""
    files = [file for folder in args.images for file in image_files(folder)][: args.limit]
    if not files:
        raise ConfigError(f"There are no pictures in {', '.join(map(str, args.images))}.")
    if args.setting:
        code(args.model, args.sizes, files, args.setting, *map(Path, args.worker))
        return 0
    if args.worker:
        work(args.model, files, args.threads[0], *map(Path, args.worker))
        return 0
    facts = compare_coding(args, files) if args.coding else compare(args, files)
    text = json.dumps(facts, indent=2)
    print(text)
    if args.output:
        write_file(args.output, text.encode() + b"\n")
    if args.coding:
        agreed = not any(s["indices_that_differ"] or s["streams_that_differ"] for s in facts["settings"].values())
    else:
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
            command = [sys.executable, __file__, "--model", args.model, "--images", *map(str, args.images),
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


# ---- coding alone ---------------------------------------------------------------------------------------------------

def code(model: str, sizes: list[int], files: list[Path], name: str, folder: Path, reference: Path) -> None:
    """The first setting writes indices and streams to folder/SIZE-N.npz; the others count what differs from those."""
    setting = SETTINGS[name]
    torch.set_num_threads(setting.threads)
    base = load_tokenizer(model)
    own = base.layout(16, 16).vocab[0]
    sizes = sizes or [own]
    members = [base if size == own else load_tokenizer(model, size=size) for size in sizes]
    prior = TokenPrior.from_pretrained(model, setting.device)
    codecs = [TokenCodec(member, prior=prior) for member in members]
    facts = {"streams": 0, "with_prior": 0, "indices": 0, "indices_that_differ": 0, "streams_that_differ": 0}
    if folder == reference:
        sides = [load_image(file).pixels.shape[:2] for file in files]
        grids = token_grids(members, whole_pictures(files))  # type: ignore[arg-type]  # a family is one of LocalVQ
        for size, codec in zip(sizes, codecs, strict=True):
            for n, (height, width) in enumerate(sides):
                indices = torch.from_numpy(grids.grid(n, size).astype(np.int64)).view(1, -1, 1)
                tokens = Tokens(indices, codec.tokenizer.layout(height, width), height, width)
                (stream,) = codec.compress_tokens(tokens)
                np.savez(folder / f"{size}-{n}.npz", indices=indices.numpy(), stream=np.frombuffer(stream, np.uint8))
    if setting.dtype == "bfloat16":
        for member in members:
            member.bfloat16()
        torch.set_float32_matmul_precision("medium")
    start = time.perf_counter()
    for size, codec in zip(sizes, codecs, strict=True):
        for n in range(len(files)):
            with np.load(reference / f"{size}-{n}.npz") as made:
                indices, stream = torch.from_numpy(made["indices"]), made["stream"].tobytes()
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bfloat16"):
                tokens = codec.decompress_tokens(stream)
                (again,) = codec.compress_tokens(Tokens(indices, tokens.layout, tokens.height, tokens.width))
            facts["streams"] += 1
            facts["with_prior"] += container.parse(stream).coder == Coder.PRIOR
            facts["indices"] += indices.numel()
            facts["indices_that_differ"] += int((tokens.indices.cpu() != indices).sum())
            facts["streams_that_differ"] += again != stream
    (folder / "facts.json").write_text(json.dumps({**facts, "seconds": round(time.perf_counter() - start, 1),
                                                   "cpu_capability": torch.backends.cpu.get_cpu_capability()}))


def compare_coding(args: argparse.Namespace, files: list[Path]) -> dict:
    """What every setting found, run one after the other."""
    facts = {"model": args.model, "fingerprint": load_tokenizer(args.model).fingerprint().hex(),
             "prior": TokenPrior.from_pretrained(args.model).fingerprint.hex(), "images": len(files),
             "sizes": args.sizes, "torch": torch.__version__, "machine": platform.machine(), "settings": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, setting) in enumerate(SETTINGS.items()):
            if setting.device == "cuda" and not torch.cuda.is_available():
                continue
            folder = Path(temporary) / str(number)
            folder.mkdir()
            command = [sys.executable, __file__, "--model", args.model, "--images", *map(str, args.images),
                       "--limit", str(len(files)), "--setting", name, "--sizes", *map(str, args.sizes),
                       "--worker", str(folder), str(Path(temporary) / "0")]
            environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), **setting.environment}
            if subprocess.run(command, env=environment).returncode:
                raise VtcError(f"The process with {name} failed.")
            facts["settings"][name] = json.loads((folder / "facts.json").read_text())
    return facts


if __name__ == "__main__":
    sys.exit(main())
