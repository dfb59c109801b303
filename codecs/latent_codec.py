"""LatentCodec: images to the bytes of a file and back, by the continuous latents of an autoencoder.

    image -> KL-VAE, SC-VAE, ... -> latents -> hyperprior -> strings of y and z -> container -> bytes

What `TokenCodec` is to discrete tokens, behind the interface of CompressAI's models and with streams of vtc. See
`vtc.codecs.hyperprior` for what is exact: the symbols of a stream are, on every machine; the last bits of pixels
are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.codecs import chunks, container
from vtc.codecs.container import Coder, Container, OutOfBytesError, Reader, varint
from vtc.codecs.hyperprior import HYPER_STRIDE, Hyperprior
from vtc.errors import BitstreamError, ConfigError, ImageError, ModelError
from vtc.hub import PretrainedMixin, fingerprint, read_model
from vtc.tokenizers.base import Latents


class Autoencoder(Protocol):
    """An `nn.Module` with continuous latents: `PatchVAE`, `DiffusersAutoencoder` or any other like them.

    downsample: how many times coarser the latents' grid is than the pixels, along each axis.
    decoding_prefixes (optional): what the names of the tensors begin with that decoding reads; by default all do.
    """

    downsample: int

    def encode(self, images: Tensor) -> Latents:
        """(B, 3, H, W) in [0, 1] of any size to latents (B, C, ceil(H/downsample), ceil(W/downsample))."""

    def decode(self, latents: Latents) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""


class LatentCodec(nn.Module, PretrainedMixin):
    """The lossy codec that an autoencoder and a hyperprior make. Needs the extra `compressai`.

    autoencoder: see `Autoencoder`. hyperprior: of as many channels as its latents have, which are at most 256.
    max_pixels: of the largest image that is decoded; a stream that declares more is refused before anything is
        allocated.

    `forward`, `compress`, `decompress`, `update` and `aux_loss` are CompressAI's; `encode_streams` and `decode_streams`
    have streams that say all they need but the model. `quality` is as in `Hyperprior`.

    The fingerprint is taken when it is first asked for, and by `update`: do that after the weights are final, and
    before a cast to another type.
    """

    def __init__(self, autoencoder: nn.Module, hyperprior: Hyperprior,
                 max_pixels: int = container.MAX_PIXELS) -> None:
        super().__init__()
        if hyperprior.channels > container.MAX_GROUPS:
            raise ConfigError(f"Streams hold latents of at most {container.MAX_GROUPS} channels, not "
                              f"{hyperprior.channels}.")
        self.autoencoder, self.hyperprior, self.max_pixels = autoencoder, hyperprior, max_pixels
        self._fingerprint: bytes | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:  # type: ignore[override]  # one argument, on purpose
        """A codec in eval mode, float32, on the CPU, from a folder or a Hub repository that `save_pretrained` made."""
        config, tensors = read_model(name_or_path)
        if config.get("class") != cls.__name__:
            raise ModelError(f"The model {str(name_or_path)!r} is not a {cls.__name__}.")
        try:
            codec = cls(_autoencoder(**config["autoencoder"]), Hyperprior(**config["hyperprior"]))
            codec.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"The model {str(name_or_path)!r} does not fit {cls.__name__}: {reason}") from error
        codec.exact_weights = any(t.dtype == torch.float32 for t in tensors.values())
        return codec.eval()

    def arguments(self) -> dict[str, Any]:
        """The kind and settings of both parts, as they stand in config.json."""
        kind = type(self.autoencoder).__name__
        if kind not in _AUTOENCODERS:
            raise ConfigError(f"A codec with an autoencoder of class {kind} cannot be saved by vtc; save its "
                              "state_dict().")
        settings = cast(Any, self.autoencoder).arguments()
        return {"autoencoder": {"kind": kind, "settings": settings}, "hyperprior": self.hyperprior.settings}

    # ---- CompressAI's interface -------------------------------------------------------------------------------------

    def forward(self, images: Tensor, quality: int | Tensor | None = None) -> dict[str, Any]:
        """(B, 3, H, W) in [0, 1] to {"x_hat": like them, "likelihoods": {"y": ..., "z": ...}}."""
        coded = self.hyperprior(self.latents(images), quality)
        x_hat = self._model.decode(self._cropped(coded["y_hat"], *images.shape[-2:]))
        return {"x_hat": x_hat, "likelihoods": coded["likelihoods"]}

    def aux_loss(self) -> Tensor:
        """See `Hyperprior.aux_loss`."""
        return self.hyperprior.aux_loss()

    def update(self, force: bool = False) -> bool:
        """Make the coder's tables and the fingerprint; see `Hyperprior.update`."""
        done = self.hyperprior.update(force)
        self._fingerprint = None
        self.fingerprint()
        return done

    @torch.no_grad()
    def compress(self, images: Tensor, quality: int | Tensor | None = None) -> dict[str, Any]:
        """(B, 3, H, W) in [0, 1] to {"strings": [strings of y, strings of z], "shape": (rows, columns) of z}."""
        return self.hyperprior.compress(self.latents(images), quality)

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: Any, quality: int | Tensor | None = None,
                   ) -> dict[str, Tensor]:
        """{"x_hat": images in [0, 1]} of what `compress` gave; as in CompressAI of the padded size, multiples of 4
        times `downsample`. BitstreamError where the strings are not the code of such latents.
        """
        values = self.hyperprior.decompress(strings, shape, quality)["y_hat"]
        height, width = (n * self._model.downsample for n in values.shape[-2:])
        return {"x_hat": self._model.decode(Latents(values, height, width))}

    # ---- streams ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_streams(self, images: Tensor, quality: int | None = None) -> list[bytes]:
        """(B, 3, H, W) float images in [0, 1] to B streams. Raises ImageError for any other shape, type or size."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ImageError("LatentCodec takes float images of shape (B, 3, H, W) in [0, 1], not "
                             f"{images.dtype} of shape {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        channels, own_fingerprint = self.hyperprior.channels, self.fingerprint()
        try:
            scales = self._scales(height, width)
            self._check_room(height, width)
        except BitstreamError as error:
            raise ImageError(f"The image cannot be coded: {error}") from error
        chosen = self.hyperprior.quality if quality is None else quality
        coded = self.compress(images, chosen)
        return [Container(height, width, scales, channels, Coder.LATENTS,
                          varint(chosen) + varint(len(z)) + z + y, 0, own_fingerprint).to_bytes()
                for y, z in zip(*coded["strings"], strict=True)]

    @torch.no_grad()
    def decode_streams(self, streams: list[bytes]) -> list[Tensor]:
        """Streams of `encode_streams` to images (3, H, W) in [0, 1] of the true sizes, on the codec's device.

        Raises BitstreamError where a stream is not ours, damaged, or not of latents, and ModelError where it was made
        with another model.
        """
        return [self._draw(stream) for stream in streams]

    @torch.no_grad()
    def symbols(self, stream: bytes) -> Tensor:
        """The (C, 4 rows, 4 columns) whole numbers of a stream around their means: the same on every machine."""
        return self._receive(stream)[0][0].int()

    def _draw(self, stream: bytes) -> Tensor:
        symbols, means, quality, parsed = self._receive(stream)
        values = self.hyperprior.dequantize(symbols, means, quality)
        images = self._model.decode(self._cropped(values, parsed.height, parsed.width))
        if images.shape != (1, 3, parsed.height, parsed.width):
            raise ModelError(f"The model drew an image of shape {tuple(images.shape)} for a stream of "
                             f"{parsed.width}x{parsed.height} pixels.")
        return images[0]

    def _receive(self, stream: bytes) -> tuple[Tensor, Tensor, Tensor, Container]:
        parsed = chunks.read(stream, self.max_pixels)
        if isinstance(parsed, chunks.ChunkedContainer) or parsed.coder != Coder.LATENTS:
            raise BitstreamError("The stream holds tokens, not latents: decode it with TokenCodec.")
        if parsed.fingerprint != self.fingerprint():
            raise ModelError(f"The stream was made with another model: its fingerprint is {parsed.fingerprint.hex()}, "
                             f"and this model's is {self.fingerprint().hex()}.")
        scales = self._scales(parsed.height, parsed.width)
        if (parsed.scales, parsed.groups) != (scales, self.hyperprior.channels):
            raise ModelError("The stream's latents are not laid out as this model's for an image of "
                             f"{parsed.width}x{parsed.height} pixels.")
        self._check_room(parsed.height, parsed.width)
        reader = Reader(parsed.payload)
        try:
            quality, length = reader.varint(), reader.varint()
            z = bytes(reader.take(length))
        except OutOfBytesError:
            raise BitstreamError(f"The stream's {len(parsed.payload)} bytes of latents end before those that it says "
                                 "it has.") from None
        if quality >= self.hyperprior.qualities:
            raise BitstreamError(f"The stream has quality {quality}, and the model has {self.hyperprior.qualities}.")
        y = parsed.payload[reader.position :]
        shape = tuple(-(-n // HYPER_STRIDE) for n in scales[0])
        return *self.hyperprior.decompress_symbols([[y], [z]], shape, quality), parsed

    def fingerprint(self) -> bytes:
        """Eight bytes that change when anything changes that decoding reads, the coder's tables included."""
        if self._fingerprint is None:
            self.hyperprior.check_tables()
            prefixes = getattr(self.autoencoder, "decoding_prefixes", ("",))
            self._fingerprint = container.with_prior(fingerprint(self.autoencoder, prefixes),
                                                     self.hyperprior.fingerprint())
        return self._fingerprint

    @property
    def _model(self) -> Autoencoder:
        return cast(Autoencoder, self.autoencoder)

    def _scales(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        f = self._model.downsample
        return ((-(-height // f), -(-width // f)),)

    def _check_room(self, height: int, width: int) -> None:
        """Raise BitstreamError beyond the limits, which hold for padded latents: of a picture one pixel high, padding
        makes four times as many.
        """
        padded = tuple((rows + -rows % HYPER_STRIDE, columns + -columns % HYPER_STRIDE)
                       for rows, columns in self._scales(height, width))
        container.check_limits(height, width, padded, self.hyperprior.channels, self.max_pixels)

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to latents (B, C, h, w), h and w multiples of 4: the last ones are repeated."""
        values = self._model.encode(images.to(self.hyperprior.log_gain)).values
        rows, columns = values.shape[-2:]
        return F.pad(values, (0, -columns % HYPER_STRIDE, 0, -rows % HYPER_STRIDE), mode="replicate")

    def _cropped(self, values: Tensor, height: int, width: int) -> Latents:
        """The inverse of that padding, which an autoencoder that is not local must not see."""
        ((rows, columns),) = self._scales(height, width)
        return Latents(values[..., :rows, :columns], height, width)


#: the autoencoders that a codec's file may name
_AUTOENCODERS = ("PatchVAE", "DiffusersAutoencoder")


def _autoencoder(kind: str, settings: dict[str, Any]) -> nn.Module:
    """One of the names above, with the arguments that its own config.json has."""
    if kind == "PatchVAE":
        from vtc.tokenizers.patch_vae import PatchVAE
        return PatchVAE(**settings)
    if kind == "DiffusersAutoencoder":
        from vtc.tokenizers.diffusers_adapters import AUTOENCODERS, DiffusersAutoencoder
        return DiffusersAutoencoder(AUTOENCODERS[settings["kind"]](**settings["settings"]))
    raise ModelError(f"A codec's autoencoder is one of {', '.join(_AUTOENCODERS)}, not {kind!r}.")
