"""Autoencoders of diffusers behind the interfaces of vtc: images in [0, 1] of any size.

DiffusersVQ: VQModel as a `Tokenizer`. DiffusersAutoencoder: AutoencoderKL, AutoencoderDC and `ScaleConsistentVAE`,
whose latents are continuous and give no tokens.

    image [0, 1] -> pad to the downsampling factor -> [-1, 1] -> diffusers -> latents -> diffusers -> [0, 1], cropped
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError, ModelError
from vtc.hub import PretrainedMixin, read_model
from vtc.tokenizers.base import Latents
from vtc.tokenizers.layers import GridTokenizer, mend_group_norms, pad_to_multiple
from vtc.tokenizers.scale_consistent_vae import AutoencoderKL, ScaleConsistentVAE
from vtc.tokenizers.tiling import warn_of_tiles
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer
from vtc.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()  # diffusers imports torchvision where it is installed

from diffusers import AutoencoderDC, VQModel  # noqa: E402

#: the autoencoders with continuous latents, by the name in their config.json
AUTOENCODERS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC,
                                "ScaleConsistentVAE": ScaleConsistentVAE}


class DiffusersVQ(GridTokenizer, PretrainedMixin):
    """diffusers' VQModel as a tokenizer. Its encoder and decoder are diffusers' own, the quantizer is vtc's.

    settings: the config of the VQModel, with diffusers' names.

    Group norm and attention see the whole image: the network is not local.
    """

    decoding_prefixes = ("decoder.", "post_quant_conv.", "quantizer.", "token_frequencies")

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        known = {k: v for k, v in settings.items() if not k.startswith("_")}
        model: Any = VQModel(**known)
        config = model.config
        self.spatial_norm = config.norm_type == "spatial"
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.vocab = (config.num_vq_embeddings,)
        self.encoder, self.quant_conv = model.encoder, model.quant_conv
        dim = config.vq_embed_dim or config.latent_channels
        self.quantizer = GradientVectorQuantizer(config.num_vq_embeddings, dim)
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        mend_group_norms(self)

    @classmethod
    def from_vqmodel(cls, model: Any) -> Self:
        """A tokenizer with the weights of a diffusers VQModel (copied), in eval mode."""
        tokenizer = cls(_settings(model))
        tensors = {("quantizer.codebook" if k == "quantize.embedding.weight" else k): v
                   for k, v in model.state_dict().items()}
        tokenizer.load_state_dict(tensors)
        tokenizer.exact_weights = True
        return tokenizer.eval()

    @classmethod
    def from_diffusers(cls, name_or_path: str | os.PathLike[str], subfolder: str | None = None) -> Self:
        """From a folder or a repository on the Hub that holds a VQModel; its weights must be safetensors."""
        return cls.from_vqmodel(_load(VQModel, name_or_path, subfolder))

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode_latents(self, z_q: Tensor) -> Tensor:
        # A MoVQ decoder also normalises by the codes themselves.
        return self.decoder(self.post_quant_conv(z_q), z_q if self.spatial_norm else None)


class DiffusersAutoencoder(nn.Module, PretrainedMixin):
    """AutoencoderKL, AutoencoderDC or ScaleConsistentVAE with images in [0, 1] of any size.

    `save_pretrained` writes vtc's two files, which `from_pretrained` reads as it does diffusers' own folders.

    The networks are not local: with `enable_tiling` a result differs from the one of the whole image, see
    `tiling_error`. Half precision may overflow in some of them (SDXL's): `decode` then repeats the work in float32.
    """

    is_local = False
    decoding_prefixes = ("model.decoder.", "model.post_quant_conv.")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, tuple(AUTOENCODERS.values())):
            raise ConfigError(f"DiffusersAutoencoder takes {', '.join(AUTOENCODERS)}, not {type(model).__name__}.")
        self.model: Any = cast(Any, model.eval())
        mend_group_norms(self.model)
        self.tiles_by_stride = isinstance(model, AutoencoderDC)  # others tile by overlap
        config: Any = self.model.config
        if self.tiles_by_stride:
            self.downsample = int(self.model.spatial_compression_ratio)
        else:
            self.downsample = 2 ** (len(config.block_out_channels) - 1) * config.get("stride", 1)
        self.scale = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str],  # type: ignore[override]  # ours is simpler
                        subfolder: str | None = None, **settings: Any) -> Self:
        """From a folder or a repository on the Hub, of diffusers or of vtc, as its config.json says; safetensors only.

        settings: replace what config.json says, such as the `alignment` of a ScaleConsistentVAE. An AutoencoderKL with
            a `stride` of 2 is a ScaleConsistentVAE.
        """
        try:
            config: Any = AutoencoderKL.load_config(str(name_or_path), subfolder=subfolder)
        except (OSError, ValueError) as error:
            raise ModelError(f"No autoencoder of diffusers at {str(name_or_path)!r}: {error}") from error
        ours = config.get("class") == cls.__name__
        name = config.get("kind" if ours else "_class_name")
        if name == "AutoencoderKL" and (settings.get("stride") or config.get("stride") or 1) != 1:
            name = "ScaleConsistentVAE"
        if name not in AUTOENCODERS:
            raise ModelError(f"{str(name_or_path)!r} holds a {name}; supported are {', '.join(AUTOENCODERS)}, and "
                             "VQModel through DiffusersVQ.")
        strangers = sorted(settings.keys() - inspect.signature(AUTOENCODERS[name].__init__).parameters.keys())
        if strangers:
            raise ConfigError(f"{name} does not take the settings {', '.join(strangers)}.")
        if not ours:
            adapter = cls(_load(AUTOENCODERS[name], name_or_path, subfolder, **settings))
            adapter.exact_weights = True
            return adapter
        config, tensors = read_model(Path(name_or_path))
        try:
            adapter = cls(AUTOENCODERS[name](**{**config["settings"], **settings}))
            adapter.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"The model {str(name_or_path)!r} does not fit {name}: {reason}") from error
        adapter.exact_weights = any(t.dtype == torch.float32 for t in tensors.values())
        return adapter.eval()

    def arguments(self) -> dict[str, Any]:
        """Kind and settings of the model within, as they stand in config.json."""
        kind = next(name for name, known in reversed(AUTOENCODERS.items()) if isinstance(self.model, known))
        return {"kind": kind, "settings": _settings(self.model)}

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Latents:
        """(B, 3, H, W) in [0, 1] to latents: the posterior's mean, or with `sample` a draw from it."""
        height, width = images.shape[-2:]
        x = (pad_to_multiple(images, self.downsample) * 2 - 1).to(self.model.dtype)
        encoded = self.model.encode(x)
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            values = posterior.sample(generator) if sample else posterior.mode()
        elif sample:
            raise ConfigError("AutoencoderDC is deterministic: it has no posterior to sample from.")
        else:
            values = encoded.latent
        return Latents((values.float() - self.shift) * self.scale, height, width)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Tensor:
        """Images in [0, 1] of the true size, float32.

        Where half precision gives infinities, the decoder runs again in float32; ModelError where that does not help.
        """
        z = latents.values / self.scale + self.shift
        images = self.model.decode(z.to(self.model.dtype)).sample
        if not images.isfinite().all() and self.model.dtype != torch.float32:
            dtype = self.model.dtype
            self.model.float()
            try:
                images = self.model.decode(z.float()).sample
            finally:
                self.model.to(dtype)
        if not images.isfinite().all():
            raise ModelError(f"{type(self.model).__name__} decoded to values that are not finite: its weights or these "
                             "latents are damaged.")
        return (images.float() * 0.5 + 0.5)[..., : latents.height, : latents.width].clamp(0, 1)

    def enable_tiling(self, tile: int = 512, overlap: float = 0.25) -> None:
        """Work in overlapping tiles of `tile` pixels, which share `overlap` of their side and are blended.

        A RuntimeWarning says that tiles change the result; memory is then bounded by the tile.
        """
        f, latent = self.downsample, tile // self.downsample
        common = round(latent * overlap)
        if tile % f or latent < 1:
            raise ConfigError(f"A tile's side is a multiple of {f} pixels, not {tile}.")
        if not 0 <= overlap < 1 or common == latent or abs(common - latent * overlap) > 1e-6:
            raise ConfigError(f"An overlap of {overlap} does not cut tiles of {latent} latents at whole latents.")
        warn_of_tiles(self)
        stride = (latent - common) * f
        if self.tiles_by_stride:
            self.model.enable_tiling(tile, tile, stride, stride)
        else:
            self.model.use_tiling = True
            self.model.tile_sample_min_size, self.model.tile_latent_min_size = tile, latent
            self.model.tile_overlap_factor = overlap

    def disable_tiling(self) -> None:
        """Work on whole images again."""
        self.model.use_tiling = False

    def enable_slicing(self, slices: bool = True) -> None:
        """Work on one image of a batch after the other."""
        self.model.use_slicing = slices

    def tiling_error(self, latents: Latents) -> float:
        """Largest difference, in [0, 1], that the present tiles make when decoding these latents. Needs the whole."""
        tiling, self.model.use_tiling = self.model.use_tiling, False
        try:
            whole = self.decode(latents)
            self.model.use_tiling = True
            return float((self.decode(latents) - whole).abs().max())
        finally:
            self.model.use_tiling = tiling


def _settings(model: Any) -> dict[str, Any]:
    """The config of a diffusers model without diffusers' notes, tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if not k.startswith("_")}


def _load(cls: Any, name_or_path: str | os.PathLike[str], subfolder: str | None, **settings: Any) -> Any:
    path = Path(name_or_path)
    where = path if path.is_dir() else str(name_or_path)
    try:  # a pickle would be run
        model, info = cls.from_pretrained(where, subfolder=subfolder, use_safetensors=True, output_loading_info=True,
                                          **settings)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{cls.__name__} does not load from {str(name_or_path)!r}: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise ModelError(f"{cls.__name__} does not fit {str(name_or_path)!r}: {what} {list(info[what])[:8]}.")
    return model
