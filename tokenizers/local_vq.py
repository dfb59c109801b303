"""LocalVQ: the photograph tokenizer that vtc ships. Our own design.

    encode                                            decode
    image (3, H, W)                                   indices (H/16, W/16)
      unshuffle 4, conv 3x3        /4   w[0]            codeword, conv 1x1     /16  w[3]
      blocks                                            blocks  <- most of the work
      2x2 stride 2                 /8   w[1]            up        /8   w[2]
      blocks                                            blocks
      2x2 stride 2                 /16  w[2]            up        /4   w[1]
      blocks                                            blocks
      norm, conv 1x1               /16  d               up        /2   w[0]
      nearest of K codewords                            blocks, 1x1 + shuffle 2, conv 3x3  /1

Every operation looks at a bounded neighbourhood: no normalisation over space, no attention. So an image can be coded
in tiles with a halo, and the result is the one of the whole. Dense 3x3 convolutions because they are what a CPU does
best (scripts/bench_blocks.py); the full resolution, where memory and not arithmetic is the limit, gets one thin
convolution, which also smooths the 2x2 lattice that the last shuffle would leave.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.hub import PretrainedMixin
from vtc.tokenizers.base import Quantized, Tokenizer, TokenLayout, Tokens
from vtc.tokenizers.vector_quantizer import VectorQuantizer


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position: (B, C, H, W) in and out, nothing shared over space."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + conv1x1(silu(conv3x3(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.proj = nn.Conv2d(width, width, 1)
        with torch.no_grad():
            self.proj.weight.mul_(0.1)  # a deep stack starts near the identity
        _zero_bias(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(F.silu(self.conv(self.norm(x))))


def uniform_frequencies(codebook_size: int, total: int = 2**20) -> Tensor:
    """(1, K) int32 that adds up to `total`, as equal as whole numbers can be."""
    share, rest = divmod(total, codebook_size)
    return (share + (torch.arange(codebook_size) < rest)).int()[None]


def _zero_bias(conv: nn.Conv2d) -> None:
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def blocks(width: int, depth: int) -> nn.Sequential:
    """`depth` blocks in a row."""
    return nn.Sequential(*(Block(width) for _ in range(depth)))


class Up(nn.Module):
    """Conv 1x1 to four times the channels, each group of four becomes a 2x2 square of pixels, then a [1 2 1] blur.

    The blur has its zero just at the frequency of the squares, so the shuffle leaves no lattice at this scale; what the
    following convolutions want sharp they sharpen. StyleGAN 2 filters its upsampling for the same reason.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, 4 * width_out, 1)
        with torch.no_grad():  # the four pixels of a square start equal
            self.conv.weight.copy_(self.conv.weight[::4].repeat_interleave(4, 0))
        _zero_bias(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.pixel_shuffle(self.conv(x), 2), (1, 1, 1, 1), mode="replicate")
        return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2, stride=1)  # [1 1] twice along each axis is [1 2 1]


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1], H and W multiples of 16, to (B, dim, H/16, W/16)."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * 4 * 4, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(blocks(w, n) for w, n in zip(widths, depths, strict=True))
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.norm = ChannelNorm(widths[-1])
        self.head = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, w[2], H/16, W/16): all but the projection, what a codebook family shares."""
        x = self.stages[0](self.stem(F.pixel_unshuffle(x, 4)))
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            x = stage(down(x))
        return self.norm(x)

    def project(self, features: Tensor) -> Tensor:
        """(B, w[2], h, w) features to (B, dim, h, w) latents."""
        z = self.head(features).float()
        # Latents live on the sphere of radius sqrt(d): commitment cannot shrink them, codewords cannot run away.
        return F.normalize(z, dim=1) * z.shape[1] ** 0.5


class Decoder(nn.Module):
    """(B, dim, h, w) codewords to (B, 3, 16 h, 16 w), about [-1, 1]. `widths` and `depths` go from /2 to /16."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], dim: int, thin: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(dim, widths[-1], 1)
        self.stages = nn.ModuleList(blocks(w, n) for w, n in zip(widths, depths, strict=True))
        self.ups = nn.ModuleList(Up(b, a) for a, b in zip((thin, *widths), widths, strict=False))
        self.head = nn.Conv2d(thin, 3, 3, padding=1)

    def forward(self, z_q: Tensor) -> Tensor:
        x = self.stem(z_q)
        for stage, up in zip(reversed(self.stages), reversed(self.ups), strict=True):
            x = up(stage(x))
        return self.head(F.silu(x))


