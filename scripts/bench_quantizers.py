"""Time and peak memory of the quantizers, forward plus backward, beside the plain form and vector-quantize-pytorch.

    python scripts/bench_quantizers.py                       # everything: some minutes, 2 GB
    python scripts/bench_quantizers.py --only lfq --json lfq.json

Every number comes from a process of its own with one thread: `ms` is the median of the process's CPU time over the
repeats, so a busy machine disturbs it little, and `MB` is by how much the process's peak memory grew in its first step.
Exit code 1 where a bar is missed or a row could not be measured.
A latent is (batch, channels, side, side), by default 4 x C x 16 x 16. "plain" is the definition written down: all
distances to all codes, a softmax over them, autograd. It also checks the closed form's loss and gradient.
Needs the `bench` extra for the rows of vector-quantize-pytorch; without it they are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer
from vtc.tokenizers.finite_scalar import FiniteScalarQuantizer
from vtc.tokenizers.index_backprop import IndexBackpropQuantizer
from vtc.tokenizers.lookup_free import GroupLFQ
from vtc.tokenizers.product_quantizer import ProductQuantizer
from vtc.tokenizers.residual_quantizer import ResidualQuantizer
from vtc.tokenizers.vector_quantizer import VectorQuantizer

Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # latents to (quantized latents, loss)

# What each case is, for the table; channels; and which implementations it has.
CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "lfq-32": ("GroupLFQ 4 x 8 bits", 32, ("vtc", "plain", "lucidrains")),
    "lfq-64": ("GroupLFQ 8 x 8 bits", 64, ("vtc", "plain", "lucidrains")),
    "lfq-16-flat": ("LFQ 16 bits, one code", 16, ("vtc", "plain", "lucidrains")),
    "lfq-18-flat": ("LFQ 18 bits, one code", 18, ("vtc",)),
    "bsq-36": ("BSQ 36 bits, histograms of 9", 36, ("vtc",)),
    "fsq": ("FSQ 8 8 8 5 5 5", 6, ("vtc", "lucidrains")),
    "vq-8192": ("VQ 8192 x 32, moving average", 32, ("vtc", "lucidrains")),
    "ibq-16384": ("IBQ 16384 x 64", 64, ("vtc", "plain")),
    "product-64": ("product VQ, 8 x 256 words", 64, ("vtc", "lucidrains")),
    "residual-32": ("residual VQ, 4 x 256 words", 32, ("vtc", "lucidrains")),
}


def plain_lfq(groups: int, bits: int, temperature: float = 0.01, eps: float = 1e-5) -> Step:
    """WeTok's loss from its definition: sample entropy - pooled codebook entropy (0.1), commitment (0.25)."""
    codes = 2.0 * ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1) - 1
    places = 1 << torch.arange(bits)

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        u = z.flatten(2).transpose(1, 2).reshape(-1, groups, bits)
        scores = 2 * torch.einsum("ngd,kd->ngk", u, codes.to(u)) / temperature
        p, log_p = scores.softmax(-1), scores.log_softmax(-1)
        mean = p.mean((0, 1))
        spread = -(p * log_p).sum(-1).mean() + (mean * (mean + eps).log()).sum()
        q = torch.where(z > 0, 1.0, -1.0).to(z)
        ((u > 0) * places).sum(-1)  # the indices, which every quantizer gives
        return z + (q - z).detach(), 0.1 * spread + 0.25 * (z - q).square().mean()

    return step


