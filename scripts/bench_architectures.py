"""What a LocalVQ of other widths, depths and vocabularies would cost: the map for a search at fixed decoding time.

    python scripts/bench_architectures.py
    python scripts/bench_architectures.py --time base deep16 --seconds 20

For each candidate: parameters, bytes of its file with float16 and with int8 weights, bits of a pixel without entropy
coding, operations (a multiplication and an addition are two) to encode and decode a picture of 768x512, and for those
named by --time the processor seconds of one thread to decode it (beside other work the wall's would say nothing), the
median of repetitions with random weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

#: the picture that is counted and timed
HEIGHT, WIDTH = 512, 768


@dataclass(frozen=True)
class Candidate:
    """Arguments of LocalVQ that differ from the bundled model's, and a core at /32 that LocalVQ does not have.

    core_width, core_depth: blocks at half the tokens' resolution, reached by a 2x2 convolution of stride 2 and left by
        an upsampling, beside the decoder's first stage: it sees twice as far for a quarter of the work.
    """

    arguments: dict[str, Any]
    core_width: int = 0
    core_depth: int = 0


CANDIDATES = {
    "base": Candidate({}),
    "deep16": Candidate({"decoder_depths": (2, 2, 2, 8)}),
    "wide16": Candidate({"decoder_widths": (40, 80, 160, 448)}),
    "deep8": Candidate({"decoder_depths": (2, 2, 4, 4)}),
    "equal": Candidate({"decoder_widths": (24, 48, 128, 384), "decoder_depths": (1, 2, 3, 5)}),
    "equal_wide": Candidate({"decoder_widths": (24, 48, 128, 448), "decoder_depths": (1, 1, 2, 4)}),
    "coarse": Candidate({"decoder_widths": (24, 48, 160, 448), "decoder_depths": (1, 1, 3, 6)}),
    "double": Candidate({"decoder_widths": (56, 112, 224, 448), "encoder_widths": (64, 128, 320)}),
    "core32": Candidate({}, core_width=448, core_depth=3),
    "equal_core": Candidate({"decoder_widths": (24, 48, 128, 320), "decoder_depths": (1, 2, 3, 4)}, 448, 4),
}
VOCABULARIES, LATENTS = (1024, 2560, 4096, 8192, 16384), (8, 16, 32, 64)


def main(arguments: list[str] | None = None) -> int:
    """Count, time, print."""
    args = parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    print(f"Pictures of {WIDTH}x{HEIGHT}.\n\n| candidate | widths, depths of the decoder | parameters, millions: "
          "encoder, decoder | MB: float16, int8 | encode GFLOP | decode GFLOP | decode CPU s |\n|-|-|-|-|-|-|-|")
    for name, candidate in CANDIDATES.items():
        facts = counted(candidate)
        seconds = f"{decode_seconds(candidate, args.seconds):.3f}" if name in args.time else "-"
        print(f"| {name} | {described(candidate)} | {facts['encoder'] / 1e6:.2f}, {facts['decoder'] / 1e6:.2f} | "
              f"{facts['float16'] / 1e6:.1f}, {facts['int8'] / 1e6:.1f} | {facts['encode'] / 1e9:.1f} | "
              f"{facts['decode'] / 1e9:.1f} | {seconds} |")
    print("\n| words | bits a token, at most | bpp, at most | " + " | ".join(f"codebook, KB, d = {d}" for d in LATENTS)
          + " | search, GFLOP, d = 32 |\n|-|-|-|" + "-|" * (len(LATENTS) + 1))
    tokens = HEIGHT * WIDTH // 256
    for words in VOCABULARIES:
        bits = math.log2(words)
        print(f"| {words:,} | {bits:.2f} | {bits / 256:.4f} | "
              + " | ".join(f"{2 * words * d / 1e3:.0f}" for d in LATENTS) + f" | {2 * tokens * words * 32 / 1e9:.2f} |")
    return 0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", nargs="*", default=[], choices=list(CANDIDATES), metavar="NAME",
                        help=f"candidates to time: {', '.join(CANDIDATES)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="to spend on each at least (default: %(default)s)")
    return parser.parse_args(arguments)


def described(candidate: Candidate) -> str:
    values = {"decoder_widths": (40, 80, 160, 320), "decoder_depths": (2, 2, 2, 4), **candidate.arguments}
    core = f" + {candidate.core_depth} of {candidate.core_width} at /32" if candidate.core_depth else ""
    encoder = f"; encoder {values['encoder_widths']}" if "encoder_widths" in values else ""
    return f"{values['decoder_widths']}, {values['decoder_depths']}{core}{encoder}"


def built(candidate: Candidate) -> tuple[Any, Any]:
    """(LocalVQ, the core or None), with random weights, on the device that is current."""
    from torch import nn

    from vtc.tokenizers.local_vq import LocalVQ, Up, blocks

    model = LocalVQ(**candidate.arguments).eval()
    if not candidate.core_depth:
        return model, None
    width, inner = model.decoder.stem.out_channels, candidate.core_width
    core = nn.Sequential(nn.Conv2d(width, inner, 2, stride=2), blocks(inner, candidate.core_depth), Up(inner, width))
    return model, core.eval()


def counted(candidate: Candidate) -> dict[str, int]:
    """Parameters of the parts, bytes of the file, operations of a picture; nothing is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        model, core = built(candidate)
        images, z = torch.empty(1, 3, HEIGHT, WIDTH), torch.empty(1, model.quantizer.dim, HEIGHT // 16, WIDTH // 16)
        features = torch.empty(1, model.decoder.stem.out_channels, HEIGHT // 16, WIDTH // 16)
        counts = []
        for steps in ((lambda: model.encoder(images),), (lambda: model.decoder(z), lambda: core and core(features))):
            with FlopCounterMode(display=False) as counter:
                for step in steps:
                    step()
            counts.append(counter.get_total_flops())
    encoder, decoder = sum(p.numel() for p in model.encoder.parameters()), sum(
        p.numel() for part in (model.decoder, core) if part is not None for p in part.parameters())
    convolutions = [m.weight for part in (model, core) if part is not None for m in part.modules()
                    if isinstance(m, torch.nn.Conv2d)]
    weights, scales = sum(w.numel() for w in convolutions), sum(len(w) for w in convolutions)
    float16 = 2 * (encoder + decoder + model.quantizer.codebook.numel()) + 4 * model.quantizer.codebook_size
    return {"encoder": encoder, "decoder": decoder, "float16": float16, "int8": float16 - weights + 4 * scales,
            "encode": counts[0], "decode": counts[1]}


def decode_seconds(candidate: Candidate, seconds: float) -> float:
    """Median processor seconds of one thread to turn codewords into a picture of 768x512."""
    import torch
    from torch.utils.benchmark import Timer

    torch.manual_seed(0)
    model, core = built(candidate)
    if core is not None:
        core.to(memory_format=torch.channels_last)
    z = torch.randn(1, model.quantizer.dim, HEIGHT // 16, WIDTH // 16)
    features = torch.randn(1, model.decoder.stem.out_channels, HEIGHT // 16, WIDTH // 16)

    @torch.no_grad()
    def decode() -> None:
        model.reconstruct(z)
        if core is not None:
            core(features)

    decode()
    return float(Timer("decode()", globals={"decode": decode}, num_threads=1,
                       timer=time.process_time).blocked_autorange(min_run_time=seconds).median)


if __name__ == "__main__":
    sys.exit(main())
