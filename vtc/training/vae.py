"""Training autoencoders with continuous latents: KL-VAE from scratch, and SC-VAE, fine-tuned against a frozen teacher.

    KLTask                   Rombach et al. (2112.10752): L1 + LPIPS + KL + adversarial; AutoencoderKL or PatchVAE.
                             With `eq_prior` below 1 in EQ-VAE's way (2502.09509): half of the steps decode latents that
                             were made smaller and turned, against images that were made smaller and turned.
    ScaleConsistentTask      Zhang et al. (2506.01331): the decoder alone learns to do at twice the downsampling what
                             the teacher does, whose features before the last convolution it is held to.

Images are in [0, 1] at the border and in [-1, 1] within, where the published weights of the terms hold.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Latents
from vtc.tokenizers.diffusers_adapters import AutoencoderKL, ScaleConsistentVAE
from vtc.tokenizers.equivariance import draw_transform, scale_and_turn
from vtc.tokenizers.layers import pad_to_multiple
from vtc.tokenizers.losses import (
    adaptive_weight,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    scale_consistency_loss,
)
from vtc.tokenizers.patch_vae import PatchVAE, Residual
from vtc.tokenizers.ranks import is_parallel
from vtc.torchvision_guard import ensure_torchvision_imports
from vtc.training.task import Task
from vtc.training.vae_recipe import KLRecipe, ScaleConsistentRecipe, VAERecipe
from vtc.training.validation import Validation

ensure_torchvision_imports()  # diffusers imports torchvision where it is installed

from diffusers.models.resnet import ResnetBlock2D  # noqa: E402

# ---- networks -------------------------------------------------------------------------------------------------------

class Reconstruction(NamedTuple):
    """output: (B, 3, H, W), about [-1, 1]. nats: (B,), the divergence of each posterior from N(0, 1), summed."""

    output: Tensor
    nats: Tensor


class DiffusersPlayer(nn.Module):
    """An autoencoder of diffusers with what the loop and the tasks ask of a player."""

    def __init__(self, model: AutoencoderKL | ScaleConsistentVAE) -> None:
        super().__init__()
        self.model = cast(Any, model)
        self.downsample = 2 ** (len(self.model.config.block_out_channels) - 1) * self.model.config.get("stride", 1)

    @property
    def last_layer(self) -> Tensor:
        """The weight on which the adversarial term is balanced."""
        return self.model.decoder.conv_out.weight

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] there and back, by the mean of the posterior."""
        x = pad_to_multiple(images, self.downsample) * 2 - 1
        output = self.model.decode(self.model.encode(x).latent_dist.mode()).sample
        return (output * 0.5 + 0.5)[..., : images.shape[-2], : images.shape[-1]].float().clamp(0, 1)

    def enable_gradient_checkpointing(self) -> None:
        """diffusers' own."""
        self.model.enable_gradient_checkpointing()

    def save(self, directory: Path) -> None:
        """A folder of diffusers."""
        self.model.save_pretrained(directory)


class KLAutoencoder(DiffusersPlayer):
    """diffusers' AutoencoderKL as it trains."""

    def forward(self, images: Tensor, transform: tuple[float, int] | None = None) -> Reconstruction:
        """(B, 3, H, W) in [-1, 1]; the latents are drawn from their posterior, then scaled and turned."""
        posterior = self.model.encode(images).latent_dist
        z = posterior.sample()
        if transform is not None:
            z = scale_and_turn(z, *transform)
        return Reconstruction(self.model.decode(z).sample, posterior.kl())


