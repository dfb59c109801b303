"""TokenCodec: images to the bytes of a file and back, with any tokenizer of vtc.

    image -> tokenizer -> indices -> packed, static tables or prior -> container -> bytes
"""

from __future__ import annotations

from itertools import chain
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtc.codecs import container, entropy
from vtc.codecs.container import Coder, Container
from vtc.errors import BitstreamError, ConfigError, ImageError, ModelError
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens
from vtc.tokenizers.tiling import decode_tiled, encode_tiled


class Prior(Protocol):
    """A learned prior of one grid of tokens, in whole numbers: `vtc.codecs.prior.TokenPrior`.

    The words of the (K, d) codebook are known to it by their vectors, so one prior serves every codebook of a latent
    space. `decode` is the inverse of `encode` on every machine, and raises BitstreamError where a payload is not
    exactly the code of such indices.
    """

    #: 8 bytes that change when anything that decoding reads changes
    fingerprint: bytes

    def encode(self, indices: NDArray[np.int64], grid: tuple[int, int], codebook: Tensor) -> bytes:
        """Indices (L,) of a grid of (rows, columns), row by row, to a payload."""

    def decode(self, payload: bytes, grid: tuple[int, int], codebook: Tensor) -> NDArray[np.int64]:
        """A payload to indices (L,)."""


class Concealer(Protocol):
    """Guesses lost tokens of one grid from their neighbours: `vtc.codecs.concealer.Concealer`."""

    def conceal(self, indices: Tensor, lost: Tensor, grid: tuple[int, int], codebook: Tensor) -> Tensor:
        """Indices (B, L) int64 with those marked in `lost` (B, L) bool replaced; what is marked is not read."""


