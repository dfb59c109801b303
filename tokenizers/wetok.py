"""WeTok: convolutional autoencoder, bits in groups, a decoder that may draw what the bits leave out.

Zhuang et al., "WeTok: Powerful Discrete Tokenization for High-Fidelity Visual Reconstruction" (2508.05599).

    encode                                             decode
    image (3, H, W)                                    indices (h, w, g)
      conv 3x3                         /1   ch m[0]      bits as -1, +1: codes q              /f  g d'
      R blocks, conv 3x3 stride 2      /2   ch m[0]      (generative: concatenate noise       /f  2 g d')
      R blocks, conv 3x3 stride 2      /4   ch m[1]      conv 3x3, R blocks                   /f  ch m[-1]
      ...                                                norm by q, R blocks, conv, shuffle   /(f/2)
      R blocks                         /f   ch m[-1]     ...
      R blocks, norm, conv 1x1         /f   g d'         norm by q, R blocks                  /1  ch m[0]
      signs, d' bits an index          /f   g            norm, conv 3x3                       /1  3

"Norm by q" is a group norm whose scale and shift are linear in the standard deviation and the mean of the codes over
the whole image. That, and the group norms, make the network non-local: tiles do not add up to the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.hub import PretrainedMixin
from vtc.tokenizers.base import Tokens
from vtc.tokenizers.layers import GridTokenizer, GroupNorm, ResBlock, group_norm, swish
from vtc.tokenizers.lookup_free import GroupLFQ

Generative = TypeVar("Generative", bound="WeTok")


def res_blocks(width_in: int, width_out: int, depth: int) -> nn.ModuleList:
    """`depth` residual blocks without biases; the first one changes the width."""
    return nn.ModuleList(ResBlock(width_out if i else width_in, width_out, bias=False) for i in range(depth))


class Down(nn.Module):
    """Residual blocks, then a 3x3 convolution of stride 2 padded on all sides; none at the coarsest level."""

    def __init__(self, width_in: int, width_out: int, depth: int, downsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(width_in, width_out, depth)
        self.downsample = nn.Conv2d(width_out, width_out, 3, stride=2, padding=1) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] to (B, z_channels, H/f, W/f)."""

    def __init__(self, channels: int, channel_multipliers: Sequence[int], num_res_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [channels] + [channels * m for m in channel_multipliers]
        last = len(widths) - 2
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(Down(a, b, num_res_blocks, i < last)
                                  for i, (a, b) in enumerate(pairwise(widths)))
        self.mid_block = res_blocks(widths[-1], widths[-1], num_res_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        for block in self.mid_block:
            h = block(h)
        return self.conv_out(swish(self.norm_out(h)))


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift follow the codes: linear in their deviation and mean over space."""

    def __init__(self, z_channels: int, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(32, width, eps=1e-6, affine=False)
        self.gamma = nn.Linear(z_channels, width)
        self.beta = nn.Linear(z_channels, width)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        flat = codes.flatten(2)
        # The weights were trained with the unbiased variance, which one position does not have: none is 0 there.
        variance = flat.var(2) if flat.shape[2] > 1 else torch.zeros_like(flat[..., 0])
        scale = self.gamma((variance + 1e-6).sqrt())
        shift = self.beta(flat.mean(2))
        return self.norm(x).mul(scale[..., None, None]).add_(shift[..., None, None])


class DepthToSpace(nn.Module):
    """Conv 3x3 to four times the channels, then to twice the size.

    Channel (2 a + b) C + c is pixel (a, b) of each 2x2 square of channel c: not the order of torch's pixel_shuffle.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        squares = self.conv1(x).unflatten(1, (2, 2, -1))  # B, a, b, C, H, W
        return squares.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class Up(nn.Module):
    """Residual blocks, then twice the size; the finest level has it already."""

    def __init__(self, width_in: int, width_out: int, depth: int, upsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(width_in, width_out, depth)
        self.upsample = DepthToSpace(width_out) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Decoder(nn.Module):
    """(B, z_channels, h, w) codes to (B, 3, f h, f w), about [-1, 1]; generative: and noise of the codes' shape."""

    def __init__(self, channels: int, channel_multipliers: Sequence[int], num_res_blocks: int, z_channels: int,
                 generative: bool) -> None:
        super().__init__()
        widths = [channels * m for m in channel_multipliers]
        inputs = [*widths[1:], widths[-1]]  # what enters level i
        self.conv_in = nn.Conv2d(z_channels * (2 if generative else 1), widths[-1], 3, padding=1)
        self.mid_block = res_blocks(widths[-1], widths[-1], num_res_blocks)
        self.up = nn.ModuleList(Up(a, b, num_res_blocks, i > 0)
                                for i, (a, b) in enumerate(zip(inputs, widths, strict=True)))
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(z_channels, a) for a in inputs)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor, noise: Tensor | None = None) -> Tensor:
        h = self.conv_in(codes) if noise is None else self._enter(codes, noise)
        for block in self.mid_block:
            h = block(h)
        for norm, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            h = level(norm(h, codes))
        return self.conv_out(swish(self.norm_out(h)))

    def _enter(self, codes: Tensor, noise: Tensor) -> Tensor:
        """`conv_in` of codes and noise side by side, as two sums: where the noise weighs zero, the other is exact.

        Added in place, which keeps the order in memory too, on which the rounding of what follows depends.
        """
        of_codes, of_noise = (w.contiguous() for w in self.conv_in.weight.chunk(2, 1))
        return F.conv2d(codes, of_codes, self.conv_in.bias, padding=1).add_(F.conv2d(noise, of_noise, padding=1))


class WeTok(GridTokenizer, PretrainedMixin):
    """The published models have 256 channels, 4 blocks a level, groups of 8 bits.

    channels: width of multiplier 1; channel_multipliers: of each level, fine to coarse: f = 2^(levels - 1).
    groups, bits_per_group: g indices of d' bits at each position.
    generative: the decoder takes noise besides the codes, see `decode` and `to_generative`.
    codebook_entropy, token_bits, compat: of the quantizer, see GroupLFQ. Its weights are attributes of `quantizer`.

        published         multipliers        groups   f    bits per pixel
        compratio24       1, 2, 2, 4         8        8    1
        compratio48       1, 2, 2, 4         4        8    0.5
        compratio192      1, 1, 2, 2, 4      4        16   0.125
        compratio768      1, 1, 2, 2, 4, 8   4        32   0.03125, generative
    """

    decoding_prefixes = ("decoder.", "token_frequencies")
    grouped_indices = True
    quantizer: GroupLFQ

    def __init__(self, channels: int = 256, channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
                 num_res_blocks: int = 4, groups: int = 4, bits_per_group: int = 8, generative: bool = False,
                 codebook_entropy: Literal["pooled", "per_group"] = "pooled",
                 token_bits: Sequence[int] | None = None, compat: Literal["upstream"] | None = None) -> None:
        super().__init__()
        z_channels = groups * bits_per_group
        self.channels, self.channel_multipliers = channels, tuple(channel_multipliers)
        self.num_res_blocks, self.generative = num_res_blocks, generative
        self.downsample = 2 ** (len(channel_multipliers) - 1)
        self.encoder = Encoder(channels, channel_multipliers, num_res_blocks, z_channels)
        self.quantizer = GroupLFQ(groups, bits_per_group, codebook_entropy=codebook_entropy,
                                  token_bits=tuple(token_bits) if token_bits else None, compat=compat)
        self.decoder = Decoder(channels, channel_multipliers, num_res_blocks, z_channels, generative)
        self.vocab = self.quantizer.vocab

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode_latents(self, z_q: Tensor, generator: torch.Generator | None = None,
                       noise: Tensor | None = None) -> Tensor:
        """Codes to (B, 3, f h, f w), about [-1, 1]. A generative decoder draws `noise` where none is given."""
        if not self.generative:
            if noise is not None:
                raise ConfigError("This WeTok has a plain decoder, which takes no noise; see `to_generative`.")
            return self.decoder(z_q)
        if noise is None:
            device = z_q.device if generator is None else generator.device
            noise = torch.randn(z_q.shape, generator=generator, device=device)
        if noise.shape != z_q.shape:
            raise ConfigError(f"The noise has the shape of the codes, {tuple(z_q.shape)}, not {tuple(noise.shape)}.")
        return self.decoder(z_q, noise.to(z_q))

    def reconstruct(self, z_q: Tensor, generator: torch.Generator | None = None,
                    noise: Tensor | None = None) -> Tensor:
        """(B, g d', h, w) codes to (B, 3, f h, f w) images, not clamped."""
        return self.decode_latents(z_q, generator, noise) * 0.5 + 0.5

    @torch.no_grad()
    def decode(self, tokens: Tokens, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Images in [0, 1] of the true size.

        A generative decoder takes `noise` (B, g d', h, w), or draws it from N(0, 1) with `generator`, or, where both
        are missing, with torch's global one: the same tokens then give another image each time.
        """
        images = self.reconstruct(self.codes(tokens), generator, noise)
        return images[..., : tokens.height, : tokens.width].clamp(0, 1)

    def to_generative(self) -> WeTok:
        """A copy with a generative decoder that ignores its noise so far: the weights that read it are zero.

        Both decode alike, to the last bit; training the copy (encoder frozen, L1 + LPIPS + GAN) teaches it to use the
        noise.
        """
        quantizer = self.quantizer
        return self._grown(WeTok(self.channels, self.channel_multipliers, self.num_res_blocks, quantizer.groups,
                                 quantizer.bits, True, quantizer.codebook_entropy, quantizer.token_bits,
                                 quantizer.compat))

    def _grown(self, grown: Generative) -> Generative:
        if self.generative:
            raise ConfigError("This tokenizer has a generative decoder already.")
        tensors = dict(self.state_dict())
        weight = tensors["decoder.conv_in.weight"]
        tensors["decoder.conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], 1)
        grown.token_frequencies = self.token_frequencies
        grown.load_state_dict(tensors)
        return grown.train(self.training)
