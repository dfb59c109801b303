"""Training a `LatentCodec`: rate and distortion of several qualities at once, h_s rounded as its whole numbers are.

Each picture of a batch draws a quality q of its own and the loss is lambda_q 255^2 MSE + bits per pixel, CompressAI's
scale. With `PatchVAE` all parts learn together: then the rate is the KL divergence of a VAE whose posterior is uniform,
one quantization step wide, from the hyperprior. A given autoencoder stays as it is: then only hyperprior and gains
learn, and the distortion is that of the latents, which have about unit variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.codecs.hyperprior import (
    ACTIVATION,
    ACTIVATION_BITS,
    HYPER_STRIDE,
    LARGEST_SCALE,
    MIDDLE_SCALE,
    OUTPUT_BITS,
    SCALE_BITS,
    SCALES,
    SMALLEST_SCALE,
    SYMBOL_BITS,
    Hyperprior,
    WholeSynthesis,
)
from vtc.codecs.latent_codec import LatentCodec
from vtc.codecs.prior import BYTE, TOTAL
from vtc.errors import ConfigError
from vtc.training.data import RandomCrops
from vtc.training.prior import RoundedConv, to_grid
from vtc.training.recipe import Recipe, flag
from vtc.training.task import Task


class RoundedSynthesis(nn.Module):
    """The trainable form of `WholeSynthesis`: rounds forward as that does, and gradients pass straight through."""

    def __init__(self, channels: int, hyper_channels: int, width: int, qualities: int) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.ModuleList((
            RoundedConv(hyper_channels, 4 * width, 3, SYMBOL_BITS, ACTIVATION_BITS, qualities, 1),
            RoundedConv(width, 4 * width, 3, ACTIVATION_BITS, ACTIVATION_BITS, qualities, 1),
            RoundedConv(width, 2 * channels, 3, ACTIVATION_BITS, OUTPUT_BITS, qualities, 1)))
        with torch.no_grad():  # it starts near mean 0 and the middle scale
            cast(RoundedConv, self.layers[-1]).weight.mul_(0.1)

    def forward(self, symbols: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """See `vtc.codecs.hyperprior.Synthesis`."""
        x = symbols.clamp(-BYTE, BYTE) / 2**SYMBOL_BITS
        for layer in self.layers[:-1]:
            x = F.pixel_shuffle(layer(x, quality, 0, 0, ACTIVATION), 2)
        means, scales = self.layers[-1](x, quality, 0, -TOTAL, TOTAL).split(self.channels, 1)
        exact = to_grid(scales, SCALE_BITS, -TOTAL, TOTAL) * 2**SCALE_BITS + MIDDLE_SCALE
        # Gradients also pass where a number is cut off, or it could never come back.
        return means, exact + (exact.clamp(0, SCALES - 1) - exact).detach()

    def whole(self) -> dict[str, Tensor]:
        """The state dict of the `WholeSynthesis` that does the same."""
        tensors: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            whole = cast(RoundedConv, layer).whole()
            tensors |= {f"weight_{number}": whole["weight"], f"shift_{number}": whole["shift"],
                        f"bias_{number}": whole["steps"] + whole["sizes"]}
        return tensors


def make_trainable(hyperprior: Hyperprior) -> None:
    """Replace h_s by its trainable form, newly initialised."""
    hyperprior.h_s = RoundedSynthesis(**hyperprior.settings).to(hyperprior.log_gain.device)


@torch.no_grad()
def start_from(hyperprior: Hyperprior, latents: Tensor, groups: int = 8, loudness: float = 8.0) -> None:
    """Let the trainable hyperprior begin as a plain one that works, for latents (B, C, h, w) like these.

    The channels are ranked by their deviation and cut into groups; one channel of z carries the mean amplitude of a
    group over 4x4 positions, `loudness` times log(1 + |y|), and h_s hands it to the group's scales. Everything else
    starts small. From random weights, z drowns in quantization noise and is given up before anything can read it.
    """
    trained, gains = cast(RoundedSynthesis, hyperprior.h_s), hyperprior.log_gain.exp2()
    deviations = latents.std((0, 2, 3))
    groups = min(groups, hyperprior.settings["width"], hyperprior.settings["hyper_channels"], len(deviations))
    members = deviations.argsort(descending=True).tensor_split(groups)
    entry, middle, exit_ = (cast(nn.Conv2d, hyperprior.h_a[n]) for n in (0, 2, 4))
    first, second, last = (cast(RoundedConv, layer) for layer in trained.layers)
    for conv in (entry, middle, exit_):
        conv.weight.mul_(0.3)
        cast(Tensor, conv.bias)[:groups] = 0
    for layer in (first, second):
        layer.weight.mul_(0.3)
    for n, member in enumerate(members):
        for conv in (entry, middle, exit_):
            conv.weight[n] = 0
        entry.weight[n, member, 1, 1] = 1 / len(member)
        middle.weight[n, n, 2:4, 2:4] = 1 / 4  # positions 2 i and 2 i + 1 along each axis
        exit_.weight[n, n, 2:4, 2:4] = loudness / 4
        for layer in (first, second):
            layer.weight[4 * n : 4 * n + 4] = 0
            layer.weight[4 * n : 4 * n + 4, n, 1, 1] = 1
    # log-scale by least squares on the amplitude of the group, which says more or less of each channel
    step = math.log(LARGEST_SCALE / SMALLEST_SCALE) / (SCALES - 1)
    unit = 2**SYMBOL_BITS / loudness  # amplitude of an activation of 1
    for quality, gain in enumerate(gains):
        y = latents * gain[:, None, None]
        last.steps[quality, : len(gain)] = y.mean((0, 2, 3))
    y = torch.cat([latents * gain[:, None, None] for gain in gains])
    last.weight.zero_()
    for n, member in enumerate(members):
        amplitude = F.avg_pool2d(y[:, member].abs().log1p().mean(1, keepdim=True), HYPER_STRIDE)
        squares = F.avg_pool2d(y[:, member].square(), HYPER_STRIDE)
        edges = torch.quantile(amplitude.flatten()[:100000], torch.linspace(0.02, 0.98, 17, device=y.device))
        cells = torch.bucketize(amplitude[:, 0], edges)
        x = torch.stack([amplitude[:, 0][cells == k].mean() for k in range(18) if (cells == k).any()])
        level = torch.stack([squares.movedim(1, -1)[cells == k].mean(0) for k in range(18) if (cells == k).any()])
        numbers = torch.log((level.sqrt() / SMALLEST_SCALE).clamp(min=1)) / step  # bins, channels of the group
        v = (numbers - MIDDLE_SCALE) / 2**SCALE_BITS
        slope = ((x - x.mean())[:, None] * (v - v.mean(0))).sum(0) / (x - x.mean()).square().sum().clamp(min=1e-6)
        last.weight[len(gain) + member, n, 1, 1] = slope * unit
        last.steps[:, len(gain) + member] = v.mean(0) - slope * x.mean()


@torch.no_grad()
def place_quantiles(hyperprior: Hyperprior) -> None:
    """Make the tables of z anew, out to where its distribution ends, with 0 as the median that z is rounded around.

    A median that follows the distribution would shift the symbols that h_s has learned to read.
    """
    bottleneck = hyperprior.entropy_bottleneck
    bottleneck.update(force=True, update_quantiles=True)
    bottleneck.quantiles[:, :, 1] = 0
    bottleneck.update(force=True)


def make_whole(hyperprior: Hyperprior) -> None:
    """The inverse, keeping what was learned; then the tables, with the quantiles where the distribution has them."""
    if isinstance(hyperprior.h_s, RoundedSynthesis):
        whole = WholeSynthesis(**hyperprior.settings)
        whole.load_state_dict(hyperprior.h_s.whole())
        hyperprior.h_s = whole.to(hyperprior.log_gain.device)
    place_quantiles(hyperprior)
    hyperprior.update(force=True)
    cast(WholeSynthesis, hyperprior.h_s).layers()  # raises where a sum is not proved to be exact


@dataclass
class HyperpriorRecipe(Recipe):
    """Hyper-parameters of one run; each is a flag of `scripts/train_hyperprior.py`."""

    lambdas: str = flag("0.0005,0.0012,0.003,0.0075", "one for each quality, with commas, coarse to fine")
    hyper_channels: int = flag(32, "of z")
    hyper_width: int = flag(48, "of h_a and h_s")
    resolution: int = flag(160, "side of the crops")
    train_batch_size: int = flag(6, "crops of one process at a time")
    max_train_steps: int = flag(1700, "steps of the whole run; the schedule ends there")
    learning_rate: float = flag(4e-4, "of the autoencoder, after the warm-up")
    final_learning_rate: float = flag(1e-5, "at the end of the schedule")
    hyper_factor: float = flag(0.5, "how much faster than the autoencoder h_a, h_s and gains learn")
    bottleneck_factor: float = flag(8.0, "and the distributions of z")
    lr_warmup_steps: int = flag(50, "steps of linear warm-up")
    adam_beta2: float = flag(0.999, "decay of Adam's second moments")
    quantile_steps: int = flag(50, "steps after which the tables of z are made anew")
    ema_decay: float = flag(0.0, "of an average of the weights; 0: none, the last weights count")
    checkpointing_steps: int = flag(250, "steps between checkpoints")
    validation_steps: int = flag(500, "steps between validations; 0: only at the end")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            weights = self.weights
        except ValueError as error:
            raise ConfigError(f"The lambdas are numbers with commas between them, not {self.lambdas!r}.") from error
        if min(weights) <= 0 or self.quantile_steps < 1:
            raise ConfigError("A hyperprior's recipe has lambdas above 0 and at least one of --quantile_steps.")
        if self.ema_decay:
            raise ConfigError("The tables of z belong to the last weights: a hyperprior is trained with --ema_decay 0.")

    @property
    def weights(self) -> list[float]:
        """The lambdas as numbers."""
        return [float(text) for text in self.lambdas.split(",")]


def first_gains(recipe: HyperpriorRecipe, channels: int, downsample: int, frozen: bool) -> Tensor:
    """(Q, C) log2 gains to start from: where, at a high rate, a finer step would cost what it gains.

    A step s gives the error s^2/12 in a number, and costs -log2 s bits in H W pixels. PatchVAE starts orthonormal, so
    the error is one of 3 H W numbers of the image; of given latents it is one of C H W / downsample^2.
    """
    numbers = channels / downsample**2 if frozen else 3.0
    return torch.tensor([[0.5 * math.log2(math.log(2) * weight * 255**2 / (6 * numbers))] * channels
                         for weight in recipe.weights])


class HyperpriorTask(Task):
    """A codec, whose h_s is made trainable here; `whole` gives it back in whole numbers.

    crops: of photographs, as the loop reads them; the first ones tell where h_s starts.
    validation: images (3, H, W) in [0, 1] to measure on, or none.
    freeze_autoencoder: it stays as it is, and the distortion is that of the latents.
    """

    def __init__(self, codec: LatentCodec, recipe: HyperpriorRecipe, crops: RandomCrops, validation: list[Tensor],
                 freeze_autoencoder: bool) -> None:
        self.recipe, self.crops, self.validation = recipe, crops, validation
        self.frozen_autoencoder = freeze_autoencoder
        make_trainable(codec.hyperprior)
        codec.requires_grad_(True)
        codec.autoencoder.requires_grad_(not freeze_autoencoder)
        codec.hyperprior.entropy_bottleneck.quantiles.requires_grad_(False)  # found by bisection instead
        codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        super().__init__({"model": codec})
        self.codec = codec

    @property
    def device(self) -> torch.device:
        """Where the codec is."""
        return self.codec.hyperprior.log_gain.device

    def parameter_groups(self, player: str, recipe: Recipe) -> list[dict[str, Any]]:
        groups: list[list[nn.Parameter]] = [[], [], []]
        for name, parameter in self.codec.named_parameters():
            if parameter.requires_grad:
                groups[0 if name.startswith("autoencoder") else 2 if "bottleneck" in name else 1].append(parameter)
        shares = (1.0, self.recipe.hyper_factor, self.recipe.bottleneck_factor)
        return [{"params": group, "share": share} for group, share in zip(groups, shares, strict=True) if group]

    def before_step(self, step: int) -> None:
        if step == 0:
            start_from(self.codec.hyperprior, self._first_latents())
        if step % self.recipe.quantile_steps == 0:
            place_quantiles(self.codec.hyperprior)

    @torch.no_grad()
    def _first_latents(self) -> Tensor:
        """(64, C, h, w) of as many crops."""
        return torch.cat([self.codec.latents(self.crops[n][None].to(self.device).float() / 255) for n in range(64)])

    def losses(self, player: str, batch: Tensor, step: int) -> dict[str, Tensor]:
        """Of a (B, 3, S, S) uint8 batch, each picture with a quality of its own: bits per pixel."""
        images = batch.float() / 255
        lambdas = torch.tensor(self.recipe.weights, device=images.device)
        quality = torch.randint(len(lambdas), (len(images),), device="cpu").to(images.device)
        x = images.contiguous(memory_format=torch.channels_last)
        if self.frozen_autoencoder:
            with torch.no_grad():
                target = self.codec.latents(x)
            output = self.codec.hyperprior(target, quality)
            error = (output["y_hat"] - target).square().flatten(1).mean(1)
        else:
            output = self.codec(x, quality)
            error = (output["x_hat"] - images).square().flatten(1).mean(1)
        y, z = (-torch.log2(output["likelihoods"][name]).flatten(1).sum(1) / images[0, 0].numel() for name in "yz")
        return {"distortion": (lambdas[quality] * 255**2 * error).mean(), "y_bpp": y.mean(), "z_bpp": z.mean()}

    def validate(self, average: nn.Module, step: int) -> dict[str, Any]:
        """Mean estimated bits per pixel and PSNR of each quality."""
        if not self.validation:
            return {}
        points = []
        for quality in range(len(self.recipe.weights)):
            bpp, psnr = 0.0, 0.0
            for image in self.validation:
                output = self.codec(image[None].to(self.device), quality)
                bits = sum(-torch.log2(likelihood).sum() for likelihood in output["likelihoods"].values())
                bpp += float(bits) / image[0].numel() / len(self.validation)
                error = (output["x_hat"].cpu() - image).square().mean().item()
                psnr += -10 * math.log10(error) / len(self.validation)
            points.append([round(bpp, 4), round(psnr, 3)])
        return {"validation_bpp_psnr": points}

    def whole(self) -> LatentCodec:
        """The codec, in eval mode and whole numbers, on the CPU: training is over."""
        codec = self.codec.cpu().eval()
        make_whole(codec.hyperprior)
        return codec
