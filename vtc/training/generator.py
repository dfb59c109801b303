"""Training generators: VAR, Infinity with bitwise self-correction, and the raster model; teacher-forced cross-entropy.

    VAR        tokens of all scales, from shards      -> what each scale sees of those before -> word of every token
    Infinity   pictures -> latents of the tokenizer   -> flipped bits, and those that mend it -> bits of every token
    LlamaGen   tokens of one grid, from shards        -> the tokens before                    -> the next word

A share of the labels, or texts, is replaced by "none", so that guidance has something to guide away from. Tokens are
made once (`scripts/tokenize_dataset.py`) and read from shards; Infinity's noise changes the tokens of all later scales,
so its pictures are encoded in each step. The script is `scripts/train_generator.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtc.errors import ConfigError, ModelError
from vtc.generators import infinity, llamagen, var
from vtc.generators.blocks import FeedForward, SelfAttention
from vtc.generators.patches import cells_of, fold
from vtc.generators.pretrained import GenerationConfig, LoadedGenerator
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.layers import MultiScaleTokenizer
from vtc.tokenizers.scales import Grid, MultiScaleQuantizer
from vtc.training.data import GoodPictures, Numbering
from vtc.training.labelled import LabelledImages, square
from vtc.training.recipe import Recipe, flag
from vtc.training.task import Task
from vtc.training.token_shards import TokenShards

#: parts of names of weights that are tables, positions or factors: weight decay would only pull them to nothing
_NOT_DECAYED = ("position", "start", "level", "log_scale", "offsets", "query", "no_text")
#: what --shard shares out of VAR and Infinity: not whole blocks, since what labels and texts do to all of them is
#: computed before the first one
_SHARDS = (SelfAttention, FeedForward, nn.Linear)


@dataclass
class GeneratorRecipe(Recipe):
    """Flags of `scripts/train_generator.py`. Rates are those of VAR: per 256 samples a step, 1e-4."""

    max_train_steps: int = flag(100_000, "steps of the whole run; the schedule ends there")
    train_batch_size: int = flag(16, "samples of one process at a time")
    learning_rate: float = flag(1e-4, "after the warm-up")
    adam_beta2: float = flag(0.95, "decay of Adam's second moments")
    weight_decay: float = flag(0.05, "of AdamW, on the weights of linear layers and words")
    max_grad_norm: float = flag(2.0, "gradients are scaled down to this norm; 0: never")
    ema_decay: float = flag(0.999, "of the average of the weights that is validated and saved; 0: no average")
    class_dropout: float = flag(0.1, "share of labels, or texts, that are replaced by none")
    short_scales: int = flag(0, "VAR: some steps train the first so many scales alone, which cost less; 0: none does")
    short_share: float = flag(0.6, "VAR: share of those steps, where there are any")
    noise_strength: float = flag(0.3, "Infinity: bits are flipped with a probability up to this")
    noisy_scales: int = flag(0, "Infinity: only in the first so many scales; 0: in all")
    validation_samples: int = flag(256, "pictures on which the loss is measured; 0: all of the validation set")
    sample_classes: int = flag(8, "classes of the sample grid, two pictures each; 0: no grid")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("class_dropout", "short_share", "noise_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is a share from 0 to 1, not {getattr(self, name)}.")


class GeneratorTask(Task):
    """What the three have in common: one player, a frozen tokenizer, weight decay, and what is written at the end.

    config: goes into the finished model's folder, beside its tokenizer.
    """

    def __init__(self, model: var.VAR | infinity.Infinity | llamagen.LlamaGen, tokenizer: Tokenizer,
                 recipe: GeneratorRecipe, config: GenerationConfig | None = None) -> None:
        self.config = config or GenerationConfig()
        LoadedGenerator(model, tokenizer, self.config)  # raises where they do not fit
        super().__init__({"generator": model}, {"tokenizer": tokenizer})
        self.recipe, self.tokenizer = recipe, tokenizer

    def parameter_groups(self, player: str, recipe: Recipe) -> list[dict[str, Any]]:
        named = [(n, p) for n, p in self.players[player].named_parameters() if p.requires_grad]
        decayed = {n for n, p in named if p.ndim > 1 and not any(part in n for part in _NOT_DECAYED)}
        groups = [{"params": [p for n, p in named if n in decayed], "weight_decay": recipe.weight_decay},
                  {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def save(self, average: nn.Module, directory: Path) -> None:
        """A folder for `vtc.load_generator` and `vtc-generate`."""
        LoadedGenerator(cast(Any, average), self.tokenizer, self.config).save(directory)

    def without_class(self, labels: Tensor, none: int) -> Tensor:
        """(B,) labels, a share of them replaced by `none`."""
        return torch.where(torch.rand(len(labels)).to(labels.device) < self.recipe.class_dropout, none, labels)

    def sample_labels(self, classes: int, device: torch.device) -> Tensor:
        """Two of each of the first classes, for the grid."""
        return torch.arange(min(self.recipe.sample_classes, classes), device=device).repeat_interleave(2)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., V) and (...) to the mean, in nats; no label smoothing."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


# ---- tokens ---------------------------------------------------------------------------------------------------------

class _TokenTask(GeneratorTask):
    """On batches (indices (B, L, 1), labels (B,)), as `TrainingTokens` gives them."""

    def __init__(self, model: var.VAR | llamagen.LlamaGen, tokenizer: Tokenizer, recipe: GeneratorRecipe,
                 validation: TokenShards | None = None, config: GenerationConfig | None = None) -> None:
        super().__init__(model, tokenizer, recipe, config)
        self.classes, self.validation = model.classes, validation
        if validation is not None:
            validation.check(tokenizer)

    def token_losses(self, model: nn.Module, indices: Tensor, labels: Tensor) -> Tensor:
        """(B, n) cross-entropies in nats, token by token, of (B, L) indices."""
        raise NotImplementedError

    def validation_means(self, model: nn.Module) -> Tensor | None:
        """(L,) mean cross-entropy of each token over the validation pictures, all with their labels; None without."""
        if self.validation is None:
            return None
        device = next(model.parameters()).device
        count = min(self.recipe.validation_samples or len(self.validation), len(self.validation))
        chosen = np.linspace(0, len(self.validation) - 1, count).round().astype(int).tolist()
        total = None
        for first in range(0, count, self.recipe.train_batch_size):
            samples = [self.validation[n] for n in chosen[first : first + self.recipe.train_batch_size]]
            indices = torch.stack([i for i, _ in samples])[..., 0].to(device)
            labels = torch.tensor([label for _, label in samples], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.mixed_precision == "bf16"):
                summed = self.token_losses(model, indices, labels).double().sum(0)
            total = summed if total is None else total + summed
        return None if total is None else total / count

    def samples(self, average: nn.Module, step: int) -> Tensor | None:
        """Two of each of the first classes."""
        labels = self.sample_labels(self.classes, next(average.parameters()).device)
        if not len(labels):
            return None
        generators = seeded(range(len(labels)), labels.device)
        return cast(Any, average).generate(labels, self.tokenizer, self.config.sampling or Sampling(),
                                           self.config.guidance or Guidance(2.0), generators=generators)[1]


class VARTask(_TokenTask):
    """Next-scale prediction. The first scales alone are a whole problem of their own, for no scale sees a later one.

    With `short_scales` some steps train those only: with VAR's ten scales the last two hold 425 of 680 tokens. Loss is
    the mean over the tokens of the step, so the first scales then also weigh more.
    """

    blocks = (var.Block,)
    shards = _SHARDS

    def __init__(self, model: var.VAR, tokenizer: MultiScaleTokenizer, recipe: GeneratorRecipe,
                 validation: TokenShards | None = None, config: GenerationConfig | None = None) -> None:
        super().__init__(model, tokenizer, recipe, validation, config)
        if not 0 <= recipe.short_scales <= len(model.sides):
            raise ConfigError(f"--short_scales is at most {len(model.sides)}, the scales of the model.")
        self.quantizer = cast(MultiScaleQuantizer, tokenizer.quantizer)
        self.scales: tuple[Grid, ...] = model.schedule().sizes
        self.sizes = [rows * columns for rows, columns in self.scales]

    def losses(self, player: str, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        indices, labels = batch[0][..., 0], self.without_class(batch[1], self.classes)
        # the same in all processes, which would wait for one another
        short = np.random.default_rng((self.recipe.seed, step)).random() < self.recipe.short_share
        if self.recipe.short_scales and short:
            indices = indices[:, : sum(self.sizes[: self.recipe.short_scales])]
        return {"cross_entropy": self.token_losses(self.model, indices, labels).mean()}

    def token_losses(self, model: nn.Module, indices: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(indices.device.type, enabled=False):
            codes = self.quantizer.teacher_inputs(indices, self.scales)
        return F.cross_entropy(model(labels, codes).transpose(1, 2), indices, reduction="none")

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        """Cross-entropy in nats: the mean of all tokens, and of each scale."""
        means = self.validation_means(average)
        if means is None:
            return {}
        by_scale = {f"cross_entropy_scale_{i + 1}": part.mean().item()
                    for i, part in enumerate(means.split(self.sizes))}
        return {"cross_entropy": means.mean().item(), **by_scale}


class RasterTask(_TokenTask):
    """Next-token prediction on a grid."""

    blocks = (llamagen.Block,)

    def losses(self, player: str, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        indices, labels = batch[0][..., 0], self.without_class(batch[1], self.classes)
        return {"cross_entropy": self.token_losses(self.model, indices, labels).mean()}

    def token_losses(self, model: nn.Module, indices: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(labels, indices[:, :-1]).transpose(1, 2), indices, reduction="none")

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        """Cross-entropy in nats, the mean of all tokens."""
        means = self.validation_means(average)
        return {} if means is None else {"cross_entropy": means.mean().item()}


# ---- texts ----------------------------------------------------------------------------------------------------------

class TextFeatures:
    """What a text encoder made of captions: a safetensors file of `features` (N, T, C) and `mask` (N, T), true on text.

    A row for each picture, in the pictures' order, or a row for each class.
    """

    def __init__(self, path: str | Path, pictures: int, classes: int) -> None:
        try:
            tensors = load_file(path)
            self.features, self.mask = tensors["features"].float(), tensors["mask"].bool()
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{path} holds no text features, 'features' (N, T, C) and 'mask' (N, T).") from error
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2] or not self.mask.any(1).all():
            raise ModelError(f"{path} holds features {tuple(self.features.shape)} and a mask {tuple(self.mask.shape)}: "
                             "they are (N, T, C) and (N, T), each row with a text.")
        self.by_class = len(self.features) == classes != pictures
        if not self.by_class and len(self.features) != pictures:
            raise ConfigError(f"{path} has {len(self.features)} texts; the pictures are {pictures}, of {classes} "
                              "classes.")

    def of(self, picture: int, label: int) -> tuple[Tensor, Tensor]:
        """(T, C) and (T,) of a picture."""
        row = label if self.by_class else picture
        return self.features[row], self.mask[row]


class TrainingPictures(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Sample n of a run without end: ((3, S, S) uint8, text (T, C), mask (T,)); mirrored half of the time.

    It depends on the seed and n alone; each epoch has every picture once. Mirror only what has no left and right in its
    captions: flip=False.
    """

    def __init__(self, images: LabelledImages, texts: TextFeatures, resolution: int, seed: int = 0,
                 flip: bool = True) -> None:
        self.images, self.texts, self.resolution, self.seed, self.flip = images, texts, resolution, seed, flip
        self.numbering, self._good = Numbering(len(images), seed), GoodPictures(images.source)

    def __len__(self) -> int:
        return 2**62  # numbered by the sampler, without end

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place, order = self.numbering(n)
        number, picture = self._good.first(order, place)
        pixels = square(picture, self.resolution)
        if self.flip and np.random.default_rng((self.seed, epoch, place)).random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels, *self.texts.of(number, int(self.images.labels[number]))


