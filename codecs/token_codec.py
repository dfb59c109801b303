"""TokenCodec: images to the bytes of a file and back, with any tokenizer of vtc.

    image -> tokenizer -> indices -> packed, static tables or prior -> container -> bytes
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtc.codecs import chunks, container, entropy, resilience
from vtc.codecs.chunks import ChunkedContainer, Division
from vtc.codecs.container import Coder, Container
from vtc.codecs.entropy import Indices
from vtc.errors import BitstreamError, ConfigError, ImageError, ModelError
from vtc.images import LoadedImage
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens
from vtc.tokenizers.extra_words import takes_extra_words, with_extra_words
from vtc.tokenizers.tiling import Write, decode_tiles, encode_tiled, encode_tiles


class Prior(Protocol):
    """A learned prior of one grid of tokens, in whole numbers: `vtc.codecs.prior.TokenPrior`.

    `decode` is the inverse of `encode` on every machine, and raises BitstreamError where a payload is not exactly the
    code of such indices.
    """

    #: 8 bytes that change when anything that decoding reads changes
    fingerprint: bytes
    #: words of the codebooks that it knows
    sizes: tuple[int, ...]

    def encode(self, indices: Indices, grid: tuple[int, int], codebook: int) -> bytes:
        """Indices (L,) of a grid of (rows, columns), row by row, in the codebook of so many words, to a payload."""

    def decode(self, payload: bytes, grid: tuple[int, int], codebook: int) -> Indices:
        """A payload to indices (L,)."""

    def probabilities(self, indices: Indices, grid: tuple[int, int], codebook: int) -> NDArray[np.float64]:
        """Of each of the indices (L,), as they are coded."""


class Concealer(Protocol):
    """Guesses lost tokens of one grid from those around them: `vtc.codecs.concealer.Concealer`.

    indices (B, L) int64 of a grid of (rows, columns), row by row; those marked in `lost` (B, L) bool are not read.
    """

    def conceal(self, indices: Tensor, lost: Tensor, grid: tuple[int, int], codebook: Tensor) -> Tensor:
        """Indices (B, L) in which the lost ones are guessed words of the codebook (K, d)."""

    def conceal_codes(self, indices: Tensor, lost: Tensor, grid: tuple[int, int], codebook: Tensor) -> Tensor:
        """Codewords (B, L, d), in which the lost ones are guesses that need not be words."""


class Received(NamedTuple):
    """What arrived of one image.

    tokens: a batch of one; lost indices are 0.
    lost: (1, L, G) bool, which of them are lost.
    stages: of a stream in scales or levels, how many of them arrived from the first on; None for any other stream.
    """

    tokens: Tokens
    lost: Tensor
    stages: int | None = None

    @property
    def share_lost(self) -> float:
        """Of all indices, 0 to 1."""
        return self.lost.float().mean().item()


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
    def compress(self, images: Tensor, resilience: int = 0, progressive: bool = False) -> list[bytes]:
        """(B, 3, H, W) float images in [0, 1] to B streams. Raises ImageError for any other shape, type or size.

        resilience, progressive: as of `compress_tokens`.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ImageError("TokenCodec.compress takes float images of shape (B, 3, H, W) in [0, 1], not "
                             f"{images.dtype} of shape {tuple(images.shape)}.")
        self._check_size(images.shape[-2], images.shape[-1])
        self._division(resilience, progressive)  # what cannot be coded is said before the work
        tokens = encode_tiled(self.tokenizer, images.to(_device(self.tokenizer), _dtype(self.tokenizer)))
        return self.compress_tokens(tokens, resilience, progressive)

    @torch.no_grad()
    def compress_picture(self, picture: LoadedImage, resilience: int = 0, progressive: bool = False) -> bytes:
        """As `compress`, of a picture file's pixels: only tiles of it become floats, so memory is bounded by those."""
        self._check_size(picture.height, picture.width)
        self._division(resilience, progressive)
        device = _device(self.tokenizer)
        tokens = encode_tiles(self.tokenizer, lambda rows, columns: picture.part(rows, columns).to(device),
                              picture.height, picture.width)
        return self.compress_tokens(tokens, resilience, progressive)[0]

    def _check_size(self, height: int, width: int) -> None:
        try:
            container.check_limits(height, width, ((1, 1),), 1, self.max_pixels)
        except BitstreamError as error:
            raise ImageError(f"The image cannot be coded: {error}") from error

    @torch.no_grad()
    def decompress(self, streams: list[bytes], generator: torch.Generator | None = None, strict: bool = False,
                   ) -> list[Tensor]:
        """Streams of `compress` to images (3, H, W) in [0, 1] of the true sizes, on the tokenizer's device.

        generator: feeds decoders that draw noise.
        strict: refuse a stream of which something is lost; otherwise what is lost is guessed (`receive` tells what).
        Raises as `receive`, and BitstreamError where nothing that can be shown arrived.
        """
        return [self.draw(self.receive(stream), generator, strict) for stream in streams]

    @torch.no_grad()
    def draw(self, received: Received, generator: torch.Generator | None = None, strict: bool = False) -> Tensor:
        """The image (3, H, W) of what arrived. Raises as `decompress`."""
        height, width = received.tokens.height, received.tokens.width
        images: list[Tensor] = []

        def write(rows: slice, columns: slice, pixels: Tensor) -> None:
            if not images:
                images.append(pixels if pixels.shape[-2:] == (height, width)
                              else pixels.new_empty(1, 3, height, width))
            if images[0] is not pixels:
                images[0][..., rows, columns] = pixels

        self.draw_tiles(received, write, generator, strict)
        return images[0][0]

    @torch.no_grad()
    def draw_tiles(self, received: Received, write: Write, generator: torch.Generator | None = None,
                   strict: bool = False) -> None:
        """As `draw`, of an image that is never in memory as a whole: `write` takes its rows, its columns and the pixels
        (1, 3, h, w) that stand there, tile by tile. Raises as `decompress`.
        """
        def checked(rows: slice, columns: slice, pixels: Tensor) -> None:
            if pixels.shape != (1, 3, rows.stop - rows.start, columns.stop - columns.start):
                raise ModelError(f"The model drew an image of shape {tuple(pixels.shape)} for a stream of "
                                 f"{tokens.width}x{tokens.height} pixels.")
            write(rows, columns, pixels)

        tokens, tokenizer = received.tokens, self.tokenizer
        if strict:
            self._refuse_loss(received)
        if received.stages is not None and received.lost.any():
            images = tokenizer.decode_stages(tokens, self._shown(received))
            checked(slice(0, tokens.height), slice(0, tokens.width), images)
            return
        if (received.lost.any() and self.concealer is not None and self.codewords is not None
                and _is_one_grid(tokens.layout) and takes_extra_words(tokenizer)):
            tokenizer, tokens = self._guesses(received, self.concealer, self.codewords)
        else:
            tokens = self.conceal(received)
        decode_tiles(tokenizer, tokens, checked, generator)

    def _guesses(self, received: Received, concealer: Concealer, codewords: Tensor) -> tuple[Tokenizer, Tokens]:
        """A tokenizer in which the vectors that are guessed for lost tokens are words, too, and the tokens in it."""
        tokens, lost = received.tokens, received.lost[..., 0]
        _refuse_nothing(received)
        codes = concealer.conceal_codes(tokens.indices[..., 0], lost, tokens.layout.scales[0],
                                        codewords.to(tokens.indices.device))
        words, indices = codes[lost], tokens.indices.clone()
        indices[lost] = len(codewords) + torch.arange(len(words), device=indices.device)[:, None]
        return with_extra_words(self.tokenizer, words), replace(tokens, indices=indices)

    @torch.no_grad()
    def draw_stages(self, received: Received, strict: bool = False) -> list[Tensor]:
        """The image (3, H, W) after each scale or level that arrived, coarse to fine. Any stream will do.

        Raises ConfigError where the tokenizer's tokens have no such order, otherwise as `decompress`.
        """
        if strict:
            self._refuse_loss(received)
        kind, layout = self.tokenizer.stages, received.tokens.layout
        if kind is None:
            raise ConfigError(f"The tokens of {type(self.tokenizer).__name__} have no order from coarse to fine, so "
                              "there are no stages to show.")
        count = self._shown(received) if received.stages is not None else len(layout.scales) if kind == "scales" \
            else layout.groups
        tokens = received.tokens if received.stages is not None else self.conceal(received)
        return [self._image(self.tokenizer.decode_stages(tokens, n), tokens) for n in range(1, count + 1)]

    def _shown(self, received: Received) -> int:
        if not received.stages:
            raise BitstreamError("The stream has lost its first, coarsest stage: there is nothing to show.")
        return received.stages

    def _image(self, images: Tensor, tokens: Tokens) -> Tensor:
        if images.shape != (1, 3, tokens.height, tokens.width):
            raise ModelError(f"The model drew an image of shape {tuple(images.shape)} for a stream of "
                             f"{tokens.width}x{tokens.height} pixels.")
        return images[0]

    def conceal(self, received: Received) -> Tokens:
        """The tokens with guesses for what is lost: the concealer's, or else those of received neighbours.

        Raises BitstreamError where nothing arrived.
        """
        tokens, lost = received.tokens, received.lost
        if not lost.any():
            return tokens
        _refuse_nothing(received)
        if self.concealer is not None and self.codewords is not None and _is_one_grid(tokens.layout):
            guessed = self.concealer.conceal(tokens.indices[..., 0], lost[..., 0], tokens.layout.scales[0],
                                             self.codewords.to(tokens.indices.device))[..., None]
        else:
            filled = resilience.fill_from_neighbours(tokens.indices[0].cpu().numpy(), lost[0].cpu().numpy(),
                                                     tokens.layout, self.tables)
            guessed = torch.from_numpy(filled)[None].to(tokens.indices.device)
        return replace(tokens, indices=guessed)

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def compress_tokens(self, tokens: Tokens, resilience: int = 0, progressive: bool = False) -> list[bytes]:
        """A stream for each image of the batch; exact: `decompress_tokens` gives the same indices on any machine.

        resilience: interleave the tokens over so many chunks, each decodable alone, so that what is lost on the way
            costs only what it hits; some three per cent more bytes for eight chunks. No prior then, which needs all.
        progressive: a chunk for each scale or level, coarse to fine, so that a cut stream is a coarser picture.

        Raises ConfigError where the tokens are not in the layout that the tokenizer gives to such an image, and where
        resilience or progressive cannot be had.
        """
        layout = tokens.layout
        if self.tokenizer.layout(tokens.height, tokens.width) != layout:
            raise ConfigError(f"The tokens are not laid out as this tokenizer's for an image of "
                              f"{tokens.width}x{tokens.height} pixels.")
        division = self._division(resilience, progressive)
        return [self._write(indices, tokens, division) for indices in tokens.indices.cpu().numpy()]

    def _division(self, count: int, progressive: bool) -> Division | None:
        if progressive and count:
            raise ConfigError("A stream is either progressive or resilient, not both.")
        if progressive:
            if self.tokenizer.stages is None:
                raise ConfigError(f"The tokens of {type(self.tokenizer).__name__} have no order from coarse to fine, "
                                  "so they make no progressive stream.")
            return Division(by=self.tokenizer.stages)
        return Division(count) if count else None

    def _write(self, indices: Indices, tokens: Tokens, division: Division | None) -> bytes:
        """The stream of indices (L, G)."""
        layout = tokens.layout
        if division is not None:
            coder, payloads = resilience.encode(indices, layout, self.tables, division)
            return ChunkedContainer(tokens.height, tokens.width, layout.scales, layout.groups, coder,
                                    self.tokenizer.model_id, self.fingerprint, division, payloads).to_bytes()
        coder, payload = entropy.encode(indices, layout, self.tables)
        prior = self.prior_for(layout)
        if prior is not None:
            learned = prior.encode(indices[:, 0], layout.scales[0], layout.vocab[0])
            if len(learned) < len(payload):
                coder, payload = Coder.PRIOR, learned
        return Container(tokens.height, tokens.width, layout.scales, layout.groups, coder, payload,
                         self.tokenizer.model_id, self._fingerprint(coder)).to_bytes()

    def decompress_tokens(self, stream: bytes, strict: bool = False) -> Tokens:
        """The tokens of one stream, as a batch of one, on the tokenizer's device; what is lost is guessed.

        Raises as `receive`, and BitstreamError where all is lost, or with `strict` where anything is.
        """
        received = self.receive(stream)
        if strict:
            self._refuse_loss(received)
        return self.conceal(received)

    def receive(self, stream: bytes) -> Received:
        """What arrived of one stream, on the tokenizer's device. Of a stream without chunks all arrives, or nothing.

        Raises BitstreamError where the stream is not ours or damaged beyond use, ModelError where it was made with
        another model.
        """
        parsed = chunks.read(stream, self.max_pixels)
        self._check_model(parsed)
        layout = self.tokenizer.layout(parsed.height, parsed.width)
        if (layout.scales, layout.groups) != (parsed.scales, parsed.groups):
            raise ModelError(f"The stream's token layout is not the one that model {parsed.model_id} gives to an image "
                             f"of {parsed.width}x{parsed.height} pixels.")
        device, stages = _device(self.tokenizer), None
        if isinstance(parsed, ChunkedContainer):
            indices, missing = resilience.decode(parsed, layout, self.tables)
            lost = torch.from_numpy(missing)[None].to(device)
            if parsed.division.by:
                stages = self._stages(missing, layout, parsed.division)
        else:
            indices = self._decode(parsed, layout)
            lost = torch.zeros(1, *indices.shape, dtype=torch.bool, device=device)
        tokens = Tokens(torch.from_numpy(indices)[None].to(device), layout, parsed.height, parsed.width)
        return Received(tokens, lost, stages)

    def _decode(self, parsed: Container, layout: TokenLayout) -> Indices:
        if parsed.coder != Coder.PRIOR:
            return entropy.decode(parsed.coder, parsed.payload, layout, self.tables)
        prior = self.prior_for(layout)
        if prior is None:
            raise ModelError("The stream is coded with a learned prior, which does not know this model's tokens.")
        return prior.decode(parsed.payload, layout.scales[0], layout.vocab[0])[:, None]

    def prior_for(self, layout: TokenLayout) -> Prior | None:
        """The prior, where it knows such tokens."""
        knows = self.prior is not None and _is_one_grid(layout) and layout.vocab[0] in self.prior.sizes
        return self.prior if knows else None

    def _stages(self, missing: NDArray[np.bool_], layout: TokenLayout, division: Division) -> int:
        if division.by != self.tokenizer.stages:
            raise ModelError(f"The stream is ordered by {division.by}, and this model's tokens are not.")
        lost = [bool(missing[part.positions, part.groups].any())
                for part in resilience.parts_of(division, layout.scales, layout.groups)]
        return lost.index(True) if True in lost else len(lost)

    def _refuse_loss(self, received: Received) -> None:
        if received.lost.any():
            raise BitstreamError(f"The stream is damaged or incomplete: {received.share_lost:.1%} of its tokens are "
                                 "lost.")

    def _fingerprint(self, coder: Coder) -> bytes:
        """What a stream needs for decoding: the model, and the prior where it is used."""
        if coder != Coder.PRIOR:
            return self.fingerprint
        if self.prior is None:
            raise ModelError("The stream is coded with a learned prior, and this codec has none: give TokenCodec the "
                             "prior that it was made with.")
        return container.with_prior(self.fingerprint, self.prior.fingerprint)

    def _check_model(self, parsed: Container | ChunkedContainer) -> None:
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


def _refuse_nothing(received: Received) -> None:
    if received.lost.all():
        raise BitstreamError("All tokens of the stream are lost: there is nothing to show.")


def _is_one_grid(layout: TokenLayout) -> bool:
    return (len(layout.scales), layout.groups) == (1, 1)


def _device(tokenizer: Tokenizer) -> torch.device:
    tensor = next(chain(tokenizer.parameters(), tokenizer.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _dtype(tokenizer: Tokenizer) -> torch.dtype:
    """Of the pictures that a tokenizer reads: float32 where it has no weights."""
    tensors = chain(tokenizer.parameters(), tokenizer.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
