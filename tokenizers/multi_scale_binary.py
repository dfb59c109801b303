"""Multi-scale residual binary spherical quantization: VAR's pyramid with signs for words.

Han et al., Infinity (2412.04431).

    rest = z                                       (B, d, H, W)
    for each grid (h, w), coarse to fine:
        bits   = signs of  area_down(rest, h, w)
        step   = bilinear_up(bits / sqrt(d), H, W)
        z_hat += step
        rest  -= step
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer
from vtc.tokenizers.bits import BitOrder, pack_tokens, unpack_tokens
from vtc.tokenizers.scales import Grid, MultiScaleQuantizer, Scale, resize_area

#: sides of Infinity's square grids at one megapixel: 10521 tokens; its 0.06, 0.25 and 0.60 M use the first 7, 10, 12
INFINITY_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


class MultiScaleBinaryQuantizer(MultiScaleQuantizer):
    """A (B, d, H, W) map as grids of d bits a cell, coarse to fine. No codebook, no state.

    dim: d; 32 (2B) and 56 (8B) in Infinity.
    scales: the grids; the last one is the map's size. Every method takes another list.
    commitment, entropy, diversity, temperature, reduce_across_ranks: of the `BinarySphericalQuantizer`, `bsq`, that all
        scales share, with histograms of single bits (upstream's inverse temperature is 100); the loss is the mean over
        scales. To change a weight while training, assign to `bsq`'s: `quantizer.bsq.entropy = 0.2`.
    token_bits: bits of each index, default one index for all d; Infinity's generator predicts each bit by itself,
        which is (1,) * d.
    bit_order: of indices of more than one bit.

    The gradient reaches z through every scale's resizing and projection, as upstream.
    Indices are (B, L, G), scale after scale, each row by row.
    """

    grouped_indices = True

    def __init__(self, dim: int, scales: Sequence[Scale] = INFINITY_1M, commitment: float = 0.25, entropy: float = 0.1,
                 diversity: float = 1.0, temperature: float = 0.01, token_bits: tuple[int, ...] | None = None,
                 bit_order: BitOrder = "msb_first", reduce_across_ranks: bool = True) -> None:
        super().__init__(dim, scales)
        self.bsq = BinarySphericalQuantizer(dim, 1, commitment, entropy, diversity, temperature,
                                            token_bits=token_bits, bit_order=bit_order,
                                            reduce_across_ranks=reduce_across_ranks)

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of each index."""
        return self.bsq.vocab

    @property
    def token_bits(self) -> tuple[int, ...]:
        """Bits of each index."""
        return self.bsq.token_bits

    @property
    def bit_order(self) -> BitOrder:
        """Order of the bits in an index."""
        return self.bsq.bit_order

    @property
    def loss_weights(self) -> dict[str, float]:
        """Those of `bsq`."""
        return self.bsq.loss_weights

    def forward(self, z: Tensor, scales: Sequence[Scale] | None = None) -> Quantized:
        """z: (B, d, H, W) float, of the last scale's size. Indices are (B, L, G)."""
        steps = self.grids_of(scales)
        self.check_map(z, steps)
        with torch.autocast(z.device.type, enabled=False):
            _, parts, added = zip(*self._walk(z, steps), strict=True)
            return Quantized(sum(added).to(z.dtype), torch.cat([part.indices.flatten(1, 2) for part in parts], 1),
                             torch.stack([part.loss for part in parts]).mean())

    def loss_terms(self, z: Tensor, scales: Sequence[Scale] | None = None) -> dict[str, Tensor]:
        """Unweighted, in either mode: per_sample_entropy, codebook_entropy, commitment, means over the scales."""
        steps = self.grids_of(scales)
        self.check_map(z, steps, training=True)
        with torch.autocast(z.device.type, enabled=False):
            terms = [self.bsq.loss_terms(small) for small, _, _ in self._walk(z, steps)]
        return {name: torch.stack([of_scale[name] for of_scale in terms]).mean() for name in self.loss_weights}

    def _walk(self, z: Tensor, steps: tuple[Grid, ...]) -> Iterator[tuple[Tensor, Quantized, Tensor]]:
        """Each scale's latents, (B, d, h, w), what `bsq` makes of them, and what that adds, (B, d, H, W)."""
        rest = z if z.dtype == torch.float64 else z.float()
        for size in steps:
            small = resize_area(rest, size)
            part = self.bsq(small)
            step = _enlarge(part.z_q, steps[-1])
            rest = rest - step.detach()
            yield small, part, step

    def step(self, indices: Tensor, number: int, steps: tuple[Grid, ...]) -> Tensor:
        return _enlarge(self.bsq.indices_to_codes(indices), steps[-1])

    def shown_at(self, total: Tensor, size: Grid) -> Tensor:
        return _enlarge(total, size)

    @torch.no_grad()
    def self_correction(self, z: Tensor, strength: float = 0.3, noisy_scales: int | None = None,
                        scales: Sequence[Scale] | None = None,
                        generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """What Infinity's generator trains on: inputs with wrong bits, and targets that mend them.

        In each of the first `noisy_scales` scales (None: all) every bit is flipped with a probability drawn from
        {0, 0.01, ..., strength}; the residual is taken from the flipped sum, so the next scale's true bits undo it.

        z: (B, d, H, W). Returns teacher inputs (B, L - cells of the first scale, d), made from flipped bits, and
        target indices (B, L, G), the true bits of each scale given the flipped ones before it.
        """
        steps = self.grids_of(scales)
        self.check_map(z, steps)
        if not 0 <= strength <= 1:
            raise ConfigError(f"The strength is a probability, not {strength}.")
        rest, targets, flipped = z.float(), [], []
        for number, size in enumerate(steps):
            bits = resize_area(rest, size) > 0
            targets.append(self._pack(bits))
            if noisy_scales is None or number < noisy_scales:
                percent = torch.randint(round(100 * strength) + 1, (), generator=generator)
                noise = torch.rand(bits.shape, generator=generator) * 100 < percent
                bits = bits ^ noise.to(bits.device)
            flipped.append(self._pack(bits))
            rest = rest - self.step(flipped[-1], number, steps)
        inputs = self.teacher_inputs(torch.cat([f.flatten(1, 2) for f in flipped], 1), scales)
        return inputs, torch.cat([t.flatten(1, 2) for t in targets], 1)

    def bits(self, indices: Tensor) -> Tensor:
        """(B, L, G) indices to (B, L, d) bits, whatever tokens they are cut into."""
        return unpack_tokens(self.checked_indices(indices), self.token_bits, self.bit_order).movedim(1, -1)

    def _pack(self, bits: Tensor) -> Tensor:
        return pack_tokens(bits, self.token_bits, self.bit_order)


def _enlarge(x: Tensor, size: Grid) -> Tensor:
    """(B, d, h, w) to (B, d, *size); upstream's trilinear resizing of one frame."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear")
