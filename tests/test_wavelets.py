"""Wavelet transforms against PyWavelets in float64, and WLF against the published lines' fixtures."""

import math

import numpy as np
import pytest
import pywt
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fixtures import Fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.wavelet_loss import WaveletLoss, estimate_clean
from vtc.tokenizers.wavelets import WaveletBands, WaveletTransform

MODES = ["periodization", "zero", "periodic", "symmetric", "reflect"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_equal_to_pywt(bands: WaveletBands, x: Tensor, wavelet: str, mode: str, levels: int, atol: float) -> None:
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(UserWarning)  # pywt warns where the filter is longer than the picture
        approximation, *details = pywt.wavedec2(x.numpy(), wavelet, mode, levels)
    np.testing.assert_allclose(bands.approximation.numpy(), approximation, atol=atol)
    assert len(details) == len(bands.details)
    for ours, theirs in zip(bands.details, details, strict=True):
        np.testing.assert_allclose(ours.numpy(), np.stack(theirs, -3), atol=atol)


@given(wavelet=st.sampled_from(["haar", "db1", "db2", "db4", "sym5", "coif1", "bior1.1", "bior2.2", "bior4.4",
                                "rbio3.1"]),
       mode=st.sampled_from(MODES), levels=st.integers(1, 3), height=st.integers(2, 33), width=st.integers(2, 33))
@settings(max_examples=150, deadline=None)
def test_equal_to_pywt_and_back(wavelet, mode, levels, height, width):
    assume(mode != "reflect" or min(height, width) > 2**levels)  # pywt, too, refuses to reflect a single sample
    x = random(2, 3, height, width)
    transform = WaveletTransform(wavelet, levels, mode)
    bands = transform(x)
    assert_equal_to_pywt(bands, x, wavelet, mode, levels, atol=1e-12)
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(UserWarning)
        coefficients = pywt.wavedec2(x.numpy(), wavelet, mode, levels)
        theirs = pywt.waverec2(coefficients, wavelet, mode)
    np.testing.assert_allclose(transform.inverse(bands).numpy(), theirs, atol=1e-12)
    torch.testing.assert_close(transform.inverse(bands, (height, width)), x, atol=1e-10, rtol=0)


def test_every_orthonormal_and_biorthogonal_wavelet_in_float32():
    x = random(1, 16, 24, dtype=torch.float32)
    for wavelet in pywt.wavelist(kind="discrete"):
        for mode in ("periodization", "zero"):
            assert_equal_to_pywt(WaveletTransform(wavelet, 1, mode)(x), x, wavelet, mode, 1, atol=2e-5)


def test_leading_dimensions_are_free_and_bfloat16_stays():
    x = random(5, 4, 2, 8, 12)
    transform = WaveletTransform("db2", 2)
    bands, flat = transform(x), transform(x.reshape(40, 8, 12))
    torch.testing.assert_close(bands.details[0].reshape(flat.details[0].shape), flat.details[0])
    assert transform(x[0, 0, 0]).approximation.shape == (2, 3)
    assert WaveletTransform("haar")(x.bfloat16()).details[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(x.float()).approximation, transform(x.float()).approximation.float())


@pytest.mark.parametrize("wavelet", ["haar", "db3", "bior2.2"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients(wavelet, mode):
    transform = WaveletTransform(wavelet, 2, mode)

    def there_and_back(x: Tensor) -> tuple[Tensor, ...]:
        bands = transform(x)
        return bands.approximation, *bands.details, transform.inverse(WaveletBands(bands[0] * 2, bands[1]))

    with torch.inference_mode():
        transform(random(2, 8, 8))  # must not leave a tensor behind that cannot be differentiated
    assert torch.autograd.gradcheck(there_and_back, random(1, 5, 6).requires_grad_())


@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym5"])
@pytest.mark.parametrize("size", [(16, 24), (8, 40)])
def test_equal_weights_are_plain_mse(wavelet, size):
    """Orthonormal filters, periodization, sides that stay even: Parseval."""
    prediction, target = random(2, 4, *size), random(2, 4, *size, seed=1)
    weight = torch.tensor([0.3, 2.0]).view(2, 1, 1, 1)
    plain = (weight * (prediction - target).square()).mean().item()
    for levels in (1, 2, 3):
        loss = WaveletLoss(wavelet, levels, "periodization")
        assert loss.transform.is_orthonormal
        assert loss(prediction, target, weight).item() == pytest.approx(plain, rel=1e-5)
    assert WaveletLoss("haar", 1, "zero")(prediction, target, weight).item() == pytest.approx(plain, rel=1e-5)


def test_what_is_not_orthonormal_is_not_plain_mse():
    prediction, target = random(1, 2, 16, 16), random(1, 2, 16, 16, seed=1)
    plain = (prediction - target).square().mean().item()
    loss = WaveletLoss("bior2.2", 1, "periodization")
    assert not loss.transform.is_orthonormal
    assert abs(loss(prediction, target).item() / plain - 1) > 0.01
    assert abs(WaveletLoss("db4", 1, "zero")(prediction, target).item() / plain - 1) > 0.01
    # an odd side: the same sum over more coefficients
    odd = random(1, 2, 15, 17)
    assert WaveletLoss()(odd, 0 * odd).item() == pytest.approx(odd.square().sum().item() / (2 * 16 * 18), rel=1e-5)


def test_band_weights_weigh_their_bands():
    prediction, target = random(2, 3, 16, 16), random(2, 3, 16, 16, seed=1)
    errors = WaveletLoss("haar", 2).band_errors(prediction, target)
    assert list(errors) == ["a_2", "h_2", "v_2", "d_2", "h_1", "v_1", "d_1"]
    share = dict.fromkeys(errors, 1 / 16) | dict.fromkeys(("h_1", "v_1", "d_1"), 1 / 4)
    weights = (1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0)
    expected = sum(w * share[band] * error for w, (band, error) in zip(weights, errors.items(), strict=True))
    seven = WaveletLoss("haar", 2, band_weights=weights)(prediction, target)
    assert seven.item() == pytest.approx(float(expected), 1e-5)
    four = WaveletLoss("haar", 2, band_weights=(1, 2, 3, 5))(prediction, target)
    seven = WaveletLoss("haar", 2, band_weights=(1, 2, 3, 5, 2, 3, 5))(prediction, target)
    assert torch.equal(four, seven)
    # a wave along the rows is in V alone: band weights see what plain MSE does not
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    energy = WaveletLoss().band_errors(stripes, torch.zeros(1, 1, 8, 8))
    assert {band: e.item() for band, e in energy.items()} == {"a_1": 0, "h_1": 0, "v_1": pytest.approx(4), "d_1": 0}


@needs_shared("fixtures", "scvae")
@pytest.mark.parametrize("case", [f"{model}.{n}." for model in ("flux", "sd3") for n in range(4)])
def test_published_loss(case):
    """Tolerance of the fixture: 1e-6 + 1e-5 relative."""
    fixture = Fixture("scvae/wavelet_loss")
    scheme = fixture.facts["cases"][case]["weighting_scheme"]
    x0, noise, sigma = (fixture[case + name] for name in ("x0", "noise", "sigma"))
    velocity = fixture[case + "v_pred"].requires_grad_()
    estimate = estimate_clean((1 - sigma) * x0 + sigma * noise, velocity, sigma)
    weight = sigma**-2 if scheme == "sigma_sqrt" else torch.ones_like(sigma)
    loss = WaveletLoss()(estimate, x0, weight)
    loss.backward()
    tolerance = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(loss, fixture[case + "loss"][0], **tolerance)
    torch.testing.assert_close(velocity.grad, fixture[case + "grad"], **tolerance)
    for name, latent in (("pred_bands", estimate), ("target_bands", x0)):
        bands = WaveletTransform("haar", 1, "zero")(latent.detach())
        joined = torch.cat([bands.approximation, *bands.details[0].unbind(-3)], 1)
        torch.testing.assert_close(joined, fixture[case + name], **tolerance)
    assert fixture.facts["cases"][case]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    if all(side % 2 == 0 for side in x0.shape[-2:]):  # the identity, on upstream's own numbers
        plain = (weight * sigma**2 * (velocity - (noise - x0)).square()).mean().item()
        assert math.isclose(plain, fixture[case + "loss"].item(), rel_tol=1e-5)


@needs_shared("fixtures", "scvae")
@pytest.mark.parametrize(("wavelet", "mode"), [("db4", "zero"), ("db4", "periodization"), ("db4", "symmetric"),
                                               ("db4", "periodic"), ("haar", "symmetric"), ("bior2.2", "reflect")])
def test_pytorch_wavelets(wavelet, mode):
    """pytorch_wavelets 1.3.0, two levels, fine to coarse there; float32. Tolerance of the fixture, as above."""
    fixture, prefix = Fixture("scvae/wavelet_loss"), f"dwt.{wavelet}.{mode}."
    bands = WaveletTransform(wavelet, 2, mode)(fixture[prefix + "x"])
    torch.testing.assert_close(bands.approximation, fixture[prefix + "ll"], atol=1e-6, rtol=1e-5)
    for ours, name in zip(bands.details, ("h1", "h0"), strict=True):
        torch.testing.assert_close(ours, fixture[prefix + name], atol=1e-6, rtol=1e-5)


def test_what_makes_no_sense_is_refused():
    for call in (lambda: WaveletTransform("morl"), lambda: WaveletTransform(levels=0),
                 lambda: WaveletTransform(mode="smooth"),
                 lambda: WaveletTransform("haar", 1, "reflect")(torch.zeros(1, 5)),
                 lambda: WaveletTransform()(torch.zeros(4)),
                 lambda: WaveletTransform()(torch.zeros(4, 4, dtype=torch.uint8)),
                 lambda: WaveletLoss(levels=2, band_weights=(1, 1, 1)), lambda: WaveletLoss(band_weights=(1, 1, 1, -1)),
                 lambda: WaveletLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))):
        with pytest.raises(ConfigError):
            call()
