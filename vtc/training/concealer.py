"""Training the concealer: first to know the lost words, then to paint them.

Token steps hide tokens of grids (`vtc.training.tokens`) and ask for them by cross-entropy, in a codebook drawn anew for
every batch. A word that looks almost like the lost one is almost right, so a part of the target lies on the words
around it. Picture steps encode crops of photographs, hide tokens, and let the decoder, which is frozen, draw from the
mean codewords: what counts is the picture, L1 and LPIPS with SqueezeNet on random views, as in training the tokenizer.

The script `scripts/train_concealer.py` holds the flags; this file holds the loop.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from vtc.codecs.concealer import Concealer
from vtc.errors import ConfigError, TrainingError
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.data import RandomCrops
from vtc.training.perceptual import PerceptualLoss
from vtc.training.tokens import TokenGrids

TensorList = tuple[Tensor, ...] | list[Tensor]


@dataclass
class ConcealerRecipe:
    """Hyper-parameters of one run; each is a flag of `scripts/train_concealer.py`."""

    #: steps on grids of tokens, and after them steps on pictures
    max_train_steps: int = 3000
    picture_steps: int = 500
    #: tokens of a token step, in crops of one random shape; pictures of a picture step
    tokens_per_step: int = 2560
    train_batch_size: int = 4
    resolution: int = 256
    learning_rate: float = 2e-3
    picture_learning_rate: float = 4e-4
    lr_warmup_steps: int = 150
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    #: share of the target on the words around the lost one, and the width of that neighbourhood (codeword units)
    label_smoothing: float = 0.3
    smoothing_width: float = 1.0
    #: how much of the batches goes to the largest codebook; the others share the rest, larger ones more
    largest_share: float = 0.4
    l1_weight: float = 3.0
    perceptual_weight: float = 1.0
    ema_decay: float = 0.998
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Two cosines, one for the tokens and one for the pictures, each after a linear warm-up."""
        first = step < self.max_train_steps
        peak = self.learning_rate if first else self.picture_learning_rate
        place, length = (step, self.max_train_steps) if first else (step - self.max_train_steps, self.picture_steps)
        warmup = self.lr_warmup_steps if first else self.lr_warmup_steps // 5
        if place < warmup:
            return peak * (place + 1) / warmup
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (place - warmup) / max(1, length - warmup))))


def random_losses(rng: np.random.Generator, rows: int, columns: int, most: float = 0.6) -> Tensor:
    """(rows, columns) bool, a share of 0.02 to `most` lost: singly in half of the cases, or by chunk, or in blocks."""
    share, kind = rng.uniform(0.02, most), rng.random()
    if kind < 0.5:
        lost = rng.random((rows, columns)) < share
    elif kind < 0.85:
        chunks = int(rng.integers(2, 33))
        gone = rng.permutation(chunks)[: max(1, round(share * chunks))]
        y, x = np.mgrid[:rows, :columns]
        lost = np.isin((rng.integers(chunks) * y + x) % chunks, gone)
    else:
        lost = np.zeros((rows, columns), dtype=bool)
        while lost.mean() < 0.5 * share:
            height, width = rng.integers(1, 5, 2)
            y, x = rng.integers(rows), rng.integers(columns)
            lost[y : y + height, x : x + width] = True
    if lost.all() or not lost.any():
        lost[:] = False
        lost[rng.integers(rows), rng.integers(columns)] = True
    return torch.from_numpy(lost)


def soft_targets(words: Tensor, codebook: Tensor, share: float, width: float) -> Tensor:
    """(N,) indices to (N, S) probabilities: 1 - `share` on the word, `share` by a Gaussian over distances to it."""
    near = torch.softmax(torch.cdist(codebook[words], codebook).square() / (-2 * width**2), dim=1)
    return (share * near).scatter_add_(1, words[:, None], near.new_full((len(words), 1), 1 - share))


