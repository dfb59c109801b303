"""PyramidVQ: VAR's pyramid of token grids around LocalVQ's networks, at 8 pixels a token. Our own design.

    encode                                            decode
    image (3, H, W)                                   indices of all grids
      unshuffle 4, conv 3x3        /4   w[0]            for each grid: codeword, bicubic to (h, w), phi; add up
      blocks                                            conv 1x1               /8   w[2]
      2x2 stride 2                 /8   w[1]            blocks  <- most of the work
      blocks                                            up                     /4   w[1]
      norm, conv 1x1, sphere       /8   d               blocks
      for each grid, coarse to fine:                    up                     /2   w[0]
        nearest codewords of the rest, shrunk           blocks, 1x1 + shuffle 2, conv 3x3  /1
        subtract what they decode to

VARVQVAE does the same with VQGAN's network, whose layers at full resolution cost ten times as much: this one can be
trained, and its pictures drawn, without a GPU. With one grid, `sides=(16,)`, it is an ordinary tokenizer for a raster
model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.hub import PretrainedMixin
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.layers import MultiScaleTokenizer
from vtc.tokenizers.local_vq import Decoder, Encoder
from vtc.tokenizers.multi_scale_residual import VAR_256, MultiScaleResidualQuantizer


class PyramidVQ(MultiScaleTokenizer, PretrainedMixin):
    """Multi-scale vector-quantized autoencoder. Defaults: 680 tokens for a picture of 128x128 pixels.

    codebook_size, dim: K codewords of d dimensions, shared by all grids.
    encoder_widths, encoder_depths: at /4, /8.
    decoder_widths, decoder_depths: at /2, /4, /8; `thin` channels at full resolution.
    sides: of the square grids; the last is the latent map's at the training size. Weights do not depend on it.
    beta, phis, phi_share: of the quantizer.
    """

    downsample = 8
    decoding_prefixes = ("decoder.", "quantizer.", "token_frequencies")

    def __init__(self, codebook_size: int = 512, dim: int = 16, encoder_widths: Sequence[int] = (96, 192),
                 encoder_depths: Sequence[int] = (2, 2), decoder_widths: Sequence[int] = (40, 96, 192),
                 decoder_depths: Sequence[int] = (1, 2, 3), thin: int = 16, sides: Sequence[int] = VAR_256,
                 beta: float = 0.25, phis: int = 4, phi_share: float = 0.5) -> None:
        super().__init__()
        if len(encoder_widths) != 2 or len(decoder_widths) != 3:
            raise ConfigError("PyramidVQ has two encoder widths (/4, /8) and three decoder widths (/2, /4, /8).")
        self.vocab, self.sides, self.phi_share = (codebook_size,), tuple(sides), phi_share
        self.encoder = Encoder(tuple(encoder_widths), tuple(encoder_depths), dim)
        self.quantizer = MultiScaleResidualQuantizer(codebook_size, dim, tuple(sides), beta, phis=phis,
                                                     phi_share=phi_share)
        for phi in self.quantizer.phi:  # phi starts as the identity, so the first steps of training have something to
            nn.init.dirac_(phi.weight)  # learn from
            nn.init.zeros_(phi.bias)
        self.decoder = Decoder(tuple(decoder_widths), tuple(decoder_depths), dim, thin)
        # Channels side by side in memory: 1.7 times as fast a decoder on a CPU, no copies for the layer norms.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    @property
    def token_format(self) -> str:
        """The vocabulary, and the share of the convolution in phi, which no tensor tells."""
        return f"{super().token_format} phi {self.phi_share}"

    def encode_latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode_latents(self, z_q: Tensor) -> Tensor:
        return self.decoder(z_q)

    def forward(self, images: Tensor, quantize: bool = True) -> tuple[Tensor, Quantized]:
        """Images to (reconstruction, quantized): the training path, not clamped.

        Without `quantize` the latents pass as they are, in `z_q`, with no indices: how training warms up.
        """
        if quantize:
            return super().forward(images)
        z = self.latents(images)
        height, width = images.shape[-2:]
        return (self.reconstruct(z)[..., :height, :width],
                Quantized(z, z.new_empty(0, dtype=torch.int64), z.new_zeros(())))
