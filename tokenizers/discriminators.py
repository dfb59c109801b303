"""Networks that tell reconstructions from photographs while a tokenizer trains.

Images are in [-1, 1], of any size that the strides leave something of; ConfigError says what that is.

PatchGAN: Isola et al., 1611.07004, as in taming-transformers (VQGAN, WeTok, Open-MAGVIT2, IBQ).
BlurPatchGAN: MaskBit, Weber et al., 2409.16211; an option of WeTok.
SpectralDiscriminator: Wuerstchen / Paella, Rampas et al., 2211.07292; the one SC-VAE trains with.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from vtc.errors import ConfigError
from vtc.tokenizers.layers import GroupNorm


class PatchGAN(nn.Module):
    """4x4 convolutions, stride 2; one logit for each patch: (B, 3, H, W) to (B, 1, about H/2^n, about W/2^n).

    channels: after the first convolution; they double up to eightfold. num_layers: n, convolutions of stride 2.
    norm: "batch" as published, "group" (32 groups or fewer), or "none".
    """

    def __init__(self, channels: int = 64, num_layers: int = 3,
                 norm: Literal["batch", "group", "none"] = "batch") -> None:
        super().__init__()
        if norm not in ("batch", "group", "none"):
            raise ConfigError(f"PatchGAN's norm is 'batch', 'group' or 'none', not {norm!r}.")
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, num_layers + 1):
            wider = channels * min(2**i, 8)
            # Batch norm brings its own shift, so the convolution before it has none.
            layers += [nn.Conv2d(width, wider, 4, stride=2 if i < num_layers else 1, padding=1, bias=norm != "batch"),
                       _norm(norm, wider), nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_start_small)
        # Each stride halves, rounding down, and each of the two last convolutions takes one off.
        self.least = 3 * 2**num_layers

    def forward(self, images: Tensor) -> Tensor:
        _check(images, min(images.shape[-2:]) >= self.least, f"PatchGAN needs sides of at least {self.least}")
        return self.main(images)


def _check(images: Tensor, enough: bool, need: str) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"A discriminator takes images of shape (B, 3, H, W), not {tuple(images.shape)}.")
    if not enough:
        raise ConfigError(f"This {need} pixels, not images of {images.shape[-1]}x{images.shape[-2]}: take larger crops "
                          "or fewer layers.")


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(width)
    if kind == "group":
        return GroupNorm(max(g for g in range(1, 33) if width % g == 0), width)
    return nn.Identity()


def _start_small(module: nn.Module) -> None:
    """Weights from N(0, 0.02), the usual start of a PatchGAN."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Blur(nn.Module):
    """Half the size through a small binomial filter, so that what is judged does not alias."""

    kernel: Tensor

    def __init__(self, taps: tuple[int, ...] = (1, 3, 3, 1)) -> None:
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32)
        square = line[:, None] * line
        self.register_buffer("kernel", (square / square.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        size = self.kernel.shape[-1]
        padded = _pad_same(x, size, stride=2)
        return F.conv2d(padded, self.kernel.expand(x.shape[1], 1, size, size), stride=2, groups=x.shape[1])


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros such that ceil(size / stride) outputs come out; an odd one goes to the right and below."""
    rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class BlurPatchGAN(nn.Module):
    """Convolutions, each followed by a halving (blurred or averaged) and a group norm; no batch statistics.

    channels: a multiple of 32; num_stages: halvings; blur: binomial filter (1, 3, 3, 1), else the mean of 2x2.
    (B, 3, H, W) to (B, 1, H/2^n, W/2^n) logits.
    """

    def __init__(self, channels: int = 64, num_stages: int = 3, blur: bool = True) -> None:
        super().__init__()
        if channels % 32 or num_stages < 1:
            raise ConfigError("BlurPatchGAN takes a multiple of 32 channels and at least one stage.")
        self.block_in = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.ModuleList()
        width = channels
        for i in range(num_stages):
            wider = channels * 2**i
            self.blocks.append(nn.Sequential(nn.Conv2d(width, wider, 3, padding=1), Blur() if blur else nn.AvgPool2d(2),
                                             GroupNorm(32, wider), nn.LeakyReLU(0.1)))
            width = wider
        self.to_logits = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 1, 5, padding=2))
        self.least = 1 if blur else 2**num_stages  # the blur pads, the mean does not

    def forward(self, images: Tensor) -> Tensor:
        _check(images, min(images.shape[-2:]) >= self.least, f"BlurPatchGAN needs sides of at least {self.least}")
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(x)


class SpectralDiscriminator(nn.Module):
    """Spectrally normalised 3x3 convolutions of stride 2, instance norm, and a sigmoid at the end.

    channels: of the last layers, which the widths double up to, from an eighth of it (2^(3 - depth) of it where depth
        is more than 6). depth: halvings. (B, 3, H, W) to (B, 1, H/2^depth, W/2^depth) in (0, 1). The sigmoid is part of
        SC-VAE's loss: within (0, 1) both hinges are always active.
    """

    def __init__(self, channels: int = 512, depth: int = 6) -> None:
        super().__init__()
        doublings = min(max(depth - 3, 3), depth - 1)  # as published from depth 4 on, which is the least there
        widths = [3] + [channels // 2 ** max(doublings - i, 0) for i in range(depth)]
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(spectral_norm(nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1)))
            if i:
                layers.append(nn.InstanceNorm2d(widths[i + 1]))
            layers.append(nn.LeakyReLU(0.2))
        self.encoder = nn.Sequential(*layers)
        self.shuffle = nn.Conv2d(channels, 1, 1)
        self.one_place = 2**depth

    def forward(self, images: Tensor) -> Tensor:
        # Instance norm has nothing to compare in a map of one place.
        _check(images, min(images.shape[-2:]) >= 1 and max(images.shape[-2:]) > self.one_place,
               f"SpectralDiscriminator needs a side of more than {self.one_place}")
        return self.shuffle(self.encoder(images)).sigmoid()
