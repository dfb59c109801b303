"""What each cache policy costs a trained VAR: bytes, time, distance to the full cache's pictures, quality. Resumable.

    python scripts/evaluate_kv.py draw --model var-d6-128 --images tiny.npz --weights weights/ --work_dir runs/kv \\
        --settings full hack:0.3 scalekv:0.3 streaming:0.3 --samples 2000
    python scripts/evaluate_kv.py report --work_dir runs/kv --images tiny.npz --weights weights/ --output results/
    python scripts/evaluate_kv.py checks --model var-d6-128 --work_dir runs/kv

draw: every setting (a word of `vtc.generators.kv_cache.specs`) draws the same pictures, number i from seed i, class by
turn; `full` comes first, the others are held against it. A batch that is done is a line in WORK_DIR/SETTING.jsonl, with
a file of features beside it, and is not done again; `--share 0/2` and `--share 1/2` are two processes at work together.
checks: the last scale's keys are not needed, a budget of everything changes nothing, and how often storage in fewer
bits changes a word: by pictures drawn freely, and word by word over the full cache's pictures ("forced").
report: tables, a plot, and a sheet of the same pictures under each policy: tables.md, rows.json, plot.svg, sheet.jpg.

Frechet distances fall with the number of pictures; where a setting has fewer than the full cache, the full cache's
distance at that number stands beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from generator_quality import Facts, GeneratorJudge, as_floats
from torch import Tensor
from tqdm import tqdm

from vtc.errors import ConfigError, FileError
from vtc.eval.provenance import provenance
from vtc.files import write_file
from vtc.generators.calibrate import calibrate
from vtc.generators.generate import Scale
from vtc.generators.inference import prepare
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.calibration import Calibration
from vtc.generators.kv_cache.specs import POLICIES, parse_policy
from vtc.generators.kv_cache.storage import Storage
from vtc.generators.pretrained import LoadedGenerator
from vtc.generators.sampling import seeded
from vtc.generators.var import VAR
from vtc.images import save_image
from vtc.models import load_generator
from vtc.script import run_script
from vtc.training.loop import picture_grid

BUDGETS = (0.5, 0.3, 0.2, 0.1)
#: a window of the newest tokens is StreamingLLM without sinks: whole scales are too coarse for small budgets
WINDOW = "streaming:{},sinks=0"
FAMILIES = (WINDOW, "streaming:{}", "h2o:{}", "snapkv:{}", "pyramidkv:{}", "adakv:{}", "hack:{}", "scalekv:{}",
            "heatkv:{}")
STORAGES = ("full+bf16", "full+int8", "full+int4", "full+mixed", "hack:0.3+int8", "sliding:1", "sliding:2")
#: seeds of the calibration's pictures, which no setting draws
CALIBRATION_SEED = 1_000_000
#: pictures of each process whose words are also judged one by one, with the full cache's history
FORCED = 50
SHEET = 8
#: so many pictures at once are real ones, whose features are kept
REMEMBERED = 500


def claimed() -> list[str]:
    """What the claims are about."""
    return [f.format(b) for b in (0.3, 0.1) for f in ("hack:{}", "scalekv:{}", WINDOW, "streaming:{}")]


def default_settings() -> list[str]:
    """Those that the claims are about first, then the rest."""
    rest = [f.format(b) for b in (0.3, 0.1, 0.2, 0.5) for f in FAMILIES]
    return list(dict.fromkeys(["full", *claimed(), *rest[:18], *STORAGES, *rest[18:]]))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("draw", "checks", "report"))
    parser.add_argument("--model", help="bundled name, or folder of a VAR with its tokenizer")
    parser.add_argument("--images", help="real pictures with the splits train and val")
    parser.add_argument("--weights", help="folder of AlexNet's features; default VTC_LPIPS_WEIGHTS")
    parser.add_argument("--work_dir", type=Path, required=True, help="what was measured, batch by batch")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--settings", nargs="+", default=default_settings())
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--share", default="0/1", help="i/n: of n processes the i-th, from 0")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no batch after so many")
    parser.add_argument("--calibration", type=Path, help="default: the model folder's, else one is measured")
    parser.add_argument("--calibration_samples", type=int, default=50)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    needed = {"draw": ("model", "images"), "checks": ("model",), "report": ("images", "output")}[args.part]
    if missing := [name for name in needed if getattr(args, name) is None]:
        parser.error(f"{args.part} needs {', '.join('--' + name for name in missing)}")
    if not re.fullmatch(r"\d+/[1-9]\d*", args.share):
        parser.error(f"a share is i/n, as 0/2, not {args.share!r}")
    return args


class RememberingJudge(GeneratorJudge):
    """One that keeps the real pictures' features in the work folder: processes start at once the second time."""

    def __init__(self, folder: Path, *args: Any) -> None:
        self.folder = folder
        super().__init__(*args)

    def look(self, images: Tensor) -> Facts:
        if images.dtype != torch.uint8 or len(images) < REMEMBERED:
            return super().look(images)
        path = self.folder / f"features.{hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]}.npz"
        if not path.is_file():
            facts = super().look(images)
            write_file(path, compressed({"pooled": facts.pooled.numpy(), "parts": facts.parts.numpy()}))
        found = np.load(path)
        return Facts(torch.from_numpy(found["pooled"]), torch.from_numpy(found["parts"]))


