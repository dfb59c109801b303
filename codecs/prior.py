"""The learned prior of token grids: how likely each word is, given the tokens around it, in exact whole numbers.

    prior = TokenPrior.from_pretrained("localvq-f16-8192-r3")
    payload = prior.encode(indices, (rows, columns), codebook=8192)
    indices = prior.decode(payload, (rows, columns), codebook=8192)

A grid is coded from coarse to fine. At each level the tokens at even rows and columns are known, being the grid of the
level above; three steps add the others, all tokens of a step at once:

    0 b 0 b      step 0 codes a = (odd, odd)    given 0
    c a c a      step 1 codes b = (even, odd)   given 0 and a
    0 b 0 b      step 2 codes c = (odd, even)   given 0, a and b
    c a c a

The known phases lie side by side as channels on the grid of the 0s:

    codewords and a plane of ones a phase -> conv 3x3 of the step -> total
    depth times:  total += conv 1x1 (relu (conv 3x3 (relu (total))))
    relu, conv 1x1 -> h;     2^9 log2 p(word) = h . E(word) + b(word) - normalisation

One network serves all levels, steps and codebooks; they differ in biases, and codebooks in their tables of codewords, E
and b. It works on whole numbers that float32 represents exactly: int8 weights, 8-bit activations, sums that are proved
to stay below 2^24 when the prior is loaded. A GEMM may then add in any order, on any processor, with any number of
threads: there is nothing to round. Powers of two requantize, an integer table exponentiates, integer cumulative
frequencies drive the coder. docs/bitstream.md has every number. The design is our own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vtc import hub
from vtc.codecs.entropy import Indices, seed_length
from vtc.errors import BitstreamError, ConfigError, ModelError

FORMAT = "vtc prior 1"
FILE = "prior.safetensors"

#: (row, column) parity of the phases in coding order; the first is the grid of the level above
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))
STEPS = len(PHASES) - 1

#: largest magnitudes: of codes, h and E; of activations; of the residual total
BYTE, ACTIVATION, TOTAL = 127, 255, 2**15 - 1
#: fractional bits of codes, activations, residual total and h
CODE_BITS, ACTIVATION_BITS, TOTAL_BITS, FEATURE_BITS, WORD_BITS = 5, 5, 8, 4, 5
#: of log2 p: those of h and E together
LOGIT_BITS = FEATURE_BITS + WORD_BITS
#: float32 holds every whole number below it
EXACT = 2**24
#: what the frequencies of one position add up to: 2^24
PRECISION = 24
#: table of powers: 2^20 2^(-i/64), for i up to 20 octaves
OCTAVE_BITS, OCTAVES, LARGEST_POWER = 6, 20, 2**20

#: numbers of float32 that one GEMM's columns take at a time, and scores that become frequencies together: few enough
#: to stay in a processor's cache on the way
BAND, TABLE = 2**21, 2**17


@dataclass(frozen=True)
class Layer:
    """A convolution of whole numbers: floor((weight * x + bias) / 2^shift).

    weight: (O, I, k, k) int8; shift: (O,) whole numbers; steps: (levels * 3, O) and sizes: (codebooks, O), whose sum is
    the bias. One half of what the shift cuts off is in it, so the floor rounds to nearest.
    """

    weight: Tensor
    shift: Tensor
    steps: Tensor
    sizes: Tensor

    def largest_sum(self, largest_input: int) -> int:
        """A bound for the magnitude of every partial sum, in any order."""
        weights = self.weight.long().abs().flatten(1).sum(1)
        bias = self.steps.long().abs().amax(0) + self.sizes.long().abs().amax(0)
        return int((weights * largest_input + bias).max())

    def to(self, device: torch.device, dtype: torch.dtype) -> Layer:
        """The same numbers in the type that they are multiplied in."""
        return Layer(*(t.to(device, dtype) for t in (self.weight, self.shift, self.steps, self.sizes)))

    def __call__(self, x: Tensor, step: int, size: int) -> Tensor:
        """(I, h, w) whole numbers to (O, h, w), with zeros around; rows in bands, so that memory is bounded."""
        outputs, inputs, kernel, _ = self.weight.shape
        height, width = x.shape[1:]
        bias = (self.steps[step] + self.sizes[size])[:, None]
        scale = torch.exp2(-self.shift)[:, None]
        pad = kernel // 2
        padded = F.pad(x, (pad, pad, pad, pad))
        out = x.new_empty(outputs, height, width)
        rows = max(1, BAND // (inputs * kernel * kernel * width))
        for top in range(0, height, rows):
            band = padded[:, top : top + rows + 2 * pad]
            columns = band.flatten(1) if kernel == 1 else F.unfold(band[None], kernel)[0]
            # A product and a sum of whole numbers below 2^24, then a power of two: nothing is rounded but by the floor.
            out[:, top : top + rows] = torch.floor((self.weight.flatten(1) @ columns + bias) * scale).unflatten(
                1, (-1, width))
        return out


def read_prior(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a prior's file. ModelError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ModelError(f"{path} holds no prior of this version of vtc.")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as a prior ({error}).") from error


def exact_place(device: str | torch.device) -> tuple[torch.device, torch.dtype]:
    """The device and the type in which sums below 2^24 are exact: float32 on the CPU; float64 on CUDA, which might add
    in fewer bits than float32 has; for any other device the CPU, as Apple's and some of Intel's know no float64.
    """
    place = torch.device(device)
    if place.type == "cuda":
        return place, torch.float64
    return torch.device("cpu"), torch.float32


@dataclass(frozen=True)
class Frequencies:
    """Those of S words at N positions, whole numbers that add up to 2^24, each at least 1.

    sums: (N, S + 1), E: sums of the words' powers from 0 on. Word i has the numbers from C_i to C_(i+1) - 1, with
        C_i = i + floor(E_i (2^24 - S) / E_S); of 2^24 places few are asked for, so they are computed when they are.
    """

    sums: Indices

    def __len__(self) -> int:
        return len(self.sums)

    def starts(self, words: Indices) -> Indices:
        """C of words (N, M), or of the same (1, M) at each position, to (N, M); that of S is 2^24."""
        share = 2**PRECISION - (self.sums.shape[1] - 1)
        return words + np.take_along_axis(self.sums, words, 1) * share // self.sums[:, -1:]  # products below 2^59

    def of(self, words: Indices) -> tuple[Indices, Indices]:
        """C and the frequency of a word (N,) at each position."""
        low, end = self.starts(words[:, None] + np.arange(2)).T
        return low, end - low

    def find(self, n: int, place: int) -> tuple[int, int, int]:
        """The word whose numbers at position n hold `place`, its first number, and the one behind its last."""
        row = self.sums[n]
        size = len(row) - 1
        share, whole = 2**PRECISION - size, row.item(size)
        word, above, low, end = 0, size, 0, 2**PRECISION
        while above - word > 1:
            middle = (word + above) // 2
            first = middle + row.item(middle) * share // whole
            if first <= place:
                word, low = middle, first
            else:
                above, end = middle, first
        return word, low, end


class TokenPrior:
    """Codes the token grids of the codebooks that it was trained for. No `nn.Module`: no cast of a model reaches it.

    tensors: of a prior's file, see docs/bitstream.md.
    device: where the network runs, see `exact_place`. The results are the same.

    Raises ModelError where the tensors are not those of a prior or a sum might reach 2^24.
    """

    def __init__(self, tensors: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        self.fingerprint = fingerprint(tensors)
        self.device, self.dtype = exact_place(device)
        rest = dict(tensors)
        try:
            self.powers = rest.pop("powers").numpy().astype(np.int64)
            self.sizes = tuple(sorted(int(name.split(".")[1]) for name in tensors if name.startswith("words.")))
            codes = {size: rest.pop(f"codes.{size}") for size in self.sizes}
            words = {size: (rest.pop(f"words.{size}"), rest.pop(f"word_bias.{size}")) for size in self.sizes}
            layers = {}
            for name in sorted({name.rpartition(".")[0] for name in rest}):
                layers[name] = Layer(*(rest.pop(f"{name}.{part}") for part in ("weight", "shift", "steps", "sizes")))
            depth = (len(layers) - STEPS - 1) // 2
            self.inputs = [layers.pop(f"input.{step}") for step in range(STEPS)]
            self.wide = [layers.pop(f"wide.{n}") for n in range(depth)]
            self.narrow = [layers.pop(f"narrow.{n}") for n in range(depth)]
            self.head = layers.pop("head")
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise ModelError(f"A prior lacks the tensor {error}.") from error
        if rest or layers or not self.sizes:
            raise ModelError(f"A prior has no tensors {', '.join([*rest, *layers]) or 'but words'}.")
        self.levels = len(self.head.steps) // STEPS
        self._check(codes, words)
        place = (self.device, self.dtype)
        self.inputs, self.wide, self.narrow = ([layer.to(*place) for layer in layers]
                                               for layers in (self.inputs, self.wide, self.narrow))
        self.head = self.head.to(*place)
        self.codes = {size: torch.cat([table, torch.full((size, 1), 1 << CODE_BITS)], 1).to(*place)
                      for size, table in codes.items()}
        self.words = {size: (table.to(*place), bias.to(*place)) for size, (table, bias) in words.items()}

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> TokenPrior:
        """The prior in a safetensors file. ModelError where it is none."""
        return cls(read_prior(path), device)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str | torch.device = "cpu") -> TokenPrior:
        """The prior beside a model: of a bundled name, a folder, or a repository on the Hub."""
        return cls.load(hub.fetch(name_or_path, FILE), device)

    def _check(self, codes: dict[int, Tensor], words: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Raise ModelError unless all shapes fit together and every sum stays exact."""
        width, dim = self.wide[0].weight.shape[0] if self.wide else self.head.weight.shape[1], len(self.head.weight)
        channels = codes[self.sizes[0]].shape[1] + 1
        expected = [(layer, (width, channels * (step + 1), 3, 3), BYTE) for step, layer in enumerate(self.inputs)]
        expected += [(layer, (width, width, 3, 3), ACTIVATION) for layer in self.wide]
        expected += [(layer, (width, width, 1, 1), ACTIVATION) for layer in self.narrow]
        expected += [(self.head, (dim, width, 1, 1), ACTIVATION)]
        for layer, shape, largest in expected:
            outputs = shape[0]
            if (layer.weight.dtype != torch.int8 or tuple(layer.weight.shape) != shape
                    or tuple(layer.shift.shape) != (outputs,) or layer.shift.min() < 0 or layer.shift.max() > 30
                    or tuple(layer.steps.shape) != (self.levels * STEPS, outputs) or not self.levels
                    or tuple(layer.sizes.shape) != (len(self.sizes), outputs)):
                raise ModelError(f"A layer of the prior should have weights {shape} and biases to match.")
            if layer.largest_sum(largest) >= EXACT:
                raise ModelError(f"A sum of the prior may reach {layer.largest_sum(largest)}; only sums below {EXACT} "
                                 "are exact everywhere.")
        for size in self.sizes:
            table, bias = words[size]
            if (tuple(codes[size].shape) != (size, channels - 1) or codes[size].dtype != torch.int8
                    or tuple(table.shape) != (size, dim) or table.dtype != torch.int8
                    or tuple(bias.shape) != (size,) or size > 2**15):
                raise ModelError(f"The prior's tables of {size} words have other shapes than ({size}, ...).")
            largest = int((table.long().abs().sum(1) * BYTE + bias.long().abs()).max())
            if largest >= EXACT:
                raise ModelError(f"A score of the prior may reach {largest}; only those below {EXACT} are exact.")
        powers = self.powers
        if powers.ndim != 1 or not len(powers) or powers[0] < 1 or powers.min() < 0 or powers.max() > LARGEST_POWER:
            raise ModelError(f"The prior's table of powers needs whole numbers up to {LARGEST_POWER}.")

    # ---- the network ------------------------------------------------------------------------------------------------

    def _features(self, indices: Tensor, step: int, level: int, codebook: int) -> Tensor:
        """(h, w) indices, of which the first step + 1 phases are read, to h of the next phase, (N, dim).

        N positions, row by row, of a phase of the shape that `indices` has.
        """
        height, width = indices.shape
        rows, columns = -(-height // 2), -(-width // 2)
        codes = self.codes[codebook]
        planes = []
        for i, j in PHASES[: step + 1]:
            phase = codes[indices[i::2, j::2]].permute(2, 0, 1)
            planes.append(F.pad(phase, (0, columns - phase.shape[2], 0, rows - phase.shape[1])))
        number, size = min(level, self.levels - 1) * STEPS + step, self.sizes.index(codebook)
        total = self.inputs[step](torch.cat(planes), number, size).clamp_(-TOTAL, TOTAL)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = wide(_activation(total), number, size).clamp_(0, ACTIVATION)
            total = (total + narrow(x, number, size)).clamp_(-TOTAL, TOTAL)
        x = self.head(_activation(total), number, size).clamp_(-BYTE, BYTE)
        i, j = PHASES[step + 1]
        return x[:, : (height + 1 - i) // 2, : (width + 1 - j) // 2].flatten(1).T

    def _logits(self, features: Tensor, codebook: int) -> NDArray[np.int32]:
        """(N, dim) to (N, S), 2^9 log2 p but for a constant a row."""
        table, bias = self.words[codebook]
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 sums would be rounded
            return torch.addmm(bias, features, table.T).int().cpu().numpy()

    def frequencies(self, logits: NDArray[np.int32]) -> Frequencies:
        """Those of (N, S) logits: E_i = e_0 + ... + e_(i-1) with e = powers[(largest logit - logit) >> 3]."""
        count, size = logits.shape
        below = logits.max(1, keepdims=True) - logits
        below >>= LOGIT_BITS - OCTAVE_BITS
        np.minimum(below, len(self.powers) - 1, out=below)
        sums = np.zeros((count, size + 1), dtype=np.int64)
        np.cumsum(self.powers.take(below), axis=1, out=sums[:, 1:])  # below 2^15 words * 2^20
        return Frequencies(sums)

    # ---- coding -----------------------------------------------------------------------------------------------------

    def encode(self, indices: Indices, grid: tuple[int, int], codebook: int) -> bytes:
        """(L,) indices of a grid (rows, columns), row by row, in the codebook of that many words, to a payload.

        Raises ConfigError where the codebook is not one of `sizes`, or the indices do not fit grid and codebook.
        """
        self._check_codebook(codebook)
        if indices.shape != (grid[0] * grid[1],) or (indices < 0).any() or (indices >= codebook).any():
            raise ConfigError(f"A grid of {grid[0]}x{grid[1]} tokens has that many indices below {codebook}.")
        lows, shares, order = [], [], []
        for frequencies, positions in self._parts(indices, grid, codebook):
            low, share = frequencies.of(indices[positions])
            lows.append(low)
            shares.append(share)
            order.append(positions)
        words = indices[np.concatenate(order)]
        return ans_encode(np.concatenate(lows), np.concatenate(shares), words, codebook)

    def decode(self, payload: bytes, grid: tuple[int, int], codebook: int) -> Indices:
        """Inverse of `encode`. Raises BitstreamError where the payload is not the code of such indices."""
        self._check_codebook(codebook)
        indices = np.zeros(grid[0] * grid[1], dtype=np.int64)
        coder = AnsDecoder(payload, len(indices), codebook)
        for frequencies, positions in self._parts(indices, grid, codebook):
            indices[positions] = coder.decode(frequencies)
        return indices

    def probabilities(self, indices: Indices, grid: tuple[int, int], codebook: int) -> NDArray[np.float64]:
        """What the prior's frequencies give each of `indices` (L,), row by row."""
        self._check_codebook(codebook)
        out = np.empty(len(indices))
        for frequencies, positions in self._parts(indices, grid, codebook):
            out[positions] = frequencies.of(indices[positions])[1] / 2**PRECISION
        return out

    def ideal_bits(self, indices: Indices, grid: tuple[int, int], codebook: int) -> float:
        """The information of `indices` (L,) under the prior's frequencies: what no coder can go below on average."""
        return -float(np.log2(self.probabilities(indices, grid, codebook)).sum())

    def _check_codebook(self, codebook: int) -> None:
        if codebook not in self.sizes:
            raise ConfigError(f"The prior codes codebooks of {', '.join(map(str, self.sizes))} words, not {codebook}.")

    @torch.inference_mode()
    def _parts(self, indices: Indices, grid: tuple[int, int], codebook: int) -> Iterator[tuple[Frequencies, Indices]]:
        """Frequencies at N positions and these (N,) in the flat grid of what is coded together, in order.

        Reads of `indices` (L,) only what was handed out before; decoding fills the positions in between.
        """
        whole = torch.from_numpy(indices).view(grid)
        places = np.arange(len(indices)).reshape(grid)
        yield self.frequencies(self.words[codebook][1][None].int().cpu().numpy()), places[0, :1]
        for level in reversed(range((max(grid) - 1).bit_length())):
            stride = 2**level
            for step, (i, j) in enumerate(PHASES[1:]):
                positions = places[::stride, ::stride][i::2, j::2].flatten()
                if not positions.size:
                    continue
                # The slice is taken anew in each step: the last one's tokens have been filled in.
                with torch.autocast(self.device.type, enabled=False):
                    features = self._features(whole[::stride, ::stride].to(self.device), step, level, codebook)
                count = max(1, TABLE // codebook)
                for start in range(0, len(positions), count):
                    part = slice(start, start + count)
                    yield self.frequencies(self._logits(features[part], codebook)), positions[part]


def _activation(total: Tensor) -> Tensor:
    """ReLU of the residual total, in the coarser steps and the range of activations."""
    half = 2.0 ** (TOTAL_BITS - ACTIVATION_BITS - 1)
    return torch.floor((total + half) * 2.0 ** (ACTIVATION_BITS - TOTAL_BITS)).clamp_(0, ACTIVATION)


def fingerprint(tensors: dict[str, Tensor]) -> bytes:
    """Eight bytes of SHA-256 over name, type, shape and bytes of each tensor, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:8]


# ---- asymmetric numeral systems, as in `vtc.codecs.entropy`, with frequencies of its own for each symbol -------------

def ans_encode(lows: Indices, shares: Indices, words: Indices, size: int) -> bytes:
    """Words (N,) below `size` that have `shares` (N,) of 2^24 from `lows` (N,) on, to bytes.

    The coder starts with the last of the words, as many as fit in 24 bits: from state 0 the first word to be coded,
    which is the last of those before them, would take 24 bits whatever it is.
    """
    coded = len(words) - seed_length(len(words), size)
    out, state = [], 0
    for word in words[coded:].tolist():
        state = state * size + word
    for low, share in zip(lows[:coded][::-1].tolist(), shares[:coded][::-1].tolist(), strict=True):
        if state >> (64 - PRECISION) >= share:
            out.append(state & 0xFFFFFFFF)
            state >>= 32
        whole, rest = divmod(state, share)
        state = whole << PRECISION | rest + low
    while state:
        out.append(state & 0xFFFFFFFF)
        state >>= 32
    return np.array(out, dtype="<u4").tobytes().rstrip(b"\0")


class AnsDecoder:
    """The `count` words below `size` of a payload, in order; BitstreamError where the payload is not their code."""

    def __init__(self, payload: bytes, count: int, size: int) -> None:
        if payload.endswith(b"\0"):
            raise BitstreamError("The payload is padded with zeros.")
        self.words = np.frombuffer(payload + bytes(-len(payload) % 4), dtype="<u4").tolist()
        self.seeds, self.size, self.state = seed_length(count, size), size, 0
        self.coded = count - self.seeds
        self._refill()
        self._refill()

    def _refill(self) -> None:
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def decode(self, frequencies: Frequencies) -> Indices:
        """The next N words, (N,), which have these frequencies."""
        out = np.empty(len(frequencies), dtype=np.int64)
        for n in range(len(frequencies)):
            if not self.coded:
                out[n] = self._seed()
                continue
            self.coded -= 1
            place = self.state & (2**PRECISION - 1)
            out[n], low, end = frequencies.find(n, place)
            self.state = (self.state >> PRECISION) * (end - low) + place - low
            self._refill()
        return out

    def _seed(self) -> int:
        """The next of the words with which the coder started: the digits of the state that is left."""
        if self.words or self.state >= self.size**self.seeds:
            raise BitstreamError("The payload does not end where its indices end.")
        self.seeds -= 1
        word, self.state = divmod(self.state, self.size**self.seeds)
        return word
