"""What interleaved chunks cost: whole files of every quality of a model, one folder of pictures.

    python scripts/bench_resilience.py --images ../shared/data/kodak --output docs/results/resilience.md

Of the same tokens: the file in one chunk with static tables (container version 1), the shortest file without chunks
(static, packed, or the learned prior that lies beside the model, if any), and files in 1 ... 32 chunks (version 2).
Every file is decoded and compared, and decoded once more without each one of its chunks. Per cent are of mean bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch

from vtc.codecs import chunks, entropy
from vtc.codecs.container import Coder, Container
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError
from vtc.files import write_file
from vtc.images import load_image
from vtc.models import DEFAULT_MODEL, companions, family_of, load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.base import Tokens
from vtc.training.data import image_files

COUNTS = (1, 4, 8, 16, 32)


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; 0 done, 1 failed (one sentence on stderr)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, or folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output", type=Path, help="the table in Markdown")
    args = parser.parse_args(arguments)
    return run_script(lambda: report(args), "bench_resilience")


def report(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    text = table(args.model, image_files(args.images))
    if args.output:
        write_file(args.output, text.encode())
    print(text, end="")


def table(model: str, files: list[Path]) -> str:
    """A row for each member of the model's family, then the model."""
    if not files:
        raise ConfigError("There are no pictures in the folder.")
    family = family_of(model)
    prior = companions(model)[0]
    lines = ["# What chunks cost", "",
             f"{len(files)} pictures, `{model}` and its family; mean bytes of whole files. Made by",
             "`python scripts/bench_resilience.py`; the prior is " + (f"`{prior.fingerprint.hex()}`." if prior else
                                                                      "not there."), "",
             "| words | static, one chunk | shortest without chunks | " + " | ".join(f"{n} chunks" for n in COUNTS)
             + " | 8 to static | 8 to shortest |", "|--:" * (5 + len(COUNTS)) + "|"]
    for size in (*(family.sizes if family else ()), None):
        codec = TokenCodec(load_tokenizer(model, size=size), prior)
        static, shortest = [], []
        chunked: dict[int, list[int]] = {count: [] for count in COUNTS}
        for file in files:
            tokens = codec.tokenizer.encode(load_image(file).tensor()[None])
            static.append(len(in_one_chunk(codec, tokens)))
            shortest.append(len(codec.compress_tokens(tokens)[0]))
            for count in COUNTS:
                (stream,) = codec.compress_tokens(tokens, resilience=count)
                check(codec, stream, tokens)
                chunked[count].append(len(stream))
        means = [mean(chunked[count]) for count in COUNTS]
        eight = mean(chunked[8])
        lines.append(f"| {tokens.layout.vocab[0]} | {mean(static):.1f} | {mean(shortest):.1f} | "
                     + " | ".join(f"{m:.1f}" for m in means)
                     + f" | {eight / mean(static) - 1:+.2%} | {eight / mean(shortest) - 1:+.2%} |")
    return "\n".join(lines) + "\n"


def in_one_chunk(codec: TokenCodec, tokens: Tokens) -> bytes:
    """The file of container version 1 with static tables."""
    if codec.tables is None:
        raise ConfigError("The model has no static tables to compare with.")
    payload = entropy.encode_ans(tokens.indices[0].numpy(), tokens.layout, codec.tables)
    return Container(tokens.height, tokens.width, tokens.layout.scales, tokens.layout.groups, Coder.STATIC_ANS, payload,
                     codec.tokenizer.model_id, codec.fingerprint).to_bytes()


def check(codec: TokenCodec, stream: bytes, tokens: Tokens) -> None:
    """Whole, and without any one of its chunks, the stream gives the tokens that it has."""
    received = codec.receive(stream)
    if received.lost.any() or not torch.equal(received.tokens.indices, tokens.indices):
        raise ConfigError("A stream did not come back as it was.")
    parsed = chunks.parse(stream)
    for chunk in filter(None, parsed.chunks if len(parsed.chunks) > 1 else ()):
        at = stream.index(chunk)
        received = codec.receive(stream[:at] + bytes(len(chunk)) + stream[at + len(chunk) :])
        if not received.lost.any() or (received.tokens.indices != tokens.indices)[~received.lost].any():
            raise ConfigError("A damaged stream did not give the tokens that are left.")


if __name__ == "__main__":
    sys.exit(main())
