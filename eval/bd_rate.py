"""Bjontegaard deltas: how much rate one codec saves over another at equal quality, as the mean over the shared range.

Bjontegaard, VCEG-M33 (2001), fits a cubic polynomial through the logarithm of the rate over the quality; later practice
(VCEG-AE07, JVET-T2010) interpolates instead: "pchip" without overshoot, "akima" with fewer wiggles than a spline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from vtc.errors import ConfigError

Interpolation = Literal["cubic", "pchip", "akima"]


class BjontegaardDelta(NamedTuple):
    """value: percent of rate, or units of quality. overlap: the range that was averaged over (quality, or log10 rate).

    overlap_share: of the two curves' joint range; below about 0.5 the number says little.
    """

    value: float
    overlap: tuple[float, float]
    overlap_share: float


def bd_rate(rates: Sequence[float], qualities: Sequence[float], test_rates: Sequence[float],
            test_qualities: Sequence[float], method: Interpolation = "pchip") -> BjontegaardDelta:
    """Percent by which the test's rate differs from the anchor's at equal quality; negative is a saving.

    rates: positive, in any unit. qualities: any measure that is strictly monotone in the rate, in either direction
    (PSNR, MS-SSIM, LPIPS). Raises ConfigError for fewer than four points (two, without "cubic"), repeated qualities,
    or curves that do not overlap.

    >>> bd_rate([1, 2, 4, 8], [30, 33, 36, 39], [0.5, 1, 2, 4], [30, 33, 36, 39]).value
    -49.99999...
    """
    anchor = _curve(qualities, np.log(_positive(rates)), method)
    test = _curve(test_qualities, np.log(_positive(test_rates)), method)
    difference, overlap, share = _mean_difference(anchor, test)
    return BjontegaardDelta(100 * float(np.expm1(difference)), overlap, share)


def bd_quality(rates: Sequence[float], qualities: Sequence[float], test_rates: Sequence[float],
               test_qualities: Sequence[float], method: Interpolation = "pchip") -> BjontegaardDelta:
    """Mean difference in quality (BD-PSNR and the like) at equal rate, test minus anchor; see `bd_rate`.

    >>> bd_quality([1, 2, 4, 8], [30, 33, 36, 39], [1, 2, 4, 8], [31, 34, 37, 40]).value
    1.00000...
    """
    anchor = _curve(np.log10(_positive(rates)), qualities, method)
    test = _curve(np.log10(_positive(test_rates)), test_qualities, method)
    return BjontegaardDelta(*_mean_difference(anchor, test))


class _Curve(NamedTuple):
    low: float
    high: float
    integral: Callable[[float, float], float]


def _positive(rates: Sequence[float]) -> np.ndarray:
    array = np.asarray(rates, dtype=np.float64)
    if not (array > 0).all():
        raise ConfigError(f"Rates are positive; {list(rates)} are not.")
    return array


def _curve(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, method: Interpolation) -> _Curve:
    """y over x, ready to be integrated."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    least = 4 if method == "cubic" else 2
    if x.ndim != 1 or x.shape != y.shape or len(x) < least:
        raise ConfigError(f"A {method} curve needs at least {least} pairs of rate and quality, "
                          f"not {x.size} and {y.size}.")
    order = np.argsort(x)
    x, y = x[order], y[order]
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all()):
        raise ConfigError("Rates and qualities must be finite, and no two points of a curve may agree in one of them.")
    if not ((np.diff(y) > 0).all() or (np.diff(y) < 0).all()):
        raise ConfigError("A curve's quality must rise (or fall) with every step of the rate; leave out points that "
                          "do worse at a higher rate.")
    if method == "cubic":
        antiderivative = np.polynomial.Polynomial.fit(x, y, 3).integ()
        return _Curve(x[0], x[-1], lambda a, b: float(antiderivative(b) - antiderivative(a)))
    from scipy.interpolate import Akima1DInterpolator, PchipInterpolator

    interpolators = {"pchip": PchipInterpolator, "akima": Akima1DInterpolator}
    if method not in interpolators:
        raise ConfigError(f'Curves are interpolated by "cubic", "pchip" or "akima", not {method!r}.')
    interpolator = interpolators[method](x, y)
    return _Curve(x[0], x[-1], lambda a, b: float(interpolator.integrate(a, b)))


def _mean_difference(anchor: _Curve, test: _Curve) -> tuple[float, tuple[float, float], float]:
    low, high = max(anchor.low, test.low), min(anchor.high, test.high)
    if not low < high:
        raise ConfigError(f"The curves do not overlap: {anchor.low:g} to {anchor.high:g} and "
                          f"{test.low:g} to {test.high:g}.")
    share = (high - low) / (max(anchor.high, test.high) - min(anchor.low, test.low))
    mean = (test.integral(low, high) - anchor.integral(low, high)) / (high - low)
    return mean, (float(low), float(high)), float(share)
