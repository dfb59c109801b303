"""DISTS, patches, wavelet bands and the scale-consistency probe, against independent implementations."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, ImageError, ModelError
from vtc.eval.dists import DISTS, DeepImageStructureAndTextureSimilarity
from vtc.eval.features import PooledFeatures
from vtc.eval.frechet import feature_statistics, frechet_distance
from vtc.eval.patch_frechet import PatchFrechetDistance, patch_frechet_distance, patches
from vtc.eval.scale_consistency import (
    ScaleConsistencyProbe,
    downscale,
    estimate_shift,
    scale_consistency,
    tiling_error,
)
from vtc.eval.wavelet_bands import WaveletBandEnergies, band_energies, haar_bands
from vtc.tokenizers.lpips import BACKBONES


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of random VGG-16 convolutions, small enough that activations stay moderate."""
    torch.manual_seed(0)
    features, _, _ = BACKBONES["vgg"]()
    path = tmp_path_factory.mktemp("vgg") / "vgg16_features.safetensors"
    save_file({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return path


def test_dists_equals_torchmetrics(vgg, monkeypatch):
    theirs = pytest.importorskip("torchmetrics.functional.image.dists")
    features, _, _ = BACKBONES["vgg"]()
    features.load_state_dict({k.removeprefix("features."): v for k, v in load_file(vgg).items()})
    vgg16 = nn.Module()
    vgg16.features = nn.Sequential(*features, nn.MaxPool2d(2))
    monkeypatch.setattr(theirs, "vgg16", lambda weights: vgg16)
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 32, 24, generator=generator)
    b = (a + 0.2 * torch.rand(2, 3, 32, 24, generator=generator)).clamp(0, 1)
    expected = theirs.DISTSNetwork()(a, b)
    torch.testing.assert_close(DISTS(vgg)(a, b), expected, atol=2e-6, rtol=1e-4)
    metric = DeepImageStructureAndTextureSimilarity(vgg)
    metric.update(a, b)
    assert metric.compute().item() == pytest.approx(expected.mean().item(), abs=2e-6)
    assert metric(a, a).item() == pytest.approx(0, abs=2e-6)


def test_dists_without_weights_is_refused(vgg, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ModelError, match="vgg16_features"):
        DISTS(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        DISTS(vgg, tmp_path / "absent.pt")


def test_patches_are_two_grids():
    image = torch.arange(9 * 14.0).view(1, 1, 9, 14)
    found = patches(image, 4)
    corners = [(r * 4, c * 4) for r in range(2) for c in range(3)] + [(2, 2), (2, 6)]
    assert [int(p[0, 0, 0]) for p in found] == [r * 14 + c for r, c in corners]
    assert torch.equal(found[-1], image[0, :, 2:6, 6:10])
    with pytest.raises(ImageError, match="no 16x16 patch"):
        patches(image, 16)


@needs_shared("weights", "squeezenet1_1_features.safetensors")
def test_patch_distance_is_the_distance_of_the_patches():
    network = PooledFeatures("squeeze", SHARED / "weights")
    real = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    fake = real.square()
    metric = PatchFrechetDistance(network, size=32, batch_size=3)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    expected = frechet_distance(*(feature_statistics(network(patches(x, 32))) for x in (real, fake)))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
    assert metric.metric_name == "patch_fd_squeezenet1_1_features_pool"
    assert patch_frechet_distance(fake, real, network, 32) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 9)])
def test_haar_bands_equal_pywavelets(height, width):
    pywt = pytest.importorskip("pywt")
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, details = pywt.dwt2(x.numpy(), "haar", mode="zero")
    for ours, theirs in zip(haar_bands(x), (low, *details), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


@needs_shared("fixtures", "scvae", "wavelet_loss.safetensors")
@pytest.mark.parametrize("case", ["flux.0", "flux.2", "sd3.1"])
def test_haar_bands_equal_upstream(case):
    arrays = load_file(SHARED / "fixtures" / "scvae" / "wavelet_loss.safetensors")
    torch.testing.assert_close(torch.cat(haar_bands(arrays[f"{case}.x0"]), 1), arrays[f"{case}.target_bands"],
                               atol=1e-6, rtol=1e-5)


def test_bands_add_up_to_the_squared_error():
    target = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sum(band_energies(target, 3).values()) == pytest.approx(target.square().sum().item())
    metric = WaveletBandEnergies(levels=2)
    metric.update(target[:1] * 0.5, target[:1])
    metric.update(target[1:] * 0.5, target[1:])
    assert set(metric.compute()) == {"low", *(f"level{i}_{d}" for i in (1, 2)
                                              for d in ("horizontal", "vertical", "diagonal"))}
    for ratio in metric.compute().values():
        assert ratio.item() == pytest.approx(0.25)


def smooth(seed: int = 0, side: int = 96) -> Tensor:
    coarse = torch.rand(1, 3, side // 6, side // 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def test_the_probe_by_hand():
    """An autoencoder that halves the picture by means of 2x2, and squares: not equivariant."""
    def encode(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2).square()

    def decode(z: Tensor) -> Tensor:
        return F.interpolate(z.sqrt(), scale_factor=2)

    images = torch.cat([smooth(0), smooth(1)])
    probe = ScaleConsistencyProbe(encode, decode, [Fraction(1, 2)])
    for image in images:
        probe.update(image[None])
    result = probe.compute()["1/2"]
    half = Fraction(1, 2)
    small, z = downscale(images, half), encode(images)
    difference = downscale(z, half) - encode(small)
    assert result.latent_error == pytest.approx((difference.square().sum() / encode(small).square().sum()).item())
    assert result.latent_error > 1e-5

    def psnr(a: Tensor, b: Tensor) -> float:
        return -10 * np.log10((a - b).square().mean().item())

    assert result.decoded_latent_psnr == pytest.approx(psnr(decode(downscale(z, half)), small), abs=1e-4)
    assert result.decode_psnr == pytest.approx(psnr(downscale(decode(z), half), decode(encode(small))), abs=1e-4)
    assert scale_consistency(images, encode, decode, [half])["1/2"] == pytest.approx(result)
    with pytest.raises(ImageError, match="whole"):
        probe.update(torch.zeros(1, 3, 95, 96))
    with pytest.raises(ConfigError):
        ScaleConsistencyProbe(encode, decode, [Fraction(2)])


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.0, 0.0), (-3.0, 2.0), (0.3, -1.4)])
def test_shifts_are_found(shift):
    pytest.importorskip("scipy")
    from scipy.ndimage import shift as move

    target = smooth(side=120)
    moved = np.stack([move(plane, shift, order=5, mode="nearest") for plane in target[0].double().numpy()])
    preds = torch.from_numpy(moved).float().clamp(0, 1)[None]
    found = estimate_shift(preds, target)[0].numpy()
    np.testing.assert_allclose(found, shift, atol=0.02)


def test_tiling_error_is_the_largest():
    whole = smooth()
    tiled = whole.clone()
    tiled[0, 1, 40, 40] = (tiled[0, 1, 40, 40] + 0.25).clamp(max=1)
    error = tiling_error(tiled, whole)
    assert error.max_error == pytest.approx((tiled - whole).max().item())
    assert error.psnr == pytest.approx(-10 * np.log10(error.max_error**2 / whole.numel()), abs=1e-3)
