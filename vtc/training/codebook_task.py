"""Fine-tuning a clustered codebook with frozen networks, as published: Mao et al. (2307.08265), for VQGAN and its kin.

The codebook, the two 1x1 convolutions beside it and a discriminator train; `vtc.tokenizers.codebook_finetuning` says on
what. A LocalVQ's whole family is another matter: `vtc.training.codebook` and `scripts/finetune_codebook.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.codebook_clustering import cluster_codebook, with_codebook
from vtc.tokenizers.codebook_finetuning import CodebookFinetuning
from vtc.tokenizers.lpips import LPIPS
from vtc.training.recipe import Recipe, flag
from vtc.training.task import Task
from vtc.training.validation import Validation


@dataclass
class CodebookTaskRecipe(Recipe):
    """The defaults are VQGAN's loss and the published optimizer; rate and length were not published."""

    resolution: int = flag(256, "side of the square crops")
    min_scale: float = flag(0.6, "photographs are shrunk by a factor from this to 1 before they are cut")
    adam_beta1: float = flag(0.5, "decay of Adam's first moments")
    adam_beta2: float = flag(0.9, "decay of Adam's second moments")
    perceptual_weight: float = flag(1.0, "of LPIPS; 0: no LPIPS")
    perceptual_backbone: str = flag("vgg", "network of that LPIPS", ("squeeze", "vgg", "alex"))
    gan_weight: float = flag(0.8, "of the adversarial term, beside the adaptive weight; 0: no discriminator")
    gan_start: int = flag(0, "first step of the adversarial term")
    discriminator_channels: int = flag(64, "of PatchGAN's first layer")
    discriminator_layers: int = flag(3, "of stride 2")
    discriminator_norm: str = flag("batch", "of PatchGAN", ("batch", "group", "none"))
    validation_limit: int = flag(0, "pictures to validate on; 0: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.resolution, self.discriminator_channels, self.discriminator_layers)
        if min(self.perceptual_weight, self.gan_weight) < 0 or min(counts) < 1 or not 0 < self.min_scale <= 1:
            raise ConfigError("Weights are not below 0, --resolution and the discriminator's channels and layers are "
                              "at least 1, and --min_scale lies in (0, 1].")


def clustered(model: Tokenizer, size: int, weighted: bool = False, seed: int = 0) -> Tokenizer:
    """The model with `size` words by K-means over its words, each once as published, or as often as it occurs."""
    codebook = getattr(getattr(model, "quantizer", None), "codebook", None)
    if not isinstance(codebook, Tensor) or not hasattr(model, "quant_conv") or not hasattr(model, "post_quant_conv"):
        raise ConfigError(f"{type(model).__name__} has no codebook between two 1x1 convolutions; VQGAN, IBQ and "
                          "LlamaGenVQ have. For a LocalVQ there is scripts/finetune_codebook.py.")
    usage = model.token_frequencies[0].float() if weighted and model.token_frequencies is not None else None
    family = cluster_codebook(codebook, [size], usage, seed=seed)
    return with_codebook(model, family.codebooks[size], family.maps[size])


class CodebookTask(Task):
    """A tokenizer with a smaller codebook.

    perceptual: LPIPS of the loss; discriminator: images in [-1, 1] to logits; either may be None.
    """

    def __init__(self, model: Tokenizer, recipe: CodebookTaskRecipe, perceptual: LPIPS | None = None,
                 discriminator: nn.Module | None = None, validation: Validation | None = None) -> None:
        self.recipe, self.validation = recipe, validation
        self.tuning = CodebookFinetuning(model, perceptual, discriminator, perceptual_weight=recipe.perceptual_weight,
                                         adversarial_weight=recipe.gan_weight)
        super().__init__({"model": model} | ({} if discriminator is None else {"discriminator": discriminator}),
                         {} if perceptual is None else {"perceptual": perceptual})
        self._output: Tensor | None = None

    def losses(self, player: str, batch: Any, step: int) -> dict[str, Tensor]:
        """batch: (B, 3, S, S) uint8."""
        images = batch.float() / 255
        judged = self.tuning.discriminator is not None and step >= self.recipe.gan_start
        if player == "discriminator":
            if not judged:
                return {}
            return {"hinge": self.tuning.discriminator_step(images, cast(Tensor, self._output))["loss"]}
        out = self.tuning.generator_step(images, judged)
        self._output = out["output"]
        terms = {"pixel": out["pixel"], "quantizer": out["quantizer"]}
        if "perceptual" in out:
            terms["perceptual"] = self.recipe.perceptual_weight * out["perceptual"]
        if "adversarial" in out:
            terms["adversarial"] = self.recipe.gan_weight * out["adaptive_weight"] * out["adversarial"]
        return terms

    def train_mode(self) -> None:
        self.tuning.train()

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        return {} if self.validation is None else self.validation.of_tokenizer(cast(Tokenizer, average))

    def samples(self, average: nn.Module, step: int) -> Tensor | None:
        """Originals, each beside its reconstruction, cut to the training crops' size."""
        side, model = self.recipe.resolution, cast(Tokenizer, average)
        pictures = [] if self.validation is None else self.validation.pictures
        large = [v[:, :side, :side] for v in pictures if min(v.shape[-2:]) >= side][:8]
        if not large:
            return None
        images = torch.stack(large).to(next(model.parameters()).device)
        return torch.stack([images, model.decode(model.encode(images))], 1).flatten(0, 1)