class PatchAutoencoder(nn.Module):
    """PatchVAE as it trains: its posterior is uniform, as wide as the quantization step of the codec it is meant for.

    KL(U(m - s/2, m + s/2) || N(0, 1)) = (m^2 + s^2/12 + ln 2 pi) / 2 - ln s for each latent.
    """

    def __init__(self, model: PatchVAE, step: float = 1.0) -> None:
        super().__init__()
        if not step > 0:
            raise ConfigError(f"A quantization step is above 0, not {step}.")
        self.model, self.step = model, step

    @property
    def last_layer(self) -> Tensor:
        """The weight on which the adversarial term is balanced."""
        return cast(nn.Conv2d, self.model.decoder[-2]).weight

    def forward(self, images: Tensor, transform: tuple[float, int] | None = None) -> Reconstruction:
        """As of KLAutoencoder."""
        mean = self.model.encode(images * 0.5 + 0.5)
        z = mean.values + (torch.rand_like(mean.values) - 0.5) * self.step
        height, width = mean.height, mean.width
        if transform is not None:
            z = scale_and_turn(z, *transform)
            height, width = (self.model.downsample * side for side in z.shape[-2:])
        constant = (self.step**2 / 12 + math.log(2 * math.pi)) / 2 - math.log(self.step)
        nats = (mean.values.square() / 2 + constant).flatten(1).sum(1)
        return Reconstruction(self.model.decode(Latents(z, height, width)) * 2 - 1, nats)

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] there and back."""
        return self.model.decode(self.model.encode(images)).clamp(0, 1)

    def save(self, directory: Path) -> None:
        """A folder of vtc."""
        self.model.save_pretrained(directory)


class ScaleConsistentStudent(DiffusersPlayer):
    """The student's decoder behind its frozen encoder: images to what is compared with the teacher.

    The latents do not change in training, so a diffusion model that was trained on them goes on working.
    """

    def __init__(self, model: ScaleConsistentVAE) -> None:
        super().__init__(model)
        if model.stride != 2:
            raise ConfigError("The student of scale-consistent training has the stride 2.")
        self.model.requires_grad_(False)
        self.model.decoder.requires_grad_(True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] to (reconstruction, clamped to it, features (B, C, H/2, W/2))."""
        with torch.no_grad():
            z = self.model.encode(images).latent_dist.sample()
        sample, features = self.model.decode_with_features(z)
        return sample.clamp(-1, 1), features


