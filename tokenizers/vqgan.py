"""VQGAN: residual autoencoder with attention at the coarsest level, and a learned codebook.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2012.09841). The published models with f = 16
also carry "Extreme Image Compression using Fine-tuned VQGANs" (2307.08265).

    encode                                              decode
    image (3, H, W)                                     indices (h, w)
      conv 3x3                          /1   ch           codeword                            /f   embed_dim
      n blocks, conv 3x3 stride 2       /2   ch m[0]      conv 1x1                            /f   z
      n blocks, conv 3x3 stride 2       /4   ch m[1]      conv 3x3                            /f   ch m[-1]
      ...                                                 block, attention, block             /f
      n (block, attention)              /f   ch m[-1]     n+1 (block, attention), double      /(f/2)
      block, attention, block           /f                ...
      norm, conv 3x3                    /f   z            n+1 blocks                          /1   ch m[0]
      conv 1x1                          /f   embed_dim    norm, conv 3x3                      /1   3
      nearest codeword

Group norm and attention see the whole image: the network is not local.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vtc.hub import PretrainedMixin
from vtc.tokenizers.layers import Decoder, Encoder, GridTokenizer
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer


class VQGAN(GridTokenizer, PretrainedMixin):
    """The defaults are `vqgan_imagenet_f16_16384`.

    codebook_size, embed_dim: K codewords of d dimensions.
    channels, channel_multipliers, num_res_blocks: the network's width at full resolution, of each level in its units,
        fine to coarse, and n; f = 2^(levels - 1).
    z_channels: what the encoder gives and the decoder takes.
    attention_levels: 0 is the finest; upstream's `attn_resolutions` at its training resolution.
    beta, legacy: of the quantizer; `legacy` puts beta on the codebook's term, as the published weights were trained.
    """

    decoding_prefixes = ("decoder.", "post_quant_conv.", "quantizer.", "token_frequencies")
    quantizer: nn.Module

    def __init__(self, codebook_size: int = 16384, embed_dim: int = 256, channels: int = 128,
                 channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2, z_channels: int = 256,
                 attention_levels: Sequence[int] = (4,), beta: float = 0.25, legacy: bool = True) -> None:
        super().__init__()
        self.downsample = 2 ** (len(channel_multipliers) - 1)
        self.vocab = (codebook_size,)
        self.encoder = Encoder(channels, channel_multipliers, num_res_blocks, z_channels, attention_levels)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.quantizer = self.make_quantizer(codebook_size, embed_dim, beta, legacy)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.decoder = Decoder(channels, channel_multipliers, num_res_blocks, z_channels, attention_levels)

    def make_quantizer(self, codebook_size: int, embed_dim: int, beta: float, legacy: bool) -> nn.Module:
        """The quantizer of this network, with `codebook` (K, d) as its one stored tensor."""
        return GradientVectorQuantizer(codebook_size, embed_dim, beta, legacy)

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode_latents(self, z_q: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_q))
