"""The one training loop, on Accelerate: `Loop(task, recipe, accelerator, data, output_dir).run()`.

One step, for each of the recipe's parts of a batch and each player of the task in turn:

    terms = task.losses(player, batch, step)      autocast, gradients of the other players off
    (sum of the terms / parts).backward()

then the gradients are averaged over the processes, clipped, and every player that had terms takes its step; the average
of the first player's weights follows. Averaging by hand instead of a DistributedDataParallel wrapper leaves the modules
as they are: a task may call any method of a player, several times or not at all.

All randomness of a step comes from (seed, step, part, process), and the data's order from sample numbers; so a run that
was stopped, whichever way, goes on from its last checkpoint to the same bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
    send_to_device,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vtc.errors import ConfigError, TrainingError, VtcError, first_sentence
from vtc.files import write_file
from vtc.images import save_image
from vtc.tokenizers.ranks import from_first_rank, is_parallel, mean_over_ranks
from vtc.training.accelerate_config import follow_accelerate_config
from vtc.training.checkpoints import (
    AVERAGE,
    all_checkpoints,
    all_tensors,
    find_checkpoint,
    forget_after,
    not_written,
    read_checkpoint,
    set_tensors,
    versions,
    write_checkpoint,
)
from vtc.training.recipe import Recipe, add_recipe_flags, flag, parse_recipe_args, recipe_from
from vtc.training.sharding import (
    check_sharding,
    clip_gradients,
    cut_state,
    is_sharded,
    kinds_to_shard,
    local,
    reshard,
    shard_blocks,
    split_groups,
    whole,
)
from vtc.training.task import Task, checkpoint_activations

__all__ = ["Loop", "Recipe", "Stopped", "Task", "add_recipe_flags", "flag", "make_accelerator", "parse_recipe_args",
           "recipe_from", "seed_everything"]

#: lines of the log, and of the validations, in the output folder
LOG, VALIDATION = "train.jsonl", "validation.jsonl"
#: steps in a row that may have no finite loss in float16, where the loss scale is still being found
FP16_PATIENCE = 20
#: seconds that a process which reads data goes on after SIGTERM
READER_PATIENCE = 120


class Stopped(TrainingError):
    """A run that a signal ended after it had written a checkpoint; `signal` is its number."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.signal, self.exit_code = number, 128 + number


def make_accelerator(recipe: Recipe, output_dir: str | Path) -> Accelerator:
    """The Accelerator of a recipe: its precision and trackers; the CPU where there is no GPU.

    What `accelerate launch` was configured to is taken over into the recipe, or refused by its name.
    """
    trackers = {"none": [], "auto": ["tensorboard"] if is_tensorboard_available() else [],
                "tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}[recipe.report_to]
    for name, there in (("tensorboard", is_tensorboard_available()), ("wandb", is_wandb_available())):
        if name in trackers and not there:
            raise ConfigError(f"--report_to {recipe.report_to} needs the package {name}, which is not installed: pip "
                              f"install {name}, or --report_to none.")
    differences = follow_accelerate_config(recipe)
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    if recipe.mixed_precision == "fp16" and on_cpu:
        raise ConfigError("--mixed_precision fp16 needs a GPU: here, take bf16 or no.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.mixed_precision:
        AcceleratorState._reset_state()  # an earlier run in this process had another precision
    try:
        # the other processes wait while the main one validates, which may take longer than the usual ten minutes
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=4))
        folders = ProjectConfiguration(str(output_dir), logging_dir=str(Path(output_dir) / "logs"))
        accelerator = Accelerator(mixed_precision=recipe.mixed_precision, cpu=on_cpu, log_with=trackers or None,
                                  project_config=folders, kwargs_handlers=[patience])
    except (ValueError, ImportError) as error:
        raise ConfigError(f"Accelerate refuses this configuration: {' '.join(str(error).split())}") from error
    if accelerator.is_main_process:
        for sentence in differences:
            tqdm.write(sentence, file=sys.stderr)
    return accelerator


