"""Losses that tokenizers train with, each a function of tensors; what remembers something between steps is a module.

Adversarial losses take logits of any shape. A step of the generator and a step of the discriminator of the published
recipes are at the end: `generator_loss` and `discriminator_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.ranks import mean_over_ranks


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (mean relu(1 - real) + mean relu(1 + fake)); Lim and Ye, 1705.02894."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (mean softplus(-real) + mean softplus(fake)): binary cross-entropy of both kinds."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean fake."""
    return -fake.mean()


def non_saturating_generator_loss(fake: Tensor, spatial_mean_first: bool = False) -> Tensor:
    """mean softplus(-fake): the cross-entropy of taking the fake for real.

    spatial_mean_first: the mean logit of each image is judged and not each patch, as in WeTok and Open-MAGVIT2.
    """
    if spatial_mean_first:
        fake = fake.flatten(1).mean(1)
    return F.softplus(-fake).mean()


class LeCAM(nn.Module):
    """Keeps the discriminator's answers near the moving average of its answers to the other kind.

    Tseng et al., 2104.03310, equation 4: mean relu(real - ema_fake)^2 + mean relu(ema_real - fake)^2. The averages
    start at zero and take in the present batch, that of all processes, before they are used.
    """

    ema_real: Tensor
    ema_fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        with torch.no_grad():
            self.ema_real.lerp_(mean_over_ranks(real.mean().float()), 1 - self.decay)
            self.ema_fake.lerp_(mean_over_ranks(fake.mean().float()), 1 - self.decay)
        return F.relu(real - self.ema_fake).square().mean() + F.relu(self.ema_real - fake).square().mean()


def adaptive_weight(reference: Tensor, adversarial: Tensor, last_layer: Tensor, maximum: float = 1e4,
                    compat: Literal["taming", "sc_vae"] = "taming") -> Tensor:
    """|d reference / d W| / |d adversarial / d W|, W the decoder's last weight: a detached scalar, at most `maximum`.

    Multiplied with it, the adversarial loss pulls as hard on the last layer as the reference does (VQGAN, equation 7).
    compat: how a vanishing denominator is held off: "taming" adds 1e-4, "sc_vae" takes 1e-8 at least.
    """
    (towards,) = torch.autograd.grad(reference, last_layer, retain_graph=True)
    (against,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    # several processes have one batch between them
    towards, against = (mean_over_ranks(gradient.float().contiguous()) for gradient in (towards, against))
    norm = against.norm()
    if compat not in ("taming", "sc_vae"):
        raise ConfigError(f"compat is 'taming' or 'sc_vae', not {compat!r}.")
    below = norm + 1e-4 if compat == "taming" else norm.clamp(min=1e-8)
    return (towards.norm() / below).clamp(max=maximum).detach()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """mean (|d D(x) / d x| - 1)^2 over real images x, the norm over an image's pixels; differentiable."""
    images = real.detach().requires_grad_(True)
    (grads,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return (grads.flatten(1).norm(dim=1) - 1).square().mean()


def scale_consistency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (teacher - doubled student)^2: SC-VAE's features before the last convolution, F16 against F8.

    student: (B, C, h, w); teacher: (B, C, 2 h, 2 w), taken as constant. The doubled map is not made.
    """
    batch, channels, height, width = student.shape
    if teacher.shape != (batch, channels, 2 * height, 2 * width):
        raise ConfigError(f"The teacher's features are twice the student's, not {tuple(teacher.shape)} "
                          f"against {tuple(student.shape)}.")
    squares = teacher.detach().reshape(batch, channels, height, 2, width, 2)
    return (squares - student[:, :, :, None, :, None]).square().mean()


def patch_mse(output: Tensor, target: Tensor, size: int = 32, stride: int = 16) -> Tensor:
    """Mean squared error over all windows of `size`, `stride` apart: pixels in several windows count several times."""
    error = (output - target).square().mean(1, keepdim=True)
    return F.avg_pool2d(error, size, stride).mean()


def warm_up(step: int, start: int) -> float:
    """1 from step `start` on, 0 before: when the adversarial terms join in."""
    return 1.0 if step >= start else 0.0


def generator_loss(output: Tensor, images: Tensor, fake: Tensor | None = None, quantizer_loss: Tensor | None = None,
                   perceptual: Callable[[Tensor, Tensor], Tensor] | None = None, pixel: Literal["l1", "l2"] = "l1",
                   pixel_weight: float = 1.0, perceptual_weight: float = 1.0, adversarial_weight: float = 0.1,
                   adversarial: Literal["non_saturating", "hinge"] = "non_saturating") -> dict[str, Tensor]:
    """The terms of a tokenizer's step, and their weighted sum under "loss".

    output, images: (B, 3, H, W), in the same range; the published weights are for [-1, 1], where L1 is twice as large
        as in [0, 1]. fake: the discriminator's logits of `output`.
    quantizer_loss: of `Quantized`, weighted already. perceptual: two images to (B,), as `LPIPS`, which takes [0, 1]:
        `lambda a, b: lpips(a * 0.5 + 0.5, b * 0.5 + 0.5)` where the images are in [-1, 1].
    adversarial: "non_saturating" on the mean logit of each image (WeTok), or "hinge" (VQGAN).
    Terms that are not given are left out. WeTok's two stages: with and without `quantizer_loss`.
    """
    pixels = F.l1_loss(output, images) if pixel == "l1" else F.mse_loss(output, images)
    terms = {"pixel": pixels}
    loss = pixel_weight * pixels
    if perceptual is not None:
        terms["perceptual"] = perceptual(output, images).mean()
        loss = loss + perceptual_weight * terms["perceptual"]
    if fake is not None:
        terms["adversarial"] = (hinge_generator_loss(fake) if adversarial == "hinge"
                                else non_saturating_generator_loss(fake, spatial_mean_first=True))
        loss = loss + adversarial_weight * terms["adversarial"]
    if quantizer_loss is not None:
        terms["quantizer"] = quantizer_loss
        loss = loss + quantizer_loss
    return {"loss": loss, **terms}


def discriminator_loss(real: Tensor, fake: Tensor, lecam: LeCAM | None = None, lecam_weight: float = 0.05,
                       kind: Literal["hinge", "vanilla"] = "hinge") -> dict[str, Tensor]:
    """The terms of a discriminator's step from its logits, and their weighted sum under "loss"."""
    loss = hinge_discriminator_loss(real, fake) if kind == "hinge" else vanilla_discriminator_loss(real, fake)
    terms = {"adversarial": loss}
    if lecam is not None:
        terms["lecam"] = lecam(real, fake)
        loss = loss + lecam_weight * terms["lecam"]
    return {"loss": loss, **terms}
