"""Parts that several networks share: the residual autoencoder of the VQGAN paper, and the grid tokenizer.

The encoder and decoder below (Esser et al., "Taming Transformers", 2012.09841; first in Ho et al., 2006.11239) carry
VQGAN, IBQ, LlamaGen's VQ, VAR's and Infinity's tokenizers. They differ in where attention stands, in how its
projections are stored, and in what follows. Sub-modules bear the names of the published checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized, Tokenizer, TokenLayout, Tokens
from vtc.tokenizers.residual_quantizer import ResidualQuantizer

#: how an attention block stores its projections: three 1x1 convolutions, or one of three times the width
Projections = Literal["separate", "fused"]


class _Swish(torch.autograd.Function):
    """x sigmoid(x), rounded as the published code rounds it, keeping x alone for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sigmoid(x).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x)


def swish(x: Tensor) -> Tensor:
    """x sigmoid(x).

    torch's silu differs in the last bit, and a sign or a nearest codeword may hang on that: with this form
    WeTok's and diffusers VQModel's latents equal those of the published code bit for bit (same torch, CPU).
    """
    return _Swish.apply(x) if x.requires_grad and torch.is_grad_enabled() else torch.sigmoid(x).mul_(x)


class GroupNorm(nn.GroupNorm):
    """torch's, without its refusal of one value a group: a 1x1 latent of 32 channels normalises to the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) in and out."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def mend_group_norms(network: nn.Module) -> None:
    """Gives every group norm in a network of others the class above; parameters and their names stay."""
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm:
                norm = GroupNorm(child.num_groups, child.num_channels, child.eps, affine=False)
                norm.affine, norm.weight, norm.bias = child.affine, child.weight, child.bias
                setattr(module, name, norm.train(child.training))


def group_norm(width: int) -> nn.GroupNorm:
    """Group norm as all these networks use it: 32 groups, eps 1e-6. Its statistics run over the whole image."""
    if width % 32:
        raise ConfigError(f"These networks normalise in 32 groups, so widths are multiples of 32, not {width}.")
    return GroupNorm(32, width, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution carries x where the width changes."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=bias)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1, bias=bias)
        self.same_width = width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return h + (x if self.same_width else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """x + attention over all positions, one head as wide as the layer."""

    def __init__(self, width: int, projections: Projections = "separate") -> None:
        super().__init__()
        self.norm = group_norm(width)
        if projections == "fused":
            self.qkv = nn.Conv2d(width, 3 * width, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)
        self.fused = projections == "fused"

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        maps = self.qkv(h).chunk(3, dim=1) if self.fused else (self.q(h), self.k(h), self.v(h))
        q, k, v = (m.flatten(2).transpose(1, 2).unsqueeze(1) for m in maps)  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).view_as(x))


class Downsample(nn.Module):
    """3x3 convolution of stride 2. Zeros go to the right and below only, as the published weights expect."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, attention: bool, projections: Projections) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width)
        self.attn_1 = AttnBlock(width, projections) if attention else nn.Identity()
        self.block_2 = ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it, then the resampling."""

    def __init__(self, width_in: int, width_out: int, depth: int, attention: bool, projections: Projections) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * depth
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(width_out, projections) for _ in range(depth if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] to (B, z_channels, H/f, W/f), f = 2^(levels - 1); H and W are multiples of f.

    channels: width at full resolution; channel_multipliers: width of each level in its units, fine to coarse.
    num_res_blocks: a level. attention_levels: which levels attend, 0 the finest; mid_attention: if the middle does.
    """

    def __init__(self, channels: int, channel_multipliers: Sequence[int], num_res_blocks: int, z_channels: int,
                 attention_levels: Sequence[int] = (), mid_attention: bool = True,
                 projections: Projections = "separate") -> None:
        super().__init__()
        widths = [channels] + [channels * m for m in channel_multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(pairwise(widths)):
            level = Level(a, b, num_res_blocks, i in attention_levels, projections)
            if i < len(channel_multipliers) - 1:
                level.downsample = Downsample(b)
            self.down.append(level)
        self.mid = Middle(widths[-1], mid_attention, projections)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) to (B, 3, f h, f w), about [-1, 1]; the encoder mirrored, one more block a level."""

    def __init__(self, channels: int, channel_multipliers: Sequence[int], num_res_blocks: int, z_channels: int,
                 attention_levels: Sequence[int] = (), mid_attention: bool = True,
                 projections: Projections = "separate") -> None:
        super().__init__()
        widths = [channels * m for m in channel_multipliers]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], mid_attention, projections)
        self.up = nn.ModuleList()  # up[i] is level i, so the last one runs first
        for i, b in enumerate(widths):
            a = widths[min(i + 1, len(widths) - 1)]
            level = Level(a, b, num_res_blocks + 1, i in attention_levels, projections)
            if i > 0:
                level.upsample = Upsample(b)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(swish(self.norm_out(h)))


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Images whose sides are multiples of `factor`: the last row and column are repeated below and to the right.

    ConfigError unless they are (B, 3, H, W), floating-point and of at least one pixel.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape[2:]:
        raise ConfigError("A network takes float images of shape (B, 3, H, W) in [0, 1], not "
                          f"{images.dtype} of shape {tuple(images.shape)}.")
    height, width = images.shape[-2:]
    if height % factor == 0 and width % factor == 0:
        return images
    return F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")


class FormattedTokenizer(Tokenizer):
    """Base of the tokenizers below: their fingerprint also covers what no tensor tells of the meaning of indices."""

    #: called with latents it gives a `Quantized`; it has `indices_to_codes`
    quantizer: Any
    #: words of each group's codebook
    vocab: tuple[int, ...]

    @property
    def token_format(self) -> str:
        """The vocabularies, and the order of the bits in an index where it is made of bits."""
        return f"{self.vocab} {getattr(self.quantizer, 'bit_order', '')}"

    def fingerprint(self) -> bytes:
        """Eight bytes that change when a tensor that decoding reads changes, or the meaning of indices."""
        return hashlib.sha256(super().fingerprint() + self.token_format.encode()).digest()[:8]


class GridTokenizer(FormattedTokenizer):
    """A tokenizer with one grid of tokens: encoder, quantizer, decoder.

    A network states `downsample`, `vocab` and `quantizer`, and implements `encode_latents` and `decode_latents`,
    both in the network's own range [-1, 1]. Padding, cropping and the public range are done here.
    """

    #: whether the quantizer's indices have a last dimension of groups, (B, h, w, G), or none, (B, h, w)
    grouped_indices: bool = False

    def encode_latents(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides multiples of `downsample`, to unquantized (B, d, H/f, W/f)."""
        raise NotImplementedError

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """(B, d, h, w) codes to (B, 3, f h, f w), about [-1, 1]."""
        raise NotImplementedError

    def layout(self, height: int, width: int) -> TokenLayout:
        f = self.downsample
        return TokenLayout(((-(-height // f), -(-width // f)),), self.vocab)

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to unquantized (B, d, ceil(H/f), ceil(W/f)); edges are replicated."""
        return self.encode_latents(pad_to_multiple(images, self.downsample) * 2 - 1)

    def reconstruct(self, z_q: Tensor) -> Tensor:
        """(B, d, h, w) codes to (B, 3, f h, f w) images, not clamped."""
        return self.decode_latents(z_q) * 0.5 + 0.5

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Images to (reconstruction of the same size, quantized): the training path, not clamped."""
        quantized = self.quantizer(self.latents(images))
        height, width = images.shape[-2:]
        return self.reconstruct(quantized.z_q)[..., :height, :width], quantized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        height, width = images.shape[-2:]
        indices = self.quantizer(self.latents(images)).indices
        layout = self.layout(height, width)
        return Tokens(indices.reshape(len(images), layout.length, layout.groups), layout, height, width)

    def codes(self, tokens: Tokens) -> Tensor:
        """The (B, d, h, w) codes that the tokens name."""
        (grid,) = tokens.grids()
        return self.quantizer.indices_to_codes(grid if self.grouped_indices else grid[..., 0])

    @torch.no_grad()
    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        images = self.reconstruct(self.codes(tokens))
        return images[..., : tokens.height, : tokens.width].clamp(0, 1)

    @property
    def stages(self) -> Literal["scales", "groups"] | None:
        return "groups" if isinstance(self.quantizer, ResidualQuantizer) else None

    @torch.no_grad()
    def decode_stages(self, tokens: Tokens, count: int) -> Tensor:
        if self.stages is None:
            return super().decode_stages(tokens, count)
        (grid,) = tokens.grids()
        images = self.reconstruct(self.quantizer.indices_to_codes(grid[..., :count]))
        return images[..., : tokens.height, : tokens.width].clamp(0, 1)


class MultiScaleTokenizer(FormattedTokenizer):
    """A tokenizer whose image is a pyramid of token grids, coarse to fine; all grids are codes of one latent map.

    A network states `downsample`, `vocab`, `sides` and `quantizer` (a `MultiScaleQuantizer`), and implements
    `encode_latents` and `decode_latents` as a `GridTokenizer` does.
    """

    #: whether the quantizer's indices have a last dimension of groups
    grouped_indices: bool = False
    #: sides of the square grids that the weights were trained with; the last is the latent map's
    sides: tuple[int, ...]

    def encode_latents(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides multiples of `downsample`, to unquantized (B, d, H/f, W/f)."""
        raise NotImplementedError

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """(B, d, h, w) codes to (B, 3, f h, f w), about [-1, 1]."""
        raise NotImplementedError

    def scales(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """The grids of a height x width image: `sides`, stretched along each axis to the latent map and rounded.

        For the size that the weights were trained with these are the trained grids. There are always as many.
        """
        last = self.sides[-1]
        rows, columns = -(-height // self.downsample), -(-width // self.downsample)
        return tuple((max(1, (2 * s * rows + last) // (2 * last)), max(1, (2 * s * columns + last) // (2 * last)))
                     for s in self.sides)

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(self.scales(height, width), self.vocab)

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to unquantized (B, d, ceil(H/f), ceil(W/f)); edges are replicated."""
        return self.encode_latents(pad_to_multiple(images, self.downsample) * 2 - 1)

    def reconstruct(self, z_q: Tensor) -> Tensor:
        """(B, d, h, w) codes to (B, 3, f h, f w) images, not clamped."""
        return self.decode_latents(z_q) * 0.5 + 0.5

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Images to (reconstruction of the same size, quantized): the training path, not clamped."""
        height, width = images.shape[-2:]
        quantized = self.quantizer(self.latents(images), self.scales(height, width))
        return self.reconstruct(quantized.z_q)[..., :height, :width], quantized

    @torch.no_grad()
    def encode(self, images: Tensor, scales: Sequence[tuple[int, int]] | None = None) -> Tokens:
        """Images to tokens; `scales` replaces the grids of `scales(height, width)`, the last staying the map's size."""
        height, width = images.shape[-2:]
        steps = self.scales(height, width) if scales is None else tuple(scales)
        indices = self.quantizer(self.latents(images), steps).indices
        return Tokens(indices if self.grouped_indices else indices[..., None], TokenLayout(steps, self.vocab), height,
                      width)

    def codes(self, tokens: Tokens) -> Tensor:
        """The (B, d, h, w) sum of codes that the tokens name."""
        indices = tokens.indices if self.grouped_indices else tokens.indices[..., 0]
        return self.quantizer.indices_to_codes(indices, tokens.layout.scales)

    @torch.no_grad()
    def decode(self, tokens: Tokens, generator: torch.Generator | None = None) -> Tensor:
        return self._crop(self.codes(tokens), tokens)

    @property
    def stages(self) -> Literal["scales", "groups"] | None:
        return "scales"

    @torch.no_grad()
    def decode_stages(self, tokens: Tokens, count: int) -> Tensor:
        if not 1 <= count <= len(tokens.layout.scales):
            raise ConfigError(f"These tokens have 1 to {len(tokens.layout.scales)} scales, not {count}.")
        length = sum(rows * columns for rows, columns in tokens.layout.scales[:count])
        indices = tokens.indices[:, :length] if self.grouped_indices else tokens.indices[:, :length, 0]
        return self._crop(self.quantizer.partial_sums(indices, tokens.layout.scales)[-1], tokens)

    @torch.no_grad()
    def decode_progressively(self, tokens: Tokens) -> list[Tensor]:
        """The image after each scale, coarse to fine; the last one is what `decode` gives."""
        indices = tokens.indices if self.grouped_indices else tokens.indices[..., 0]
        return [self._crop(total, tokens) for total in self.quantizer.partial_sums(indices, tokens.layout.scales)]

    def _crop(self, z_q: Tensor, tokens: Tokens) -> Tensor:
        return self.reconstruct(z_q)[..., : tokens.height, : tokens.width].clamp(0, 1)