def seed_everything(*numbers: int) -> None:
    """Seed torch, numpy and random by a few non-negative numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Average:
    """A copy of a model whose weights follow it, slowly; buffers, and weights that do not learn, are the model's."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.module = deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """The decay grows with the run, so that the first, useless weights are soon forgotten."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(mine, local(its.detach()), its.requires_grad) for mine, its in
                 zip(map(local, self.module.parameters()), model.parameters(), strict=True)]
        torch._foreach_lerp_([mine for mine, _, learns in pairs if learns], [its for _, its, learns in pairs if learns],
                             1 - decay)
        still = [(mine, its) for mine, its, learns in pairs if not learns]  # a lerp would turn the sign of a zero
        for kept, current in (*still, *zip(self.module.buffers(), model.buffers(), strict=True)):
            kept.copy_(current)
        self.updates += 1


class Numbered(Iterable[Any]):
    """The numbers of the samples that one process reads: lists of `size`, or single ones where `size` is None.

    Batch after batch, the processes side by side in it: two processes see what one with twice the batch sees.
    """

    def __init__(self, start: int, count: int, size: int | None, rank: int, ranks: int) -> None:
        self.start, self.count, self.size, self.rank, self.ranks = start, count, size, rank, ranks

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        size = self.size or 1
        for batch in range(self.count):
            first = self.start + (batch * self.ranks + self.rank) * size
            yield first if self.size is None else list(range(first, first + size))


