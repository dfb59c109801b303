"""Training a `LatentCodec`: rate and distortion of several qualities at once, h_s rounded as its whole numbers are.

Each picture of a batch draws a quality q of its own and the loss is lambda_q 255^2 MSE + bits per pixel, CompressAI's
scale. With `PatchVAE` all parts learn together: then the rate is the KL divergence of a VAE whose posterior is uniform,
one quantization step wide, from the hyperprior. A given autoencoder stays as it is: then only hyperprior and gains
learn, and the distortion is that of the latents, which have about unit variance.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

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
from vtc.errors import ConfigError, TrainingError
from vtc.training.data import RandomCrops
from vtc.training.prior import RoundedConv, to_grid


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
class HyperpriorRecipe:
    """Hyper-parameters of one run; each is a flag of `scripts/train_hyperprior.py`.

    lambdas: one for each quality, with commas, coarse to fine.
    hyper_factor, bottleneck_factor: how much faster than the autoencoder h_a, h_s and gains learn, and the
        distributions of z.
    """

    lambdas: str = "0.0005,0.0012,0.003,0.0075"
    hyper_channels: int = 32
    hyper_width: int = 48
    resolution: int = 160
    train_batch_size: int = 6
    max_train_steps: int = 1700
    learning_rate: float = 4e-4
    final_learning_rate: float = 1e-5
    hyper_factor: float = 0.5
    bottleneck_factor: float = 8.0
    lr_warmup_steps: int = 50
    max_grad_norm: float = 1.0
    quantile_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            weights = self.weights
        except ValueError as error:
            raise ConfigError(f"The lambdas are numbers with commas between them, not {self.lambdas!r}.") from error
        if min(weights) <= 0 or self.max_train_steps < 1 or self.train_batch_size < 1:
            raise ConfigError("A recipe has at least one step of one picture, and lambdas above 0.")

    @property
    def weights(self) -> list[float]:
        """The lambdas as numbers."""
        return [float(text) for text in self.lambdas.split(",")]

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to the final rate."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def first_gains(recipe: HyperpriorRecipe, channels: int, downsample: int, frozen: bool) -> Tensor:
    """(Q, C) log2 gains to start from: where, at a high rate, a finer step would cost what it gains.

    A step s gives the error s^2/12 in a number, and costs -log2 s bits in H W pixels. PatchVAE starts orthonormal, so
    the error is one of 3 H W numbers of the image; of given latents it is one of C H W / downsample^2.
    """
    numbers = channels / downsample**2 if frozen else 3.0
    return torch.tensor([[0.5 * math.log2(math.log(2) * weight * 255**2 / (6 * numbers))] * channels
                         for weight in recipe.weights])


class HyperpriorTrainer:
    """One training run of a codec, whose h_s is made trainable here; `train` returns it in whole numbers.

    files: photographs. validation: images (3, H, W) in [0, 1] to measure on, or none.
    freeze_autoencoder: it stays as it is, and the distortion is that of the latents.
    folder: takes `log.jsonl` and `checkpoint.pt`, from which `resume` goes on.
    """

    def __init__(self, codec: LatentCodec, recipe: HyperpriorRecipe, accelerator: Accelerator, files: list[Path],
                 validation: list[Tensor], folder: Path, freeze_autoencoder: bool) -> None:
        self.recipe, self.accelerator, self.files, self.folder = recipe, accelerator, files, folder
        self.validation, self.frozen, self.step = validation, freeze_autoencoder, 0
        make_trainable(codec.hyperprior)
        codec.requires_grad_(True)
        codec.autoencoder.requires_grad_(not freeze_autoencoder)
        codec.hyperprior.entropy_bottleneck.quantiles.requires_grad_(False)  # found by bisection instead
        codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        self.codec = codec.to(accelerator.device)
        self.factors = (1.0, recipe.hyper_factor, recipe.bottleneck_factor)
        groups: list[list[nn.Parameter]] = [[], [], []]
        for name, parameter in codec.named_parameters():
            if parameter.requires_grad:
                groups[0 if name.startswith("autoencoder") else 2 if "bottleneck" in name else 1].append(parameter)
        optimizer = torch.optim.Adam([{"params": group} for group in groups], lr=1.0)
        # What is wrapped where there are several processes is what is called, and all of that must learn.
        self.model, self.optimizer = accelerator.prepare(codec.hyperprior if self.frozen else codec, optimizer)
        self.lambdas = torch.tensor(recipe.weights, device=accelerator.device)

    def resume(self) -> None:
        """Go on from the folder's checkpoint, where there is one."""
        path = self.folder / "checkpoint.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            self.codec.load_state_dict(state["codec"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def train(self, checkpointing_steps: int, validation_steps: int) -> LatentCodec:
        """The codec after the last step, in eval mode and whole numbers. TrainingError where the loss is no number."""
        recipe, started, running = self.recipe, time.process_time(), dict[str, float]()
        self.model.train()
        batches = iter(self._loader())
        for step in tqdm(range(self.step + 1, recipe.max_train_steps + 1), initial=self.step, mininterval=10,
                         total=recipe.max_train_steps, disable=not self.accelerator.is_main_process):
            self.step, batch = step, next(batches)
            torch.manual_seed(hash((recipe.seed, self.step, self.accelerator.process_index)))
            if self.step == 1:
                start_from(self.codec.hyperprior, self._first_latents())
            for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
                group["lr"] = factor * recipe.learning_rate_at(self.step - 1)
            if self.step % recipe.quantile_steps == 1:
                place_quantiles(self.codec.hyperprior)
            loss, facts = self._loss(batch.float() / 255)
            if not math.isfinite(loss.item()):
                raise TrainingError(f"The loss is {loss.item()} at step {self.step}; lower the learning rate.")
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, value in facts.items():
                running[name] = 0.98 * running.get(name, value) + 0.02 * value
            last = self.step == recipe.max_train_steps
            if self.accelerator.is_main_process and (self.step % checkpointing_steps == 0 or last):
                self._checkpoint()
            if self.accelerator.is_main_process and (self.step % validation_steps == 0 or last):
                self._log({"step": self.step, "cpu_seconds": round(time.process_time() - started, 1), **running,
                           **self._validate()})
        codec = self.codec.eval()
        make_whole(codec.hyperprior)
        return codec

    def _loader(self) -> DataLoader[Tensor]:
        recipe = self.recipe
        per_step = recipe.train_batch_size * self.accelerator.num_processes
        crops = RandomCrops(self.files, recipe.resolution, recipe.seed)
        numbers = range(self.step * per_step, recipe.max_train_steps * per_step)
        return self.accelerator.prepare(DataLoader(crops, recipe.train_batch_size, sampler=numbers))

    @torch.no_grad()
    def _first_latents(self) -> Tensor:
        """(64, C, h, w) of as many crops."""
        crops = RandomCrops(self.files, self.recipe.resolution, self.recipe.seed)
        return torch.cat([self.codec.latents(crops[n][None].to(self.accelerator.device).float() / 255)
                          for n in range(64)])

    def _loss(self, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Of a (B, 3, S, S) batch, each picture with a quality of its own; also mean bits per pixel and MSE."""
        quality = torch.randint(len(self.lambdas), (len(images),), device="cpu").to(images.device)
        with self.accelerator.autocast():
            x = images.contiguous(memory_format=torch.channels_last)
            if self.frozen:
                with torch.no_grad():
                    target = self.codec.latents(x)
                output = self.model(target, quality)
                error = (output["y_hat"] - target).square().flatten(1).mean(1)
            else:
                output = self.model(x, quality)
                error = (output["x_hat"] - images).square().flatten(1).mean(1)
        y, z = (-torch.log2(output["likelihoods"][name]).flatten(1).sum(1) / images[0, 0].numel() for name in "yz")
        loss = (self.lambdas[quality] * 255**2 * error + y + z).mean()
        return loss, {"loss": loss.item(), "y_bpp": y.mean().item(), "z_bpp": z.mean().item(),
                      "train_mse": error.mean().item()}

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Mean estimated bits per pixel and PSNR of each quality."""
        if not self.validation:
            return {}
        codec, points = self.codec.eval(), []
        for quality in range(len(self.lambdas)):
            bpp, psnr = 0.0, 0.0
            for image in self.validation:
                output = codec(image[None].to(self.accelerator.device), quality)
                bits = sum(-torch.log2(likelihood).sum() for likelihood in output["likelihoods"].values())
                bpp += float(bits) / image[0].numel() / len(self.validation)
                error = (output["x_hat"].cpu() - image).square().mean().item()
                psnr += -10 * math.log10(error) / len(self.validation)
            points.append([round(bpp, 4), round(psnr, 3)])
        codec.train()
        return {"validation_bpp_psnr": points}

    def _log(self, facts: dict[str, Any]) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in facts.items()})
        tqdm.write(line)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(line + "\n")

    def _checkpoint(self) -> None:
        temporary = self.folder / "checkpoint.tmp"
        torch.save({"codec": self.codec.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step},
                   temporary)
        temporary.replace(self.folder / "checkpoint.pt")
