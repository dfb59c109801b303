"""How fast VAR generates with this cache, beside a plain implementation in upstream's form, and in how many bytes.

    python scripts/bench_generation.py --output docs/results/generation_speed.md     # VAR-d16, 256 px: 25 minutes
    python scripts/bench_generation.py --parts speed --threads 1 --repeats 1

speed: one picture of a class with guidance, same weights, implementations taking turns: the plain form (float32; keys
and values joined anew at each scale, the last one's too; modulations computed anew at each scale), ours, ours with
packed weights, ours in bfloat16. Transformer and decoder apart and together.
policies: bytes and time of every policy at one mean budget; two head groups against one; what selecting costs.
bytes: the published shapes of VAR and Infinity by formula, and the largest batch that a card of each size holds.
gpu: depths 16, 24 and 30 in bfloat16, batches of 1 and 16, with peak memory, and the largest batch at each budget;
left out, with a sentence, where there is no CUDA device.

Weights are random and larger than a fresh model's, so that what attention sees matters; a random model's pictures mean
nothing, its bytes and seconds are those of a trained one. The least of the repeats counts; with one thread those of the
processor, which a busy machine disturbs little, with more those of the wall. Exit code 1: a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.cli.common import usable_cpus
from vtc.errors import ConfigError, VtcError
from vtc.files import write_file
from vtc.generators.inference import bfloat16_is_fast, prepare
from vtc.generators.infinity import scales_for
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.calibration import Calibration
from vtc.generators.kv_cache.hack import HACK
from vtc.generators.kv_cache.policy import Candidates, KVPolicy, Merged, budget_from_ratio
from vtc.generators.kv_cache.schedule import Schedule
from vtc.generators.kv_cache.specs import parse_policy
from vtc.generators.kv_cache.wrappers import Around
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.var import PUBLISHED_GUIDANCE, PUBLISHED_SAMPLING, VAR, Block
from vtc.tokenizers.multi_scale_residual import VAR_256, VAR_512
from vtc.tokenizers.var_vqvae import VARVQVAE

PARTS = ("speed", "policies", "bytes", "gpu")
#: the bars of the project: times of the plain form over ours, and shares of a step
FULL_BAR, BFLOAT16_BAR, GROUPS_BAR, SELECTION_BAR = 1.05, 1.5, 1.05, 0.05
MIB = 2**20


# ---- the plain form -------------------------------------------------------------------------------------------------

class PlainVAR:
    """VAR's generation as its authors' code goes about it, on the tensors of one of ours. float32, slow on purpose.

    Every scale: all modulations again; keys and values of all scales so far joined into new tensors, the last one's
    too; the bias of the projection joined again; top-k and top-p each over all words.
    """

    def __init__(self, model: VAR) -> None:
        self.model = model
        self.blocks = cast(list[Block], list(model.blocks))

    @torch.no_grad()
    def generate(self, labels: Tensor, tokenizer: VARVQVAE, sampling: Sampling, guidance: Guidance,
                 generator: torch.Generator | None = None, clock: Clock | None = None) -> tuple[Tensor, Tensor, int]:
        """Indices (B, L), images (B, 3, H, W) in [0, 1], and the bytes that the cache has in the end."""
        clock = clock or Clock()
        model, quantizer, batch = self.model, tokenizer.quantizer, len(labels)
        cond = model.class_embedding(torch.cat([labels, torch.full_like(labels, model.classes)]))
        level = torch.repeat_interleave(torch.arange(len(model.sides)), torch.tensor([s * s for s in model.sides]))
        place = model.level(level)[None] + model.position
        x = cond[:, None] + model.start + place[:, : model.sides[0] ** 2]
        keys: list[Tensor | None] = [None] * model.depth
        values: list[Tensor | None] = [None] * model.depth
        f_hat = x.new_zeros(batch, model.code_dim, model.sides[-1], model.sides[-1])
        drawn, seen = [], 0
        grids = tuple((s, s) for s in model.sides)
        for number, side in enumerate(model.sides):
            clock.start()
            seen += side * side
            for i, block in enumerate(self.blocks):
                if block.adaptive is None:
                    raise ConfigError("The plain form is of models whose blocks have modulations of their own.")
                gamma1, gamma2, scale1, scale2, shift1, shift2 = block.adaptive(F.silu(cond)).view(
                    -1, 1, 6, model.width).unbind(2)
                h = F.layer_norm(x, (model.width,), eps=1e-6).mul(scale1.add(1)).add_(shift1)
                a = block.attention
                bias = torch.cat((a.q_bias, torch.zeros_like(a.q_bias), a.v_bias))
                qkv = F.linear(h, a.qkv.weight, bias).view(2 * batch, side * side, 3, a.heads, a.head_dim)
                q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
                factor = a.log_scale.clamp_max(math.log(100)).exp()
                q, k = F.normalize(q, dim=-1).mul(factor), F.normalize(k, dim=-1)
                old_k, old_v = keys[i], values[i]
                k = keys[i] = k if old_k is None else torch.cat((old_k, k), dim=2)
                v = values[i] = v if old_v is None else torch.cat((old_v, v), dim=2)
                out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
                out = a.proj(out.transpose(1, 2).reshape(2 * batch, side * side, model.width))
                x = x + out.mul_(gamma1)
                h = F.layer_norm(x, (model.width,), eps=1e-6).mul(scale2.add(1)).add_(shift2)
                up, down = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
                x = x + down(F.gelu(up(h), approximate="tanh")).mul(gamma2)
            scale, shift = model.head_adaptive(F.silu(cond)).view(-1, 1, 2, model.width).unbind(2)
            logits = model.head(F.layer_norm(x, (model.width,), eps=1e-6).mul(scale.add(1)).add_(shift).float())
            weight = guidance.at(number, len(model.sides))
            logits = weight * logits[:batch] - (weight - 1) * logits[batch:]
            words = plain_sample(logits, sampling, generator)
            drawn.append(words)
            f_hat = f_hat + quantizer.step(words.view(batch, side, side), number, grids)
            if number + 1 < len(model.sides):
                after = model.sides[number + 1]
                codes = F.interpolate(f_hat, (after, after), mode="area").flatten(2).transpose(1, 2)
                x = model.word(codes) + place[:, seen : seen + after * after]
                x = x.repeat(2, 1, 1)
            clock.stop(f"scale {number + 1}")
        clock.start()
        images = tokenizer.reconstruct(f_hat).clamp(0, 1)
        clock.stop("decoder")
        return torch.cat(drawn, 1), images, sum(t.nbytes for t in (*keys, *values) if t is not None)


def plain_sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """(B, n, V) logits to (B, n) words: each limit over all the words, then one draw."""
    if sampling.top_k == 1:
        return logits.argmax(-1)
    if sampling.top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k, largest=True, sorted=False)[0].amin(
            dim=-1, keepdim=True), -torch.inf)
    if sampling.top_p > 0:
        ordered, order = logits.sort(dim=-1, descending=False)
        remove = ordered.softmax(dim=-1).cumsum_(dim=-1) <= (1 - sampling.top_p)
        remove[..., -1:] = False
        logits = logits.masked_fill(remove.scatter(order.ndim - 1, order, remove), -torch.inf)
    p = logits.softmax(dim=-1).view(-1, logits.shape[-1])
    return torch.multinomial(p, num_samples=1, replacement=True, generator=generator).view(logits.shape[:-1])


# ---- measuring ------------------------------------------------------------------------------------------------------

@dataclass
class Clock:
    """Seconds by name: of the processor with one thread, else of the wall; on a GPU it waits for the device."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = 0.0

    def start(self) -> None:
        self.began = self._now()

    def stop(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.began
        self.began = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    @property
    def transformer(self) -> float:
        return sum(s for name, s in self.seconds.items() if name.startswith("scale"))

    @property
    def total(self) -> float:
        return self.transformer + self.seconds.get("decoder", 0.0)


@dataclass
class Run:
    """One generation: its clock, indices (B, L), and bytes of keys and values at the end and at the peak."""

    clock: Clock
    indices: Tensor
    nbytes: int
    peak: int = 0


def ours(model: VAR, tokenizer: VARVQVAE, labels: Tensor, sampling: Sampling, cache: KVCache,
         guidance: Guidance = PUBLISHED_GUIDANCE) -> Run:
    """Our generation with a clock."""
    clock = Clock(labels.device)
    clock.start()
    generator = torch.Generator(labels.device).manual_seed(0)
    tokens, _ = model.generate(labels, tokenizer, sampling, guidance, cache, generator,
                               callback=lambda scale: clock.stop(f"scale {scale.number + 1}"))
    clock.stop("decoder")
    return Run(clock, tokens.indices[..., 0], cache.nbytes(), cache.peak_nbytes())


def plain(model: PlainVAR, tokenizer: VARVQVAE, labels: Tensor, sampling: Sampling) -> Run:
    """The plain form's."""
    clock = Clock()
    indices, _, nbytes = model.generate(labels, tokenizer, sampling, PUBLISHED_GUIDANCE,
                                        torch.Generator().manual_seed(0), clock)
    return Run(clock, indices, nbytes, nbytes)


def best(runs: list[Run]) -> Run:
    return min(runs, key=lambda run: run.clock.total)


@torch.no_grad()
def random_var(depth: int, sides: tuple[int, ...], device: str = "cpu", seed: int = 0) -> VAR:
    """VAR of a published size with weights of no meaning, large enough that attention is not uniform."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = VAR(depth, 64 * depth, depth, sides=sides)
    model = model.to_empty(device=device).eval()
    for name, p in model.named_parameters():
        if "log_scale" in name:
            p.fill_(math.log(4.0))
        elif p.ndim > 1:
            p.normal_(0, 0.02 if "adaptive" in name else 1 / p.shape[-1] ** 0.5)
        else:
            p.zero_()
    return model


def random_calibration(model: VAR) -> Calibration:
    """Heads and layers of no meaning either, for policies that want a calibration."""
    schedule, generator = model.schedule(), torch.Generator().manual_seed(0)
    shape = (schedule.layers, schedule.heads, schedule.steps)
    return Calibration(torch.rand(shape[:2], generator=generator) + 0.1, torch.rand(shape[::2], generator=generator),
                       torch.rand(shape, generator=generator), schedule.sizes, "", 1)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown: words to the left, numbers to the right."""
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# ---- the floor ------------------------------------------------------------------------------------------------------

def floor(model: VAR, threads: int) -> tuple[str, float]:
    """What the transformer of one picture must do, and the least seconds in which this processor could."""
    a = torch.randn(1536, 1536)
    product = min(seconds_of(lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], "")) for _ in range(4))
    peak = 2 * 1536**3 / product
    big = torch.randn(32 * 2**20)
    bandwidth = big.nbytes / min(seconds_of(big.sum) for _ in range(3))
    weights = sum(m.weight.numel() for block in model.blocks for name, m in block.named_modules()
                  if isinstance(m, nn.Linear) and "adaptive" not in name) + model.head.weight.numel()
    seconds = operations = attention = 0.0
    seen = 0
    for side in model.sides:
        seen += side * side
        rows = 2 * side * side
        products = 2 * rows * weights
        pairs = 2 * 2 * rows * seen * model.width * model.depth
        operations, attention = operations + products, attention + pairs
        seconds += max(products / peak, 4 * weights / bandwidth) + pairs / peak
    kept = model.schedule()
    text = (f"Floor, float32, {threads} thread{'s' * (threads > 1)}: one picture with guidance is "
            f"{operations / 1e9:.0f} GFLOP of products with weights and {attention / 1e9:.0f} of attention, and reads "
            f"{4 * weights / 1e9:.2f} GB of weights at each of {len(model.sides)} scales. This processor does "
            f"{peak / 1e9:.0f} GFLOP/s in a square product and reads {bandwidth / 1e9:.1f} GB/s, so the transformer "
            f"cannot take less than {seconds:.2f} s. Keys and values: "
            f"{kept.kv_bytes(kept.all_tokens, 2, 4) / MIB:.0f} MiB as upstream stores them, "
            f"{kept.kv_bytes(kept.stored_tokens, 2, 4) / MIB:.0f} without the last scale, "
            f"{kept.kv_bytes(kept.stored_tokens, 2, 2) / MIB:.0f} of these in bfloat16.\n")
    return text, seconds