class Loop:
    """One training run.

    data: a dataset without end, whose item n depends on nothing but n: one sample, or a whole batch where the dataset
        has a true `whole_batches`. Or a function (first number, batches) -> iterable of batches for this process.
    output_dir: takes checkpoint-N/, train.jsonl, validation.jsonl, samples/, recipe.json, versions.json and, from
        `run`, the finished model in model/.
    step: steps done. position: number of the first sample that was not used.
    """

    def __init__(self, task: Task, recipe: Recipe, accelerator: Accelerator,
                 data: Dataset[Any] | Callable[[int, int], Iterable[Any]], output_dir: str | Path) -> None:
        self.task, self.recipe, self.accelerator, self.data = task, recipe, accelerator, data
        self.output_dir = Path(output_dir)
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.step = self.position = 0
        self._signal = 0
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self._bad_steps = 0
        self._warned: set[str] = set()
        for module in (*task.frozen.values(), *task.players.values()):
            module.to(accelerator.device)
        for module in task.frozen.values():
            module.requires_grad_(False).eval()
        task.train_mode()
        for player in task.players.values():
            for tensor in (*player.parameters(), *player.buffers()):  # processes start alike
                tensor.data.copy_(from_first_rank(tensor.data.contiguous()))
        self.average = Average(task.model, recipe.ema_decay) if recipe.ema_decay else None
        self._unsharded: nn.Module | None = None
        if recipe.shard:
            check_sharding(recipe.mixed_precision)
            shards = kinds_to_shard(task.model, task.shards or task.blocks, recipe.shard_classes)
            if accelerator.is_main_process:
                self._unsharded = deepcopy(task.model).cpu()  # what a finished model is written from
        if recipe.gradient_checkpointing:
            checkpoint_activations(task.model, task.blocks)
        if recipe.shard:
            for module in (*task.players.values(), *([self.average.module] if self.average else [])):
                shard_blocks(module, shards, accelerator.device, recipe.reshard_after_forward)
        self._trained = {name: [p for p in player.parameters() if p.requires_grad]
                         for name, player in task.players.items()}
        for name, parameters in self._trained.items():
            if not parameters:
                raise ConfigError(f"The player {name!r} has no weights to train.")
        self.optimizers = {name: task.optimizer(name, recipe) for name in task.players}
        for optimizer in self.optimizers.values():
            split_groups(optimizer)
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if recipe.mixed_precision == "fp16" else None
        if recipe.compile:
            for module in task.compiled():
                # In place: names of tensors stay. Crops have one size; kernels for any size fail on pooled pyramids.
                module.compile(dynamic=False)

    @property
    def averaged(self) -> nn.Module:
        """The model with averaged weights; the model itself where the recipe has no average."""
        return self.task.model if self.average is None else self.average.module

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, resume: str | Path | None = None) -> nn.Module:
        """Resume where asked, train, and write the finished model to output_dir/model; the averaged model."""
        if resume:
            self.resume(resume)
        average = self.train()
        if self.recipe.shard:
            tensors = all_tensors(average, keep=self._unsharded is not None)
            if self._unsharded is not None:
                set_tensors(self._unsharded, tensors, "the model")
        if self.accelerator.is_main_process:
            try:
                self.task.save(self._unsharded or average, self.output_dir / "model")
            except (OSError, SafetensorError) as error:
                raise TrainingError(not_written("The finished model", self.output_dir, error)) from error
        self.accelerator.wait_for_everyone()
        return average

    def train(self, stop_at: int | None = None) -> nn.Module:
        """Run from the current step to the recipe's last, or pause at `stop_at`; the averaged model, in eval mode.

        Raises TrainingError where the run cannot go on, and Stopped after a Ctrl-C or SIGTERM; either leaves whole
        checkpoints only.
        """
        recipe, main = self.recipe, self.accelerator.is_main_process
        final = recipe.total_steps if stop_at is None else min(stop_at, recipe.total_steps)
        if self.step >= final:
            return self.averaged.eval()
        if main:
            self._describe()
        self._started, self._since = time.perf_counter(), (time.perf_counter(), self.step)
        bar = tqdm(total=recipe.total_steps, initial=self.step, disable=not main, unit="step", mininterval=1)
        batches = self._batches(final)
        try:
            with self._signals(), bar:
                while self.step < final:
                    self._one_step(batches)
                    bar.update()
                    last = self.step == final
                    stopped = self._asked_to_stop(last)
                    if self.step % recipe.logging_steps == 0 or last or stopped:
                        self._log(bar)
                    if last or (recipe.validation_steps and self.step % recipe.validation_steps == 0):
                        self._validate()
                    if last or stopped or self.step % recipe.checkpointing_steps == 0:
                        self._flush()  # a loss that is no number must not get into a checkpoint
                        self.save_checkpoint()
                    if stopped and not last:
                        name = signal.Signals(stopped).name
                        raise Stopped(f"{name}: stopped at step {self.step} of {recipe.total_steps}, with a "
                                      "checkpoint; go on with --resume_from_checkpoint latest.", stopped)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):  # told by a signal, wherever the run is at that moment
                raise TrainingError(_dead_worker(error, self.position)) from error
            if recipe.compile and type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                raise TrainingError(f"torch.compile failed: {first_sentence(error)}; leave --compile out.") from error
            if isinstance(error, torch.OutOfMemoryError):
                raise TrainingError(f"The device has too little memory for step {self.step}: take a smaller "
                                    "--train_batch_size with more --gradient_accumulation_steps, or "
                                    "--gradient_checkpointing.") from error
            raise
        finally:
            batches.close()
            for tracker in self.accelerator.trackers:  # Accelerate's end_training would end the process group as well
                tracker.finish()
            self.accelerator.trackers.clear()
        return self.averaged.eval()

    def _one_step(self, batches: Iterator[Any]) -> None:
        recipe, task = self.recipe, self.task
        parts, terms_of_step = recipe.gradient_accumulation_steps, dict[str, Tensor]()
        seed_everything(recipe.seed, self.step)
        task.before_step(self.step)
        active: list[str] = []
        for part in range(parts):
            batch = next(batches)
            seed_everything(recipe.seed, self.step, part, self.rank)
            for player in task.players:
                with self._only(player):
                    with self.accelerator.autocast():
                        terms = task.losses(player, batch, self.step)
                    if not terms:
                        continue
                    loss = torch.stack([term.float() for term in terms.values()]).sum() / parts
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                if player not in active:
                    active.append(player)
                for name, term in terms.items():
                    name = f"{player}/{name}"
                    terms_of_step[name] = terms_of_step.get(name, 0) + term.detach().float() / parts
        for player in active:
            terms_of_step[f"{player}/grad_norm"] = self._step_of(player)
        if self.scaler is not None:
            self.scaler.update()
        self._agree_on_batch_norms()
        if self.average is not None:
            self.average.update(task.model)
        self.step += 1
        self._pending.append((self.step, terms_of_step))

    def _step_of(self, player: str) -> Tensor:
        """Average the gradients over the processes, clip, step; the norm of the gradients before clipping."""
        recipe, optimizer = self.recipe, self.optimizers[player]
        parameters = average_gradients(self._trained[player])
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step) * group.get("share", 1.0)
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(parameters, recipe.max_grad_norm or math.inf)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return norm.detach().float()

    @contextlib.contextmanager
    def _only(self, player: str) -> Iterator[None]:
        """Gradients for one player's weights alone, while the others are used."""
        others = [p for name, parameters in self._trained.items() if name != player for p in parameters]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def _agree_on_batch_norms(self) -> None:
        if is_parallel():
            for player in self.task.players.values():
                for module in player.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                        mean_over_ranks(module.running_mean)
                        mean_over_ranks(cast(Tensor, module.running_var))

    # ---- data -------------------------------------------------------------------------------------------------------

    @property
    def _items_per_step(self) -> int:
        size = 1 if getattr(self.data, "whole_batches", False) else self.recipe.train_batch_size
        return size * self.recipe.gradient_accumulation_steps * self.ranks

    def _batches(self, final: int) -> Generator[Any]:
        """The batches up to step `final`, on the device; `position` moves on with them."""
        recipe = self.recipe
        count = (final - self.step) * recipe.gradient_accumulation_steps
        step = self._items_per_step // recipe.gradient_accumulation_steps
        source = iter(self._loader(count))
        try:
            for _ in range(count):
                try:
                    batch = next(source)
                except StopIteration:
                    raise TrainingError(f"The data ended at sample {self.position} of step {self.step}; a run needs "
                                        "data without end.") from None
                except VtcError as error:
                    raise TrainingError(_original(error)) from error
                except (ConnectionError, EOFError) as error:  # it died while its last batch was fetched
                    raise TrainingError(_dead_worker(error, self.position)) from error
                except RuntimeError as error:
                    if "DataLoader" not in str(error):
                        raise
                    raise TrainingError(_dead_worker(error, self.position)) from error
                self.position += step
                yield send_to_device(batch, self.accelerator.device, non_blocking=True)
        finally:
            # End the readers at once: until a dead one is forgotten, torch's signal handler raises for it anywhere.
            end = getattr(source, "_shutdown_workers", None)
            if end is not None:
                with contextlib.suppress(RuntimeError):
                    end()

    def _loader(self, count: int) -> Iterable[Any]:
        recipe = self.recipe
        if not hasattr(self.data, "__getitem__"):
            return self.data(self.position, count)
        dataset = cast(Dataset[Any], self.data)
        whole = bool(getattr(dataset, "whole_batches", False))
        size = None if whole else recipe.train_batch_size
        numbers = Numbered(self.position, count, size, self.rank, self.ranks)
        workers = recipe.dataloader_num_workers
        return DataLoader(dataset, num_workers=workers, prefetch_factor=4 if workers else None,
                          pin_memory=self.accelerator.device.type == "cuda",
                          generator=torch.Generator().manual_seed(recipe.seed),  # workers draw nothing from the step's
                          collate_fn=getattr(dataset, "collate", None), worker_init_fn=_outlive_signals,
                          **({"batch_size": None, "sampler": numbers} if whole else {"batch_sampler": numbers}))

    # ---- watching ---------------------------------------------------------------------------------------------------

    def _flush(self) -> dict[str, float]:
        """The means of the terms since the last time; TrainingError where one of them was no number.

        In float16 steps whose gradients are beyond its range are left out by the loss scale, which they make smaller;
        only many of them in a row are an error. `skipped_steps` says how many, and the means leave them out.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return {}
        flat = mean_over_ranks(torch.stack([value for _, terms in pending for value in terms.values()])).tolist()
        values, sums, skipped = iter(flat), dict[str, list[float]](), 0
        for step, terms in pending:
            bad = ""
            for name in terms:
                value = next(values)
                if math.isfinite(value):
                    sums.setdefault(name, []).append(value)
                else:
                    bad = bad or f"{name} is {value}"
            self._bad_steps = self._bad_steps + 1 if bad else 0
            skipped += bool(bad)
            if bad and (self.scaler is None or self._bad_steps > FP16_PATIENCE):
                raise TrainingError(f"Step {step} has no finite loss or gradient: {bad}. Go on from the last "
                                    "checkpoint, which is from before it (--resume_from_checkpoint latest), with a "
                                    "lower --learning_rate or --mixed_precision no.")
        means = {name: sum(of_term) / len(of_term) for name, of_term in sums.items()}
        return means if self.scaler is None else {**means, "skipped_steps": float(skipped)}

    def _log(self, bar: Any) -> None:
        recipe, (then, step) = self.recipe, self._since
        terms = self._flush()
        now = time.perf_counter()
        self._since = (now, self.step)
        report = self.task.report(self.step)
        self._watch_codebook(report)
        rate = (self.step - step) * recipe.train_batch_size * recipe.gradient_accumulation_steps * self.ranks
        facts = {**terms, **report, "learning_rate": recipe.learning_rate_at(self.step - 1),
                 "samples_per_second": rate / max(now - then, 1e-9)}
        if self.scaler is not None:
            facts["loss_scale"] = self.scaler.get_scale()
        if self.accelerator.device.type == "cuda":
            facts["gigabytes"] = torch.cuda.max_memory_allocated() / 2**30
        if self.accelerator.is_main_process:
            bar.set_postfix({name.rpartition("/")[2]: f"{value:.4g}" for name, value in terms.items()}, refresh=False)
            self._append(LOG, {"step": self.step, "seconds": round(now - self._started, 3), **facts})
            self.accelerator.log(facts, step=self.step)

    def _watch_codebook(self, report: dict[str, float]) -> None:
        for name, share in report.items():
            if not name.endswith("usage") or share >= self.recipe.collapse_usage:
                continue
            text = (f"Codebook collapse at step {self.step}: {name} is {share:.2%}. A lower learning rate, a larger "
                    "entropy weight, a K-means start (--continuous_steps) or reviving dead words keep words in use.")
            if self.recipe.stop_on_collapse:
                raise TrainingError(text)
            if name not in self._warned and self.accelerator.is_main_process:
                tqdm.write(text, file=sys.stderr)
            self._warned.add(name)

    def _validate(self) -> None:
        self.accelerator.wait_for_everyone()
        main, result, pictures = self.accelerator.is_main_process, dict[str, float](), None
        if main or self.recipe.shard:  # blocks that are shared out compute on all processes or on none
            model = self.averaged.eval()
            seed_everything(self.recipe.seed, self.step)
            with torch.no_grad():
                result = self.task.validate(model, self.step)
                pictures = self.task.samples(model, self.step)
            if self.recipe.shard:
                reshard(model)
        if main:
            if result:
                facts = {"step": self.step, "seconds": round(time.perf_counter() - self._started), **result}
                tqdm.write(json.dumps(facts), file=sys.stderr)
                self._append(VALIDATION, facts)
                self.accelerator.log({f"validation/{k}": v for k, v in result.items() if isinstance(v, int | float)},
                                     step=self.step)
            if pictures is not None:
                self._show(pictures)
        self.task.train_mode()
        self.accelerator.wait_for_everyone()

    def _show(self, pictures: Tensor) -> None:
        grid = picture_grid(pictures.detach().float().cpu())
        try:
            (self.output_dir / "samples").mkdir(exist_ok=True)
            save_image(grid, self.output_dir / "samples" / f"step-{self.step:07d}.png")
        except OSError as error:
            raise TrainingError(not_written("A sample grid", self.output_dir, error)) from error
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                pixels = grid.clamp(0, 1).permute(1, 2, 0).numpy()[None]
                more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels}, step=self.step, **more)

    def _forget_after(self, step: int) -> None:
        """Take later steps out of the logs: they will be written anew."""
        if self.accelerator.is_main_process:
            for log in (LOG, VALIDATION):
                forget_after(self.output_dir / log, step)

    def _append(self, name: str, facts: dict[str, Any]) -> None:
        """A line of a log."""
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in facts.items()}
        try:
            with open(self.output_dir / name, "a") as file:
                file.write(json.dumps(rounded) + "\n")
        except OSError as error:
            raise TrainingError(not_written(f"A line of {name}", self.output_dir, error)) from error

    def _describe(self) -> None:
        """What this run is, beside its results."""
        if not self.step and all_checkpoints(self.output_dir):
            self._say(f"{self.output_dir} has checkpoints of an earlier run, which this one will replace by and by; to "
                      "go on with that one, stop and give --resume_from_checkpoint latest.")
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_file(self.output_dir / "recipe.json", json.dumps(asdict(self.recipe), indent=1).encode() + b"\n")
            facts = {**versions(), "device": str(self.accelerator.device), "processes": self.ranks}
            write_file(self.output_dir / "versions.json", json.dumps(facts, indent=1).encode() + b"\n")
        except OSError as error:
            raise TrainingError(not_written("The recipe", self.output_dir, error)) from error
        if self.accelerator.log_with and not self.accelerator.trackers:
            config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(self.recipe).items()}
            about = {"wandb": {"name": self.output_dir.name, "dir": str(self.output_dir)}}
            self.accelerator.init_trackers(self.recipe.tracker_project_name, config=config, init_kwargs=about)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write the checkpoint of this step, by the main process. TrainingError where it cannot be."""
        self.accelerator.wait_for_everyone()
        main = self.accelerator.is_main_process
        if main or self.recipe.shard:
            modules = {name: all_tensors(player, main) for name, player in self.task.players.items()}
            if self.average is not None:
                modules[AVERAGE] = all_tensors(self.average.module, main)
            training = {"optimizers": whole({name: o.state_dict() for name, o in self.optimizers.items()}, main),
                        "scaler": None if self.scaler is None else self.scaler.state_dict(),
                        "task": self.task.state_dict()}
        if main:
            state = {"position": self.position, "average_updates": self.average.updates if self.average else 0,
                     "processes": self.ranks, "recipe": asdict(self.recipe)}
            write_checkpoint(self.output_dir, self.step, modules, training, state, self.recipe.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def resume(self, wanted: str | Path = "latest") -> bool:
        """Take over a checkpoint: "latest" of the output folder, or a path. False where there is no latest one yet.

        A recipe that differs from the checkpoint's is told, then followed; other numbers of processes or samples go on
        at the right sample. Raises TrainingError and ModelError.
        """
        path = find_checkpoint(self.output_dir, wanted)
        if path is None:
            self._forget_after(0)  # lines of a run that was killed before its first one
            self._say(f"There is no checkpoint in {self.output_dir} yet: the run starts at step 0.")
            return False
        modules, training, state = read_checkpoint(path)
        missing = [name for name in self.task.players if name not in modules]
        if next(iter(self.task.players)) in missing:
            raise TrainingError(f"The checkpoint {path} has no weights of {missing[0]!r}.")
        for name, player in self.task.players.items():
            if name in missing:
                self._say(f"{path.name} has no {name!r}: it starts anew.")
                continue
            set_tensors(player, modules[name], f"{path.name}/{name}")
            try:
                optimizer = self.optimizers[name]
                settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                optimizer.load_state_dict(cut_state(optimizer, training["optimizers"][name]))
                for group, now in zip(optimizer.param_groups, settings, strict=True):
                    group.update(now)  # the checkpoint's would come back: betas, decays, shares of the learning rate
            except (ValueError, KeyError) as error:
                raise TrainingError(f"The optimizer of {name!r} in {path} is of another model: {error}.") from error
        if self.average is not None:
            source = AVERAGE if AVERAGE in modules else next(iter(self.task.players))
            set_tensors(self.average.module, modules[source], f"{path.name}/{source}")
            self.average.updates = int(state["average_updates"])
        if self.scaler is not None and training["scaler"]:
            self.scaler.load_state_dict(training["scaler"])
        self.task.load_state_dict(training["task"])
        self.step, self.position = int(state["step"]), int(state["position"])
        self._pending = []
        if path.parent.resolve() == self.output_dir.resolve():
            self._forget_after(self.step)
        now = json.loads(json.dumps(asdict(self.recipe)))
        before = state["recipe"]
        changed = [f"{k} {before[k]} -> {v}" for k, v in now.items() if k in before and before[k] != v]
        self._say(f"Going on from {path.name}" + (f", with {', '.join(changed)}." if changed else "."))
        return True

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    # ---- stopping ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks for a checkpoint after this step; the second one is as it always is."""
        before: dict[int, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            self._signal = number
            for known, handler in before.items():
                signal.signal(known, handler)

        self._signal = 0
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for each in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(each) is not signal.SIG_IGN:  # a shell's background job does not hear Ctrl-C
                    before[each] = signal.signal(each, ask)
        try:
            yield
        finally:
            for known, handler in before.items():
                signal.signal(known, handler)

    def _asked_to_stop(self, last: bool) -> int:
        """The number of a signal that any process got; several processes ask one another now and then."""
        if not is_parallel():
            return self._signal
        if not last and self.step % self.recipe.logging_steps:
            return 0
        number = torch.tensor(self._signal, device=self.accelerator.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], bucket: int = 2**25) -> list[nn.Parameter]:
    """Replace gradients by their mean over the processes, some `bucket` numbers at a time.

    Returns the parameters that have one. Where only some processes have one, the others' counts as zero.
    """
    if not is_parallel():
        return [p for p in parameters if p.grad is not None]
    cut = [p for p in parameters if is_sharded(p) and p.grad is not None]  # these are averages already
    parameters = [p for p in parameters if not is_sharded(p)]
    if not parameters:
        return cut
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    used = [p for p, share in zip(parameters, mean_over_ranks(there).tolist(), strict=True) if share]
    start = 0
    while start < len(used):
        end, size = start, 0
        while end < len(used) and (end == start or size < bucket):
            size += used[end].numel()
            end += 1
        for p in used[start:end]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [cast(Tensor, p.grad) for p in used[start:end]]
        flat = mean_over_ranks(torch.cat([g.float().flatten() for g in gradients]))
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))
        start = end
    return used + cut


def picture_grid(pictures: Tensor, columns: int | None = None) -> Tensor:
    """(N, 3, H, W) to one picture (3, rows H, columns W), row by row; about square by default."""
    count, _, height, width = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    grid = pictures.new_ones(rows * columns, 3, height, width)
    grid[:count] = pictures
    return grid.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)


def _original(error: BaseException) -> str:
    """What a worker said, without the traceback that the loader puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition("Error: ")[2] or lines[-1] if lines else type(error).__name__


def _outlive_signals(worker: int) -> None:
    """A signal to the whole process group, as a terminal, `timeout` or a batch system sends it, is for the run, which
    still has a step to end and a checkpoint to write: a process that reads data goes on for READER_PATIENCE seconds.
    """
    def later(number: int, frame: FrameType | None) -> None:
        signal.alarm(READER_PATIENCE)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, later)


def _dead_worker(error: Exception, position: int) -> str:
    """One sentence on a data worker that is gone."""
    text = " ".join(str(error).split()).rstrip(".") or "it closed its pipe"
    return (f"A process that reads data died near sample {position}: {text}. Often memory ran out: take fewer "
            "--dataloader_num_workers, then go on with --resume_from_checkpoint latest.")
