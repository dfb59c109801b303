"""Making a model's family: smaller codebooks by clustering, fine-tuned with frozen networks, counted, and checked.

A member's words are the base's, clustered, and stay; so does the encoder, and with it every token. What trains is how
the decoder reads them: its 1x1 entry, and the scales and biases of its layers, some twenty thousand numbers. (To move
words and the encoder's projection too, as Mao et al. do, made it worse here: docs/decisions.md.) The members come one
after another, largest first, and each goes on from the one before it, so that what the coarse ones need most is learned
the longest. The script `scripts/finetune_codebook.py` holds the flags.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vtc.codecs.entropy import frequencies_from_counts
from vtc.errors import TrainingError
from vtc.images import load_image
from vtc.tokenizers.codebook_clustering import with_codebook
from vtc.tokenizers.codebook_finetuning import CodebookFinetuning
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.data import RandomCrops
from vtc.training.perceptual import PerceptualLoss


def own_parameters(model: LocalVQ) -> tuple[str, ...]:
    """Names of what a member has of its own and trains, beside its words and its table."""
    return tuple(name for name, parameter in model.named_parameters()
                 if name.startswith("decoder.stem.") or (name.startswith("decoder.") and parameter.ndim == 1))


@dataclass
class CodebookRecipe:
    """Hyper-parameters of one family; each is a flag of `scripts/finetune_codebook.py`."""

    resolution: int = 160
    train_batch_size: int = 6
    gradient_accumulation_steps: int = 1
    #: of a member of at most `whole_below` words; each doubling beyond it halves them
    max_train_steps: int = 150
    whole_below: int = 128
    #: members of more words keep the base's decoder as it is: the paper gains next to nothing there
    tuned_below: int = 256
    learning_rate: float = 3e-3
    lr_warmup_steps: int = 10
    max_grad_norm: float = 1.0
    #: of LPIPS beside L1 of images in [-1, 1], as in VQGAN; the bundled base was trained with 2/3
    perceptual_weight: float = 1.0
    seed: int = 0

    def steps(self, size: int) -> int:
        """Steps that a member of `size` words trains for."""
        if size > self.tuned_below:
            return 0
        return round(self.max_train_steps * min(1.0, self.whole_below / size))

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Linear warm-up, then a cosine down to nothing."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, steps - self.lr_warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def start_member(base: LocalVQ, codebook: Tensor, larger: LocalVQ | None) -> LocalVQ:
    """A copy of the base with these (S, d) words that goes on from the next larger member."""
    member = with_codebook(base, codebook)
    if larger is not None:
        own = own_parameters(larger)
        member.load_state_dict({**member.state_dict(), **{n: t for n, t in larger.state_dict().items() if n in own}})
    return member


def finetune(member: LocalVQ, recipe: CodebookRecipe, accelerator: Accelerator, files: Sequence[Path],
             perceptual: PerceptualLoss) -> list[dict[str, float]]:
    """Train what is a member's own in place; the losses of each step.

    With several processes the few gradients are averaged by hand: nothing else of the model is shared between them.
    """
    size = member.quantizer.codebook_size
    steps = recipe.steps(size)
    if steps == 0:
        return []
    member.to(accelerator.device)
    tuning = CodebookFinetuning(member, lambda output, images: perceptual(images, output),
                                trained=own_parameters(member), balance="decoder.stem.weight",
                                perceptual_weight=recipe.perceptual_weight)
    parameters = list(tuning.trained_parameters())
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, betas=(0.5, 0.9))
    batches = iter(_loader(recipe, accelerator, files, steps, size))
    log: list[dict[str, float]] = []
    for step in tqdm(range(steps), desc=f"S={size}", disable=not accelerator.is_main_process):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step, steps)
        for part in range(recipe.gradient_accumulation_steps):
            images = (next(batches).float() / 255).contiguous(memory_format=torch.channels_last)
            # after the batch: the first one also starts the worker, which draws a number
            torch.manual_seed(hash((recipe.seed, size, step, part, accelerator.process_index)))
            with accelerator.autocast():
                terms = tuning.generator_step(images)
            accelerator.backward(terms["loss"] / recipe.gradient_accumulation_steps)
        for parameter in parameters:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.append({name: terms[name].item() for name in ("loss", "pixel", "perceptual")})
        if not math.isfinite(log[-1]["loss"]):
            raise TrainingError(f"The loss is not finite at step {step} of S={size}; begin anew with "
                                "a lower --learning_rate.")
    member.requires_grad_(True).cpu().eval()
    return log


def _loader(recipe: CodebookRecipe, accelerator: Accelerator, files: Sequence[Path], steps: int,
            size: int) -> Any:
    """Batches (B, 3, R, R) uint8, other crops for each member: the same whatever was trained before, or resumed."""
    crops = RandomCrops(list(files), recipe.resolution, recipe.seed * 2**20 + size)
    count = steps * recipe.gradient_accumulation_steps * recipe.train_batch_size * accelerator.num_processes
    return accelerator.prepare(DataLoader(crops, recipe.train_batch_size, sampler=range(count), num_workers=1,
                                          prefetch_factor=4, drop_last=True))


@torch.inference_mode()
def count_words(members: dict[int, LocalVQ], files: Sequence[Path]) -> dict[int, NDArray[np.int64]]:
    """How often each member uses each of its words on whole pictures; their common encoder runs once a picture."""
    counts = {size: np.zeros(size, dtype=np.int64) for size in members}
    encoder = next(iter(members.values()))
    for file in tqdm(files, desc="counting", unit="image"):
        latents = encoder.latents(load_image(file).tensor()[None])
        for size, member in members.items():
            indices = member.quantizer(latents).indices
            counts[size] += np.bincount(indices.flatten().numpy(), minlength=size)
    return counts


def set_table(member: LocalVQ, counts: NDArray[np.int64]) -> None:
    """The entropy-coding table that suits these counts plus one half (Krichevsky-Trofimov)."""
    member.token_frequencies = torch.from_numpy(frequencies_from_counts(2 * counts + 1)).int()[None]