class InfinityTask(GeneratorTask):
    """Bits of all scales, with self-correction: Han et al. (2412.04431), section 3.4.

    In each scale bits are flipped; the residual is taken from the flipped sum, and the targets of later scales are the
    bits that mend it. So the model learns to undo mistakes, of which teacher forcing alone shows it none.

    scales: the grids of the transformer. validation: batches (pixels, text, mask) on which the loss is measured, with
    the same noise each time.
    """

    blocks = (infinity.Block,)
    shards = _SHARDS

    def __init__(self, model: infinity.Infinity, tokenizer: InfinityVAE, recipe: GeneratorRecipe,
                 scales: tuple[Grid, ...], validation: list[tuple[Tensor, Tensor, Tensor]] | None = None,
                 config: GenerationConfig | None = None) -> None:
        super().__init__(model, tokenizer, recipe, config)
        self.quantizer, self.scales, self.validation = tokenizer.quantizer, scales, validation or []

    def losses(self, player: str, batch: tuple[Tensor, Tensor, Tensor], step: int) -> dict[str, Tensor]:
        model = cast(infinity.Infinity, self.model)
        pixels, text, mask = batch
        inputs, targets = self.noisy(pixels)
        none = torch.rand(len(text)).to(text.device) < self.recipe.class_dropout
        text = torch.where(none[:, None, None], model.no_text[: text.shape[1]].to(text.dtype), text)
        return {"cross_entropy": cross_entropy(model(text, mask, inputs, self.scales), targets)}

    @torch.no_grad()
    def noisy(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) uint8 to teacher inputs (B, L - first scale, d) and bits (B, L, d), in the model's patches."""
        patch = cast(infinity.Infinity, self.model).patch
        cells = cells_of(self.scales, patch)
        with torch.autocast(pixels.device.type, enabled=False):
            z = cast(InfinityVAE, self.tokenizer).latents(pixels.float() / 255)
            inputs, targets = self.quantizer.self_correction(z, self.recipe.noise_strength,
                                                             self.recipe.noisy_scales or None, cells)
        if patch > 1:
            inputs, targets = fold(inputs, self.scales[1:], patch), fold(targets, self.scales, patch)
        return inputs, targets

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        """Cross-entropy a bit, in nats (0.693 is a coin), and the share of bits that are right."""
        losses, right = [], []
        torch.manual_seed(0)  # the next step has a seed of its own
        device = next(average.parameters()).device
        for pixels, text, mask in self.validation:
            inputs, targets = self.noisy(pixels.to(device))
            logits = average(text.to(device), mask.to(device), inputs, self.scales)
            losses.append(cross_entropy(logits, targets).item())
            right.append((logits.argmax(-1) == targets).float().mean().item())
        if not losses:
            return {}
        return {"cross_entropy": sum(losses) / len(losses), "right_bits": sum(right) / len(right)}

    def samples(self, average: nn.Module, step: int) -> Tensor | None:
        """The first validation texts, drawn."""
        if not self.validation or not self.recipe.sample_classes:
            return None
        device = next(average.parameters()).device
        text, mask = (t[: self.recipe.sample_classes].to(device) for t in self.validation[0][1:])
        return cast(infinity.Infinity, average).generate(
            text, mask, cast(InfinityVAE, self.tokenizer), self.scales, self.config.sampling or Sampling(),
            self.config.guidance or Guidance(2.0), generators=seeded(range(len(text)), device))[1]
