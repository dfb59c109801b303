"""Multi-scale residual vector quantization: one map, coded as a pyramid of token grids. Tian et al., VAR (2404.02905).

    rest = f                                       (B, d, H, W)
    for each grid (h, w), coarse to fine:
        indices = nearest words of  area_down(rest, h, w)
        step    = phi(bicubic_up(words[indices], H, W))
        f_hat  += step
        rest   -= step

The finest grid has the map's own size, so nothing is resized there. All grids share one codebook; phi is a 3x3
convolution blended with the identity, and a few of them are shared out over the grids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Quantized
from vtc.tokenizers.kmeans import kmeans
from vtc.tokenizers.ranks import from_first_rank
from vtc.tokenizers.scales import Grid, MultiScaleQuantizer, Scale, resize_area
from vtc.tokenizers.straight_through import straight_through
from vtc.tokenizers.vector_quantizer import nearest_codeword

#: sides of the square grids of VAR at 256 px: 680 tokens
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
#: and at 512 px: 2240 tokens
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def phi_of_scale(scale: int, scales: int, phis: int) -> int:
    """Which of `phis` convolutions serves scale number `scale` of `scales`: the one whose tick is nearest.

    In float64, as upstream: with ten scales and four convolutions, scales 2 and 7 lie exactly between two ticks, and
    the last bit decides, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]; float32 answers otherwise and gives another picture.
    """
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    position = scale / (scales - 1) if scales > 1 else 0.0
    return int(np.argmin(np.abs(np.linspace(edge, 1 - edge, phis) - position)))


class Phi(nn.Conv2d):
    """(1 - share) * x + share * conv3x3(x)."""

    def __init__(self, dim: int, share: float) -> None:
        super().__init__(dim, dim, 3, padding=1)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - self.share) + super().forward(x) * self.share


class MultiScaleResidualQuantizer(MultiScaleQuantizer):
    """A (B, d, H, W) map as tokens of several grids, coarse to fine, with one codebook.

    codebook_size, dim: K and d; 4096 and 32 in VAR.
    scales: the grids, as sides or (rows, columns); the last one is the map's size. Codebook and phis do not depend on
        them, so every method takes another list for an image of another size.
    beta: the loss is the mean over scales of mean (f_hat - sg(f))^2 + beta * mean (sg(f_hat) - f)^2.
    normalize: choose words by cosine instead of distance (upstream's `using_znorm`); the codes stay as they are.
    phis: number of phi convolutions, shared out over the scales (upstream's `share_quant_resi`, whose 0 is one a scale:
        give their number); 0: no phi (upstream's `quant_resi` of 0).
    phi_share: of the convolution in phi (upstream's `quant_resi`).

    Indices are (B, L), scale after scale, each row by row: L is the number of cells of all grids.
    """

    def __init__(self, codebook_size: int, dim: int, scales: Sequence[Scale] = VAR_256, beta: float = 0.25,
                 normalize: bool = False, phis: int = 4, phi_share: float = 0.5) -> None:
        super().__init__(dim, scales)
        if codebook_size < 1 or dim < 1 or phis < 0:
            raise ConfigError(f"A multi-scale quantizer of {codebook_size} words, {dim} dimensions and {phis} phis "
                              "cannot be: at least 1, 1 and 0.")
        self.codebook_size, self.beta, self.normalize = codebook_size, beta, normalize
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.phi = nn.ModuleList(Phi(dim, phi_share) for _ in range(phis))

    @property
    def vocab(self) -> tuple[int, ...]:
        """Words of the index."""
        return (self.codebook_size,)

    @property
    def loss_weights(self) -> dict[str, float]:
        """1 and `beta`."""
        return {"codebook_loss": 1.0, "commitment": self.beta}

    def forward(self, z: Tensor, scales: Sequence[Scale] | None = None) -> Quantized:
        """z: (B, d, H, W) float, of the last scale's size. Indices are (B, L)."""
        steps = self.grids_of(scales)
        self.check_map(z, steps)
        with torch.autocast(z.device.type, enabled=False):  # what ten steps leave over needs its precision
            f = z if z.dtype == torch.float64 else z.float()
            indices, sums = zip(*self._walk(f, steps), strict=True)
            loss = self.weighted(self._terms(f, sums)) if self.training else f.new_zeros(())
        z_q = straight_through(z, sums[-1]) if self.training else sums[-1].to(z.dtype)
        return Quantized(z_q, torch.cat([chosen.flatten(1) for chosen in indices], 1), loss)

    def loss_terms(self, z: Tensor, scales: Sequence[Scale] | None = None) -> dict[str, Tensor]:
        """Unweighted, in either mode: codebook_loss and commitment, means over the scales."""
        steps = self.grids_of(scales)
        self.check_map(z, steps, training=True)
        with torch.autocast(z.device.type, enabled=False):
            f = z if z.dtype == torch.float64 else z.float()
            return self._terms(f, [total for _, total in self._walk(f, steps)])

    def _walk(self, f: Tensor, steps: tuple[Grid, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each scale's indices, (B, h, w), and the sum after it, (B, d, H, W)."""
        rest, f_hat = f.detach(), torch.zeros_like(f)
        for number, size in enumerate(steps):
            chosen = self.nearest(resize_area(rest, size))
            step = self.step(chosen, number, steps)
            f_hat, rest = f_hat + step, rest - step.detach()
            yield chosen, f_hat

    def _terms(self, f: Tensor, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"codebook_loss": torch.stack([F.mse_loss(total, f.detach()) for total in sums]).mean(),
                "commitment": torch.stack([F.mse_loss(f, total.detach()) for total in sums]).mean()}

    def nearest(self, z: Tensor) -> Tensor:
        """(B, d, h, w) to (B, h, w) indices of the nearest words."""
        flat, codebook = z.permute(0, 2, 3, 1).reshape(-1, self.dim), self.codebook.detach().to(z.dtype)
        if self.normalize:  # on the sphere the nearest word is the one of the largest cosine
            flat, codebook = F.normalize(flat, dim=1), F.normalize(codebook, dim=1)
        return nearest_codeword(flat, codebook).view(z.shape[0], *z.shape[-2:])

    def step(self, indices: Tensor, number: int, steps: tuple[Grid, ...]) -> Tensor:
        codes = self.codebook[indices].permute(0, 3, 1, 2)
        if number < len(steps) - 1:
            codes = F.interpolate(codes, steps[-1], mode="bicubic")
        return self.phi[phi_of_scale(number, len(steps), len(self.phi))](codes) if len(self.phi) else codes

    def shown_at(self, total: Tensor, size: Grid) -> Tensor:
        return resize_area(total, size)

    @torch.no_grad()
    def residuals(self, z: Tensor, scales: Sequence[Scale] | None = None) -> Tensor:
        """The vectors for which words are looked up in a map, scale after scale: (B, d, H, W) to (B, L, d)."""
        steps = self.grids_of(scales)
        self.check_map(z, steps)
        rest, found = z.float(), []
        for number, size in enumerate(steps):
            small = resize_area(rest, size)
            found.append(small.flatten(2).transpose(1, 2))
            rest = rest - self.step(self.nearest(small), number, steps)
        return torch.cat(found, 1)

    @torch.no_grad()
    def start_from(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the codebook to the K-means centres of (N, d) vectors, such as latents and their area means."""
        found = kmeans(latents.float(), self.codebook_size, start="random", iterations=10, generator=generator)
        self.codebook.copy_(from_first_rank(found.centres))
