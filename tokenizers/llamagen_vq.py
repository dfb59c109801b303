"""LlamaGen's VQ: VQGAN's network around a small codebook on the unit sphere.

Sun et al., "Autoregressive Model Beats Diffusion" (2406.06525). Encoder and decoder are those of `vqgan.py`, block
diagram included, with attention at the coarsest level; latents and codewords have 8 dimensions and unit length.

    image -> encoder -> conv 1x1 to 8 -> unit length -> nearest codeword -> conv 1x1 -> decoder -> image
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer
from vtc.tokenizers.vqgan import VQGAN


class LlamaGenVQ(VQGAN):
    """VQ-16 by default; VQ-8 has channel_multipliers (1, 2, 2, 4). Arguments as of VQGAN.

    Attention is at the coarsest level. entropy: weight of the quantizer's entropy term.
    """

    def __init__(self, codebook_size: int = 16384, embed_dim: int = 8, channels: int = 128,
                 channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2, z_channels: int = 256,
                 beta: float = 0.25, entropy: float = 0.0) -> None:
        super().__init__(codebook_size, embed_dim, channels, channel_multipliers, num_res_blocks, z_channels,
                         (len(channel_multipliers) - 1,), beta)
        self.quantizer.entropy = entropy  # type: ignore[assignment]  # torch's stub: Tensor or Module

    def make_quantizer(self, codebook_size: int, embed_dim: int, beta: float, legacy: bool) -> nn.Module:
        return GradientVectorQuantizer(codebook_size, embed_dim, beta, normalize=True)
