"""Infinity's tokenizer: a convolutional autoencoder around a pyramid of grids of bits.

Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis" (2412.04431).

    encode                                              decode
    image (3, H, W)                                     d bits a cell of all grids
      conv 3x3                          /1   ch           for each grid: signs/sqrt(d), bilinear to (h, w); add up
      n blocks, conv 3x3 stride 2       /2   ch m[0]      conv 3x3                            /f   ch m[-1]
      ...                                                 block, block                        /f
      n blocks                          /f   ch m[-1]     n+1 blocks, double                  /(f/2)
      block, block                      /f                ...
      norm, conv 3x3                    /f   d            n+1 blocks                          /1   ch m[0]
      for each grid, coarse to fine:                      norm, conv 3x3                      /1   3
        signs of the rest, shrunk; subtract

VQGAN's network without attention and without convolutions around the quantizer. Group norm sees the whole image: the
network is not local.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtc.hub import PretrainedMixin
from vtc.tokenizers.layers import Decoder, Encoder, MultiScaleTokenizer
from vtc.tokenizers.multi_scale_binary import INFINITY_1M, MultiScaleBinaryQuantizer


class InfinityVAE(MultiScaleTokenizer, PretrainedMixin):
    """The defaults are the tokenizer of Infinity-2B, f = 16 and 32 bits.

    That of Infinity-8B has bits=14, channel_multipliers=(1, 2, 4, 4) and sides twice as large; its generator reads
    2 x 2 cells of 14 bits as one token of 56.

    bits: d. channels, channel_multipliers, num_res_blocks: as of VQGAN.
    sides: of the square grids; the last is the latent map's at one megapixel. Weights do not depend on it. Infinity's
        generators have a list of grids for each aspect ratio: give theirs to `encode`.
    token_bits: bits of each index; by default every bit is an index, as the generator predicts them.
    """

    decoding_prefixes = ("decoder.", "token_frequencies")
    grouped_indices = True

    def __init__(self, bits: int = 32, channels: int = 128, channel_multipliers: Sequence[int] = (1, 2, 4, 4, 4),
                 num_res_blocks: int = 2, sides: Sequence[int] = INFINITY_1M,
                 token_bits: Sequence[int] | None = None) -> None:
        super().__init__()
        self.downsample = 2 ** (len(channel_multipliers) - 1)
        self.sides = tuple(sides)
        self.encoder = Encoder(channels, channel_multipliers, num_res_blocks, bits, mid_attention=False)
        self.quantizer = MultiScaleBinaryQuantizer(bits, tuple(sides),
                                                   token_bits=tuple(token_bits) if token_bits else (1,) * bits)
        self.vocab = self.quantizer.vocab
        self.decoder = Decoder(channels, channel_multipliers, num_res_blocks, bits, mid_attention=False)

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode_latents(self, z_q: Tensor) -> Tensor:
        return self.decoder(z_q)
