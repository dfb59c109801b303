"""Training a tokenizer: reconstruction, a perceptual term that is hard to cheat, a codebook without dead words.

The script `scripts/train_tokenizer.py` holds the flags; this file holds the loop.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from vtc.errors import TrainingError
from vtc.eval.lattice import error_spectrum, lattice_ratio
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.training.data import RandomCrops
from vtc.training.perceptual import PerceptualLoss

TensorList = tuple[Tensor, ...] | list[Tensor]


@dataclass
class TokenizerRecipe:
    """Hyper-parameters of one run; each is a flag of `scripts/train_tokenizer.py`."""

    resolution: int = 224
    train_batch_size: int = 6
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 8500
    learning_rate: float = 8e-4
    final_learning_rate: float = 1e-5
    lr_warmup_steps: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    l1_weight: float = 3.0
    perceptual_weight: float = 1.0
    #: steps without quantization; the latents of the last fifty give the K-means start of the codebook
    continuous_steps: int = 300
    ema_decay: float = 0.999
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to the final rate."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def evaluate(model: LocalVQ, images: list[Tensor], judge: LPIPS) -> dict[str, float]:
    """Mean PSNR (dB), LPIPS, lattice ratio, and codebook perplexity and usage over whole images (3, H, W) in [0, 1]."""
    psnr, lpips, spectra = [], [], []
    counts = torch.zeros(model.quantizer.codebook_size)
    for image in images:
        image = image[None]
        tokens = model.encode(image)
        output = (model.decode(tokens) * 255).round() / 255
        psnr.append(-10 * math.log10((output - image).square().mean().item()))
        lpips.append(judge(output, image).item())
        spectra.append(error_spectrum(image, output, model.downsample))
        counts += torch.bincount(tokens.indices.flatten(), minlength=len(counts))
    p = counts / counts.sum()
    entropy = -(p * p.clamp(min=1e-12).log2()).sum().item()
    return {"psnr": sum(psnr) / len(psnr), f"lpips_{judge.backbone}": sum(lpips) / len(lpips),
            "lattice_ratio": lattice_ratio(torch.stack(spectra).sum(0), model.downsample),
            "codebook_entropy_bits": entropy,
            "codebook_perplexity": 2**entropy, "codebook_usage": (counts > 0).float().mean().item()}


class TokenizerTrainer:
    """One training run; `train` returns the averaged model.

    All randomness of a step comes from the seed and the step's number, so a run that was stopped goes on to the bit.
    """

    def __init__(self, model: LocalVQ, recipe: TokenizerRecipe, accelerator: Accelerator, files: list[Path],
                 output_dir: Path, perceptual: LPIPS, judge: LPIPS | None, validation: list[Tensor]) -> None:
        self.recipe, self.accelerator, self.files, self.output_dir = recipe, accelerator, files, output_dir
        self.judge, self.validation = judge, validation
        self.step = 0
        self.warm_latents: list[Tensor] = []
        self.loss = PerceptualLoss(perceptual).to(accelerator.device)
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
                  {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = AveragedModel(self._bare_model(), multi_avg_fn=self._average_in)
        accelerator.register_for_checkpointing(self)

    def _average_in(self, averages: TensorList, current: TensorList, updates: Tensor | int) -> None:
        # The decay grows with the run, so the first, useless weights are soon forgotten.
        decay = min(self.recipe.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, current, 1 - decay)

    def _bare_model(self) -> LocalVQ:
        return self.accelerator.unwrap_model(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model, optimizer and random state."""
        quantizer = self._bare_model().quantizer
        return {"step": self.step, "average": self.average.state_dict(), "warm_latents": self.warm_latents,
                "ema_counts": quantizer.ema_counts, "ema_sums": quantizer.ema_sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.step, self.warm_latents = state["step"], state["warm_latents"]
        self.average.load_state_dict(state["average"])
        quantizer = self._bare_model().quantizer
        quantizer.ema_counts.copy_(state["ema_counts"])
        quantizer.ema_sums.copy_(state["ema_sums"])

    def train(self, checkpointing_steps: int, validation_steps: int, stop_at: int | None = None) -> LocalVQ:
        """Run from the current step to the recipe's last, or pause at `stop_at`; the weights' average comes back.

        A checkpoint is written every `checkpointing_steps` and at the end.
        """
        recipe, accelerator = self.recipe, self.accelerator
        final_step = recipe.max_train_steps if stop_at is None else min(stop_at, recipe.max_train_steps)
        bar = tqdm(total=recipe.max_train_steps, initial=self.step, disable=not accelerator.is_main_process)
        started, running = time.time(), dict[str, float]()
        batches = iter(self._loader())
        while self.step < final_step:
            if self.step == recipe.continuous_steps and self.warm_latents:
                self._bare_model().quantizer.start_from(torch.cat(self.warm_latents))
                self.warm_latents = []
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(self.step)
            for part in range(recipe.gradient_accumulation_steps):
                batch = next(batches)  # before seeding: the first one also starts the worker, which draws a number
                torch.manual_seed(hash((recipe.seed, self.step, part, accelerator.process_index)))
                with accelerator.accumulate(self.model):
                    parts = self._losses(batch)
                    accelerator.backward(sum(parts.values()))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                for name, value in parts.items():
                    running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
            self.average.update_parameters(self._bare_model())
            self.step += 1
            bar.update()
            if not all(map(math.isfinite, running.values())):
                raise TrainingError(f"The loss is not finite at step {self.step}: {running}. Resume from the last "
                                    f"checkpoint with a lower --learning_rate.")
            if self.step % 20 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()})
            last = self.step == final_step
            if self.step % validation_steps == 0 or last:
                self._validate(time.time() - started)
            if self.step % checkpointing_steps == 0 or last:
                accelerator.save_state(str(self.output_dir / "checkpoint"))
        bar.close()
        return cast(LocalVQ, self.average.module)

    def _loader(self) -> DataLoader[Tensor]:
        recipe = self.recipe
        per_step = recipe.train_batch_size * recipe.gradient_accumulation_steps * self.accelerator.num_processes
        crops = RandomCrops(self.files, recipe.resolution, recipe.seed)
        numbers = range(self.step * per_step, recipe.max_train_steps * per_step)
        return self.accelerator.prepare(DataLoader(crops, recipe.train_batch_size, sampler=numbers, num_workers=1,
                                                   prefetch_factor=8, drop_last=True))

    def _losses(self, batch: Tensor) -> dict[str, Tensor]:
        """The weighted terms for a (B, 3, S, S) uint8 batch."""
        recipe = self.recipe
        images = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
        quantize = self.step >= recipe.continuous_steps
        with self.accelerator.autocast():
            output, quantized = self.model(images, quantize=quantize)
            perceptual = self.loss(images, output)
        if not quantize and self.step >= recipe.continuous_steps - 50:
            self.warm_latents.append(quantized.z_q.detach().movedim(1, -1).flatten(0, -2))
        return {"l1": recipe.l1_weight * F.l1_loss(output.float(), images),
                "lpips": recipe.perceptual_weight * perceptual, "commit": quantized.loss}

    def _validate(self, seconds: float) -> None:
        if self.judge is None or not self.accelerator.is_main_process:
            return
        model = cast(LocalVQ, self.average.module).eval()
        result = {"step": self.step, "seconds": round(seconds), **evaluate(model, self.validation, self.judge)}
        tqdm.write(json.dumps(result))
        with (self.output_dir / "validation.jsonl").open("a") as log:
            log.write(json.dumps(result) + "\n")
