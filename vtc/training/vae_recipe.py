"""Hyper-parameters of autoencoders' training; the flags of `scripts/train_vae.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vtc.errors import ConfigError
from vtc.training.recipe import Recipe, flag


@dataclass
class VAERecipe(Recipe):
    """What both kinds of training take."""

    resolution: int = flag(256, "side of the square crops")
    min_scale: float = flag(0.6, "photographs are shrunk by a factor from this to 1 before they are cut")
    pixel: str = flag("l1", "error of the pixels", ("l1", "l2"))
    pixel_weight: float = flag(1.0, "of the pixels' error, images in [-1, 1]")
    perceptual_weight: float = flag(1.0, "of LPIPS; 0: no LPIPS")
    perceptual_backbone: str = flag("vgg", "network of that LPIPS", ("squeeze", "vgg", "alex"))
    adversarial_weight: float = flag(0.5, "of the adversarial term, after it was balanced; 0: no discriminator")
    discriminator_channels: int = flag(64, "of its first layer (KL) or its last ones (scale-consistent)")
    discriminator_layers: int = flag(3, "of stride 2")
    validation_limit: int = flag(0, "pictures to validate on; 0: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (field.name for field in fields(self) if field.name.endswith("_weight")):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name} is not below 0, which {getattr(self, name)} is.")
        if min(self.discriminator_channels, self.discriminator_layers, self.resolution) < 1:
            raise ConfigError("A discriminator has at least one channel and one layer, and a crop at least one pixel.")
        if not 0 < self.min_scale <= 1:
            raise ConfigError(f"--min_scale is above 0 and at most 1, not {self.min_scale}.")


@dataclass
class KLRecipe(VAERecipe):
    """The defaults are those of the autoencoder kl-f8 of latent diffusion, but for its batch and rate."""

    kl_weight: float = flag(1e-6, "of the divergence from N(0, 1), in nats a colour value")
    discriminator_start: int = flag(50_001, "step from which on it takes part")
    discriminator_norm: str = flag("batch", "norm of PatchGAN; with none or group a batch may be spread over processes",
                                   ("batch", "group", "none"))
    eq_prior: float = flag(1.0, "share of steps on images as they are; 0.5 is EQ-VAE, 1 a plain KL-VAE")
    eq_downscale: float = flag(0.25, "share of those steps on images that were made smaller, where eq_prior is below 1")
    quantization_step: float = flag(1.0, "width of PatchVAE's posterior")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eq_prior", "eq_downscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is a share, from 0 to 1, not {getattr(self, name)}.")


@dataclass
class ScaleConsistentRecipe(VAERecipe):
    """The defaults are those of SC-VAE's published script."""

    resolution: int = flag(512, "side of the square crops")
    pixel: str = flag("l2", "error of the pixels", ("l1", "l2"))
    perceptual_weight: float = flag(0.1, "of LPIPS; 0: no LPIPS")
    adversarial_weight: float = flag(0.05, "of the adversarial term, after it was balanced; 0: no discriminator")
    consistency_weight: float = flag(1.0, "of the squared distance from the teacher's features")
    penalty_weight: float = flag(10.0, "of the discriminator's gradient penalty")
    discriminator_channels: int = flag(512, "of its last layers")
    discriminator_layers: int = flag(6, "of stride 2")
    alternate: bool = flag(True, "decoder and discriminator take turns, step by step; else both learn in every step")
