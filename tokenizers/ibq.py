"""IBQ: VQGAN's network around a codebook that learns whole at every step.

Shi et al., "Scalable Image Tokenization with Index Backpropagation Quantization" (2412.02692). Encoder and decoder are
those of `vqgan.py`, block diagram included; the codeword is the one of the largest inner product, not the nearest.

    image -> encoder -> conv 1x1 -> arg max_k <z, e_k> -> e_k -> conv 1x1 -> decoder -> image
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vtc.tokenizers.index_backprop import IndexBackpropQuantizer
from vtc.tokenizers.vqgan import VQGAN


class IBQ(VQGAN):
    """Published with 1,024, 8,192, 16,384 and 262,144 codewords of 256 dimensions; arguments as of VQGAN.

    entropy: weight of the quantizer's entropy term (0.05 upstream, 0 leaves it out).
    """

    def __init__(self, codebook_size: int = 16384, embed_dim: int = 256, channels: int = 128,
                 channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2, z_channels: int = 256,
                 attention_levels: Sequence[int] = (4,), beta: float = 0.25, entropy: float = 0.05) -> None:
        super().__init__(codebook_size, embed_dim, channels, channel_multipliers, num_res_blocks, z_channels,
                         attention_levels, beta)
        self.quantizer.entropy = entropy  # type: ignore[assignment]  # torch's stub: Tensor or Module

    def make_quantizer(self, codebook_size: int, embed_dim: int, beta: float, legacy: bool) -> nn.Module:
        return IndexBackpropQuantizer(codebook_size, embed_dim, beta)