class LocalVQ(Tokenizer, PretrainedMixin):
    """Vector-quantized autoencoder for photographs at 16 pixels a token, local throughout.

    codebook_size, dim: K codewords of d dimensions.
    encoder_widths, encoder_depths: at /4, /8, /16.
    decoder_widths, decoder_depths: at /2, /4, /8, /16; `thin` channels at full resolution.
    """

    downsample = 16
    is_local = True
    decoding_prefixes = ("decoder.", "quantizer.", "token_frequencies")

    def __init__(self, codebook_size: int = 8192, dim: int = 32,
                 encoder_widths: tuple[int, ...] = (64, 128, 256), encoder_depths: tuple[int, ...] = (1, 2, 3),
                 decoder_widths: tuple[int, ...] = (40, 80, 160, 320), decoder_depths: tuple[int, ...] = (2, 2, 2, 4),
                 thin: int = 16) -> None:
        super().__init__()
        if len(encoder_widths) != 3 or len(decoder_widths) != 4:
            raise ConfigError("LocalVQ has three encoder widths (/4, /8, /16) and four decoder widths (/2 to /16).")
        self.encoder = Encoder(tuple(encoder_widths), tuple(encoder_depths), dim)
        self.quantizer = VectorQuantizer(codebook_size, dim)
        self.decoder = Decoder(tuple(decoder_widths), tuple(decoder_depths), dim, thin)
        # Until `scripts/fit_tables.py` has counted a folder of photographs, every word is equally likely.
        self.token_frequencies = uniform_frequencies(codebook_size)
        # A 3x3 convolution and a blur reach one position further at their resolution.
        encoder_reach = 4 + sum(n * s for n, s in zip(encoder_depths, (4, 8, 16), strict=True))
        blurs = 1 + 2 + 4 + 8
        decoder_reach = 1 + blurs + sum(n * s for n, s in zip(decoder_depths, (2, 4, 8, 16), strict=True))
        self.halo = -(-max(encoder_reach, decoder_reach) // 16) * 16 + 16
        # Channels side by side in memory: 1.7 times as fast a decoder on a CPU, no copies for the layer norms.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((-(-height // 16), -(-width // 16)),), (self.quantizer.codebook_size,))

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to unquantized (B, d, ceil(H/16), ceil(W/16)); edges are replicated."""
        return self.encoder.project(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the encoder's last projection sees of images (B, 3, H, W) in [0, 1]."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
        return self.encoder.features(padded * 2 - 1)

    def forward(self, images: Tensor, quantize: bool = True) -> tuple[Tensor, Quantized]:
        """Images whose sides are multiples of 16 to (reconstruction, quantized): the training path, not clamped.

        Without `quantize` the latents pass as they are, in `z_q`, with no indices: how training warms up.
        """
        z = self.latents(images)
        quantized = self.quantizer(z) if quantize else Quantized(z, z.new_empty(0, dtype=torch.int64), z.new_zeros(()))
        return self.reconstruct(quantized.z_q), quantized

    def reconstruct(self, z_q: Tensor) -> Tensor:
        """(B, d, h, w) codewords to (B, 3, 16 h, 16 w) images, not clamped."""
        return self.decoder(z_q) * 0.5 + 0.5

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        height, width = images.shape[-2:]
        z = self.latents(images)
        indices = self.quantizer(z).indices.flatten(1).unsqueeze(-1)
        return Tokens(indices, self.layout(height, width), height, width)

    @torch.no_grad()
    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        (grid,) = tokens.grids()
        images = self.reconstruct(self.quantizer.indices_to_codes(grid[..., 0]))
        return images[..., : tokens.height, : tokens.width].clamp(0, 1)
