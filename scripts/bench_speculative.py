"""Speculative decoding on a trained pair of raster models: tokens a pass of the target, and time, beside the plain way.

    python scripts/bench_speculative.py --model runs/raster/model --images 20 --ahead 2 4 6 --output docs/results

The model's folder holds the target and its `draft`. Every picture is drawn alone, as speculative decoding does it;
plain decoding is `LlamaGen.generate` with a batch of one, in the same process, before and after. Also: passes and time
a picture by the proposals at a time, and how alike the two models' distributions are, which is what decides.
OUTPUT receives speculative.json and speculative.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vtc.errors import ConfigError
from vtc.eval.provenance import provenance
from vtc.files import write_file
from vtc.generators.llamagen import LlamaGen
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.generators.speculative import generate_speculatively
from vtc.models import load_generator
from vtc.script import run_script


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, or folder of a raster generator with a draft")
    parser.add_argument("--images", type=int, default=20, help="pictures of each setting, class by turn")
    parser.add_argument("--ahead", type=int, nargs="+", default=[1, 2, 4, 6], help="tokens proposed at a time")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--temperature", type=float, help="default: the model's own")
    parser.add_argument("--output", type=Path, help="folder for speculative.json and .md; default: print only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def clock(device: torch.device) -> float:
    """Processor seconds on a CPU, so that other work beside does not count: run it with one thread. Else the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def plain_seconds(model: LlamaGen, tokenizer: Any, count: int, sampling: Sampling, guidance: Guidance) -> list[float]:
    """Of each picture drawn alone."""
    seconds = []
    device = model.head.weight.device
    for i in range(count):
        labels = torch.tensor([i % model.classes], device=device)
        start = clock(device)
        model.generate(labels, tokenizer, sampling, guidance, generators=seeded([i], device))
        seconds.append(clock(device) - start)
    return seconds


@torch.no_grad()
def overlap(target: LlamaGen, draft: LlamaGen, tokenizer: Any, sampling: Sampling, guidance: Guidance,
            count: int = 10) -> float:
    """Mean of sum min(p, q) over the tokens of pictures that the target drew: the chance that a proposal is kept."""
    kept = []
    for label in range(min(count, target.classes)):
        labels = torch.tensor([label], device=target.head.weight.device)
        words = target.generate(labels, tokenizer, sampling, guidance,
                                generators=seeded([label], labels.device))[0].indices[..., 0]
        both = torch.cat([labels, torch.full_like(labels, target.classes)]) if guidance.active else labels
        seen = words[:, :-1].expand(len(both), -1)
        p, q = (torch.stack([sampling.probabilities(guidance(logits[:, i], i, target.tokens))[0]
                             for i in range(target.tokens)]) for logits in (target(both, seen), draft(both, seen)))
        kept.append(torch.minimum(p, q).sum(-1).mean().item())
    return statistics.mean(kept)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.images < 1 or min(args.ahead) < 1:
        raise ConfigError("--images and --ahead are at least 1.")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    generator = load_generator(args.model).to(args.device)
    target, draft = generator.model, generator.draft
    if not isinstance(target, LlamaGen) or draft is None:
        raise ConfigError(f"{args.model} is no raster generator with a draft.")
    own = generator.sampling
    sampling = own if args.temperature is None else Sampling(args.temperature, own.top_k, own.top_p)
    guidance = generator.guidance if args.guidance is None else Guidance(args.guidance)
    plain_seconds(target, generator.tokenizer, 1, sampling, guidance)  # the first picture also loads kernels
    before = plain_seconds(target, generator.tokenizer, args.images, sampling, guidance)
    of_draft = plain_seconds(draft, generator.tokenizer, max(1, args.images // 4), sampling, guidance)
    rows = []
    for ahead in args.ahead:
        seconds, passes, accepted, proposed = list[float](), 0, 0, 0
        for i in range(args.images):
            torch.manual_seed(i)
            start = clock(target.head.weight.device)
            drawn = generate_speculatively(target, draft, i % target.classes, generator.tokenizer, ahead, sampling,
                                           guidance)
            seconds.append(clock(target.head.weight.device) - start)
            passes, accepted, proposed = passes + drawn.passes, accepted + drawn.accepted, proposed + drawn.proposed
        rows.append({"ahead": ahead, "kept": accepted / proposed, "accepted_length": accepted / passes,
                     "tokens_a_pass": args.images * target.tokens / passes, "seconds": statistics.median(seconds)})
    after = plain_seconds(target, generator.tokenizer, args.images, sampling, guidance)
    size = [sum(p.numel() for p in m.parameters()) for m in (target, draft)]
    result = {"model": args.model, "images": args.images, "sampling": vars(sampling), "guidance": vars(guidance),
              "parameters": size, "overlap": overlap(target, draft, generator.tokenizer, sampling, guidance),
              "plain_seconds": statistics.median(before + after), "draft_seconds": statistics.median(of_draft),
              "rows": rows, "device": args.device, "threads": torch.get_num_threads(), "provenance": provenance()}
    text = report(result)
    print(text)
    if args.output is not None:
        write_file(args.output / "speculative.json", json.dumps(result, indent=1).encode() + b"\n")
        write_file(args.output / "speculative.md", text.encode())


def report(result: dict[str, Any]) -> str:
    """As Markdown."""
    target, draft = result["parameters"]
    plain = result["plain_seconds"]
    lines = [f"Target {target / 1e6:.2f} M parameters, draft {draft / 1e6:.2f} M; {result['images']} pictures of each "
             f"setting, one at a time; guidance {result['guidance']['weight']}, temperature "
             f"{result['sampling']['temperature']}; {result['device']}, threads: {result['threads']}; medians of "
             f"{'processor ' if result['device'] == 'cpu' else ''}seconds.",
             "", f"A picture by the target alone takes {plain:.3f} s, by the draft alone {result['draft_seconds']:.3f} "
             f"s. Overlap of the two distributions, the chance that a proposal is kept: {result['overlap']:.3f}.", "",
             "| proposed at a time | proposals kept | accepted length | tokens a pass | s a picture | speed-up |",
             "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['ahead']} | {row['kept']:.3f} | {row['accepted_length']:.2f} "
                     f"| {row['tokens_a_pass']:.2f} | {row['seconds']:.3f} | {plain / row['seconds']:.2f}x |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_script(main, "bench_speculative"))
