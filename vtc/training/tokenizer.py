"""Training a tokenizer: reconstruction, a perceptual term that is hard to cheat, a codebook without dead words.

The script `scripts/train_tokenizer.py` holds the flags; this file holds the loop.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vtc.eval.lattice import error_spectrum, lattice_ratio
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.training.data import NumberedSampler, RandomCrops
from vtc.training.perceptual import PerceptualLoss


@dataclass
class TokenizerRecipe:
    """Hyper-parameters of one run."""

    resolution: int = 192
    batch_size: int = 8
    steps: int = 14000
    learning_rate: float = 6e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    l1_weight: float = 4.0
    mse_weight: float = 0.0
    perceptual_weight: float = 1.0
    #: steps without quantization; the latents of the last of them give the K-means start of the codebook
    continuous_steps: int = 300
    ema_decay: float = 0.999
    seed: int = 0


def learning_rate_at(step: int, recipe: TokenizerRecipe) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def evaluate(model: LocalVQ, images: list[Tensor], judge: LPIPS) -> dict[str, float]:
    """Mean PSNR (dB), LPIPS, lattice ratio, and codebook perplexity and usage over whole images (3, H, W) in [0, 1]."""
    psnr, lpips, spectrum = [], [], 0
    counts = torch.zeros(model.quantizer.codebook_size)
    for image in images:
        image = image[None]
        tokens = model.encode(image)
        output = (model.decode(tokens) * 255).round() / 255
        psnr.append(-10 * math.log10((output - image).square().mean().item()))
        lpips.append(judge(output, image).item())
        spectrum = spectrum + error_spectrum(image, output, model.downsample)
        counts += torch.bincount(tokens.indices.flatten(), minlength=len(counts))
    p = counts / counts.sum()
    entropy = -(p * p.clamp(min=1e-12).log2()).sum().item()
    return {"psnr": sum(psnr) / len(psnr), f"lpips_{judge.backbone}": sum(lpips) / len(lpips),
            "lattice_ratio": lattice_ratio(spectrum, model.downsample), "codebook_entropy_bits": entropy,
            "codebook_perplexity": 2**entropy, "codebook_usage": (counts > 0).float().mean().item()}


class TokenizerTrainer:
    """One training run; `train` returns the averaged model."""

    def __init__(self, model: LocalVQ, recipe: TokenizerRecipe, accelerator: Accelerator, files: list[Path],
                 output_dir: Path, perceptual: LPIPS, judge: LPIPS | None, validation: list[Tensor]) -> None:
        self.recipe, self.accelerator, self.files, self.output_dir = recipe, accelerator, files, output_dir
        self.judge, self.validation = judge, validation
        self.step = 0
        self.loss = PerceptualLoss(perceptual).to(accelerator.device)
        model = model.to(memory_format=torch.channels_last)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": recipe.weight_decay},
                                       {"params": plain, "weight_decay": 0.0}], lr=recipe.learning_rate,
                                      betas=(0.9, 0.99))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = AveragedModel(accelerator.unwrap_model(self.model),
                                     multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, object]:
        quantizer = self.accelerator.unwrap_model(self.model).quantizer
        return {"step": self.step, "average": self.average.state_dict(),
                "ema_counts": quantizer.ema_counts, "ema_sums": quantizer.ema_sums}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.average.load_state_dict(state["average"])
        quantizer = self.accelerator.unwrap_model(self.model).quantizer
        quantizer.ema_counts.copy_(state["ema_counts"])
        quantizer.ema_sums.copy_(state["ema_sums"])

    def train(self, checkpoint_every: int, validate_every: int) -> LocalVQ:
        recipe, accelerator = self.recipe, self.accelerator
        crops = RandomCrops(self.files, recipe.resolution, recipe.seed)
        sampler = NumberedSampler(self.step * recipe.batch_size, recipe.steps * recipe.batch_size)
        loader = accelerator.prepare(DataLoader(crops, recipe.batch_size, sampler=sampler, num_workers=1,
                                                prefetch_factor=8, drop_last=True))
        bar = tqdm(total=recipe.steps, initial=self.step, disable=not accelerator.is_main_process)
        latents: list[Tensor] = []
        started, running = time.time(), {}
        for batch in loader:
            images = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
            if self.step == recipe.continuous_steps and latents:
                accelerator.unwrap_model(self.model).quantizer.start_from(torch.cat(latents))
                latents.clear()
            parts = self._losses(images, latents)
            loss = sum(parts.values())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.step, recipe)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update_parameters(accelerator.unwrap_model(self.model))
            self.step += 1
            bar.update()
            for name, value in parts.items():
                running[name] = running.get(name, 0.0) * 0.98 + 0.02 * value.item()
            if self.step % 50 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()})
            if self.step % validate_every == 0 or self.step == recipe.steps:
                self._validate(time.time() - started)
            if self.step % checkpoint_every == 0 or self.step == recipe.steps:
                accelerator.save_state(str(self.output_dir / "checkpoint"))
        bar.close()
        return self.average.module

    def _losses(self, images: Tensor, latents: list[Tensor]) -> dict[str, Tensor]:
        recipe = self.recipe
        with self.accelerator.autocast():
            if self.step < recipe.continuous_steps:
                z = self.model.latents(images)
                if self.step >= recipe.continuous_steps - 50:
                    latents.append(z.detach().movedim(1, -1).flatten(0, -2))
                output, commitment = self.model.reconstruct(z), images.new_zeros(())
            else:
                output, quantized = self.model(images)
                commitment = quantized.loss
            perceptual = self.loss(images, output)
        output = output.float()
        parts = {"l1": recipe.l1_weight * F.l1_loss(output, images), "lpips": recipe.perceptual_weight * perceptual,
                 "commit": commitment}
        if recipe.mse_weight:
            parts["mse"] = recipe.mse_weight * F.mse_loss(output, images)
        return parts

    def _validate(self, seconds: float) -> None:
        if self.judge is None or not self.accelerator.is_main_process:
            return
        self.average.module.eval()
        result = {"step": self.step, "seconds": round(seconds), **evaluate(self.average.module, self.validation, self.judge)}
        tqdm.write(json.dumps(result))
        with (self.output_dir / "validation.jsonl").open("a") as log:
            log.write(json.dumps(result) + "\n")
