"""SC-VAE: diffusers' AutoencoderKL at twice the downsampling, with no new parameters.

Zhang et al., "Diffusion-4K" (2503.18352) and "Ultra-High-Resolution Image Synthesis" (2506.01331).

    encode                                              decode
    image (3, H, W)                                     latents (h, w)
      conv 3x3, stride 2 instead of 1   /2                AutoencoderKL's decoder up to its last norm    /2
      the rest of AutoencoderKL's encoder                 twice the size by nearest neighbour            /1
    mean and log-variance               /16               conv 3x3                                       /1  3

The last two steps are done at once, on the small map. After doubling, a 3x3 convolution sees each source pixel once or
twice along an axis, so its three taps a, b, c collapse to two, {a, b + c} for one output pixel of a pair and {a + b, c}
for the other: a 2x2 convolution with four outputs a colour, then a pixel shuffle. The doubled map of 128 channels,
which is 4.3 GB in bfloat16 for an image of 4096 x 4096, never exists.

The published code cuts the map in four and stitches the results one pixel off: its output is the true one moved one
pixel down and to the right. Weights trained with it have absorbed that (`alignment="upstream"`); plain weights used at
twice the downsampling have not (`alignment="centered"`). The two differ in nothing else.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.layers import mend_group_norms
from vtc.tokenizers.tiling import warn_of_tiles
from vtc.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()  # diffusers imports torchvision where it is installed

from diffusers import AutoencoderKL  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.models.autoencoders.vae import Decoder  # noqa: E402

Alignment = Literal["upstream", "centered"]


def doubled_conv(features: Tensor, weight: Tensor, bias: Tensor | None, alignment: Alignment) -> Tensor:
    """Nearest-neighbour doubling, then a 3x3 convolution, without the doubled map.

    features: (B, C, h, w); weight: (O, C, 3, 3); returns (B, O, 2 h, 2 w).
    alignment: "centered": equal to conv2d(interpolate(features, scale_factor=2), weight, bias, padding=1);
        "upstream": that moved one pixel down and right, its first row and column seeing zeros above and to the left.
    """
    # Window k covers source pixels k-1 and k, and holds outputs 2k-1 (taps a+b, c) and 2k (taps a, b+c).
    rows = torch.stack([torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2),
                        torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2)], 1)  # O, 2, C, 2, 3
    taps = torch.stack([torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], -1),
                        torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], -1)], 2)  # O, 2, 2, C, 2, 2
    kernel = taps.flatten(0, 2)  # 4 O, C, 2, 2; in each group of four: (row, column) of the pair
    wide_bias = None if bias is None else bias.repeat_interleave(4)
    windows = F.conv2d(features, kernel, wide_bias, padding=1)  # one more than pixels along each axis
    if alignment == "centered":
        return F.pixel_shuffle(windows, 2)[..., 1:-1, 1:-1]
    return F.pixel_shuffle(windows[..., :-1, :-1], 2)


def decoder_features(decoder: Any, z: Tensor) -> Tensor:
    """Latents to the map before the last convolution of a diffusers decoder."""
    h = decoder.conv_in(z)
    for block in (decoder.mid_block, *decoder.up_blocks):
        if torch.is_grad_enabled() and decoder.gradient_checkpointing:
            h = decoder._gradient_checkpointing_func(block, h, None)
        else:
            h = block(h, None)
    return decoder.conv_act(decoder.conv_norm_out(h))


class DoublingDecoder(Decoder):
    """diffusers' decoder whose output is twice as large: the doubling and the last convolution are one step."""

    alignment: Alignment = "upstream"

    def head(self, features: Tensor) -> Tensor:
        """The (B, C, H/2, W/2) map to images (B, 3, H, W)."""
        return doubled_conv(features, self.conv_out.weight, self.conv_out.bias, self.alignment)

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Latents to images; `latent_embeds` is there for diffusers' signature and must be None."""
        if latent_embeds is not None:
            raise ConfigError("The decoder of SC-VAE takes latents alone.")
        return self.head(decoder_features(self, sample))


class DecodedWithFeatures(NamedTuple):
    """sample: (B, 3, H, W) in about [-1, 1]. features: the map before the last convolution, (B, C, H/s, W/s)."""

    sample: Tensor
    features: Tensor


