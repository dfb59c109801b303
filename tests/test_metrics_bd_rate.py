"""Bjontegaard deltas against the published package's numbers, and the package itself where it is installed."""

import json

import numpy as np
import pytest

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError
from vtc.eval.bd_rate import bd_quality, bd_rate

METHODS = ["cubic", "pchip", "akima"]


@needs_shared("fixtures", "eval", "bd_rate.json")
@pytest.mark.parametrize("method", METHODS)
def test_the_fixture(method):
    fixture = json.loads((SHARED / "fixtures" / "eval" / "bd_rate.json").read_text())
    rates, quality, test_rates, test_quality = (
        fixture[f"{kind}_{side}"] for side in ("anchor", "test") for kind in ("rate", "psnr"))
    rate = bd_rate(rates, quality, test_rates, test_quality, method=method)
    assert rate.value == pytest.approx(fixture[f"bd_rate_{method}"], abs=1e-9)
    assert rate.overlap == (28.3, 36.2)
    assert rate.overlap_share == pytest.approx((36.2 - 28.3) / (36.5 - 28.0))
    gain = bd_quality(rates, quality, test_rates, test_quality, method=method)
    assert gain.value == pytest.approx(fixture[f"bd_psnr_{method}"], abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_package(method):
    bjontegaard = pytest.importorskip("bjontegaard")
    rates, test_rates = [0.02, 0.05, 0.1, 0.3, 0.8], [0.03, 0.06, 0.11, 0.2, 0.6]
    quality, test_quality = [20.0, 22.5, 24.1, 27.0, 31.0], [21.0, 23.4, 25.2, 26.8, 30.0]
    expected = bjontegaard.bd_rate(rates, quality, test_rates, test_quality, method=method)
    assert bd_rate(rates, quality, test_rates, test_quality, method=method).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_measure_that_falls_with_the_rate(method):
    """LPIPS: the same curves upside down give the same saving."""
    rates, quality = [0.1, 0.2, 0.4, 0.9], [30.0, 32.0, 35.0, 37.0]
    test_rates, test_quality = [0.08, 0.2, 0.3, 0.7], [29.0, 33.0, 35.0, 36.5]
    up = bd_rate(rates, quality, test_rates, test_quality, method=method)
    down = bd_rate(rates, [-q for q in quality], test_rates, [-q for q in test_quality], method=method)
    assert down.value == pytest.approx(up.value, abs=1e-9)


@pytest.mark.parametrize(("arguments", "message"), [
    (([0.1, 0.2], [30, 31], [0.1, 0.2], [40, 41]), "do not overlap"),
    (([0.1, -0.2], [30, 31], [0.1, 0.2], [30, 31]), "positive"),
    (([0.1, 0.2, 0.3], [30, 32, 31], [0.1, 0.2], [30, 31]), "rise"),
    (([0.1, 0.2, 0.3], [30, 30, 31], [0.1, 0.2], [30, 31]), "agree"),
    (([0.1], [30], [0.1, 0.2], [30, 31]), "at least 2"),
    (([0.1, 0.2], [30, np.nan], [0.1, 0.2], [30, 31]), "finite"),
])
def test_curves_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        bd_rate(*arguments)
    if message == "at least 2":
        with pytest.raises(ConfigError, match="at least 4"):
            bd_rate([1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3], method="cubic")
