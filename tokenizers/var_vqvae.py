"""VAR's tokenizer: VQGAN's network around a pyramid of token grids.

Tian et al., "Visual Autoregressive Modeling" (2404.02905).

    encode                                              decode
    image (3, H, W)                                     indices of all grids
      conv 3x3                          /1   ch           for each grid: codeword, bicubic to (h, w), phi; add up
      n blocks, conv 3x3 stride 2       /2   ch m[0]      conv 3x3                            /f   z
      ...                                                 conv 3x3                            /f   ch m[-1]
      n (block, attention)              /f   ch m[-1]     block, attention, block             /f
      block, attention, block           /f                n+1 (block, attention), double      /(f/2)
      norm, conv 3x3, conv 3x3          /f   z            ...
      for each grid, coarse to fine:                      n+1 blocks                          /1   ch m[0]
        nearest codewords of the rest, shrunk             norm, conv 3x3                      /1   3
        subtract what they decode to

The encoder pads to the right and below only, attention stores its three projections as one, and the convolutions around
the quantizer are 3x3. Group norm and attention see the whole image: the network is not local.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vtc.hub import PretrainedMixin
from vtc.tokenizers.layers import Decoder, Encoder, MultiScaleTokenizer
from vtc.tokenizers.multi_scale_residual import VAR_256, MultiScaleResidualQuantizer


class VARVQVAE(MultiScaleTokenizer, PretrainedMixin):
    """The defaults are the published `vae_ch160v4096z32` at 256 px: 680 tokens. At 512 px: sides=VAR_512, 2240 tokens.

    codebook_size, z_channels: K and d. channels, channel_multipliers, num_res_blocks: as of VQGAN.
    sides: of the square grids; the last is the latent map's at the training size. Weights do not depend on it.
    attention, mid_attention: at the coarsest level and in the middle.
    beta, normalize, phis, phi_share: of the quantizer.
    """

    decoding_prefixes = ("decoder.", "post_quant_conv.", "quantizer.", "token_frequencies")

    def __init__(self, codebook_size: int = 4096, z_channels: int = 32, channels: int = 160,
                 channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 sides: Sequence[int] = VAR_256, attention: bool = True, mid_attention: bool = True,
                 beta: float = 0.25, normalize: bool = False, phis: int = 4, phi_share: float = 0.5) -> None:
        super().__init__()
        levels = (len(channel_multipliers) - 1,) if attention else ()
        self.downsample = 2 ** (len(channel_multipliers) - 1)
        self.vocab, self.sides, self.phi_share = (codebook_size,), tuple(sides), phi_share
        self.encoder = Encoder(channels, channel_multipliers, num_res_blocks, z_channels, levels, mid_attention,
                               "fused")
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.quantizer = MultiScaleResidualQuantizer(codebook_size, z_channels, tuple(sides), beta, normalize, phis,
                                                     phi_share)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.decoder = Decoder(channels, channel_multipliers, num_res_blocks, z_channels, levels, mid_attention,
                               "fused")

    @property
    def token_format(self) -> str:
        """The vocabulary, and the share of the convolution in phi, which no tensor tells."""
        return f"{super().token_format} phi {self.phi_share}"

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode_latents(self, z_q: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_q))
