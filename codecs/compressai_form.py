"""TokenCodec behind CompressAI's contract, so that code which evaluates CompressAI's models evaluates tokens, too.

    forward     x (B, 3, H, W) -> {"x_hat": (B, 3, H, W), "likelihoods": {"y": (B, L, G)}}
    compress    x              -> {"strings": [[stream of each image]], "shape": (rows, columns)}
    decompress  strings, shape -> {"x_hat": (B, 3, H, W)}

CompressAI's strings need their model, shape and size besides; a stream of vtc is a whole file, so its length counts
everything. (`TokenCodec.compress` gives the streams alone.)
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError
from vtc.tokenizers.tiling import decode_tiled, encode_tiled


class Compressed(TypedDict):
    """What CompressAI's `compress` gives: strings by kind of latent and image, and the grid of the finest tokens."""

    strings: list[list[bytes]]
    shape: tuple[int, int]


class CompressAIForm:
    """`codec` with `compress`, `decompress` and `forward` as a model of CompressAI has them."""

    def __init__(self, codec: TokenCodec) -> None:
        self.codec = codec

    def __call__(self, x: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        return self.forward(x)

    @torch.no_grad()
    def forward(self, x: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """Images as they will be decoded, and the probability of each token in float64: under the learned prior or the
        static tables, whichever gives an image fewer bits; without either, every word is equally likely.

        The sum of -log2 is what streams need but for the container and about three bytes.
        """
        tokens = encode_tiled(self.codec.tokenizer, x)
        layout, tables, prior = tokens.layout, self.codec.tables, self.codec.prior_for(tokens.layout)
        indices = tokens.indices.cpu().numpy()
        likelihoods = np.broadcast_to(1 / np.array(layout.vocab, dtype=np.float64), indices.shape).copy()
        if tables is not None:
            for where, group, row in tables.runs(layout):
                likelihoods[:, where, group] = (row / row.sum())[indices[:, where, group]]
        if prior is not None:
            for own, found in zip(indices, likelihoods, strict=True):
                learned = prior.probabilities(own[:, 0], layout.scales[0], layout.vocab[0])[:, None]
                if np.log2(learned).sum() > np.log2(found).sum():
                    found[:] = learned
        return {"x_hat": decode_tiled(self.codec.tokenizer, tokens),
                "likelihoods": {"y": torch.from_numpy(likelihoods).to(x.device)}}

    def compress(self, x: Tensor) -> Compressed:
        """Images in [0, 1]; raises as `TokenCodec.compress`."""
        grid = self.codec.tokenizer.layout(x.shape[-2], x.shape[-1]).scales[-1]
        return {"strings": [self.codec.compress(x)], "shape": grid}

    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """What `compress` gave to images of one size. Raises as `TokenCodec.decompress`, and BitstreamError where the
        streams are not of that shape.
        """
        images = []
        for stream in strings[0]:
            received = self.codec.receive(stream)
            if received.tokens.layout.scales[-1] != tuple(shape):
                raise BitstreamError(f"The stream has a grid of {received.tokens.layout.scales[-1]} tokens, not "
                                     f"{tuple(shape)}.")
            images.append(self.codec.draw(received))
        return {"x_hat": torch.stack(images)}
