"""Any network with any quantizer: a tokenizer that is described by two names and their arguments.

    compose("wetok", "fsq", {"channels": 64, "channel_multipliers": [1, 2, 4]}, {"levels": [8, 8, 8, 5, 5]})

    image -> encoder of the network -> quantizer -> decoder of the network -> image

The published combinations have classes of their own, with their checkpoints; this is for trying others. A pyramid of
grids (multi_scale_vq, multi_scale_bsq) makes a `ComposedPyramid`, any other quantizer a `ComposedTokenizer`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vtc.errors import ConfigError, first_sentence
from vtc.hub import PretrainedMixin
from vtc.tokenizers import layers, local_vq, wetok
from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer
from vtc.tokenizers.finite_scalar import FiniteScalarQuantizer
from vtc.tokenizers.index_backprop import IndexBackpropQuantizer
from vtc.tokenizers.layers import GridTokenizer, MultiScaleTokenizer
from vtc.tokenizers.lookup_free import LFQ, GroupLFQ
from vtc.tokenizers.multi_scale_binary import MultiScaleBinaryQuantizer
from vtc.tokenizers.multi_scale_residual import MultiScaleResidualQuantizer
from vtc.tokenizers.product_quantizer import ProductQuantizer
from vtc.tokenizers.quantizer import Quantizer
from vtc.tokenizers.residual_quantizer import ResidualQuantizer
from vtc.tokenizers.scales import MultiScaleQuantizer
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer, VectorQuantizer

#: quantizers by name; "product" and "residual" take `quantizers`, a list of {"quantizer": name, **arguments}
QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer, "gradient_vq": GradientVectorQuantizer, "ibq": IndexBackpropQuantizer, "lfq": LFQ,
    "group_lfq": GroupLFQ, "bsq": BinarySphericalQuantizer, "fsq": FiniteScalarQuantizer, "product": ProductQuantizer,
    "residual": ResidualQuantizer, "multi_scale_vq": MultiScaleResidualQuantizer,
    "multi_scale_bsq": MultiScaleBinaryQuantizer}


def make_quantizer(name: str, arguments: dict[str, Any]) -> Quantizer:
    """A quantizer by its name in QUANTIZERS. ConfigError."""
    if name not in QUANTIZERS:
        raise ConfigError(f"There is no quantizer {name!r}; there are {', '.join(QUANTIZERS)}.")
    kind, arguments = QUANTIZERS[name], dict(arguments)
    if name in ("product", "residual"):
        members = arguments.pop("quantizers", ())
        if not all(isinstance(m, dict) and "quantizer" in m for m in members):
            raise ConfigError(f"{name!r} takes quantizers=[{{'quantizer': name, ...}}, ...].")
        arguments["quantizers"] = [make_quantizer(m["quantizer"], {k: v for k, v in m.items() if k != "quantizer"})
                                   for m in members]
    return called(kind, {k: tuple(v) if isinstance(v, list) and k != "quantizers" else v for k, v in arguments.items()})


def called(kind: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """kind(**arguments), whatever is wrong with them as a ConfigError."""
    known = inspect.signature(kind).parameters
    name = getattr(kind, "__name__", "this").strip("_")
    for argument in arguments:
        if argument not in known:
            raise ConfigError(f"{name} has no argument {argument!r}, but {', '.join(known)}.")
    try:
        return kind(**arguments)
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} cannot be made of {arguments}: {first_sentence(error)}.") from error


def _vqgan(dim: int, channels: int = 128, channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
           z_channels: int = 256, attention_levels: Sequence[int] = (), mid_attention: bool = True) -> Any:
    sizes = (channels, channel_multipliers, num_res_blocks, z_channels, attention_levels, mid_attention)
    return (nn.Sequential(layers.Encoder(*sizes), nn.Conv2d(z_channels, dim, 1)),
            nn.Sequential(nn.Conv2d(dim, z_channels, 1), layers.Decoder(*sizes)), 2 ** (len(channel_multipliers) - 1))


def _wetok(dim: int, channels: int = 128, channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
           num_res_blocks: int = 4) -> Any:
    sizes = (channels, channel_multipliers, num_res_blocks, dim)
    return wetok.Encoder(*sizes), wetok.Decoder(*sizes, generative=False), 2 ** (len(channel_multipliers) - 1)


def _local_vq(dim: int, encoder_widths: Sequence[int] = (64, 128, 256), encoder_depths: Sequence[int] = (1, 2, 3),
              decoder_widths: Sequence[int] = (40, 80, 160, 320), decoder_depths: Sequence[int] = (2, 2, 2, 4),
              thin: int = 16) -> Any:
    if len(decoder_widths) != len(encoder_widths) + 1 or not encoder_widths:
        raise ConfigError("LocalVQ's network has an encoder width for /4, /8, ... and one decoder width more, for /2.")
    return (local_vq.Encoder(tuple(encoder_widths), tuple(encoder_depths), dim),
            local_vq.Decoder(tuple(decoder_widths), tuple(decoder_depths), dim, thin), 2 ** len(decoder_widths))


#: networks by name: (dim, arguments) to (encoder, decoder, pixels per token)
NETWORKS: dict[str, Callable[..., Any]] = {"vqgan": _vqgan, "wetok": _wetok, "local_vq": _local_vq}


def _network(name: str, dim: int, arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module, int]:
    if name not in NETWORKS:
        raise ConfigError(f"There is no network {name!r}; there are {', '.join(NETWORKS)}.")
    if "dim" in arguments:
        raise ConfigError("The quantizer tells the network how many channels its latents have.")
    return called(NETWORKS[name], {"dim": dim, **arguments})


class ComposedTokenizer(GridTokenizer, PretrainedMixin):
    """A network of NETWORKS around a quantizer of QUANTIZERS that has one grid of tokens."""

    decoding_prefixes = ("decoder.", "quantizer.", "token_frequencies")

    def __init__(self, network: str, quantizer: str, network_args: dict[str, Any] | None = None,
                 quantizer_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.quantizer = make_quantizer(quantizer, quantizer_args or {})
        if isinstance(self.quantizer, MultiScaleQuantizer):
            raise ConfigError(f"{quantizer!r} has several grids: take ComposedPyramid.")
        self.encoder, self.decoder, self.downsample = _network(network, self.quantizer.dim, network_args or {})
        self.vocab, self.grouped_indices = self.quantizer.vocab, self.quantizer.grouped_indices
        self.settings = json.dumps([quantizer, quantizer_args or {}], sort_keys=True)

    @property
    def token_format(self) -> str:
        """The vocabulary, and the quantizer's settings, which no tensor tells."""
        return f"{super().token_format} {self.settings}"

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode_latents(self, z_q: Tensor) -> Tensor:
        return self.decoder(z_q)


