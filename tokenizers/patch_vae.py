"""PatchVAE: a small convolutional VAE at stride 8 that is cheap enough to train on one processor core.

    encode                                                   decode
    image (3, H, W) in [0, 1]                                latents (C, H/8, W/8)
      the lowest C frequencies of 8x8 blocks  ──┐              blocks of those frequencies  ──┐
      4x4 pixels as channels, conv 3x3   /4     │              conv 3x3                  /8   │
      residual blocks, conv 3x3 stride 2 /8     +──► latents   residual blocks, shuffle  /4   +──► image
      residual blocks, conv 3x3          ───────┘              residual blocks, shuffle  ─────┘

It starts as what JPEG begins with, a cosine transform of blocks of luma and chroma, of which the higher frequencies are
dropped: the basis is orthonormal, so an error in the latents is as large in the image. The networks beside it, whose
last convolutions start at zero, learn what is better than that. No normalisation and no attention: each pixel depends
on a neighbourhood, so the network is local. The design is our own.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.hub import PretrainedMixin
from vtc.tokenizers.base import Latents
from vtc.tokenizers.layers import pad_to_multiple

BLOCK = 8


class PatchVAE(nn.Module, PretrainedMixin):
    """Images in [0, 1] of any size to continuous latents at stride 8 and back.

    channels: of the latents, at most 192.
    width: channels at stride 8; half as many at stride 4.
    depth: residual blocks of the decoder at stride 8; the encoder has one less, and both have one less at stride 4.

    Its posterior is what the codec that codes the latents makes it: uniform, one quantization step wide.
    """

    downsample = BLOCK
    is_local = True
    decoding_prefixes = ("synthesis", "decoder.")

    def __init__(self, channels: int = 48, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        if not 3 <= channels <= 3 * BLOCK**2 or width < 2 or width % 2 or depth < 1:
            raise ConfigError(f"PatchVAE takes 3 to {3 * BLOCK**2} channels, an even width and a depth of at least 1.")
        self.channels = channels
        basis = cosine_basis(channels)
        self.analysis = nn.Parameter(basis.clone())
        self.synthesis = nn.Parameter(basis.clone())
        half = width // 2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), _conv(48, half), *(Residual(half) for _ in range(depth - 1)),
            _conv(half, width, stride=2), *(Residual(width) for _ in range(depth - 1)), _conv(width, channels))
        self.decoder = nn.Sequential(
            _conv(channels, width), *(Residual(width) for _ in range(depth)), _conv(width, 4 * half),
            nn.PixelShuffle(2), *(Residual(half) for _ in range(depth - 1)), _conv(half, 48), nn.PixelShuffle(4))
        nn.init.zeros_(cast(nn.Conv2d, self.encoder[-1]).weight)
        nn.init.zeros_(cast(nn.Conv2d, self.decoder[-2]).weight)

    def arguments(self) -> dict[str, int]:
        """The constructor's arguments, as they stand in config.json."""
        width, depth = self.encoder[-1].in_channels, sum(isinstance(m, Residual) for m in self.encoder) // 2 + 1
        return {"channels": self.channels, "width": cast(int, width), "depth": depth}

    def encode(self, images: Tensor) -> Latents:
        """(B, 3, H, W) in [0, 1] to latents (B, C, ceil(H/8), ceil(W/8)); about [-4, 4] for the mean of a block."""
        x = pad_to_multiple(images, BLOCK) - 0.5
        with torch.autocast(x.device.type, enabled=False):  # exact where the networks need not be
            blocks = F.conv2d(x.to(self.analysis.dtype), self.analysis, stride=BLOCK)
        values = blocks + self.encoder(x.to(self.analysis.dtype))
        return Latents(values.float(), *images.shape[-2:])

    def decode(self, latents: Latents) -> Tensor:
        """Images of the true size, float32; in [0, 1] but while training, where clamping would stop gradients."""
        z = latents.values.to(self.synthesis.dtype)
        with torch.autocast(z.device.type, enabled=False):
            blocks = F.conv_transpose2d(z, self.synthesis, stride=BLOCK)
        images = (blocks + self.decoder(z)).float()[..., : latents.height, : latents.width] + 0.5
        return images if self.training else images.clamp(0, 1)


class Residual(nn.Module):
    """x + conv 3x3 (relu (conv 3x3 (relu x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)
        with torch.no_grad():  # the sum of several blocks starts near its input
            self.second.weight.mul_(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) in and out."""
        return x + self.second(F.relu(self.first(F.relu(x))))


def cosine_basis(channels: int) -> Tensor:
    """(C, 3, 8, 8), orthonormal: the lowest frequencies of luma, and of two chroma axes a sixth of them each.

    Any more than luma has go to chroma.
    """
    n = torch.arange(BLOCK, dtype=torch.float64)
    waves = torch.cos(math.pi / BLOCK * (n + 0.5) * n[:, None]) * math.sqrt(2 / BLOCK)
    waves[0] /= math.sqrt(2)
    order = sorted(((i, j) for i in range(BLOCK) for j in range(BLOCK)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    planes = torch.stack([waves[i][:, None] * waves[j] for i, j in order])  # 64, 8, 8
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    chroma = max(1, channels // 8, -(-(channels - BLOCK**2) // 2))
    counts = (channels - 2 * chroma, chroma, chroma)
    return torch.cat([planes[:count, None] * colour[:, None, None]
                      for count, colour in zip(counts, colours, strict=True)]).float()


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv
