"""Wavelet transforms of images and latents, equal to PyWavelets and differentiable.

    level 1      x (..., H, W)  ->  A1, (H1, V1, D1)            each about (..., H/2, W/2)
    level 2      A1             ->  A2, (H2, V2, D2)            each about (..., H/4, W/4)
    ...

A is the low-pass band; H, V and D are low along the rows and high along the columns, the reverse, and high along both:
pywt's cA and (cH, cV, cD). Haar is additions of slices; other filters are two grouped convolutions, along each axis.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError

#: how an image goes on beyond its edges, by pywt's names. "periodization": it repeats, and a band has just half the
#: samples (an odd side is first made even by repeating its last row); the others give (n + L - 1) // 2 for n samples
Mode = Literal["periodization", "zero", "periodic", "symmetric", "reflect"]


class WaveletBands(NamedTuple):
    """What a transform of (..., H, W) gives, coarse to fine as pywt.wavedec2.

    approximation: (..., h, w), the low-pass band of the last level.
    details: the levels, coarse to fine, each (..., 3, h, w) with H, V and D.
    """

    approximation: Tensor
    details: tuple[Tensor, ...]


class WaveletTransform(nn.Module):
    """(..., H, W) float to `WaveletBands`, and back by `inverse`.

    wavelet: a discrete wavelet of PyWavelets, such as "haar", "db4", "bior4.4", "sym8".
    levels: how often the approximation is split again.
    mode: what is beyond the edges; see `Mode`.

    There are no parameters and no buffers: the filters follow the type and the device of the input.
    """

    def __init__(self, wavelet: str = "haar", levels: int = 1, mode: Mode = "periodization") -> None:
        super().__init__()
        if wavelet not in pywt.wavelist(kind="discrete"):
            raise ConfigError(f"{wavelet!r} is no discrete wavelet of PyWavelets; see pywt.wavelist(kind='discrete').")
        if levels < 1:
            raise ConfigError(f"A wavelet transform has at least one level, not {levels}.")
        if mode not in get_args(Mode):
            raise ConfigError(f"The mode is one of {', '.join(get_args(Mode))}, not {mode!r}.")
        self.wavelet, self.levels, self.mode = wavelet, levels, mode
        #: taps of each filter, L
        self.taps: int = pywt.Wavelet(wavelet).dec_len
        self.is_haar = wavelet in ("haar", "db1")

    @property
    def is_orthonormal(self) -> bool:
        """Whether the filters are orthonormal: in periodization and on even sides, squares then keep their sum."""
        return bool(pywt.Wavelet(self.wavelet).orthogonal)

    def forward(self, x: Tensor) -> WaveletBands:
        if x.ndim < 2 or not x.is_floating_point() or min(x.shape[-2:]) < 1:
            raise ConfigError(f"A wavelet transform takes floating-point (..., H, W), not {x.dtype} {tuple(x.shape)}.")
        details = []
        for _ in range(self.levels):
            bands = self._split(x)  # (..., 4, h, w)
            x = bands[..., 0, :, :]
            details.append(bands[..., 1:, :, :])
        return WaveletBands(x, tuple(reversed(details)))

    def inverse(self, bands: WaveletBands, size: tuple[int, int] | None = None) -> Tensor:
        """The (..., H, W) that `forward` was given; `size` = (H, W), needed where a side of it was odd."""
        x = bands.approximation
        for details in bands.details:
            x = x[..., : details.shape[-2], : details.shape[-1]]  # an odd side has grown by one on the way
            x = self._merge(torch.cat([x.unsqueeze(-3), details], -3))
        return x if size is None else x[..., : size[0], : size[1]]

    def _split(self, x: Tensor) -> Tensor:
        """(..., H, W) to (..., 4, h, w): A, H, V, D of one level."""
        before, after = self._reach(x.shape[-2]), self._reach(x.shape[-1])
        x = _extend(_extend(x, -2, *before, self.mode), -1, *after, self.mode)
        if self.is_haar:
            top, bottom = x[..., ::2, :], x[..., 1::2, :]
            low, high = top + bottom, top - bottom
            parts = [low[..., ::2] + low[..., 1::2], high[..., ::2] + high[..., 1::2],
                     low[..., ::2] - low[..., 1::2], high[..., ::2] - high[..., 1::2]]
            return 0.5 * torch.stack(parts, -3)
        analysis, _ = _filters(self.wavelet, x.dtype, x.device)
        with torch.autocast(x.device.type, enabled=False):
            # Even and odd samples are two channels of a plain convolution, which is faster than one of stride 2.
            halves = x.reshape(-1, *x.shape[-2:]).unflatten(-1, (-1, 2)).movedim(-1, 1)
            rows = F.conv2d(halves, analysis[:, :, None, :])  # (N, low and high, H, w)
            rows = rows.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)
            bands = F.conv2d(rows, analysis[:, :, :, None].repeat(2, 1, 1, 1), groups=2)  # low low, low high, high ...
        return bands.reshape(*x.shape[:-2], 4, *bands.shape[-2:])

    def _merge(self, bands: Tensor) -> Tensor:
        """(..., 4, h, w) to (..., H, W): the inverse of `_split`, up to the sample that an odd side gains."""
        if self.is_haar:
            a, h, v, d = (0.5 * bands).unbind(-3)
            even, odd = (torch.stack([s + t, s - t], -1).flatten(-2) for s, t in ((a + h, v + d), (a - h, v - d)))
            return torch.stack([even, odd], -2).flatten(-3, -2)
        taps, shape = self.taps, bands.shape
        _, synthesis = _filters(self.wavelet, bands.dtype, bands.device)
        bands, first = bands.reshape(-1, 4, *shape[-2:]), 0
        height, width = (2 * n - taps + 2 for n in shape[-2:])
        if self.mode == "periodization":
            wrap = taps // 4
            bands = _extend(_extend(bands, -2, wrap, wrap, "periodic"), -1, wrap, wrap, "periodic")
            first, height, width = 2 * wrap - taps // 2 + 1, 2 * shape[-2], 2 * shape[-1]
        with torch.autocast(bands.device.type, enabled=False):
            rows = F.conv2d(bands, synthesis[:, :, :, None].repeat(2, 1, 1, 1), groups=2)  # (N, 2 x 2 parities, h, w)
            rows = rows.unflatten(1, (2, 2)).transpose(2, 3).flatten(2, 3)
            x = F.conv2d(rows, synthesis[:, :, None, :]).movedim(1, -1).flatten(-2)
        return x[:, first : first + height, first : first + width].reshape(*shape[:-3], height, width)

    def _reach(self, size: int) -> tuple[int, int]:
        """Samples that a side needs before its first and after its last."""
        taps = self.taps
        if self.mode == "periodization":
            return taps // 2 - 1, taps // 2 - 1
        return taps - 2, 2 * ((size + taps - 1) // 2) - size


@lru_cache
def _filters(wavelet: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Filters for correlation, (2, 2, L/2): analysis by band and parity of the input, synthesis by parity and band.

    What pywt convolves with stands reversed.
    """
    bank = pywt.Wavelet(wavelet)
    with torch.inference_mode(False):  # the cache must not keep a tensor that autograd refuses
        analysis = torch.tensor([bank.dec_lo[::-1], bank.dec_hi[::-1]], dtype=dtype, device=device)
        synthesis = torch.tensor([bank.rec_lo, bank.rec_hi], dtype=dtype, device=device)
        analysis = analysis.view(2, -1, 2).transpose(1, 2).contiguous()
        return analysis, synthesis.view(2, -1, 2).flip(1).permute(2, 0, 1).contiguous()


def _extend(x: Tensor, axis: int, before: int, after: int, mode: Mode) -> Tensor:
    """`x` with so many samples more at the two ends of an axis; any number of them, also more than there are."""
    size = x.shape[axis]
    if mode == "periodization" and size % 2:
        x = torch.cat([x, x.narrow(axis, size - 1, 1)], axis)
        size += 1
    if not before and not after:
        return x
    if mode == "zero":
        return F.pad(x, (0, 0, before, after) if axis == -2 else (before, after))
    places = torch.arange(-before, size + after, device=x.device)
    if mode == "symmetric":
        places = places % (2 * size)
        places = torch.minimum(places, 2 * size - 1 - places)
    elif mode == "reflect":
        if size < 2:
            raise ConfigError("The mode 'reflect' needs sides of at least two samples at every level.")
        places = places % (2 * size - 2)
        places = torch.minimum(places, 2 * size - 2 - places)
    return x.index_select(axis, places % size)