def seconds_of(call: Callable[[], Any]) -> float:
    clock = Clock()
    clock.start()
    call()
    clock.stop("call")
    return clock.seconds["call"]


# ---- speed ----------------------------------------------------------------------------------------------------------

def speed_part(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The plain form and ours on the same weights, taking turns."""
    texts, missed = ["## One picture, end to end\n"], []
    tokenizer, low_tokenizer = VARVQVAE().eval(), VARVQVAE().eval()
    low_tokenizer.load_state_dict(tokenizer.state_dict())
    low_tokenizer.decoder.bfloat16()
    low_tokenizer.post_quant_conv.register_forward_hook(lambda module, args, out: out.bfloat16())
    low_tokenizer.decoder.register_forward_hook(lambda module, args, out: out.float())
    labels = torch.tensor([207])
    raw = random_var(args.depth, VAR_256)
    packed = prepare(random_var(args.depth, VAR_256))
    low = prepare(random_var(args.depth, VAR_256), torch.bfloat16)
    upstream, schedule = PlainVAR(raw), raw.schedule()
    makers: dict[str, Callable[[Sampling], Run]] = {
        "plain, upstream's form": lambda s: plain(upstream, tokenizer, labels, s),
        "vtc": lambda s: ours(raw, tokenizer, labels, s, KVCache(schedule)),
        "vtc, prepared": lambda s: ours(packed, tokenizer, labels, s, KVCache(schedule)),
        "vtc, prepared, stored in bfloat16":
            lambda s: ours(packed, tokenizer, labels, s, KVCache(schedule, storage=torch.bfloat16)),
        "vtc, bfloat16": lambda s: ours(low, low_tokenizer, labels, s, KVCache(schedule))}
    for threads in args.threads:
        torch.set_num_threads(threads)
        text, least = floor(raw, threads)
        runs: dict[str, list[Run]] = {name: [] for name in makers}
        for make in makers.values():
            make(Sampling(top_k=1))  # warms up
        for _ in range(args.repeats):
            for name, make in makers.items():
                runs[name].append(make(PUBLISHED_SAMPLING))
        reference = best(runs["plain, upstream's form"])
        rows = []
        for name, of_name in runs.items():
            run = best(of_name)
            same = (run.indices == reference.indices).float().mean().item()
            rows.append([name, f"{run.clock.transformer:.2f}", f"{run.clock.seconds['decoder']:.2f}",
                         f"{run.clock.total:.2f}", f"{reference.clock.total / run.clock.total:.2f}",
                         f"{reference.clock.transformer / run.clock.transformer:.2f}", f"{run.nbytes / MIB:.0f}",
                         f"{run.peak / MIB:.0f}", f"{same:.3f}"])
        texts += [text, table([f"{threads} thread{'s' * (threads > 1)}", "transformer s", "decoder s", "total s",
                               "times as fast", "transformer alone", "cache MiB", "peak MiB", "same words"], rows)]
        scale_rows = [[name, *(f"{1e3 * best(of_name).clock.seconds[f'scale {i + 1}']:.0f}"
                               for i in range(len(VAR_256)))] for name, of_name in runs.items()]
        texts.append(table([f"ms of each scale, {threads} thread{'s' * (threads > 1)}", *map(str, VAR_256)],
                           scale_rows))
        ratios = {name: reference.clock.total / best(r).clock.total for name, r in runs.items()}
        missed += verdict(f"full policy in float32, {threads} threads", ratios["vtc, prepared"], FULL_BAR)
        if bfloat16_is_fast():
            missed += verdict(f"full policy in bfloat16, {threads} threads", ratios["vtc, bfloat16"], BFLOAT16_BAR)
        texts.append(f"Plain over vtc, prepared: {ratios['vtc, prepared']:.2f} (bar {FULL_BAR}); over bfloat16: "
                     f"{ratios['vtc, bfloat16']:.2f} (bar {BFLOAT16_BAR}"
                     f"{'' if bfloat16_is_fast() else ', which does not count here: no instructions for it'}); the "
                     "floor over the prepared transformer: "
                     f"{least / best(runs['vtc, prepared']).clock.transformer:.2f}.\n")
    return "\n".join(texts), missed


def verdict(what: str, found: float, bar: float) -> list[str]:
    return [] if found >= bar else [f"{what}: {found:.2f} times as fast, not {bar}"]


# ---- policies -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Timed(Around):
    """Another policy, with the seconds that its choices take."""

    clock: Clock

    def attended(self, candidates: Candidates) -> Tensor | Merged | None:
        self.clock.start()
        chosen = super().attended(candidates)
        self.clock.stop("select")
        return chosen

    def stored(self, candidates: Candidates) -> Tensor | None:
        self.clock.start()
        chosen = super().stored(candidates)
        self.clock.stop("select")
        return chosen


class TimedCache(KVCache):
    """Seconds within the cache: attention, choices and copies."""

    clock: Clock

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int) -> Tensor:
        self.clock.start()
        out = super().attend(q, k, v, layer, step)
        self.clock.stop("attend")
        return out


def timed_cache(schedule: Schedule, policy: KVPolicy, storage: Any = None) -> tuple[TimedCache, Clock, Clock]:
    """A cache, the clock of its choices, and that of all it does."""
    choices, everything = Clock(), Clock()
    cache = TimedCache(schedule, policy if policy.keeps_all else Timed(policy, choices), storage)
    cache.clock = everything
    return cache, choices, everything


def policies_part(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Bytes, time and selection of every policy on one thread."""
    torch.set_num_threads(1)
    raw = random_var(args.depth, VAR_256)
    calibration, schedule = random_calibration(raw), raw.schedule()
    raw.permute_heads(calibration.head_order())
    half = schedule.heads // 2
    contextual = tuple(tuple(range(half)) for _ in range(schedule.layers))
    model, tokenizer, labels = prepare(raw), VARVQVAE(channels=32, num_res_blocks=1).eval(), torch.tensor([207])
    budget = budget_from_ratio(schedule, 0.3)
    made: dict[str, tuple[KVPolicy, Any]] = {word: parse_policy(word).build(schedule, calibration) for word in (
        "full", "full+bf16", "full+int8", "sliding:2", "streaming:0.3", "h2o:0.3", "snapkv:0.3", "pyramidkv:0.3",
        "adakv:0.3", "scalekv:0.3", "heatkv:0.3", "full+mixed", "hack:0.3+int8")}
    two, one = "hack, two groups", "hack, one group"
    made |= {two: (HACK(contextual, budget), None), one: (HACK(((*range(schedule.heads),),) * schedule.layers, budget,
                                                               contextual_share=1.0), None),
             "hack, attention 0.3": (HACK(contextual, attention=budget_from_ratio(schedule, 0.3, "all")), None)}
    rows: list[list[str]] = []
    found: dict[str, tuple[float, float, float, Run]] = {}
    for name in [two, one, *made, one, two]:  # those whose ratio has a bar thrice, in turns
        policy, storage = made[name]
        runs = []
        for _ in range(args.repeats):
            cache, choices, everything = timed_cache(schedule, policy, storage)
            run = ours(model, tokenizer, labels, PUBLISHED_SAMPLING, cache)
            runs.append((run.clock.transformer, everything.seconds["attend"], choices.seconds.get("select", 0.0), run))
        least = min(runs, key=lambda r: r[0])
        if name not in found or least[0] < found[name][0]:
            found[name] = least
        print(f"{name}: {found[name][0]:.2f} s", file=sys.stderr, flush=True)
    full = found["full"][0]
    for name, (seconds, attend, select, run) in found.items():
        rows.append([name, f"{run.nbytes / MIB:.1f}", f"{run.peak / MIB:.1f}", f"{seconds:.2f}",
                     f"{seconds / full:.2f}", f"{attend:.2f}", f"{1e3 * select:.0f}",
                     f"{100 * select / seconds:.1f} %"])
    ratio, attend_ratio = found[two][0] / found[one][0], found[two][1] / found[one][1]
    selections = {n: f[2] / f[0] for n, f in found.items()}
    missed = [f"two head groups: {ratio:.3f} times the time of one, not {GROUPS_BAR}"] if ratio > GROUPS_BAR else []
    missed += [f"selection of {name}: {100 * share:.1f} % of the transformer" for name, share in selections.items()
               if share > SELECTION_BAR]
    text = "\n".join(["## Every policy at 30 % of the stored tokens\n", table(
        ["1 thread", "cache MiB", "peak MiB", "transformer s", "of full", "in the cache s", "selecting ms", "of it"],
        rows), f"Two head groups, budgets 1 : 5, take {ratio:.3f} of the time of one group at the same mean (bar "
        f"{GROUPS_BAR}), inside the cache {attend_ratio:.2f}. The dearest selection is "
        f"{100 * max(selections.values()):.1f} % of the transformer (bar {100 * SELECTION_BAR:.0f}).\n"])
    return text, missed


# ---- bytes ----------------------------------------------------------------------------------------------------------

#: name -> depth, width, heads, grids, bytes of a key's and of a value's number as upstream stores them
SHAPES: dict[str, tuple[int, int, int, tuple[tuple[int, int], ...], float, float]] = {
    **{f"VAR-d{d} 256": (d, 64 * d, d, tuple((s, s) for s in VAR_256), 4, 4) for d in (16, 20, 24, 30)},
    "VAR-d36 512": (36, 2304, 36, tuple((s, s) for s in VAR_512), 4, 4),
    "Infinity-2B 1024": (32, 2048, 16, scales_for(), 4, 2),
    "Infinity-8B 1024": (40, 3584, 28, scales_for(), 4, 2)}


def shape(name: str) -> Schedule:
    depth, width, heads, grids, _, _ = SHAPES[name]
    return Schedule(grids, depth, heads, width // heads)


def bytes_part(args: argparse.Namespace) -> tuple[str, list[str]]:
    """By formula: depth x width x tokens x 2 (guidance) x bytes of a key's and a value's number."""
    rows = []
    for name, (*_, k_bytes, v_bytes) in SHAPES.items():
        schedule = shape(name)
        stored, mean = schedule.stored_tokens, (k_bytes + v_bytes) / 2

        def mib(tokens: float, number: float, schedule: Schedule = schedule) -> str:
            return f"{schedule.kv_bytes(tokens, 2, number) / MIB:,.0f}"

        upstream, small = schedule.kv_bytes(schedule.all_tokens, 2, mean), schedule.kv_bytes(stored, 2, 2)
        rows.append([name, f"{schedule.all_tokens} / {stored}", mib(schedule.all_tokens, mean), mib(stored, mean),
                     mib(stored, 2), f"{upstream / small:.2f}", mib(stored, 1 + 2 / schedule.head_dim),
                     *(mib(share * stored, 2) for share in (0.5, 0.3, 0.2, 0.1))])
    return "\n".join(["## Bytes of keys and values, MiB a picture with guidance\n", table(
        ["model", "tokens / stored", "upstream", "no last scale", "and bfloat16", "times less", "and int8",
         "bfloat16, 50 %", "30 %", "20 %", "10 %"], rows)]), []


# ---- gpu ------------------------------------------------------------------------------------------------------------

def gpu_part(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Depths and batches in bfloat16 with peak memory, and the largest batch at each budget."""
    if not torch.cuda.is_available():
        return "## On a GPU\n\nNot measured: this machine has no CUDA device.\n", []
    device = "cuda"
    tokenizer = VARVQVAE().eval().to(device)
    rows, batches = [], []
    for depth in (16, 24, 30):
        model = random_var(depth, VAR_256, device)
        calibration, schedule = random_calibration(model), model.schedule()
        model.permute_heads(calibration.head_order().to(device))
        prepare(model, torch.bfloat16)
        for batch in (1, 16):
            labels = torch.arange(batch, device=device) % 1000
            for word in ("full", "full+int8", "hack:0.3", "scalekv:0.3", "heatkv:0.3", "streaming:0.3"):
                runs = []
                for _ in range(args.repeats + 1):
                    torch.cuda.reset_peak_memory_stats()
                    cache = KVCache(schedule, *built(word, model, calibration))
                    runs.append(ours(model, tokenizer, labels, PUBLISHED_SAMPLING, cache))
                run = best(runs[1:])
                rows.append([f"VAR-d{depth}, batch {batch}, {word}", f"{1e3 * run.clock.transformer:.0f}",
                             f"{1e3 * run.clock.seconds['decoder']:.0f}", f"{run.nbytes / MIB:.0f}",
                             f"{run.peak / MIB:.0f}", f"{torch.cuda.max_memory_allocated() / MIB:.0f}"])
        batches += [[f"VAR-d{depth}, {word}", str(largest_batch(model, word, calibration, device))]
                    for word in ("full", "full+int8", "hack:0.5", "hack:0.3", "hack:0.2", "hack:0.1")]
        del model
        torch.cuda.empty_cache()
    return "\n".join([f"## On a GPU: {torch.cuda.get_device_name()}, bfloat16\n", table(
        ["", "transformer ms", "decoder ms", "cache MiB", "cache's peak MiB", "allocated at the peak MiB"], rows),
        "Largest batch whose transformer fits, by doubling and bisection:\n", table(["", "pictures"], batches)]), []


def built(word: str, model: VAR, calibration: Calibration) -> tuple[KVPolicy, Any]:
    """A policy for heads that `permute_heads` has put in order: contextual ones first."""
    policy, storage = parse_policy(word).build(model.schedule(), calibration)
    if isinstance(policy, HACK):
        kinds = tuple(tuple(range(len(kind))) for kind in policy.contextual)
        policy = HACK(kinds, policy.tokens, policy.attention, policy.contextual_share)
    return policy, storage


def largest_batch(model: VAR, word: str, calibration: Calibration, device: str) -> int:
    """How many pictures a scale-by-scale pass holds before memory runs out; pictures are not decoded."""

    @torch.no_grad()
    def fits(batch: int) -> bool:
        try:
            labels = torch.zeros(2 * batch, dtype=torch.int64, device=device)
            cache, modulation = KVCache(model.schedule(), *built(word, model, calibration)), model.modulation(labels)
            for step, side in enumerate(model.sides):
                codes = None if step == 0 else torch.zeros(2 * batch, side * side, model.code_dim, device=device)
                model.step(codes, labels, modulation, cache, step)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- command line ---------------------------------------------------------------------------------------------------

def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 0 done, 1 a bar was missed or something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--depth", type=int, default=16, help="of the CPU's VAR")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="the tables in Markdown")
    args = parser.parse_args(arguments)
    measures = {"speed": speed_part, "policies": policies_part, "bytes": bytes_part, "gpu": gpu_part}
    failures: list[str] = []
    try:
        texts = [where()]
        for part in args.parts:
            text, missed = measures[part](args)
            texts.append(text)
            failures += missed
            print(text, flush=True)
            if args.output:
                write_file(args.output, "\n".join(texts).encode())
    except (VtcError, RuntimeError) as error:
        print(f"bench_generation: {error}", file=sys.stderr)
        return 1
    for failure in failures:
        print(f"NOT MET {failure}", file=sys.stderr)
    return 1 if failures else 0


def where() -> str:
    """The head of the page."""
    return (f"# Speed of generation\n\nMade by `python scripts/bench_generation.py`. {usable_cpus()} processors "
            f"({platform.machine()}), load {os.getloadavg()[0]:.1f} at the start, Python {platform.python_version()}, "
            f"torch {torch.__version__}, instructions for bfloat16: {'yes' if bfloat16_is_fast() else 'no'}.\n")


if __name__ == "__main__":
    sys.exit(main())
