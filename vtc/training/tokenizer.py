"""Training a tokenizer: any of our networks with any quantizer, by reconstruction, LPIPS and a discriminator.

The loop is `vtc.training.loop`; this file says what is trained. `scripts/train_tokenizer.py` holds the flags.

    model          l1, l2, lpips, the quantizer's own loss (commitment, entropies), the discriminator's opinion
    discriminator  hinge or cross-entropy of photographs against the reconstructions of the same step, LeCAM

Images are in [0, 1] in every term, where L1 is half, and L2 a quarter, of what it is in [-1, 1]: a published weight of
1 for L1 is `--l1_weight 2`. The discriminator sees [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.eval.measures import build
from vtc.int8 import train_quantized, trained_quantized
from vtc.tokenizers.base import Quantized, Tokenizer
from vtc.tokenizers.classes import TOKENIZER_CLASSES
from vtc.tokenizers.codebook_stats import MAX_WORDS
from vtc.tokenizers.composed import called
from vtc.tokenizers.discriminators import BlurPatchGAN, PatchGAN, SpectralDiscriminator
from vtc.tokenizers.layers import AttnBlock, MultiScaleTokenizer, ResBlock
from vtc.tokenizers.local_vq import Block
from vtc.tokenizers.lookup_free import annealed_entropy_weight
from vtc.tokenizers.losses import (
    LeCAM,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_generator_loss,
    vanilla_discriminator_loss,
)
from vtc.tokenizers.lpips import LPIPS
from vtc.tokenizers.ranks import mean_over_ranks, sum_over_ranks
from vtc.tokenizers.scales import MultiScaleQuantizer, resize_area
from vtc.tokenizers.vector_quantizer import nearest_codeword
from vtc.training.perceptual import PerceptualLoss
from vtc.training.recipe import Recipe
from vtc.training.task import Task
from vtc.training.tokenizer_recipe import TokenizerRecipe
from vtc.training.validation import CountedWords, Validation, lpips_by

__all__ = ["MODELS", "Critic", "TokenizerRecipe", "TokenizerTask", "evaluate", "make_critic", "make_tokenizer"]

#: models by the names of `--model`; their classes are known to `vtc.tokenizers.classes`
MODELS = {"local_vq": "LocalVQ", "pyramid_vq": "PyramidVQ", "vqgan": "VQGAN", "ibq": "IBQ", "llamagen": "LlamaGenVQ",
          "wetok": "WeTok", "open_magvit2": "OpenMAGVIT2", "var_vqvae": "VARVQVAE", "infinity_vae": "InfinityVAE",
          "diffusers_vq": "DiffusersVQ"}
#: of the continuous steps, the last ones, whose latents the codebook starts from
START_STEPS = 50
#: vectors for each codeword that K-means sees at most
START_SHARE = 64
#: sub-modules that stage 2 leaves as they are
FROZEN_IN_STAGE_2 = ("encoder", "quant_conv", "quantizer")


def evaluate(model: Tokenizer, images: Sequence[Tensor], judge: LPIPS) -> dict[str, float]:
    """Mean PSNR (dB), LPIPS, lattice ratio, and use of the codebook over whole images (3, H, W) in [0, 1].

    Usage and entropy are means over the groups of a code.
    """
    measures = [build("psnr"), lpips_by(judge), build("lattice"), CountedWords()]
    return Validation(images, measures, str(next(judge.parameters()).device)).of_tokenizer(model)


def make_tokenizer(name: str, arguments: dict[str, Any]) -> Tokenizer:
    """A new model of a kind in MODELS (or by its class) with the arguments of its constructor. ConfigError."""
    kind = MODELS.get(name, name)
    if kind not in TOKENIZER_CLASSES:
        raise ConfigError(f"There is no model {name!r}; there are {', '.join(MODELS)}.")
    return called(getattr(import_module(TOKENIZER_CLASSES[kind]), kind), arguments)


class Critic(nn.Module):
    """A discriminator, and the averages that LeCAM holds its answers to."""

    def __init__(self, network: nn.Module, lecam: LeCAM | None = None) -> None:
        super().__init__()
        self.network, self.lecam = network, lecam

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        return self.network(images * 2 - 1)


def make_critic(recipe: TokenizerRecipe) -> Critic | None:
    """The discriminator of a recipe; None where it has no adversarial term."""
    if not recipe.gan_weight:
        return None
    channels, layers = recipe.discriminator_channels, recipe.discriminator_layers
    if recipe.discriminator == "patch":
        network: nn.Module = PatchGAN(channels, layers, cast(Any, recipe.discriminator_norm))
    elif recipe.discriminator == "blur":
        network = BlurPatchGAN(channels, layers)
    else:
        network = SpectralDiscriminator(channels, layers)
    return Critic(network, LeCAM() if recipe.lecam_weight else None)


class TokenizerTask(Task):
    """A tokenizer and, where the recipe has an adversarial term, a discriminator.

    perceptual: LPIPS of the loss, None where its weight is 0.
    codebooks: (S, d) each, of the smaller members of the model's family, for `family_share` of the crops.
    """

    blocks: tuple[type[nn.Module], ...] = (ResBlock, AttnBlock, Block)

    def __init__(self, model: Tokenizer, recipe: TokenizerRecipe, perceptual: LPIPS | None = None,
                 validation: Validation | None = None, codebooks: Sequence[Tensor] = ()) -> None:
        if recipe.perceptual_weight and perceptual is None:
            raise ConfigError("The recipe has a --perceptual_weight; it needs the weights of LPIPS.")
        if recipe.family_share and not codebooks:
            raise ConfigError("The recipe has a --family_share; it needs a model with a family.")
        critic = make_critic(recipe)
        views: nn.Module | None = perceptual
        if perceptual is not None and recipe.random_views:
            views = PerceptualLoss(perceptual)
        super().__init__({"model": model} | ({} if critic is None else {"discriminator": critic}),
                         {} if views is None else {"perceptual": views})
        self.recipe, self.tokenizer, self.validation = recipe, model, validation
        # diffusers' own, in a DiffusersVQ; it is not imported for the others
        self.blocks = (*self.blocks, *{type(m) for m in model.modules() if type(m).__name__ == "ResnetBlock2D"})
        self.quantizer = cast(Any, model.quantizer)
        cast(Any, model).int8_weights = frozenset()  # this run decides, not the one that the model is from
        if recipe.int8:
            train_quantized(model)
        self.codebooks = [codebook.float() for codebook in codebooks]
        if recipe.stage2:
            for name in FROZEN_IN_STAGE_2:
                getattr(model, name, nn.Identity()).requires_grad_(False)
        can_start = hasattr(self.quantizer, "start_from") and not recipe.stage2
        #: steps without quantization
        self.continuous_steps = recipe.continuous_steps if can_start else 0
        self._warm: list[Tensor] = []
        self._output: Tensor | None = None
        self._shown: Tensor | None = None
        self._counts: Tensor | None = None
        self._last_layer = _last_convolution(model) if critic is not None and recipe.adaptive_weight else None

    # ---- a step -----------------------------------------------------------------------------------------------------

    def losses(self, player: str, batch: Tensor | Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """batch: (B, 3, S, S) uint8, or these and their labels."""
        batch = batch if isinstance(batch, Tensor) else batch[0]
        images = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
        return self._model_losses(images, step) if player == "model" else self._critic_losses(images, step)

    def _model_losses(self, images: Tensor, step: int) -> dict[str, Tensor]:
        recipe = self.recipe
        output, quantized = self.reconstruct(images, step)
        output = output.float()
        terms: dict[str, Tensor] = {}
        if recipe.l1_weight:
            terms["l1"] = recipe.l1_weight * F.l1_loss(output, images)
        if recipe.l2_weight:
            terms["l2"] = recipe.l2_weight * F.mse_loss(output, images)
        if recipe.perceptual_weight:
            terms["lpips"] = recipe.perceptual_weight * self.frozen["perceptual"](images, output).mean()
        if quantized is not None and not recipe.stage2:
            terms["quantizer"] = recipe.quantizer_weight * quantized.loss
        if self._judged(step):
            critic = self.players["discriminator"]
            fake = critic(output).float()
            opinion = (hinge_generator_loss(fake) if recipe.gan_loss == "hinge"
                       else non_saturating_generator_loss(fake, spatial_mean_first=True))
            weight: float | Tensor = recipe.gan_weight
            if self._last_layer is not None:
                reference = sum((terms[name] for name in ("l1", "l2", "lpips") if name in terms), output.new_zeros(()))
                weight = weight * adaptive_weight_over_ranks(reference, opinion, self._last_layer)
            terms["gan"] = weight * opinion
        if self._watched(step):
            self._output = output.detach()
        self._shown = images[:8].detach()
        return terms

    def _critic_losses(self, images: Tensor, step: int) -> dict[str, Tensor]:
        if not self._watched(step) or self._output is None:
            return {}
        recipe, critic = self.recipe, cast(Critic, self.players["discriminator"])
        real, fake = critic(images).float(), critic(self._output).float()
        loss = hinge_discriminator_loss if recipe.discriminator_loss == "hinge" else vanilla_discriminator_loss
        terms = {recipe.discriminator_loss: loss(real, fake)}
        if critic.lecam is not None:
            terms["lecam"] = recipe.lecam_weight * critic.lecam(real, fake)
        self._output = None
        return terms

    def _judged(self, step: int) -> bool:
        return "discriminator" in self.players and step >= self.recipe.gan_start

    def _watched(self, step: int) -> bool:
        start = self.recipe.discriminator_start
        return "discriminator" in self.players and step >= (self.recipe.gan_start if start < 0 else start)

    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Quantized | None]:
        """(output, quantized); None before the codebook's start."""
        model: Any = self.players["model"]
        height, width = images.shape[-2:]
        if self.recipe.stage2:
            with torch.no_grad():
                z = model.latents(images)
                quantized = self._quantize(z, height, width)
                z_q = self._with_fewer_words(z, quantized.z_q) if self.recipe.family_share else quantized.z_q
            return model.reconstruct(z_q)[..., :height, :width], quantized
        if step >= self.continuous_steps:
            output, quantized = model(images)
            self._count(quantized.indices, height, width)
            return output, quantized
        z = model.latents(images)
        if step >= self.continuous_steps - START_STEPS:
            self._remember(z.detach().float())
        return model.reconstruct(z)[..., :height, :width], None

    def _with_fewer_words(self, z: Tensor, z_q: Tensor) -> Tensor:
        """(B, d, h, w) codewords, of some pictures those that a smaller codebook has for their latents."""
        z_q = z_q.clone()
        for n in (torch.rand(len(z)) < self.recipe.family_share).nonzero()[:, 0].tolist():
            codebook = self.codebooks[int(torch.randint(len(self.codebooks), ()))].to(z.device)
            nearest = nearest_codeword(z[n].flatten(1).T.float(), codebook)
            z_q[n] = codebook[nearest].T.view_as(z_q[n])
        return z_q

    def _quantize(self, z: Tensor, height: int, width: int) -> Quantized:
        model = self.tokenizer
        scales = (model.scales(height, width),) if isinstance(model, MultiScaleTokenizer) else ()
        return self.quantizer(z, *scales)

    def train_mode(self) -> None:
        super().train_mode()
        if self.recipe.stage2:
            for name in FROZEN_IN_STAGE_2:
                getattr(self.tokenizer, name, nn.Identity()).eval()

    def parameter_groups(self, player: str, recipe: Recipe) -> list[dict[str, Any]]:
        groups = super().parameter_groups(player, recipe)
        rate = self.recipe.discriminator_learning_rate
        if player == "discriminator" and rate:
            for group in groups:
                group["share"] = rate / recipe.learning_rate
        return groups

    def compiled(self) -> list[nn.Module]:
        if not self.recipe.stage2:
            return super().compiled()
        decoder = cast(nn.Module, cast(Any, self.tokenizer).decoder)  # the model's own forward pass is not asked
        return [decoder, *[self.players[name] for name in self.players if name != "model"]]

    # ---- the codebook -----------------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """Start the codebook, anneal the entropy weight."""
        if step == self.continuous_steps and self._warm:
            latents, self._warm = torch.cat(self._warm), []
            self._start_codebook(latents)
        recipe = self.recipe
        if recipe.entropy_weight >= 0 or recipe.entropy_boost:
            for quantizer in _with_entropy(self.quantizer):
                if not hasattr(quantizer, "entropy_of_model"):
                    quantizer.entropy_of_model = quantizer.entropy
                weight = quantizer.entropy_of_model if recipe.entropy_weight < 0 else recipe.entropy_weight
                quantizer.entropy = annealed_entropy_weight(step, weight, recipe.entropy_boost,
                                                            recipe.entropy_annealing_steps)

    def _remember(self, z: Tensor) -> None:
        """Keep some latents for the codebook's start: whole maps for a pyramid, else vectors, evenly drawn."""
        words = max(cast(Sequence[int], self.quantizer.vocab))
        if not isinstance(self.quantizer, MultiScaleQuantizer):
            z = z.movedim(1, -1).flatten(0, -2)
        share = max(1, -(-START_SHARE * words // START_STEPS) // max(1, z[0].numel() // z.shape[1]))
        self._warm.append(z[:: max(1, len(z) // share)].clone())

    def _start_codebook(self, latents: Tensor) -> None:
        quantizer: Any = self.quantizer
        if not isinstance(self.quantizer, MultiScaleQuantizer):
            quantizer.start_from(latents)
            return
        # A pyramid's words stand for means of the map first, and then for what they left over.
        maps = latents
        sizes = [(rows, columns) for rows, columns in self._grids(maps)]
        means = [resize_area(maps, size).flatten(2).transpose(1, 2).flatten(0, 1) for size in sizes]
        quantizer.start_from(torch.cat(means))
        quantizer.start_from(quantizer.residuals(maps, sizes).flatten(0, 1))

    def _grids(self, maps: Tensor) -> Sequence[tuple[int, int]]:
        model = cast(MultiScaleTokenizer, self.tokenizer)
        return model.scales(maps.shape[-2] * model.downsample, maps.shape[-1] * model.downsample)

    @torch.no_grad()
    def _count(self, indices: Tensor, height: int, width: int) -> None:
        """Count the words of a batch, a row for each scale, without waiting for the device."""
        vocab = self.tokenizer.layout(height, width).vocab
        scales = self.tokenizer.layout(height, width).scales
        words = sum(vocab)
        if words * len(scales) > MAX_WORDS // 16:
            return
        offsets = torch.tensor([sum(vocab[:g]) for g in range(len(vocab))], device=indices.device)
        scale = torch.cat([torch.full((rows * columns,), n) for n, (rows, columns) in enumerate(scales)])
        places = indices.reshape(len(indices), -1, len(vocab)) + offsets + words * scale.to(indices.device)[:, None]
        counts = torch.bincount(places.flatten(), minlength=words * len(scales)).view(len(scales), words)
        self._counts = counts if self._counts is None else self._counts + counts

    def report(self, step: int) -> dict[str, float]:
        """Usage and perplexity of the codebook since the last report: means over groups, and for each scale."""
        if self._counts is None:
            return {}
        counts, self._counts = sum_over_ranks(self._counts).double().cpu(), None
        vocab = list(self.tokenizer.layout(self.recipe.resolution, self.recipe.resolution).vocab)
        usage, perplexity = _use(counts.sum(0), vocab)
        result = {"codebook_usage": usage, "codebook_perplexity": perplexity}
        if len(counts) > 1:
            result |= {f"scale_{n}_perplexity": _use(row, vocab)[1] for n, row in enumerate(counts)}
        return result

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        if self.validation is None or step < self.continuous_steps:
            return {}
        return self.validation.of_tokenizer(cast(Tokenizer, average))

    def samples(self, average: nn.Module, step: int) -> Tensor | None:
        """Originals, each beside its reconstruction."""
        side, model = self.recipe.resolution, cast(Tokenizer, average)
        device = next(model.parameters()).device
        pictures = [] if self.validation is None else self.validation.pictures
        large = [v for v in pictures if min(v.shape[-2:]) >= side][:8]
        if large:
            images = torch.stack([v[:, (v.shape[1] - side) // 2 :, (v.shape[2] - side) // 2 :][:, :side, :side]
                                  for v in large]).to(device)
        elif self._shown is not None:
            images = self._shown
        else:
            return None
        if step < self.continuous_steps:
            return None
        output = model.decode(model.encode(images), torch.Generator(device).manual_seed(0))
        return torch.stack([images, output], 1).flatten(0, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"warm": self._warm, "counts": self._counts}

    def save(self, average: nn.Module, directory: Path) -> None:
        super().save(trained_quantized(average) if self.recipe.int8 else average, directory)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(self.tokenizer.parameters()).device
        self._warm = [z.to(device) for z in state["warm"]]
        self._counts = None if state["counts"] is None else state["counts"].to(device)


def adaptive_weight_over_ranks(reference: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """`vtc.tokenizers.losses.adaptive_weight` with the gradients of all processes' batches together."""
    (towards,) = torch.autograd.grad(reference, last_layer, retain_graph=True)
    (against,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    towards, against = (mean_over_ranks(g.float().contiguous()) for g in (towards, against))
    return (towards.norm() / (against.norm() + 1e-4)).clamp(max=1e4).detach()


def _last_convolution(model: nn.Module) -> Tensor:
    convolutions = [m for m in getattr(model, "decoder", model).modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1].weight


def _with_entropy(quantizer: nn.Module) -> list[Any]:
    """The quantizers in a quantizer that have an entropy weight."""
    return [module for module in quantizer.modules() if isinstance(getattr(module, "entropy", None), float | int)]


def _use(counts: Tensor, vocab: Sequence[int]) -> tuple[float, float]:
    """(usage, perplexity), means over the groups, of their counts side by side."""
    usage, perplexity = [], []
    for part in counts.split(list(vocab)):
        p = part / part.sum().clamp(min=1)
        usage.append((part > 0).double().mean())
        perplexity.append(torch.exp(-torch.xlogy(p, p).sum()))
    return torch.stack(usage).mean().item(), torch.stack(perplexity).mean().item()