# ---- drawing --------------------------------------------------------------------------------------------------------

@dataclass
class Drawn:
    """A batch. indices: (B, L). images: (B, 3, S, S) uint8. seconds: processor time of each scale, then the decoder.

    logits: (B, L, V) float32 if they were asked for, after guidance.
    """

    indices: Tensor
    images: Tensor
    seconds: list[float]
    cache: KVCache
    logits: Tensor | None


@torch.inference_mode()
def draw(generator: LoadedGenerator, labels: Tensor, seeds: Sequence[int], cache: KVCache, given: Tensor | None = None,
         keep_logits: bool = False) -> Drawn:
    """A batch of pictures through a cache; given: (B, L) words that are taken, while the logits are as they come."""
    model, seconds, logits = cast(VAR, generator.model), [], []
    last = time.process_time()

    def listening(scale: Scale) -> None:
        nonlocal last
        seconds.append(time.process_time() - last)
        if keep_logits:
            logits.append(scale.logits.float())
        last = time.process_time()

    held = None if given is None else (given, torch.ones_like(given, dtype=torch.bool))
    tokens, images = model.generate(labels.to(generator.device), cast(Any, generator.tokenizer), generator.sampling,
                                    generator.guidance, cache, seeded(seeds, generator.device), held, listening)
    seconds.append(time.process_time() - last)
    return Drawn(tokens.indices[..., 0].cpu(), (images * 255).round().to(torch.uint8).cpu(), seconds, cache,
                 torch.cat(logits, 1) if keep_logits else None)


def calibration_of(args: argparse.Namespace, generator: LoadedGenerator) -> Calibration:
    """The file's that --calibration names, the model's own, or one that is measured now and kept in the work folder."""
    found = generator.calibration(args.calibration)
    kept = args.work_dir / "calibration.safetensors"
    if found is None and kept.is_file():
        found = generator.calibration(kept)
    if found is None:
        model = cast(VAR, generator.model)
        labels = torch.arange(args.calibration_samples) % model.classes
        found = calibrate(generator, list(labels.split(10)), seed=CALIBRATION_SEED)
        found.save(kept)
    return found


def loaded(args: argparse.Namespace) -> tuple[LoadedGenerator, Calibration]:
    """The generator, ready, and its calibration."""
    generator = load_generator(args.model).to(args.device)
    if not isinstance(generator.model, VAR):
        raise ConfigError("This script measures VAR models.")
    calibration = calibration_of(args, generator)
    prepare(generator.model, torch.bfloat16 if args.bfloat16 else None)
    return generator, calibration