class TokenCodec:
    """The lossy codec that a tokenizer makes: one self-contained stream per image.

    prior: codes the grids of tokenizers with one codebook in fewer bytes than their static tables; streams that use it
        need it to be decoded, and name it in their fingerprint.
    concealer: guesses lost tokens; without one, or where it does not fit, they are taken from their neighbours.
    max_pixels: of the largest image that is decoded; a stream that declares more is refused before anything is
        allocated.

    The tokenizer's fingerprint, codewords and tables are read once, here: make the codec after the weights are final.
    Raises ModelError where the tokenizer's entropy-coding tables are not valid.
    """

    def __init__(self, tokenizer: Tokenizer, prior: Prior | None = None, concealer: Concealer | None = None,
                 max_pixels: int = container.MAX_PIXELS) -> None:
        self.tokenizer, self.prior, self.concealer = tokenizer, prior, concealer
        self.max_pixels = max_pixels
        self.fingerprint = tokenizer.fingerprint()
        codewords = tokenizer.codewords
        self.codewords = None if codewords is None else codewords.detach().float().cpu()
        table = tokenizer.token_frequencies
        self.tables = None if table is None else entropy.StaticTables(table.detach().long().cpu().numpy())

    @torch.no_grad()
    def compress(self, images: Tensor) -> list[bytes]:
        """(B, 3, H, W) float images in [0, 1] to B streams. Raises ImageError for any other shape, type or size."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ImageError("TokenCodec.compress takes float images of shape (B, 3, H, W) in [0, 1], not "
                             f"{images.dtype} of shape {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        try:
            container.check_limits(height, width, ((1, 1),), 1, self.max_pixels)
        except BitstreamError as error:
            raise ImageError(f"The image cannot be coded: {error}") from error
        return self.compress_tokens(encode_tiled(self.tokenizer, images.to(_device(self.tokenizer))))

    @torch.no_grad()
    def decompress(self, streams: list[bytes], generator: torch.Generator | None = None) -> list[Tensor]:
        """Streams of `compress` to images (3, H, W) in [0, 1] of the true sizes, on the tokenizer's device.

        `generator` feeds decoders that draw noise. Raises as `decompress_tokens`.
        """
        return [self._decompress_one(stream, generator) for stream in streams]

    def _decompress_one(self, stream: bytes, generator: torch.Generator | None) -> Tensor:
        tokens = self.decompress_tokens(stream)
        images = decode_tiled(self.tokenizer, tokens, generator)
        if images.shape != (1, 3, tokens.height, tokens.width):
            raise ModelError(f"The model drew an image of shape {tuple(images.shape)} for a stream of "
                             f"{tokens.width}x{tokens.height} pixels.")
        return images[0]

    def compress_tokens(self, tokens: Tokens) -> list[bytes]:
        """A stream for each image of the batch; exact: `decompress_tokens` gives the same indices on any machine.

        Raises ConfigError where the tokens are not in the layout that the tokenizer gives to such an image.
        """
        layout = tokens.layout
        if self.tokenizer.layout(tokens.height, tokens.width) != layout:
            raise ConfigError(f"The tokens are not laid out as this tokenizer's for an image of "
                              f"{tokens.width}x{tokens.height} pixels.")
        streams = []
        for indices in tokens.indices.cpu().numpy():
            coder, payload = self._encode(indices, layout)
            streams.append(Container(tokens.height, tokens.width, layout.scales, layout.groups, coder, payload,
                                     self.tokenizer.model_id, self._fingerprint(coder)).to_bytes())
        return streams

    def _encode(self, indices: entropy.Indices, layout: TokenLayout) -> tuple[Coder, bytes]:
        """The shortest code of all that there are for indices (L, G)."""
        coder, payload = entropy.encode(indices, layout, self.tables)
        if self.prior is None or self.codewords is None or (len(layout.scales), layout.groups) != (1, 1):
            return coder, payload
        learned = self.prior.encode(indices[:, 0], layout.scales[0], self.codewords)
        return (Coder.PRIOR, learned) if len(learned) < len(payload) else (coder, payload)

    def _decode(self, parsed: Container, layout: TokenLayout) -> entropy.Indices:
        if parsed.coder != Coder.PRIOR:
            return entropy.decode(parsed.coder, parsed.payload, layout, self.tables)
        if self.prior is None or self.codewords is None or (len(layout.scales), layout.groups) != (1, 1):
            raise ModelError("The stream is coded with a learned prior, which does not fit this model's tokens.")
        return self.prior.decode(parsed.payload, layout.scales[0], self.codewords)[:, None]

    def _fingerprint(self, coder: Coder) -> bytes:
        """What a stream needs for decoding: the model, and the prior where it is used."""
        if coder != Coder.PRIOR:
            return self.fingerprint
        if self.prior is None:
            raise ModelError("The stream is coded with a learned prior, and this codec has none: give TokenCodec the "
                             "prior that it was made with.")
        return container.with_prior(self.fingerprint, self.prior.fingerprint)

    def decompress_tokens(self, stream: bytes) -> Tokens:
        """The tokens of one stream, as a batch of one, on the tokenizer's device.

        Raises BitstreamError where the stream is damaged or not ours, ModelError where it was made with another model.
        """
        parsed = container.parse(stream, self.max_pixels)
        self._check_model(parsed)
        layout = self.tokenizer.layout(parsed.height, parsed.width)
        if (layout.scales, layout.groups) != (parsed.scales, parsed.groups):
            raise ModelError(f"The stream's token layout is not the one that model {parsed.model_id} gives to an image "
                             f"of {parsed.width}x{parsed.height} pixels.")
        indices = self._decode(parsed, layout)
        return Tokens(torch.from_numpy(indices)[None].to(_device(self.tokenizer)), layout, parsed.height, parsed.width)

    def _check_model(self, parsed: Container) -> None:
        """The fingerprint decides; ids, where both have one, say it in fewer words. A copy in a folder has id 0."""
        ours = self.tokenizer.model_id
        if 0 not in (parsed.model_id, ours) and parsed.model_id != ours:
            raise ModelError(f"The stream was made with model {parsed.model_id} (fingerprint "
                             f"{parsed.fingerprint.hex()}), and this is model {ours} ({self.fingerprint.hex()}).")
        expected = self._fingerprint(parsed.coder)
        if parsed.fingerprint != expected:
            what = "another prior or other weights" if parsed.coder == Coder.PRIOR else "other weights"
            raise ModelError(f"The stream was made with {what} of model {parsed.model_id}: its fingerprint is "
                             f"{parsed.fingerprint.hex()}, and this model's is {expected.hex()}.")


def _device(tokenizer: Tokenizer) -> torch.device:
    tensor = next(chain(tokenizer.parameters(), tokenizer.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
