"""The hyperprior of continuous latents: CompressAI's entropy models, steered by whole numbers that cannot drift.

                   y = latents * gain                                              z
    latents ─►──┬─────────────────────────┬──► h_a ──► EntropyBottleneck ──► symbols of z ──► h_s, in whole numbers
                │                         ▼                                                      │
                │           round(y - mean) ──► GaussianConditional of scale number i ◄── mean, i┘
                ▼
    the decoder gets (symbols + mean) / gain

Ballé et al., "Variational image compression with a scale hyperprior" (1802.01436), with means as in Minnen et al.
(1809.02736). Decoders of such streams break where h_s gives another scale than it gave the encoder: on another
processor, thread count, precision or library. Here h_s reads the *symbols* of z, has int8 weights and 8-bit
activations, and its sums are proved to stay below 2^24, so that float32 holds each exactly in whatever order it is
added (`vtc.codecs.prior.Layer`). It gives the number of a scale in a fixed table and a mean in sixteenths of a
quantization step, whole numbers both. The coder's tables are whole numbers in the model's file.

What is exact: the symbols of a stream, everywhere. What is not: the pixels that an autoencoder draws from them, which
may differ in the last bits, and what `encode` rounds to begin with, so two machines may write different streams of
one image; each decodes both alike.

The gain sets the rate: one vector for each quality. CompressAI does the rest: likelihoods, tables, rANS.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.codecs.prior import BYTE, EXACT, TOTAL, Layer, exact_place
from vtc.errors import BitstreamError, ConfigError, ModelError
from vtc.hub import fingerprint
from vtc.torchvision_guard import ensure_torchvision_imports

#: the latents' grid is so many times finer along each axis than that of z
HYPER_STRIDE = 4
#: activations of h_s: the largest, and fractional bits of theirs, of the symbols of z, and of means and scales
ACTIVATION, ACTIVATION_BITS, SYMBOL_BITS, OUTPUT_BITS = 255, 5, 3, 4
#: scales: 64 from 0.11 to 256 quantization steps, by equal ratios; the one where h_s gives 0; eight to a unit of h_s
SCALES, SMALLEST_SCALE, LARGEST_SCALE, MIDDLE_SCALE, SCALE_BITS = 64, 0.11, 256.0, 24, 3
#: largest magnitude of a symbol
LARGEST_SYMBOL = 2**15
#: what CompressAI's rows of cumulative frequencies end with
WHOLE = 2**16


def scale_table() -> list[float]:
    """The standard deviations that the numbers from h_s stand for, in quantization steps."""
    step = math.log(LARGEST_SCALE / SMALLEST_SCALE) / (SCALES - 1)
    return [SMALLEST_SCALE * math.exp(n * step) for n in range(SCALES)]


class Synthesis(Protocol):
    """h_s: symbols of z (B, N, h, w), qualities (B,), to means and scale numbers, both (B, C, 4 h, 4 w)."""

    def __call__(self, symbols: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Means in quantization steps, and numbers of scales from 0 to 63, as floating numbers."""