def plain_ibq(codebook: nn.Parameter, beta: float = 0.25) -> Step:
    """IBQ with its one-hot written out."""

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.movedim(1, -1).flatten(0, -2)
        soft = (flat @ codebook.T).softmax(1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        q, e = (hard - soft.detach() + soft) @ codebook, hard @ codebook
        loss = ((q - flat).square() + (e.detach() - flat).square() + beta * (e - flat.detach()).square()).mean()
        return q, loss

    return step


def ours(quantizer: nn.Module) -> Step:
    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        out = quantizer(z)
        return out.z_q, out.loss

    return step


def theirs(module: nn.Module, tokens_last: bool = False) -> Step:
    """A module of vector-quantize-pytorch; most take (B, N, d)."""

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        out = module(z.flatten(2).transpose(1, 2).contiguous() if tokens_last else z)
        loss = out[2] if len(out) > 2 else z.new_zeros(())
        return out[0], loss.sum()

    return step


def build(case: str, implementation: str) -> Step:
    """The step of one row of the table."""
    family = case.split("-")[0]
    torch.manual_seed(0)
    if family == "lfq":
        groups, bits = {"lfq-32": (4, 8), "lfq-64": (8, 8), "lfq-16-flat": (1, 16), "lfq-18-flat": (1, 18)}[case]
        if implementation == "plain":
            return plain_lfq(groups, bits)
        if implementation == "vtc":
            return ours(GroupLFQ(groups, bits))
        peer = importlib.import_module("vector_quantize_pytorch")
        return theirs(peer.LFQ(dim=groups * bits, codebook_size=2**bits, num_codebooks=groups, entropy_loss_weight=0.1,
                               commitment_loss_weight=0.25))
    if implementation == "plain":
        return plain_ibq(nn.Parameter(torch.randn(16384, 64)))
    if implementation == "vtc":
        return ours({
            "bsq-36": lambda: BinarySphericalQuantizer(36, 9),
            "fsq": lambda: FiniteScalarQuantizer((8, 8, 8, 5, 5, 5)),
            "vq-8192": lambda: VectorQuantizer(8192, 32),
            "ibq-16384": lambda: IndexBackpropQuantizer(16384, 64),
            "product-64": lambda: ProductQuantizer(VectorQuantizer(256, 8) for _ in range(8)),
            "residual-32": lambda: ResidualQuantizer(VectorQuantizer(256, 32) for _ in range(4)),
        }[case]())
    peer = importlib.import_module("vector_quantize_pytorch")
    if case == "fsq":
        return theirs(peer.FSQ([8, 8, 8, 5, 5, 5]))
    module = {
        "vq-8192": lambda: peer.VectorQuantize(dim=32, codebook_size=8192),
        "product-64": lambda: peer.VectorQuantize(dim=64, codebook_size=256, heads=8, codebook_dim=8,
                                                  separate_codebook_per_head=True),
        "residual-32": lambda: peer.ResidualVQ(dim=32, num_quantizers=4, codebook_size=256),
    }[case]()
    return theirs(module, tokens_last=True)


def latents(case: str, batch: int, side: int) -> Tensor:
    # Near zero, where bits are undecided and no term of an entropy vanishes.
    scale = 0.02 if case.startswith("lfq") else 1.0
    return scale * torch.randn(batch, CASES[case][1], side, side, generator=torch.Generator().manual_seed(1))


def forward_backward(step: Step, z: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient at z of loss + sum of the quantized latents."""
    z = z.clone().requires_grad_()
    z_q, loss = step(z)
    (z_q.sum() + loss).backward()
    assert z.grad is not None
    return loss.detach(), z.grad


def peak_bytes() -> int:
    """The most memory this process ever had in use."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def measure(case: str, implementation: str, batch: int, side: int, repeats: int) -> dict[str, Any]:
    """One row; in a process of its own, or its memory means nothing."""
    torch.set_num_threads(1)
    step = build(case, implementation)
    z = latents(case, batch, side)
    forward_backward(ours(GroupLFQ(1, 4)), torch.randn(1, 4, 2, 2))  # wakes up autograd and the GEMM library
    before = peak_bytes()
    forward_backward(step, z)
    growth = peak_bytes() - before
    times: list[float] = []
    while len(times) < repeats and sum(times) < 5:
        started = time.process_time()
        forward_backward(step, z)
        times.append(time.process_time() - started)
    return {"case": case, "implementation": implementation, "milliseconds": 1000 * statistics.median(times),
            "repeats": len(times), "megabytes": growth / 1e6}


def agreement(case: str, batch: int, side: int) -> dict[str, Any]:
    """How far the closed form's loss and gradient are from the plain form's, and both from the plain one in float64."""
    torch.set_num_threads(1)
    if case == "lfq-16-flat":
        batch, side = 1, 8  # in float64 the plain form would take gigabytes
    z = latents(case, batch, side)

    def loss_and_gradient(implementation: str, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.clone().requires_grad_()
        loss = build(case, implementation)(z)[1]
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    results = {name: loss_and_gradient(name, z) for name in ("vtc", "plain")}
    results["float64"] = loss_and_gradient("plain", z.double())

    def between(a: str, b: str) -> list[float]:
        (loss_a, grad_a), (loss_b, grad_b) = results[a], results[b]
        return [abs(loss_a - loss_b).item(), ((grad_a - grad_b).norm() / grad_b.norm()).item()]

    pairs = [("vtc", "plain"), ("vtc", "float64"), ("plain", "float64")]
    return {"case": case, "agreement": {f"{a} - {b}": between(a, b) for a, b in pairs}}


def in_own_process(args: argparse.Namespace, *job: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--batch", str(args.batch), "--side", str(args.side), "--repeats",
               str(args.repeats), "--job", *job]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()  # nothing where it was killed
        return {"case": job[0], "implementation": job[1], "error": said[-1] if said else f"code {done.returncode}"}
    return json.loads(done.stdout)


def bars(rows: dict[tuple[str, str], dict[str, Any]], agreements: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The claims that this benchmark stands for, and whether this run bears them out; a row that failed is none."""
    result = [(f"{row['case']}, {row['implementation']}: measured", False)
              for row in (*rows.values(), *agreements) if "error" in row]
    rows = {key: row for key, row in rows.items() if "error" not in row}
    agreements = [entry for entry in agreements if "error" not in entry]
    for case in ("lfq-32", "lfq-64"):
        mine, plain = rows.get((case, "vtc")), rows.get((case, "plain"))
        if mine and plain:
            speed, memory = (plain[k] / mine[k] for k in ("milliseconds", "megabytes"))
            result.append((f"{case}: at least 5 times faster than plain ({speed:.1f})", speed >= 5))
            result.append((f"{case}: at least 3 times less memory than plain ({memory:.1f})", memory >= 3))
    mine, peer = rows.get(("lfq-64", "vtc")), rows.get(("lfq-64", "lucidrains"))
    if mine and peer:
        speed = peer["milliseconds"] / mine["milliseconds"]
        result.append((f"lfq-64: at least 12 times faster than vector-quantize-pytorch ({speed:.1f})", speed >= 12))
    flat = rows.get(("lfq-16-flat", "vtc"))
    if flat:
        result.append((f"16-bit LFQ: under 50 ms ({flat['milliseconds']:.1f})", flat["milliseconds"] < 50))
        result.append((f"16-bit LFQ: under 100 MB ({flat['megabytes']:.0f})", flat["megabytes"] < 100))
    for entry in agreements:
        loss, grad = entry["agreement"]["vtc - plain"]
        result.append((f"{entry['case']}: loss equal to 1e-6 ({loss:.1e})", loss <= 1e-6))
        if entry["case"] != "lfq-16-flat":  # the two entropies' gradients all but cancel: float32 has few digits left
            result.append((f"{entry['case']}: gradient equal to 1e-5 ({grad:.1e})", grad <= 1e-5))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=16, help="of the latent map")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", help="cases whose name begins so")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        case, what = args.job
        print(json.dumps(agreement(case, args.batch, args.side) if what == "agreement" else
                         measure(case, what, args.batch, args.side, args.repeats)))
        return 0

    if args.only and not any(case.startswith(args.only) for case in CASES):
        parser.error(f"no case begins with {args.only!r}: {', '.join(CASES)}")
    peer = importlib.util.find_spec("vector_quantize_pytorch") is not None
    if not peer:
        print("vector-quantize-pytorch is not installed: its rows are left out.", file=sys.stderr)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, "
          f"latent {args.batch} x C x {args.side} x {args.side}\n")
    print(f"| {'case':29} | {'vtc':>17} | {'plain':>17} | {'lucidrains':>17} |\n|{'-' * 31}|{('-' * 18 + ':|') * 3}")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    agreements: list[dict[str, Any]] = []
    for case, (title, _, implementations) in CASES.items():
        if args.only and not case.startswith(args.only):
            continue
        cells = []
        for name in ("vtc", "plain", "lucidrains"):
            if name not in implementations or (name == "lucidrains" and not peer):
                cells.append("")
                continue
            row = rows[case, name] = in_own_process(args, case, name)
            cells.append("fails" if "error" in row else f"{row['milliseconds']:.1f} ms {row['megabytes']:.0f} MB")
            if "error" in row:
                print(f"{case}, {name}: {row['error']}", file=sys.stderr)
        print(f"| {title:29} | {cells[0]:>17} | {cells[1]:>17} | {cells[2]:>17} |", flush=True)
        if case.startswith("lfq") and "plain" in implementations:
            agreements.append(in_own_process(args, case, "agreement"))
            if "error" in agreements[-1]:
                print(f"{case}, agreement: {agreements[-1]['error']}", file=sys.stderr)
    compared = [a for a in agreements if "error" not in a]
    if compared:
        print("\n| loss, gradient (relative) | " + " | ".join(a["case"] for a in compared) + " |")
        print("|---|" + "---|" * len(compared))
        for pair in ("vtc - plain", "vtc - float64", "plain - float64"):
            found = [a["agreement"][pair] for a in compared]
            print(f"| {pair} | " + " | ".join(f"{loss:.1e}, {grad:.1e}" for loss, grad in found) + " |")
    verdicts = bars(rows, agreements)
    print("\n" + "\n".join(f"{'met    ' if met else 'NOT MET'} {claim}" for claim, met in verdicts))
    if args.json:
        args.json.write_text(json.dumps({"rows": list(rows.values()), "agreements": agreements}, indent=2) + "\n")
    return 0 if all(met for _, met in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