class ConcealerTrainer:
    """One training run; `train` returns the averaged model.

    members: the tokenizers by codebook size; they share encoder and decoder but for the projections.
    views: token grids of the photographs, with all those sizes.
    All randomness of a step comes from the seed and the step's number, so a run that was stopped goes on to the bit.
    """

    def __init__(self, model: Concealer, recipe: ConcealerRecipe, accelerator: Accelerator,
                 members: Mapping[int, LocalVQ], views: Sequence[TokenGrids], files: list[Path], output_dir: Path,
                 loss: PerceptualLoss | None, validation: TokenGrids | None) -> None:
        if loss is None and recipe.picture_steps:
            raise ConfigError("Picture steps need LPIPS with SqueezeNet: give --lpips_weights or --picture_steps 0.")
        self.recipe, self.accelerator, self.views, self.output_dir = recipe, accelerator, views, output_dir
        self.crops = RandomCrops(files, recipe.resolution, recipe.seed)
        self.validation, self.step = validation, 0
        device = accelerator.device
        self.loss = None if loss is None else loss.to(device)
        self.members = {size: member.to(device).eval().requires_grad_(False) for size, member in members.items()}
        self.codebooks = {size: cast(Tensor, member.codewords).float() for size, member in self.members.items()}
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
                  {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = AveragedModel(accelerator.unwrap_model(self.model), multi_avg_fn=self._average_in)
        accelerator.register_for_checkpointing(self)

    def _average_in(self, averages: TensorList, current: TensorList, updates: Tensor | int) -> None:
        decay = min(self.recipe.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, current, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model, optimizer and random state."""
        return {"step": self.step, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.step = state["step"]
        self.average.load_state_dict(state["average"])

    def train(self, checkpointing_steps: int, validation_steps: int, stop_at: int | None = None) -> Concealer:
        """Run from the current step to the recipe's last, or pause at `stop_at`; the weights' average comes back."""
        recipe, accelerator = self.recipe, self.accelerator
        total = recipe.max_train_steps + recipe.picture_steps
        final = total if stop_at is None else min(stop_at, total)
        bar = tqdm(total=total, initial=self.step, disable=not accelerator.is_main_process, mininterval=10)
        started, running = time.time(), math.nan
        while self.step < final:
            rng = np.random.default_rng((recipe.seed, self.step, accelerator.process_index))
            torch.manual_seed(int(rng.integers(2**62)))
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(self.step)
            loss = self._token_loss(rng) if self.step < recipe.max_train_steps else self._picture_loss(rng)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update_parameters(accelerator.unwrap_model(self.model))
            value = loss.item()
            running = value if math.isnan(running) or self.step == recipe.max_train_steps else (
                0.98 * running + 0.02 * value)
            self.step += 1
            bar.update()
            if not math.isfinite(value):
                raise TrainingError(f"The loss is not finite at step {self.step}. Resume from the last checkpoint with "
                                    "a lower --learning_rate.")
            last = self.step == final
            if self.step % validation_steps == 0 or last:
                self._validate(running, time.time() - started)
            if self.step % checkpointing_steps == 0 or last:
                accelerator.save_state(str(self.output_dir / "checkpoint"))
        bar.close()
        return cast(Concealer, self.average.module)

    def _size(self, rng: np.random.Generator) -> int:
        """A codebook: the largest, or one of the others by the logarithm of its size."""
        *others, largest = sorted(self.members)
        if not others or rng.random() < self.recipe.largest_share:
            return largest
        weights = np.log2(others)
        return int(rng.choice(others, p=weights / weights.sum()))

    def _token_loss(self, rng: np.random.Generator) -> Tensor:
        recipe, device = self.recipe, self.accelerator.device
        size = self._size(rng)
        rows, columns = (int(side) for side in rng.integers(14, 29, 2))
        grids: list[NDArray[np.int16]] = []
        while len(grids) < max(1, recipe.tokens_per_step // (rows * columns)):
            view = self.views[rng.integers(len(self.views))]
            grid = view.grid(int(rng.integers(len(view))), size)
            if grid.shape[0] < rows or grid.shape[1] < columns:
                rows, columns = min(rows, grid.shape[0]), min(columns, grid.shape[1])
                grids = [g[:rows, :columns] for g in grids]
            y, x = rng.integers(grid.shape[0] - rows + 1), rng.integers(grid.shape[1] - columns + 1)
            grids.append(grid[y : y + rows, x : x + columns])
        indices = torch.from_numpy(np.stack(grids).astype(np.int64)).to(device)
        lost = torch.stack([random_losses(rng, rows, columns) for _ in grids]).to(device)
        codebook = self.codebooks[size]
        with self.accelerator.autocast():
            logits = self.model(codebook[indices], lost, codebook)
        target = soft_targets(indices[lost], codebook, recipe.label_smoothing, recipe.smoothing_width)
        return F.cross_entropy(logits.float(), target)

    def _picture_loss(self, rng: np.random.Generator) -> Tensor:
        recipe, device = self.recipe, self.accelerator.device
        member = self.members[self._size(rng)]
        step = self.step - recipe.max_train_steps
        first = (step * self.accelerator.num_processes + self.accelerator.process_index) * recipe.train_batch_size
        images = torch.stack([self.crops[first + i] for i in range(recipe.train_batch_size)]).to(device).float() / 255
        with self.accelerator.autocast():
            with torch.no_grad():
                indices = member.encode(images).grids()[0][..., 0]
            rows, columns = indices.shape[1:]
            lost = torch.stack([random_losses(rng, rows, columns, most=0.45) for _ in images]).to(device)
            codebook = cast(Tensor, member.codewords).float()
            codes = codebook[indices]
            logits = self.model(codes, lost, codebook)
            means = self.accelerator.unwrap_model(self.model).mean_codes(logits, codebook)
            codes = codes.index_put((lost,), means.float())
            output = member.reconstruct(codes.movedim(-1, 1).contiguous(memory_format=torch.channels_last))
            assert self.loss is not None  # the constructor saw to it
            perceptual = self.loss(images, output)
        return recipe.l1_weight * F.l1_loss(output.float(), images) + recipe.perceptual_weight * perceptual

    @torch.no_grad()
    def _validate(self, running: float, seconds: float) -> None:
        """Loss of lost tokens in nats, accuracy, and the error of the mean codeword, at 20 % lost singly."""
        if self.validation is None or not self.accelerator.is_main_process:
            return
        model = cast(Concealer, self.average.module).eval()
        result: dict[str, Any] = {"step": self.step, "seconds": round(seconds), "running_loss": round(running, 4)}
        for size in [s for s in sorted(self.members) if s in (32, 256, max(self.members))]:
            codebook, sums = self.codebooks[size], np.zeros(4)
            for n in range(len(self.validation)):
                indices = torch.from_numpy(self.validation.grid(n, size).astype(np.int64))[None].to(codebook.device)
                lost = torch.from_numpy(np.random.default_rng(n).random(indices.shape) < 0.2).to(codebook.device)
                logits, target = model(codebook[indices], lost, codebook).float(), indices[lost]
                error = (logits.softmax(1) @ codebook - codebook[target]).square().sum(1)
                sums += [F.cross_entropy(logits, target, reduction="sum").item(),
                         (logits.argmax(1) == target).sum().item(), error.sum().item(), len(target)]
            nats, right, error = (float(value) for value in (sums / sums[3])[:3])
            result[str(size)] = {"nats": round(nats, 4), "accuracy": round(right, 4), "code_error": round(error, 3)}
        tqdm.write(json.dumps(result))
        with (self.output_dir / "validation.jsonl").open("a") as log:
            log.write(json.dumps(result) + "\n")
