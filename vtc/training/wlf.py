"""WLF: fine-tuning a flow-matching transformer of diffusers with the wavelet-based loss on latents.

Zhang et al., "Diffusion-4K" (2503.18352). A picture becomes latents of a frozen autoencoder, SC-VAE or any other that
`DiffusersAutoencoder` reads; the transformer says the velocity from them to noise at a random time; the loss is that of
`vtc.tokenizers.wavelet_loss`, which says what it is with equal band weights: the plain squared error times s^2.

Prompts are embedded before training, by whatever text encoders the transformer wants, into one file:

    save_prompt_embeddings("prompts.safetensors", ["cats/1", ...], prompt_embeds, pooled_prompt_embeds)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtc.errors import ConfigError, ModelError
from vtc.files import write_file
from vtc.tokenizers.base import Latents
from vtc.tokenizers.diffusers_adapters import DiffusersAutoencoder
from vtc.tokenizers.wavelet_loss import WaveletLoss, estimate_clean
from vtc.torchvision_guard import ensure_torchvision_imports
from vtc.training.data import RandomCrops
from vtc.training.sources import Pictures
from vtc.training.task import Task
from vtc.training.wlf_recipe import WLFRecipe

ensure_torchvision_imports()  # diffusers imports torchvision where it is installed

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel  # noqa: E402
from diffusers.models.attention import JointTransformerBlock  # noqa: E402
from diffusers.models.transformers.transformer_flux import (  # noqa: E402
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3  # noqa: E402

#: the transformers that are known, by the name in their config.json
TRANSFORMERS: dict[str, Any] = {"SD3Transformer2DModel": SD3Transformer2DModel,
                                "FluxTransformer2DModel": FluxTransformer2DModel}


class FlowTransformer(nn.Module):
    """A transformer of diffusers as one function: velocity(latents, sigma, prompts).

    SD3 takes latents as they are and times up to 1000; Flux takes 2x2 latents as one position, their places, and times
    up to 1. guidance: what a distilled Flux is told; others ignore it.
    """

    def __init__(self, model: nn.Module, guidance: float = 3.5) -> None:
        super().__init__()
        if not isinstance(model, tuple(TRANSFORMERS.values())):
            raise ConfigError(f"FlowTransformer takes {', '.join(TRANSFORMERS)}, not {type(model).__name__}.")
        self.model: Any = model
        self.guidance = guidance
        self.is_flux = isinstance(model, FluxTransformer2DModel)

    @property
    def latent_channels(self) -> int:
        """C of the latents that it takes."""
        return self.model.config.in_channels // (4 if self.is_flux else 1)

    def forward(self, noisy: Tensor, sigma: Tensor, prompts: Tensor, pooled: Tensor) -> Tensor:
        """(B, C, h, w), sides even; sigma (B,) in [0, 1]; prompts (B, T, D); pooled (B, P); to (B, C, h, w)."""
        if not self.is_flux:
            return self.model(noisy, encoder_hidden_states=prompts, pooled_projections=pooled, timestep=sigma * 1000,
                              return_dict=False)[0]
        rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        places = torch.zeros(rows, columns, 3, device=noisy.device)
        places[..., 1] = torch.arange(rows, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(columns, device=noisy.device)
        guidance = (noisy.new_full((len(noisy),), self.guidance) if self.model.config.guidance_embeds else None)
        velocity = self.model(
            pack(noisy), encoder_hidden_states=prompts, pooled_projections=pooled, timestep=sigma,
            img_ids=places.flatten(0, 1), txt_ids=places.new_zeros(prompts.shape[1], 3), guidance=guidance,
            return_dict=False)[0]
        return unpack(velocity, rows, columns)

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None, guidance: float = 3.5,
                        ) -> FlowTransformer:
        """From a folder or a repository on the Hub whose config.json names one of TRANSFORMERS; safetensors only."""
        try:
            config: Any = SD3Transformer2DModel.load_config(str(folder), subfolder=subfolder)
            name = config.get("_class_name")
            if name not in TRANSFORMERS:
                raise ModelError(f"{str(folder)!r} holds a {name}; supported are {', '.join(TRANSFORMERS)}.")
            model = TRANSFORMERS[name].from_pretrained(folder, subfolder=subfolder, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"No transformer of diffusers at {str(folder)!r}: {reason}") from error
        return cls(model, guidance)

    @classmethod
    def from_config(cls, path: str | Path, guidance: float = 3.5) -> FlowTransformer:
        """With random weights, from a JSON file that names the class under `_class_name`."""
        try:
            config = json.loads(Path(path).read_text())
            name = config.pop("_class_name")
            return cls(TRANSFORMERS[name](**config), guidance)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is no configuration of {' or '.join(TRANSFORMERS)} ({error}).") from error

    def enable_gradient_checkpointing(self) -> None:
        """diffusers' own."""
        self.model.enable_gradient_checkpointing()

    def save(self, directory: Path) -> None:
        """A folder of diffusers."""
        self.model.save_pretrained(directory)