class WholeSynthesis(nn.Module):
    """h_s in whole numbers: conv 3x3, relu, shuffle, twice, and conv 3x3; each with a bias for each quality.

    Its tensors are integers, which no cast of the model to another type reaches. As constructed it gives mean 0 and the
    middle scale everywhere; `vtc.training.hyperprior` makes trained ones.
    """

    def __init__(self, channels: int, hyper_channels: int, width: int, qualities: int) -> None:
        super().__init__()
        self.channels = channels
        self.shapes = ((4 * width, hyper_channels), (4 * width, width), (2 * channels, width))
        for number, (outputs, inputs) in enumerate(self.shapes):
            self.register_buffer(f"weight_{number}", torch.zeros(outputs, inputs, 3, 3, dtype=torch.int8))
            self.register_buffer(f"shift_{number}", torch.zeros(outputs, dtype=torch.uint8))
            self.register_buffer(f"bias_{number}", torch.zeros(qualities, outputs, dtype=torch.int32))

    def layers(self) -> list[Layer]:
        """The three convolutions. Raises ModelError where a sum is not proved to be exact."""
        found = []
        for number, (outputs, _) in enumerate(self.shapes):
            weight, shift, bias = (cast(Tensor, getattr(self, f"{name}_{number}"))
                                   for name in ("weight", "shift", "bias"))
            layer = Layer(weight, shift, bias, bias.new_zeros(1, outputs))
            if (weight.dtype, shift.dtype, bias.dtype) != (torch.int8, torch.uint8, torch.int32) or shift.max() > 30:
                raise ModelError("The hyperprior's synthesis has other tensors than int8, uint8 and int32.")
            largest = layer.largest_sum(ACTIVATION if number else BYTE)
            if largest >= EXACT:
                raise ModelError(f"A sum of the hyperprior may reach {largest}; only sums below {EXACT} are exact "
                                 "everywhere.")
            found.append(layer)
        return found

    @torch.no_grad()
    def forward(self, symbols: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """See `Synthesis`."""
        device, dtype = exact_place(symbols.device)
        layers = [layer.to(device, dtype) for layer in self.layers()]
        with torch.autocast(device.type, enabled=False):
            maps = [self._map(layers, s.to(device, dtype).clamp(-BYTE, BYTE), int(q))
                    for s, q in zip(symbols, quality, strict=True)]
        means, scales = torch.stack(maps).split(self.channels, 1)
        numbers = torch.floor((scales + 1) / 2 ** (OUTPUT_BITS - SCALE_BITS)) + MIDDLE_SCALE
        means, numbers = means / 2**OUTPUT_BITS, numbers.clamp(0, SCALES - 1)
        return means.float().to(symbols.device), numbers.float().to(symbols.device)

    @staticmethod
    def _map(layers: list[Layer], x: Tensor, quality: int) -> Tensor:
        for layer in layers[:-1]:
            x = F.pixel_shuffle(layer(x, quality, 0).clamp(0, ACTIVATION), 2)
        return layers[-1](x, quality, 0).clamp(-TOTAL, TOTAL)


class Hyperprior(nn.Module):
    """Codes latents (B, C, h, w), h and w multiples of 4, behind CompressAI's interface. Needs the extra `compressai`.

    channels: C. hyper_channels: of z. width: of h_a and h_s. qualities: how many gains there are, coarse to fine.

    `quality`, an argument everywhere, is a number from 0 on or one for each image (B,); None is the attribute
    `quality`, at first the finest. Raises ModelError where CompressAI is not installed.
    """

    decoding_prefixes = ("h_s.", "log_gain", "entropy_bottleneck._", "gaussian_conditional._")

    def __init__(self, channels: int, hyper_channels: int = 32, width: int = 48, qualities: int = 1) -> None:
        super().__init__()
        if min(channels, hyper_channels, width, qualities) < 1:
            raise ConfigError("A hyperprior has at least one channel of each kind and one quality.")
        models = _compressai()
        self.settings = {"channels": channels, "hyper_channels": hyper_channels, "width": width,
                         "qualities": qualities}
        self.channels, self.qualities, self.quality = channels, qualities, qualities - 1
        self.h_a = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 5, stride=2, padding=2),
            nn.ReLU(), nn.Conv2d(width, hyper_channels, 5, stride=2, padding=2))
        self.entropy_bottleneck: Any = models.EntropyBottleneck(hyper_channels, init_scale=4)
        self.h_s: nn.Module = WholeSynthesis(channels, hyper_channels, width, qualities)
        self.gaussian_conditional: Any = models.GaussianConditional(scale_table())
        for part in (self.entropy_bottleneck, self.gaussian_conditional):
            _keep_constants_out(part)
        self.log_gain = nn.Parameter(torch.zeros(qualities, channels))

    # ---- CompressAI's interface -------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, quality: int | Tensor | None = None) -> dict[str, Any]:
        """{"y_hat": latents (B, C, h, w) as decoded, "likelihoods": {"y": like them, "z": (B, N, h/4, w/4)}}.

        -log2 of the likelihoods adds up to the bits of the strings. While training they are those of latents with
        uniform noise instead of rounding, and gradients pass through the rounding.
        """
        quality = self._qualities(latents, quality)
        with torch.autocast(latents.device.type, enabled=False):  # rates need more than eight bits
            return self._forward(latents, quality)

    def _forward(self, latents: Tensor, quality: Tensor) -> dict[str, Any]:
        y, z = self._analyse(latents, quality)
        z_hat, z_likelihoods = self.entropy_bottleneck(z)
        symbols = z_hat.float() - self._medians(z)
        means, numbers = self.h_s(symbols if self.training else torch.round(symbols), quality)
        step = math.log(LARGEST_SCALE / SMALLEST_SCALE) / (SCALES - 1)
        scales = SMALLEST_SCALE * torch.exp(numbers * step)
        y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means)
        if self.training:
            rest = y - means
            y_hat = means + rest + (torch.round(rest) - rest).detach()
        return {"y_hat": y_hat / self._gain(quality), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def aux_loss(self) -> Tensor:
        """What places the quantiles of z; to be minimised beside the main loss, over the parameter `quantiles`."""
        return self.entropy_bottleneck.loss()

    def update(self, force: bool = False) -> bool:
        """Make the whole-number tables of both entropy models from their present parameters.

        Returns whether anything was done: tables that are there stay, but with `force`. Making them rounds, so streams
        need the tables that a model's file carries.
        """
        done = bool(self.entropy_bottleneck.update(force=force))
        return bool(self.gaussian_conditional.update_scale_table(scale_table(), force=force)) or done

    @torch.no_grad()
    def compress(self, latents: Tensor, quality: int | Tensor | None = None) -> dict[str, Any]:
        """{"strings": [B strings of y, B strings of z], "shape": (rows, columns) of z}: CompressAI's own strings.

        Raises ConfigError where the latents are not finite or reach 2^15 quantization steps.
        """
        self.check_tables()
        quality = self._qualities(latents, quality)
        y, z = self._analyse(latents, quality)
        z_symbols = self._symbols(self.entropy_bottleneck, z, self._medians(z))
        means, numbers = self.h_s(z_symbols, quality)
        y_symbols = self._symbols(self.gaussian_conditional, y, means)
        return {"strings": [self._strings(self.gaussian_conditional, y_symbols, numbers),
                            self._strings(self.entropy_bottleneck, z_symbols, _channel_numbers(z_symbols))],
                "shape": z.shape[-2:]}

    def decompress(self, strings: list[list[bytes]], shape: Any, quality: int | Tensor | None = None,
                   ) -> dict[str, Tensor]:
        """{"y_hat": latents (B, C, 4 rows, 4 columns)} of what `compress` gave, float32.

        Raises BitstreamError where the strings are not the code of such latents.
        """
        symbols, means, quality = self.decompress_symbols(strings, shape, quality)
        return {"y_hat": self.dequantize(symbols, means, quality)}

    def dequantize(self, symbols: Tensor, means: Tensor, quality: Tensor) -> Tensor:
        """What `decompress_symbols` gives to latents, float32."""
        return (symbols + means) / self._gain(quality)

    # ---- what is behind it ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decompress_symbols(self, strings: list[list[bytes]], shape: Any, quality: int | Tensor | None = None,
                           ) -> tuple[Tensor, Tensor, Tensor]:
        """Symbols and means (B, C, 4 rows, 4 columns), float32, both exact everywhere; and the qualities (B,)."""
        self.check_tables()
        if len(strings) != 2 or len(strings[0]) != len(strings[1]):
            raise ConfigError("decompress takes a list of strings of y and one of as many strings of z.")
        rows, columns = shape
        z_shape = (len(strings[1]), self.settings["hyper_channels"], int(rows), int(columns))
        device = self.log_gain.device
        z_numbers = _channel_numbers(torch.empty(z_shape, device=device))
        z_symbols = self._decode(self.entropy_bottleneck, strings[1], z_numbers)
        quality = self._qualities(z_symbols, quality)
        means, numbers = self.h_s(z_symbols, quality)
        return self._decode(self.gaussian_conditional, strings[0], numbers), means, quality

    def check_tables(self) -> None:
        """Raise ModelError unless the tables are there and are such that rANS is safe with them."""
        for model, rows in ((self.entropy_bottleneck, self.settings["hyper_channels"]),
                            (self.gaussian_conditional, SCALES)):
            table, lengths, offsets = model._quantized_cdf, model._cdf_length, model._offset
            if not table.numel():
                raise ModelError("The hyperprior has no tables yet: call its update() once it is trained.")
            if table.ndim != 2 or (len(table), *lengths.shape, *offsets.shape) != (rows, rows, rows) \
                    or lengths.min() < 3 or lengths.max() > table.shape[1] \
                    or any(t.dtype != torch.int32 for t in (table, lengths, offsets)):
                raise ModelError("The hyperprior's tables have another shape or type than its entropy models need.")
            inside = torch.arange(1, table.shape[1], device=table.device) < lengths[:, None]
            ends = table.gather(1, lengths[:, None].long() - 1)
            if (table[:, 0] != 0).any() or (ends != WHOLE).any() or ((table.diff(dim=1) < 1) & inside).any():
                raise ModelError(f"The rows of the hyperprior's tables do not rise from 0 to {WHOLE}.")

    def fingerprint(self) -> bytes:
        """Eight bytes that change when anything changes that decoding reads: h_s, tables and gains."""
        return fingerprint(self, self.decoding_prefixes)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        # CompressAI's tables are empty until they are made; they take the shapes that the file has.
        for name in ("entropy_bottleneck", "gaussian_conditional"):
            for table in ("_offset", "_quantized_cdf", "_cdf_length"):
                found = state_dict.get(f"{prefix}{name}.{table}")
                if found is not None:
                    setattr(getattr(self, name), table, torch.empty_like(found))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _qualities(self, like: Tensor, quality: int | Tensor | None) -> Tensor:
        """(B,) int64, one for each of `like`. Raises ConfigError where there is no such quality."""
        value = torch.as_tensor(self.quality if quality is None else quality, device=like.device).long()
        value = value.expand(len(like))
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < self.qualities:
            raise ConfigError(f"The hyperprior has qualities 0 to {self.qualities - 1}, not {value.tolist()}.")
        return value

    def _gain(self, quality: Tensor) -> Tensor:
        return torch.exp2(self.log_gain.float())[quality][:, :, None, None]

    def _analyse(self, latents: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """y and z, float32."""
        if latents.ndim != 4 or latents.shape[1] != self.channels or any(n % HYPER_STRIDE for n in latents.shape[2:]):
            raise ConfigError(f"The hyperprior takes latents (B, {self.channels}, h, w) with h and w multiples of "
                              f"{HYPER_STRIDE}, not {tuple(latents.shape)}.")
        y = latents.float() * self._gain(quality)
        # Amplitudes span three decades and scales go by ratios, so h_a sees logarithms.
        amplitudes = y.abs().log1p()
        return y, self.h_a(torch.cat([amplitudes, y.sign() * amplitudes], 1).to(self.log_gain.dtype)).float()

    def _medians(self, z: Tensor) -> Tensor:
        return self.entropy_bottleneck.quantiles[:, 0, 1].detach().float()[None, :, None, None].expand_as(z)

    @staticmethod
    def _symbols(model: Any, x: Tensor, means: Tensor) -> Tensor:
        """Whole numbers (int32) of x around its means, as CompressAI rounds them."""
        if not (x - means).abs().max() < LARGEST_SYMBOL:
            raise ConfigError(f"The latents are not finite, or reach {LARGEST_SYMBOL} quantization steps; check the "
                              "model and its gain.")
        return model.quantize(x, "symbols", means)

    @staticmethod
    def _strings(model: Any, symbols: Tensor, numbers: Tensor) -> list[bytes]:
        """One string for each image: each symbol by the row of the model's table that has its number."""
        tables = _lists(model)
        return [model.entropy_coder.encode_with_indexes(s.flatten().tolist(), n.int().flatten().tolist(), *tables)
                for s, n in zip(symbols, numbers, strict=True)]

    @staticmethod
    def _decode(model: Any, strings: list[bytes], numbers: Tensor) -> Tensor:
        """The symbols, as float32, of strings made with the same numbers. Raises BitstreamError for any others.

        CompressAI's decoder trusts its input and reads on behind a string that is too short. A symbol takes at most 2
        bytes, and an escape as many half bytes as it announces, in digits of half a byte that end at the first that
        is not 15. Behind the end there are only zeros, from which at most 8 such digits come: so no string makes it
        read more than 80 bytes a symbol and 16 for each of its own beyond its end.
        """
        tables, out = _lists(model), []
        for string, number in zip(strings, numbers, strict=True):
            rows = number.int().flatten().tolist()
            padded = string + bytes(80 * len(rows) + 16 * len(string) + 256)
            symbols = model.entropy_coder.decode_with_indexes(padded, rows, *tables)
            found = torch.tensor(symbols, dtype=torch.int32)
            # Decoding what any bytes say is not enough: they must be the code of it.
            if found.numel() and (found.abs().max() >= LARGEST_SYMBOL + WHOLE
                                  or model.entropy_coder.encode_with_indexes(symbols, rows, *tables) != string):
                raise BitstreamError("A string of the stream is not the code of latents of this shape.")
            out.append(found.float().view(number.shape).to(numbers.device))
        return torch.stack(out)


def _channel_numbers(z: Tensor) -> Tensor:
    """The entropy bottleneck has a row of its table for each channel."""
    return torch.arange(z.shape[1], device=z.device, dtype=torch.float32)[None, :, None, None].expand_as(z)


def _keep_constants_out(model: nn.Module) -> None:
    """Take what is the same in every model out of its files, where float16 would turn a bound of 1e-9 to zero."""
    for module in model.modules():
        for name in ("bound", "target", "scale_table", "scale_bound"):
            value = dict(module.named_buffers(recurse=False)).get(name)
            if value is not None:
                module.register_buffer(name, value, persistent=False)


def _lists(model: Any) -> tuple[list, list, list]:
    return model._quantized_cdf.tolist(), model._cdf_length.flatten().tolist(), model._offset.flatten().tolist()


def _compressai() -> Any:
    """CompressAI's entropy models, imported when first needed."""
    ensure_torchvision_imports()  # CompressAI imports torchvision where it is installed
    try:
        from compressai import entropy_models
    except ModuleNotFoundError as error:
        raise ModelError("Coding continuous latents needs CompressAI: pip install 'vtc[compressai]'.") from error
    return entropy_models
