"""TokenCodec: images to the bytes of a file and back, with any tokenizer of vtc.

    image -> tokenizer -> indices -> packed or static ANS -> container -> bytes
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from vtc.codecs import container, entropy
from vtc.codecs.container import Container
from vtc.errors import BitstreamError, ConfigError, ImageError, ModelError
from vtc.tokenizers.base import Tokenizer, Tokens
from vtc.tokenizers.tiling import decode_tiled, encode_tiled


class TokenCodec:
    """The lossy codec that a tokenizer makes: one self-contained stream per image.

    The tokenizer's fingerprint and tables are read once, here: make the codec after the weights are final.
    `max_pixels` is the largest image that is decoded; a stream that declares more is refused before anything is
    allocated.

    Raises ModelError where the tokenizer's entropy-coding tables are not valid.
    """

    def __init__(self, tokenizer: Tokenizer, max_pixels: int = container.MAX_PIXELS) -> None:
        self.tokenizer = tokenizer
        self.max_pixels = max_pixels
        self.fingerprint = tokenizer.fingerprint()
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
            coder, payload = entropy.encode(indices, layout, self.tables)
            streams.append(Container(tokens.height, tokens.width, layout.scales, layout.groups, coder, payload,
                                     self.tokenizer.model_id, self.fingerprint).to_bytes())
        return streams

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
        indices = entropy.decode(parsed.coder, parsed.payload, layout, self.tables)
        return Tokens(torch.from_numpy(indices)[None].to(_device(self.tokenizer)), layout, parsed.height, parsed.width)

    def _check_model(self, parsed: Container) -> None:
        """The fingerprint decides; ids, where both have one, say it in fewer words. A copy in a folder has id 0."""
        ours = self.tokenizer.model_id
        if 0 not in (parsed.model_id, ours) and parsed.model_id != ours:
            raise ModelError(f"The stream was made with model {parsed.model_id} (fingerprint "
                             f"{parsed.fingerprint.hex()}), and this is model {ours} ({self.fingerprint.hex()}).")
        if parsed.fingerprint != self.fingerprint:
            raise ModelError(f"The stream was made with other weights of model {parsed.model_id}: its fingerprint is "
                             f"{parsed.fingerprint.hex()}, and this model's is {self.fingerprint.hex()}.")


def _device(tokenizer: Tokenizer) -> torch.device:
    tensor = next(chain(tokenizer.parameters(), tokenizer.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