class ScaleConsistentVAE(AutoencoderKL):
    """diffusers' AutoencoderKL with a strided entry; its state dict is AutoencoderKL's, and so are its methods.

    Images are in [-1, 1] as in diffusers; sides are multiples of `downsample`. `from_pretrained` reads a folder of
    AutoencoderKL as well: `ScaleConsistentVAE.from_pretrained(flux, subfolder="vae", alignment="centered")`.

    stride: 2, or 1 for AutoencoderKL itself (the teacher in training).
    alignment: "upstream" for weights of the SC-VAE authors, "centered" for AutoencoderKL's own; see the module.

    `enable_slicing` and `enable_tiling` work and count the stride. Group norm and attention see only their tile, so a
    tiled result differs from the whole, as it does in AutoencoderKL; `tiling_error` says by how much.
    """

    #: group norm and attention see the whole image
    is_local = False

    # diffusers declares no types for what it assigns
    encoder: Any
    decoder: Any
    post_quant_conv: Any
    decode: Any
    tile_sample_min_size: int
    tile_overlap_factor: float

    @register_to_config
    def __init__(self, in_channels: int = 3, out_channels: int = 3,
                 down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
                 up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",), block_out_channels: tuple[int, ...] = (64,),
                 layers_per_block: int = 1, act_fn: str = "silu", latent_channels: int = 4, norm_num_groups: int = 32,
                 sample_size: int = 32, scaling_factor: float = 0.18215, shift_factor: float | None = None,
                 latents_mean: tuple[float, ...] | None = None, latents_std: tuple[float, ...] | None = None,
                 force_upcast: bool = True, use_quant_conv: bool = True, use_post_quant_conv: bool = True,
                 mid_block_add_attention: bool = True, stride: int = 2, alignment: Alignment = "upstream") -> None:
        if stride not in (1, 2):
            raise ConfigError(f"SC-VAE's stride is 1 or 2, not {stride}.")
        if alignment not in ("upstream", "centered"):
            raise ConfigError(f"SC-VAE's alignment is 'upstream' or 'centered', not {alignment!r}.")
        super().__init__(in_channels, out_channels, down_block_types, up_block_types, block_out_channels,
                         layers_per_block, act_fn, latent_channels, norm_num_groups, sample_size, scaling_factor,
                         shift_factor, latents_mean, latents_std, force_upcast, use_quant_conv, use_post_quant_conv,
                         mid_block_add_attention)
        self.stride = stride
        self.downsample = stride * 2 ** (len(block_out_channels) - 1)
        if stride == 2:
            self.encoder.conv_in.stride = (2, 2)
            decoder = DoublingDecoder(latent_channels, out_channels, up_block_types, block_out_channels,
                                      layers_per_block, norm_num_groups, act_fn,
                                      mid_block_add_attention=mid_block_add_attention)
            decoder.alignment = alignment
            self.decoder = decoder
        mend_group_norms(cast(nn.Module, self))
        self.tile_latent_min_size = int(self.tile_sample_min_size / self.downsample)

    def decode_with_features(self, z: Tensor) -> DecodedWithFeatures:
        """Latents to images and the features that the scale-consistency loss compares, in one pass."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        features = decoder_features(self.decoder, z)
        head = self.decoder.head if self.stride == 2 else self.decoder.conv_out
        return DecodedWithFeatures(head(features), features)

    def enable_tiling(self, use_tiling: bool = True, tile: int | None = None, overlap: float | None = None) -> None:
        """Work in overlapping tiles that are blended; memory is then bounded by the tile.

        A RuntimeWarning says that tiles change the result.

        tile: side in pixels, a multiple of `downsample`; by default the config's sample_size.
        overlap: share of a tile that it has in common with the next, 0 to below 1; by default 0.25.
        """
        side = self.tile_sample_min_size if tile is None else tile
        share = self.tile_overlap_factor if overlap is None else overlap
        latent = side // self.downsample
        if side % self.downsample or side < self.downsample:
            raise ConfigError(f"A tile's side is a multiple of {self.downsample} pixels, not {side}.")
        step = int(latent * (1 - share))
        if not 0 <= share < 1 or step < 1 or step * self.downsample != int(side * (1 - share)):
            raise ConfigError(f"An overlap of {share} does not cut tiles of {latent} latents at whole latents.")
        if use_tiling:
            warn_of_tiles(cast(nn.Module, self))
        self.use_tiling = use_tiling
        self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor = side, latent, share

    @torch.no_grad()
    def tiling_error(self, z: Tensor) -> float:
        """Largest difference, in the range [-1, 1], that the present tiles make when decoding z. Needs the whole."""
        tiling, self.use_tiling = self.use_tiling, False
        try:
            whole = self.decode(z).sample
            self.use_tiling = True
            return float((self.decode(z).sample - whole).abs().max())
        finally:
            self.use_tiling = tiling