@torch.no_grad()
def teacher_features(teacher: ScaleConsistentVAE, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to the (B, C, H, W) features of the teacher, from latents of its own finer grid."""
    if teacher.stride != 1:
        raise ConfigError("The teacher of scale-consistent training has the stride 1.")
    return teacher.decode_with_features(cast(Any, teacher).encode(images).latent_dist.sample()).features


# ---- tasks ----------------------------------------------------------------------------------------------------------

class VAETask(Task):
    """Base of the two.

    model: from images to reconstructions, with `last_layer`, `save`. discriminator: None for no adversarial term.
    perceptual: LPIPS or another distance of images in [0, 1], (B,); None for none.
    """

    recipe: VAERecipe
    blocks = (Residual, ResnetBlock2D)

    def __init__(self, model: nn.Module, recipe: VAERecipe, discriminator: nn.Module | None,
                 perceptual: nn.Module | None, validation: Validation | None = None,
                 frozen: dict[str, nn.Module] | None = None) -> None:
        players = {"vae": model} if discriminator is None else {"vae": model, "discriminator": discriminator}
        super().__init__(players, {**(frozen or {}), **({} if perceptual is None else {"perceptual": perceptual})})
        self.perceptual, self.validation = perceptual, validation

    def _reconstruction_terms(self, output: Tensor, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(weighted terms, the unweighted distance that the adversarial term is balanced with)."""
        recipe = self.recipe
        error = F.l1_loss(output, images) if recipe.pixel == "l1" else F.mse_loss(output, images)
        terms = {"pixel": recipe.pixel_weight * error}
        if self.perceptual is None or not recipe.perceptual_weight:
            return terms, error
        distance = self.perceptual(output * 0.5 + 0.5, images * 0.5 + 0.5).mean()
        terms["perceptual"] = recipe.perceptual_weight * distance
        return terms, distance

    def save(self, average: nn.Module, directory: Path) -> None:
        cast(Any, average).save(directory)

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        """Of reconstructions from the means of the posteriors."""
        if self.validation is None:
            return {}
        return self.validation.of_autoencoder(cast(Any, average).reconstruct, next(average.parameters()).device)

    @torch.no_grad()
    def samples(self, average: nn.Module, step: int) -> Tensor | None:
        """The first pictures above what became of them, cut to the smallest of them."""
        shown = [] if self.validation is None else self.validation.pictures[:4]
        if not shown:
            return None
        height, width = (min(image.shape[axis] for image in shown) for axis in (1, 2))
        device = next(average.parameters()).device
        made = [cast(Any, average).reconstruct(image[None].to(device))[0, :, :height, :width].cpu() for image in shown]
        return torch.stack([image[:, :height, :width] for image in shown] + made)


class KLTask(VAETask):
    """An autoencoder from scratch, or one that is trained on.

    batch: (B, 3, S, S) uint8, as the loaders give it.
    """

    recipe: KLRecipe

    def __init__(self, model: KLAutoencoder | PatchAutoencoder, recipe: KLRecipe, discriminator: nn.Module | None,
                 perceptual: nn.Module | None, validation: Validation | None = None) -> None:
        self.recipe = recipe
        super().__init__(model, recipe, discriminator, perceptual, validation)
        self._images = self._output = torch.zeros(0)  # of the model's turn, for the discriminator's

    def losses(self, player: str, batch: Any, step: int) -> dict[str, Tensor]:
        with_adversary = "discriminator" in self.players and step >= self.recipe.discriminator_start
        if player == "discriminator":
            if not with_adversary:
                return {}
            critic = self.players[player]
            return {"hinge": hinge_discriminator_loss(critic(self._images), critic(self._output))}
        images, transform = self._transformed(symmetric(batch))
        model = cast(KLAutoencoder, self.players["vae"])
        output, nats = model(images, transform)
        if transform is not None:
            images = scale_and_turn(images, *transform)
        terms, _ = self._reconstruction_terms(output, images)
        reference = torch.stack(list(terms.values())).sum()
        terms["kl"] = self.recipe.kl_weight * nats.mean() / batch[0].numel()
        if with_adversary:
            adversarial = hinge_generator_loss(self.players["discriminator"](output))
            weight = adaptive_weight(reference, adversarial, model.last_layer)
            terms["adversarial"] = self.recipe.adversarial_weight * weight * adversarial
        self._images, self._output = images.detach(), output.detach()
        return terms

    def _transformed(self, images: Tensor) -> tuple[Tensor, tuple[float, int] | None]:
        """EQ-VAE's lot: images as they are or made smaller, and no transform of the latents; or a transform."""
        recipe = self.recipe
        if recipe.eq_prior == 1:
            return images, None
        if torch.rand(()) >= recipe.eq_prior:
            return images, draw_transform()
        if torch.rand(()) < recipe.eq_downscale:
            return scale_and_turn(images, draw_transform()[0], 0), None
        return images, None


class ScaleConsistentTask(VAETask):
    """SC-VAE's decoder, fine-tuned to the published loss:

        MSE + 0.1 LPIPS + 0.05 balance -D(output) + |teacher's features - doubled features|^2

    The discriminator's is the hinge of both kinds, not halved, and 10 times the gradient penalty on real images. By the
    published schedule the two take turns, and the discriminator judges the decoder's last output, which is of the batch
    before. A checkpoint between two turns holds that output of the main process; other processes then make one anew.
    """

    recipe: ScaleConsistentRecipe

    def __init__(self, student: ScaleConsistentStudent, teacher: ScaleConsistentVAE, recipe: ScaleConsistentRecipe,
                 discriminator: nn.Module | None, perceptual: nn.Module | None, validation: Validation | None = None,
                 ) -> None:
        self.recipe, self.teacher = recipe, teacher
        super().__init__(student, recipe, discriminator, perceptual, validation, {"teacher": cast(nn.Module, teacher)})
        self._output: Tensor | None = None

    def losses(self, player: str, batch: Any, step: int) -> dict[str, Tensor]:
        recipe, images = self.recipe, symmetric(batch)
        turns = recipe.alternate and "discriminator" in self.players
        if turns and (step % 2 == 0) == (player == "discriminator"):
            return {}
        student = cast(ScaleConsistentStudent, self.players["vae"])
        if player == "discriminator":
            critic = self.players[player]
            if self._output is None:  # a run that was resumed between two turns
                with torch.no_grad():
                    self._output = student(images)[0]
            hinge = 2 * hinge_discriminator_loss(critic(images), critic(self._output.to(images)))
            return {"hinge": hinge, "penalty": recipe.penalty_weight * gradient_penalty(critic, images)}
        output, features = student(images)
        terms, distance = self._reconstruction_terms(output, images)
        consistency = scale_consistency_loss(features, teacher_features(self.teacher, images))
        terms["consistency"] = recipe.consistency_weight * consistency
        if "discriminator" in self.players:
            adversarial = hinge_generator_loss(self.players["discriminator"](output))
            weight = adaptive_weight(distance, adversarial, student.last_layer, compat="sc_vae")
            terms["adversarial"] = recipe.adversarial_weight * weight * adversarial
        self._output = output.detach()
        return terms

    def before_step(self, step: int) -> None:
        if step % 2 == 0:
            self._output = None

    def state_dict(self) -> dict[str, Any]:
        return {"output": self._output}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        others = is_parallel() and torch.distributed.get_rank() > 0  # their outputs were others
        self._output = None if others else state["output"]


def symmetric(batch: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to float in [-1, 1]."""
    return batch.float().div_(127.5).sub_(1)