def draw_all(args: argparse.Namespace) -> None:
    args.work_dir.mkdir(parents=True, exist_ok=True)
    generator, calibration = loaded(args)
    judge = RememberingJudge(args.work_dir, args.images, args.weights)
    schedule, model = generator.schedule(), cast(VAR, generator.model)
    share, shares = map(int, args.share.split("/"))
    batches = [b for b in range(-(-args.samples // args.batch_size)) if b % shares == share]
    began = time.monotonic()
    forced_logits: Tensor | None = None
    for setting in args.settings:
        policy, storage = parse_policy(setting).build(schedule, calibration)
        done = {line["batch"] for line in lines_of(args.work_dir, setting)}
        for batch in tqdm([b for b in batches if b not in done], desc=setting, mininterval=10):
            if time.monotonic() - began > 60 * args.minutes:
                print(f"evaluate_kv: stopped after {args.minutes} minutes within {setting}", file=sys.stderr)
                return
            numbers = torch.arange(batch * args.batch_size, min((batch + 1) * args.batch_size, args.samples))
            labels, seeds = numbers % model.classes, (numbers + args.seed).tolist()
            drawn = draw(generator, labels, seeds, KVCache(schedule, policy, storage))
            line, arrays = judged(judge, drawn, labels, args.work_dir, setting, batch)
            if batch == batches[0]:
                full = np.load(at(args.work_dir, "full", batch))["indices"] if setting != "full" else drawn.indices
                words = torch.as_tensor(full)[:FORCED].long().to(generator.device)
                if forced_logits is None:
                    reference = draw(generator, labels[:FORCED], seeds[:FORCED], KVCache(schedule), words, True)
                    forced_logits = cast(Tensor, reference.logits)
                line |= forced(generator, labels, seeds, KVCache(schedule, policy, storage), words, forced_logits)
            write_file(at(args.work_dir, setting, batch), compressed(arrays))
            with at(args.work_dir, setting).open("a") as file:
                file.write(json.dumps({"batch": batch, "threads": torch.get_num_threads(), **line}) + "\n")


def judged(judge: GeneratorJudge, drawn: Drawn, labels: Tensor, work: Path, setting: str, batch: int,
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line of facts, and arrays: features, the classifier's verdict, words and, of the full cache, pictures."""
    facts = judge.look(drawn.images)
    correct = judge.probabilities(facts).argmax(-1) == labels
    arrays: dict[str, Any] = {"pooled": facts.pooled.numpy(), "correct": correct.numpy(),
                              "indices": drawn.indices.numpy().astype(np.int16)}
    if setting == "full":
        arrays["images"] = drawn.images.numpy()
    else:
        if not at(work, "full", batch).is_file():
            raise FileError(f"The full cache's batch {batch} is not drawn yet: begin --settings with full.")
        full = np.load(at(work, "full", batch))
        a, b = as_floats(drawn.images), as_floats(torch.from_numpy(full["images"]))
        errors = (a - b).square().mean((1, 2, 3)).clamp(min=1e-10)  # equal pictures: 100 dB
        with torch.inference_mode():
            arrays |= {"psnr": (-10 * errors.log10()).numpy(), "lpips": judge.lpips(a, b).numpy()}
        arrays["same"] = (drawn.indices.numpy() == full["indices"]).mean(1)
        if batch == 0:
            arrays["images"] = drawn.images.numpy()[:SHEET]
    cache, count = drawn.cache, len(labels)
    line = {"count": count, "bytes": cache.nbytes() / count, "peak": cache.peak_nbytes() / count,
            "metadata": (cache.nbytes(metadata=True) - cache.nbytes()) / count,
            "seconds": [s / count for s in drawn.seconds]}
    return line, arrays


@torch.inference_mode()
def forced(generator: LoadedGenerator, labels: Tensor, seeds: Sequence[int], cache: KVCache, words: Tensor,
           expected: Tensor) -> dict[str, float]:
    """With the full cache's words as history: how often the best word is the same, and the divergence, nats a token."""
    found = draw(generator, labels[: len(words)], list(seeds)[: len(words)], cache, words, True)
    assert found.logits is not None
    p, q = expected.log_softmax(-1), found.logits.log_softmax(-1)
    return {"forced_same": (found.logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            "forced_divergence": (p.exp() * (p - q)).sum(-1).mean().item(), "forced_pictures": len(words)}


def slug(setting: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", setting.lower())


def at(work: Path, setting: str, batch: int | None = None) -> Path:
    """Where a setting's lines are, or a batch's arrays."""
    return work / (f"{slug(setting)}.jsonl" if batch is None else f"{slug(setting)}.{batch:04d}.npz")


def lines_of(work: Path, setting: str) -> list[dict[str, Any]]:
    """What is done of a setting, by number of the batch; a line that was cut off by a kill does not count."""
    found: dict[int, dict[str, Any]] = {}
    path = at(work, setting)
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[line["batch"]] = line
    return [found[b] for b in sorted(found)]


def compressed(arrays: dict[str, Any]) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# ---- exactness ------------------------------------------------------------------------------------------------------

class StoresAll(KVCache):
    """As upstream does: the last scale is stored as well, in an account of its own."""

    extra = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: int) -> Tensor:
        out = super().attend(q, k, v, layer, step)
        if step == self.schedule.steps - 1:
            group = self.groups[layer][0]
            group.k.append(k)
            group.v.append(v)
            self.extra += k.nbytes + v.nbytes
        return out


def checks(args: argparse.Namespace) -> None:
    """Exactness on `--samples` pictures: written to the work folder for the report."""
    from bench_generation import PlainVAR

    args.work_dir.mkdir(parents=True, exist_ok=True)
    raw = load_generator(args.model).to(args.device)
    calibration = calibration_of(args, raw)
    schedule, model = raw.schedule(), cast(VAR, raw.model)
    count = min(args.samples, 50)
    labels = torch.arange(count) % model.classes
    seeds = list(range(args.seed, args.seed + count))
    full = draw(raw, labels, seeds, KVCache(schedule))
    everything = draw(raw, labels, seeds, StoresAll(schedule))
    found: dict[str, Any] = {"pictures": count,
                             "stores_all_same": share_equal(full.indices, everything.indices),
                             "stored_bytes": full.cache.nbytes() / count,
                             "stores_all_bytes": everything.cache.nbytes() / count}
    plain_words = [PlainVAR(model).generate(labels[i : i + 1], cast(Any, raw.tokenizer), raw.sampling, raw.guidance,
                                            torch.Generator().manual_seed(seeds[i]))[0] for i in range(min(count, 10))]
    found["plain_same"] = share_equal(full.indices[: len(plain_words)], torch.cat(plain_words))
    found["plain_pictures"] = len(plain_words)
    budget = {}
    for name, kind in POLICIES.items():
        if kind.amount == "tokens":
            policy = kind.make(schedule, schedule.stored_tokens, {}, calibration)
            budget[name] = share_equal(full.indices, draw(raw, labels, seeds, KVCache(schedule, policy)).indices)
    found["budget_of_everything_same"] = budget
    reference = draw(raw, labels, seeds, KVCache(schedule), full.indices.to(raw.device), True)
    prepare(raw.model)
    for name, dtype, storage in (("packed", None, None), ("packed, stored in bfloat16", None, torch.bfloat16),
                                 ("packed, stored in int8", None, "int8"), ("bfloat16", torch.bfloat16, None)):
        prepare(raw.model, dtype)
        cache: Storage = cast(Any, storage)
        free = draw(raw, labels, seeds, KVCache(schedule, storage=cache))
        found[name] = {"free_same": share_equal(full.indices, free.indices),
                       "pictures_same": (full.indices == free.indices).all(1).float().mean().item(),
                       "bytes": free.cache.nbytes() / count,
                       **forced(raw, labels, seeds, KVCache(schedule, storage=cache), full.indices.to(raw.device),
                                cast(Tensor, reference.logits))}
    write_file(args.work_dir / "checks.json", json.dumps(found, indent=1).encode())
    print(json.dumps(found, indent=1))


def share_equal(a: Tensor, b: Tensor) -> float:
    return (a == b.cpu()).float().mean().item()


# ---- report ---------------------------------------------------------------------------------------------------------

def measured(args: argparse.Namespace, judge: GeneratorJudge) -> dict[str, dict[str, Any]]:
    """Of each setting with pictures, its numbers."""
    rows: dict[str, dict[str, Any]] = {}
    full: Tensor | None = None
    for setting in args.settings:
        lines = [line for line in lines_of(args.work_dir, setting)
                 if at(args.work_dir, setting, line["batch"]).is_file()]
        if not lines:
            continue
        parts = [dict(np.load(at(args.work_dir, setting, line["batch"]))) for line in lines]
        arrays = {key: np.concatenate([p[key] for p in parts]) for key in ("pooled", "correct", "psnr", "lpips", "same")
                  if all(key in p for p in parts)}
        pooled = torch.from_numpy(arrays["pooled"])
        full = pooled if setting == "full" else full
        count = len(pooled)
        seconds = np.average([line["seconds"] for line in lines], axis=0, weights=[line["count"] for line in lines])
        row: dict[str, Any] = {
            "count": count, "bytes": lines[0]["bytes"], "peak": lines[0]["peak"], "metadata": lines[0]["metadata"],
            "class_accuracy": float(arrays["correct"].mean()), "seconds": seconds.tolist(),
            **(judge.frechet(pooled) if count > 256 else {})}
        if setting != "full":
            row |= {"psnr": float(arrays["psnr"].mean()), "lpips": float(arrays["lpips"].mean()),
                    "same": float(arrays["same"].mean())}
            if full is not None and 256 < count < len(full):
                same_batches = torch.cat([torch.from_numpy(np.load(at(args.work_dir, "full", line["batch"]))["pooled"])
                                          for line in lines])
                row["full_at_count"] = judge.frechet(same_batches)
        forced_lines = [line for line in lines if "forced_same" in line]
        for key in ("forced_same", "forced_divergence"):
            if forced_lines:
                row[key] = float(np.average([line[key] for line in forced_lines],
                                            weights=[line["forced_pictures"] for line in forced_lines]))
        rows[setting] = row
    return rows


def name_of(setting: str) -> str:
    """For tables: a window is what StreamingLLM without sinks is."""
    return setting.replace("streaming", "window").replace(",sinks=0", "") if setting.endswith(",sinks=0") else setting


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, by setting."""
    lines = ["| setting | n | cache KiB | peak KiB | transformer ms | last scale ms | same words | PSNR dB | LPIPS "
             "| FD to held-out | full at that n | class accuracy | divergence, forced |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for setting, row in rows.items():
        full = row.get("full_at_count", {}).get("fd_alexnet_to_held_out")
        cells = [f"{row['count']}", f"{row['bytes'] / 1024:.0f}", f"{row['peak'] / 1024:.0f}",
                 f"{1e3 * sum(row['seconds'][:-1]):.0f}", f"{1e3 * row['seconds'][-2]:.1f}",
                 number(row.get("same"), ".3f"), number(row.get("psnr"), ".2f"), number(row.get("lpips"), ".4f"),
                 number(row.get("fd_alexnet_to_held_out"), ".3f"), number(full, ".3f"),
                 f"{row['class_accuracy']:.3f}", number(row.get("forced_divergence"), ".5f")]
        lines.append(f"| {name_of(setting)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Quality against bytes: LPIPS to the full cache, Frechet distance, accuracy, divergence.

    What depends on the number of pictures is shown of settings with as many as the full cache has.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    matplotlib.rcParams["svg.hashsalt"] = "vtc"
    shown = (("lpips", "LPIPS to the full cache's picture"), ("fd_alexnet_to_held_out", "FD-AlexNet to held-out"),
             ("class_accuracy", "class accuracy"), ("forced_divergence", "divergence, nats a token"))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    families = {name_of(f.format(1)).partition(":")[0]: f for f in FAMILIES}
    for axis, (key, title) in zip(axes.flat, shown, strict=True):
        fair = {s: r for s, r in rows.items() if key in r and (
            key not in ("fd_alexnet_to_held_out", "class_accuracy") or r["count"] == rows["full"]["count"])}
        for number_, (name, family) in enumerate(families.items()):
            found = [fair[family.format(b)] for b in BUDGETS if family.format(b) in fair]
            axis.plot([r["bytes"] / 1024 for r in found], [r[key] for r in found], "o-", label=name,
                      color=f"C{number_}", markersize=4)
        for setting, marker in (("full", "*"), ("full+bf16", "s"), ("full+int8", "v"), ("full+int4", "^"),
                                ("full+mixed", "D"), ("hack:0.3+int8", "P")):
            if setting in fair:
                axis.plot(fair[setting]["bytes"] / 1024, fair[setting][key], marker, color="black", label=setting)
        axis.set(xlabel="cache, KiB a picture", ylabel=title, xscale="log")
        axis.xaxis.set_major_locator(ticker.LogLocator(2, numticks=8))
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.grid(alpha=0.3)
    axes.flat[2].legend(*axes.flat[3].get_legend_handles_labels(), fontsize=7, loc="lower right", ncols=2)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def sheet(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> list[str]:
    """The first pictures under the full cache and what the claims are about, one a row: sheet.jpg; from the top."""
    names, pictures = [], []
    for setting in (s for s in rows if s in ("full", *claimed(), "hack:0.3+int8", "sliding:1")):
        path = at(args.work_dir, setting, 0)
        if path.is_file():
            names.append(setting)
            pictures.append(torch.from_numpy(np.load(path)["images"])[:SHEET])
    if pictures:
        save_image(picture_grid(as_floats(torch.cat(pictures)), columns=SHEET), args.output / "sheet.jpg")
    return names


def paired(work: Path, ours: str, theirs: str) -> dict[str, np.ndarray] | None:
    """Of the pictures that both settings drew, what of theirs exceeds ours: (N,) by measure; None: no picture."""
    batches = [{line["batch"] for line in lines_of(work, setting)} for setting in (ours, theirs)]
    loaded = [[np.load(at(work, setting, b)) for setting in (ours, theirs)] for b in sorted(batches[0] & batches[1])]
    return {key: np.concatenate([b[key].astype(float) - a[key].astype(float) for a, b in loaded])
            for key in ("lpips", "psnr", "correct")} if loaded else None


def claims(rows: dict[str, dict[str, Any]], work: Path) -> str:
    """HACK and ScaleKV beside a window and StreamingLLM, in Markdown; pairs of pictures with the same seed.

    LPIPS, PSNR and class accuracy stand with the mean difference in its own standard errors; above two it is no chance.
    """
    lines = ["| ours | beside | pictures | divergence | LPIPS | PSNR dB | class accuracy | FD to held-out |",
             "|---|---|--:|---|---|---|---|---|"]
    for budget in BUDGETS:
        for ours, theirs in ((f.format(budget), g.format(budget)) for f in ("hack:{}", "scalekv:{}")
                             for g in (WINDOW, "streaming:{}")):
            if ours not in rows or theirs not in rows or not (found := paired(work, ours, theirs)):
                continue
            a, b = rows[ours], rows[theirs]
            cells = [str(len(found["lpips"])), both(a, b, "forced_divergence", ".4f")]
            for key, form, better in (("lpips", ".4f", 1), ("psnr", ".2f", -1), ("correct", ".3f", -1)):
                error = found[key].std() / math.sqrt(len(found[key]))
                gain = better * found[key].mean() / error if error else 0.0
                cells.append(f"{both(a, b, 'class_accuracy' if key == 'correct' else key, form)} ({gain:+.1f} s.e.)")
            cells.append(both(a, b, "fd_alexnet_to_held_out", ".2f"))
            lines.append(f"| {ours} | {name_of(theirs)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Standard errors are positive where ours is better.", ""])


def both(a: dict[str, Any], b: dict[str, Any], key: str, form: str) -> str:
    return f"{a[key]:{form}}, {b[key]:{form}}" if key in a and key in b else ""


def report(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    judge = RememberingJudge(args.work_dir, args.images, args.weights)
    rows = measured(args, judge)
    if "full" not in rows:
        raise FileError(f"There are no pictures of the full cache in {args.work_dir}: draw them first.")
    plot(rows, args.output / "plot.svg")
    names = sheet(args, rows)
    exact_file = args.work_dir / "checks.json"
    exact = json.loads(exact_file.read_text()) if exact_file.is_file() else {}
    result = {"rows": rows, "checks": exact, "held_out_accuracy": judge.held_out_accuracy, "sheet": names,
              "provenance": provenance()}
    write_file(args.output / "rows.json", (json.dumps(result, indent=1) + "\n").encode())
    text = "\n".join([
        "# What each cache policy costs", "", table(rows), "## The claims", "", claims(rows, args.work_dir),
        "## The sheet", "", "`sheet.jpg`, from the top: " + ", ".join(map(name_of, names)) + ".", "",
        "## Exactness", "", "```json", json.dumps(exact, indent=1), "```", ""])
    write_file(args.output / "tables.md", text.encode())
    print(text)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    {"draw": draw_all, "checks": checks, "report": report}[args.part](args)


if __name__ == "__main__":
    sys.exit(run_script(main, "evaluate_kv"))