def pack(latents: Tensor) -> Tensor:
    """(B, C, 2 r, 2 c) to (B, r c, 4 C), a 2x2 square a position: channel, row, column of the square."""
    squares = latents.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))  # B, C, r, 2, c, 2
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(positions: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`."""
    squares = positions.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))  # B, r, c, C, 2, 2
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# ---- prompts --------------------------------------------------------------------------------------------------------

def save_prompt_embeddings(path: str | Path, names: Sequence[str], prompts: Tensor, pooled: Tensor) -> None:
    """The file that `PromptEmbeddings` reads.

    names: of the pictures, relative to their folder and without suffix; or one, "", whose prompt all pictures get.
    prompts: (N, T, D); pooled: (N, P), as a pipeline's `encode_prompt` gives them.
    """
    if not len(names) == len(prompts) == len(pooled) or len(set(names)) < len(names):
        raise ConfigError("Each name is there once, with one row of embeddings.")
    tensors = {"prompt_embeds": prompts.contiguous(), "pooled_prompt_embeds": pooled.contiguous()}
    write_file(path, save(tensors, {"names": json.dumps(list(names))}))


class PromptEmbeddings:
    """Embeddings of prompts in a file, one row a picture; a row is read when it is asked for.

    Raises ModelError where the file holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, "pt") as file:
                names = json.loads((file.metadata() or {})["names"])
                shapes = [tuple(file.get_slice(name).get_shape()) for name in ("prompt_embeds", "pooled_prompt_embeds")]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"{path} holds no prompt embeddings; save_prompt_embeddings of vtc.training.wlf writes "
                             f"them ({error}).") from error
        self.prompt_shape, self.pooled_shape = shapes[0][1:], shapes[1][1:]
        self.rows: dict[str, int] = {name: row for row, name in enumerate(names)}
        if len(shapes[0]) != 3 or len(shapes[1]) != 2 or not len(names) == shapes[0][0] == shapes[1][0]:
            raise ModelError(f"{path} holds {len(names)} names, prompts {shapes[0]} and pooled prompts {shapes[1]}, "
                             "which do not fit together.")

    def row(self, name: str) -> int:
        """Of a picture, by its path relative to its folder, with or without suffix. ConfigError where it has none."""
        if list(self.rows) == [""]:
            return 0
        for known in (name, str(Path(name).with_suffix(""))):
            if known in self.rows:
                return self.rows[known]
        raise ConfigError(f"{self.path} has no prompt for {name}.")

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """((T, D), (P,)), float32."""
        with safe_open(self.path, "pt") as file:
            return (file.get_slice("prompt_embeds")[row].float(),
                    file.get_slice("pooled_prompt_embeds")[row].float())


# ---- times ----------------------------------------------------------------------------------------------------------

#: how random times are spread over [0, 1]
Sampling = Literal["uniform", "logit_normal", "mode"]


def draw_sigmas(count: int, sampling: Sampling, shift: float = 1.0, mean: float = 0.0, deviation: float = 1.0,
                mode_scale: float = 1.29) -> Tensor:
    """(count,) times in [0.001, 1] from torch's random generator; Esser et al. (2403.03206), section 3.1.

    sampling: "uniform"; "logit_normal": the sigmoid of N(mean, deviation^2); "mode": more often in the middle.
    shift: s becomes shift s / (1 + (shift - 1) s), for large pictures; 3 for SD3, 1 for none.
    """
    if sampling == "logit_normal":
        s = torch.normal(mean, deviation, (count,)).sigmoid()
    else:
        s = torch.rand(count)
        if sampling == "mode":
            s = 1 - s - mode_scale * (torch.cos(torch.pi / 2 * s).square() - 1 + s)
    s = shift * s / (1 + (shift - 1) * s)
    return s.clamp(0.001, 1)  # the least time of a schedule of a thousand steps; at 0 there is nothing to learn


# ---- training -------------------------------------------------------------------------------------------------------

class PromptedPictures(Dataset[dict[str, Tensor]]):
    """Sample n of a run: a random crop, and the embeddings of the prompt of the picture that it was cut from.

    pictures: any source of `vtc.training.sources`; the other arguments but `prompts` are of `RandomCrops`.
    Item: pixels (3, S, S) uint8, prompt (T, D), pooled (P,).
    Raises ConfigError where a picture has no prompt; some are looked at in the beginning.
    """

    def __init__(self, pictures: Pictures, prompts: PromptEmbeddings, resolution: int, seed: int,
                 min_scale: float = 0.6) -> None:
        self.source, self.prompts = _Remembering(pictures), prompts
        self.crops = RandomCrops(self.source, resolution, seed, min_scale)
        for n in range(0, len(pictures), -(-len(pictures) // 100)):
            prompts.row(pictures.read(n)[0])

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        pixels = self.crops[n]
        prompt, pooled = self.prompts.read(self.prompts.row(self.source.last))
        return {"pixels": pixels, "prompt": prompt, "pooled": pooled}


class _Remembering:
    """A source that knows the key of the picture that it gave last: that of a crop, for a broken one is skipped."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures, self.classes, self.last = pictures, pictures.classes, ""

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, n: int) -> tuple[str, int, Path | bytes]:
        found = self.pictures.read(n)
        self.last = found[0]
        return found


class WLFTask(Task):
    """A transformer, trained on the latents of a frozen autoencoder.

    validation: a batch as the loader gives it; its error is measured at fixed times and noise, band by band.
    """

    blocks = (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)

    def __init__(self, transformer: FlowTransformer, autoencoder: DiffusersAutoencoder, recipe: WLFRecipe,
                 validation: dict[str, Tensor] | None = None) -> None:
        super().__init__({"transformer": transformer}, {"autoencoder": autoencoder})
        self.recipe, self.autoencoder, self.validation = recipe, autoencoder, validation
        self.loss = WaveletLoss(recipe.wavelet, recipe.wavelet_levels, band_weights=recipe.band_weights)
        self.frozen["loss"] = self.loss
        channels = autoencoder.model.config.latent_channels
        if channels != transformer.latent_channels:
            raise ConfigError(f"The autoencoder's latents have {channels} channels, and the transformer takes "
                              f"{transformer.latent_channels}; choose two that belong together.")

    def check(self, prompts: PromptEmbeddings) -> None:
        """Raises ConfigError where the prompts are not of the widths that the transformer takes."""
        config = cast(FlowTransformer, self.model).model.config
        widths = prompts.prompt_shape[-1], prompts.pooled_shape[-1]
        wanted = config.joint_attention_dim, config.pooled_projection_dim
        if widths != wanted:
            raise ConfigError(f"{prompts.path} holds prompts of the widths {widths} (each word, pooled), and the "
                              f"transformer takes {wanted}; embed them by the text encoders that belong to it.")

    def losses(self, player: str, batch: Any, step: int) -> dict[str, Tensor]:
        recipe = self.recipe
        clean = self.latents(batch["pixels"], sample=True)
        sigma = draw_sigmas(len(clean), cast(Sampling, recipe.timestep_sampling), recipe.sigma_shift,
                            recipe.logit_mean, recipe.logit_deviation).to(clean)
        estimate = self.estimate(self.model, clean, torch.randn_like(clean), sigma, batch)
        weight = compute_loss_weighting_for_sd3(recipe.loss_weighting, sigma).view(-1, 1, 1, 1)
        return {"wavelet": self.loss(estimate, clean, weight)}

    def latents(self, pixels: Tensor, sample: bool = False) -> Tensor:
        """(B, 3, S, S) uint8 to (B, C, s, s): the mean of the posterior, or a draw from it."""
        latents = self.autoencoder.encode(pixels.float() / 255, sample).values
        if latents.shape[-1] % 2 or latents.shape[-2] % 2:
            raise ConfigError(f"Pictures of {pixels.shape[-1]}x{pixels.shape[-2]} pixels have an odd number of latents "
                              f"along a side; --resolution is a multiple of {2 * self.autoencoder.downsample}.")
        return latents

    @staticmethod
    def estimate(model: nn.Module, clean: Tensor, noise: Tensor, sigma: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The clean latents that the model sees in a mixture with noise."""
        s = sigma.view(-1, 1, 1, 1)
        noisy = (1 - s) * clean + s * noise
        velocity = model(noisy, sigma, batch["prompt"].to(clean), batch["pooled"].to(clean))
        return estimate_clean(noisy, velocity, s)

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        batch = self._validation_batch(average)
        clean = self.latents(batch["pixels"])
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
        sums: dict[str, float] = {}
        times = (0.25, 0.5, 0.75)
        for time in times:
            estimate = self.estimate(average, clean, noise, clean.new_full((len(clean),), time), batch)
            for name, error in self.loss.band_errors(estimate, clean).items():
                sums[name] = sums.get(name, 0.0) + float(error) / len(times)
        return {f"error_{name}": value for name, value in sums.items()}

    def samples(self, average: nn.Module, step: int) -> Tensor | None:
        """Pictures from noise, by Euler's method and without guidance, for the prompts of the validation batch."""
        if self.validation is None or not self.recipe.sample_steps:
            return None
        batch = self._validation_batch(average)
        side = batch["pixels"].shape[-1]
        clean = self.latents(batch["pixels"])
        z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(clean)
        shift = self.recipe.sigma_shift
        times = torch.linspace(1, 0, self.recipe.sample_steps + 1)
        times = shift * times / (1 + (shift - 1) * times)
        for now, then in pairwise(times.tolist()):
            velocity = average(z, z.new_full((len(z),), now), batch["prompt"].to(z), batch["pooled"].to(z))
            z = z + (then - now) * velocity
        return self.autoencoder.decode(Latents(z, side, side))

    def _validation_batch(self, average: nn.Module) -> dict[str, Tensor]:
        device = next(average.parameters()).device
        return {name: tensor[:4].to(device) for name, tensor in cast(dict[str, Tensor], self.validation).items()}

    def save(self, average: nn.Module, directory: Path) -> None:
        cast(FlowTransformer, average).save(directory)
