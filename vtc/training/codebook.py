"""Making a model's family: smaller codebooks by clustering, fine-tuned with frozen networks, counted, and checked.

A member's words are the base's, clustered, and stay; so does the encoder, and with it every token. What trains is how
the decoder reads them: its 1x1 entry, and the scales and biases of its layers, some twenty thousand numbers. (To move
words and the encoder's projection too, as Mao et al. do, made it worse here: docs/decisions.md.) The members come one
after another, largest first, and each goes on from the one before it, so that what the coarse ones need most is learned
the longest. The script `scripts/finetune_codebook.py` holds the flags.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vtc.codecs.entropy import frequencies_from_counts
from vtc.errors import VtcError, first_sentence
from vtc.images import load_image
from vtc.tokenizers.codebook_clustering import with_codebook
from vtc.tokenizers.codebook_finetuning import CodebookFinetuning
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.data import RandomCrops
from vtc.training.loop import Loop
from vtc.training.perceptual import PerceptualLoss
from vtc.training.recipe import Recipe, flag
from vtc.training.task import Task

log = logging.getLogger(__name__)


def own_parameters(model: LocalVQ) -> tuple[str, ...]:
    """Names of what a member has of its own and trains, beside its words and its table."""
    return tuple(name for name, parameter in model.named_parameters()
                 if name.startswith("decoder.stem.") or (name.startswith("decoder.") and parameter.ndim == 1))


@dataclass
class CodebookRecipe(Recipe):
    """Hyper-parameters of one family; each is a flag of `scripts/finetune_codebook.py`."""

    resolution: int = flag(160, "side of the crops")
    train_batch_size: int = flag(6, "crops of one process at a time")
    max_train_steps: int = flag(150, "of a member of at most --whole_below words; each doubling beyond it halves them")
    whole_below: int = flag(128, "see --max_train_steps")
    tuned_below: int = flag(256, "members of more words keep the base's decoder: the paper gains next to nothing there")
    learning_rate: float = flag(3e-3, "after the warm-up")
    lr_warmup_steps: int = flag(10, "steps of linear warm-up")
    adam_beta1: float = flag(0.5, "decay of Adam's first moments")
    adam_beta2: float = flag(0.9, "decay of Adam's second moments")
    ema_decay: float = flag(0.0, "of an average of the weights; 0: none")
    mixed_precision: str = flag("bf16", "type of the forward pass; fp16 needs a GPU", ("no", "bf16", "fp16"))
    perceptual_weight: float = flag(1.0, "of LPIPS beside L1 of images in [-1, 1], as in VQGAN; the bundled base was "
                                         "trained with 2")
    checkpointing_steps: int = flag(50, "steps between checkpoints of the member that is trained")

    def steps(self, size: int) -> int:
        """Steps that a member of `size` words trains for."""
        if size > self.tuned_below:
            return 0
        return round(self.max_train_steps * min(1.0, self.whole_below / size))


def start_member(base: LocalVQ, codebook: Tensor, larger: LocalVQ | None) -> LocalVQ:
    """A copy of the base with these (S, d) words that goes on from the next larger member."""
    member = with_codebook(base, codebook)
    if larger is not None:
        own = own_parameters(larger)
        member.load_state_dict({**member.state_dict(), **{n: t for n, t in larger.state_dict().items() if n in own}})
    return member


class MemberTask(Task):
    """What is a member's own learns, by L1 and LPIPS; the rest is frozen, and its words stay."""

    def __init__(self, member: LocalVQ, recipe: CodebookRecipe, perceptual: PerceptualLoss) -> None:
        super().__init__({"model": member}, {"perceptual": perceptual})
        self.tuning = CodebookFinetuning(member, lambda output, images: perceptual(images, output),
                                         trained=own_parameters(member), balance="decoder.stem.weight",
                                         perceptual_weight=recipe.perceptual_weight)
        self.weight = recipe.perceptual_weight

    def train_mode(self) -> None:
        self.tuning.train()

    def losses(self, player: str, batch: Tensor, step: int) -> dict[str, Tensor]:
        images = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
        terms = self.tuning.generator_step(images)
        return {"l1": terms["pixel"], "lpips": self.weight * terms["perceptual"], "quantizer": terms["quantizer"]}


def finetune(member: LocalVQ, recipe: CodebookRecipe, accelerator: Accelerator, files: Sequence[Path],
             perceptual: PerceptualLoss, output_dir: Path) -> None:
    """Train what is a member's own in place, in `output_dir`; a run that was stopped goes on from its checkpoint."""
    size = member.quantizer.codebook_size
    steps = recipe.steps(size)
    if steps == 0:
        return
    # other crops for each member: the same whatever was trained before, or resumed
    crops = RandomCrops(list(files), recipe.resolution, recipe.seed * 2**20 + size)
    task = MemberTask(member, recipe, perceptual)
    loop = Loop(task, replace(recipe, max_train_steps=steps), accelerator, crops, output_dir)
    loop.resume("latest")
    member.load_state_dict(loop.train().state_dict())  # the average; its own where there is none
    member.requires_grad_(True).cpu().eval()


@torch.inference_mode()
def count_words(members: dict[int, LocalVQ], files: Sequence[Path]) -> dict[int, NDArray[np.int64]]:
    """How often each member uses each of its words on whole pictures; their common encoder runs once a picture."""
    counts = {size: np.zeros(size, dtype=np.int64) for size in members}
    encoder = next(iter(members.values()))
    for file in tqdm(files, desc="counting", unit="image"):
        try:
            latents = encoder.latents(load_image(file).tensor()[None])
        except VtcError as error:
            log.warning("%s is not counted: %s.", file, first_sentence(error))
            continue
        for size, member in members.items():
            indices = member.quantizer(latents).indices
            counts[size] += np.bincount(indices.flatten().numpy(), minlength=size)
    return counts


def set_table(member: LocalVQ, counts: NDArray[np.int64]) -> None:
    """The entropy-coding table that suits these counts plus one half (Krichevsky-Trofimov)."""
    member.token_frequencies = torch.from_numpy(frequencies_from_counts(2 * counts + 1)).int()[None]