class ComposedPyramid(MultiScaleTokenizer, PretrainedMixin):
    """A network of NETWORKS around a multi-scale quantizer; its last scale is the latent map's at the training size."""

    decoding_prefixes = ("decoder.", "quantizer.", "token_frequencies")

    def __init__(self, network: str, quantizer: str, network_args: dict[str, Any] | None = None,
                 quantizer_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        made = make_quantizer(quantizer, quantizer_args or {})
        if not isinstance(made, MultiScaleQuantizer):
            raise ConfigError(f"{quantizer!r} has one grid: take ComposedTokenizer.")
        self.quantizer = made
        self.encoder, self.decoder, self.downsample = _network(network, made.dim, network_args or {})
        self.vocab, self.grouped_indices = made.vocab, made.grouped_indices
        if any(rows != columns for rows, columns in made.scales):
            raise ConfigError("A ComposedPyramid is made for square grids; those of other images follow from them.")
        self.sides = tuple(rows for rows, _ in made.scales)
        self.settings = json.dumps([quantizer, quantizer_args or {}], sort_keys=True)

    @property
    def token_format(self) -> str:
        """The vocabulary, and the quantizer's settings, which no tensor tells."""
        return f"{super().token_format} {self.settings}"

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode_latents(self, z_q: Tensor) -> Tensor:
        return self.decoder(z_q)


def compose(network: str, quantizer: str, network_args: dict[str, Any] | None = None,
            quantizer_args: dict[str, Any] | None = None) -> ComposedTokenizer | ComposedPyramid:
    """The tokenizer of these two; ConfigError for names and arguments that there are not."""
    kind = ComposedPyramid if quantizer.startswith("multi_scale") else ComposedTokenizer
    return kind(network, quantizer, network_args, quantizer_args)
