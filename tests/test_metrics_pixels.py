"""PSNR, SSIM, MS-SSIM, LPIPS, rates and codebook statistics against independent implementations."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, ImageError, ModelError
from vtc.eval.bits import BitsPerPixel
from vtc.eval.codebook import CodebookUsageMetric, codebook_usage
from vtc.eval.lpips import LearnedPerceptualImagePatchSimilarity
from vtc.eval.psnr import PeakSignalNoiseRatio, peak_signal_noise_ratio
from vtc.eval.ssim import (
    MultiscaleStructuralSimilarity,
    StructuralSimilarity,
    multiscale_structural_similarity,
    padded_structural_similarity,
    structural_similarity,
)
from vtc.torchvision_guard import ensure_torchvision_imports

FIXTURES = SHARED / "fixtures" / "eval"


def read(path) -> Tensor:
    """(1, 3, H, W) float64 in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)).permute(2, 0, 1)[None] / 255


def noisy_pair(height: int, width: int, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth picture and the same with noise, so that all terms of SSIM matter."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, height // 16 + 2, width // 16 + 2, generator=generator, dtype=dtype)
    target = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = 0.2 * torch.rand(2, 3, height, width, generator=generator, dtype=dtype) - 0.1
    return (target + noise).clamp(0, 1), target


@needs_shared("fixtures", "eval", "pixel_metrics.json")
def test_pixel_metrics_equal_the_fixtures():
    fixture = json.loads((FIXTURES / "pixel_metrics.json").read_text())
    psnr, pooled = PeakSignalNoiseRatio(), PeakSignalNoiseRatio(aggregation="pooled")
    ms_ssim = MultiscaleStructuralSimilarity()
    for name, expected in fixture["image_pairs"].items():
        target, preds = (read(FIXTURES / f"{name}_{kind}.png") for kind in ("ref", "rec"))
        assert peak_signal_noise_ratio(preds, target).item() == pytest.approx(
            expected["psnr"]["skimage_data_range255"], abs=1e-9)
        ssim = structural_similarity(preds, target).item()
        assert ssim == pytest.approx(expected["ssim"]["skimage_wang2004_gauss_rgb"], abs=1e-9)
        # pytorch-msssim rounds its window to float32.
        assert ssim == pytest.approx(expected["ssim"]["pytorch_msssim_gauss11_f64_range1"], abs=5e-6)
        assert padded_structural_similarity(preds, target).item() == pytest.approx(
            expected["ssim"]["torchmetrics_gauss11_s1.5_f64"], abs=1e-9)
        assert multiscale_structural_similarity(preds, target).item() == pytest.approx(
            expected["ms_ssim"]["pytorch_msssim_f64"], abs=5e-6)
        for metric in (psnr, pooled, ms_ssim):
            metric.update(preds, target)
    whole = fixture["dataset_aggregation"]
    assert psnr.compute().item() == pytest.approx(whole["psnr_mean_of_images"], abs=1e-9)
    assert pooled.compute().item() == pytest.approx(whole["psnr_torchmetrics_pooled_mse"], abs=5e-6)
    assert ms_ssim.compute().item() == pytest.approx(whole["ms_ssim_batch_pytorch_msssim"], abs=5e-6)


@pytest.mark.parametrize(("height", "width"), [(40, 57), (11, 11)])
def test_ssim_equals_scikit_image(height, width):
    skimage = pytest.importorskip("skimage.metrics")
    preds, target = noisy_pair(height, width)
    for i in range(2):
        _, full = skimage.structural_similarity(
            preds[i].permute(1, 2, 0).numpy(), target[i].permute(1, 2, 0).numpy(), channel_axis=2, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)
        inside = full[5 : height - 5, 5 : width - 5].mean()
        assert structural_similarity(preds, target)[i].item() == pytest.approx(inside, abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(161, 176), (163, 167)])
def test_ms_ssim_equals_pytorch_msssim(height, width):
    pytorch_msssim = pytest.importorskip("pytorch_msssim")
    preds, target = noisy_pair(height, width)
    expected = pytorch_msssim.ms_ssim(preds, target, data_range=1.0, size_average=False)
    torch.testing.assert_close(multiscale_structural_similarity(preds, target), expected, atol=5e-6, rtol=0)


def test_float32_is_as_good_as_float64():
    preds, target = noisy_pair(176, 176)
    for function in (structural_similarity, multiscale_structural_similarity):
        torch.testing.assert_close(function(preds.float(), target.float()).double(), function(preds, target),
                                   atol=2e-6, rtol=0)


def test_a_data_range_of_255_gives_the_same_numbers():
    preds, target = noisy_pair(48, 48)
    for function in (peak_signal_noise_ratio, structural_similarity, padded_structural_similarity):
        torch.testing.assert_close(function(preds * 255, target * 255, data_range=255.0), function(preds, target),
                                   atol=1e-9, rtol=0)


def test_equal_images():
    _, target = noisy_pair(176, 176)
    assert torch.isinf(peak_signal_noise_ratio(target, target)).all()
    for function in (structural_similarity, padded_structural_similarity, multiscale_structural_similarity):
        torch.testing.assert_close(function(target, target), torch.ones(2).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [PeakSignalNoiseRatio, lambda: PeakSignalNoiseRatio(aggregation="pooled"),
                                  StructuralSimilarity, MultiscaleStructuralSimilarity])
def test_batches_and_processes_add_up(make):
    pairs = [noisy_pair(161, 161, seed=seed) for seed in range(3)]
    whole = make()
    for preds, target in pairs:
        whole.update(preds, target)
    parts = [make(), make()]
    parts[0].update(*(torch.cat(x) for x in zip(*pairs[:2], strict=True)))
    parts[1].update(*pairs[2])
    # What torch.distributed does at the end of an epoch, by hand: every state is a sum.
    parts[0].total += parts[1].total
    parts[0].count += parts[1].count
    torch.testing.assert_close(parts[0].compute(), whole.compute(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("preds", "message"), [
    (torch.zeros(1, 3, 20, 21), "different sizes"),
    (torch.zeros(1, 3, 20, 20, dtype=torch.uint8), "floating-point"),
    (torch.full((1, 3, 20, 20), math.nan), "nan"),
    (torch.full((1, 3, 20, 20), 200.0), "data_range"),
    (torch.full((1, 3, 20, 20), -1.0), "data_range"),
])
def test_pictures_that_make_no_sense_are_refused(preds, message):
    for metric in (PeakSignalNoiseRatio(), StructuralSimilarity()):
        with pytest.raises(ImageError, match=message):
            metric.update(preds, torch.zeros(1, 3, 20, 20))


def test_too_small_for_the_windows():
    with pytest.raises(ImageError, match="at least 161"):
        MultiscaleStructuralSimilarity().update(torch.zeros(1, 3, 160, 300), torch.zeros(1, 3, 160, 300))
    with pytest.raises(ImageError, match="at least 11"):
        StructuralSimilarity().update(torch.zeros(1, 3, 30, 10), torch.zeros(1, 3, 30, 10))


@needs_shared("weights", "lpips_reference")
def test_lpips_of_the_reference_images():
    reference, first, second = (read(SHARED / "weights" / "lpips_reference" / f"ex_{name}.png").float()
                                for name in ("ref", "p0", "p1"))
    metric = LearnedPerceptualImagePatchSimilarity("alex", SHARED / "weights")
    assert metric(first, reference).item() == pytest.approx(0.722, abs=5e-4)
    assert metric(second, reference).item() == pytest.approx(0.138, abs=5e-4)
    assert metric.compute().item() == pytest.approx((0.722 + 0.138) / 2, abs=5e-4)
    with pytest.raises(ImageError, match="at least 31"):
        metric.update(torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64))
    smallest = torch.zeros(1, 3, 31, 31)
    assert metric(smallest, smallest).item() == 0


@pytest.mark.parametrize("backbone", ["alex", "squeeze", "vgg"])
def test_lpips_equals_the_package(backbone, tmp_path):
    """With the same random features and the package's own heads; theirs takes images in [-1, 1] unless told."""
    ensure_torchvision_imports()
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False).eval()
    features = {f"features.{layer}.{name}": tensor for part in theirs.net.children() for layer, module in
                part.named_children() for name, tensor in module.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in features.items()}, tmp_path / "weights.safetensors")
    preds, target = (x.float() for x in noisy_pair(48, 70))
    metric = LearnedPerceptualImagePatchSimilarity(backbone, tmp_path / "weights.safetensors")
    with torch.no_grad():
        expected = theirs(preds, target, normalize=True).mean()
    assert metric(preds, target).item() == pytest.approx(expected.item(), rel=1e-4)
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    for name in ("other", "damaged"):
        with pytest.raises(ModelError, match="not the features"):
            LearnedPerceptualImagePatchSimilarity(backbone, tmp_path / f"{name}.safetensors")


def test_lpips_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ModelError, match="alexnet_features"):
        LearnedPerceptualImagePatchSimilarity("alex", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, tmp_path / "checkpoints" / "alexnet-owt-0.pth")  # a download takes no part where a place is named
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="does not hold alexnet_features"):
            LearnedPerceptualImagePatchSimilarity("alex", place)


def test_rates_refuse_nonsense():
    with pytest.raises(ConfigError):
        BitsPerPixel().update(-1, 10, 10)
    with pytest.raises(ConfigError):
        BitsPerPixel("median")


def test_codebook_usage_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(7)
    p = 1 / np.arange(1, 257)
    tokens = rng.choice(256, size=(50, 64), p=p / p.sum())
    usage = codebook_usage(torch.from_numpy(tokens), 256)
    entropy = stats.entropy(np.bincount(tokens.ravel()), base=2)
    assert usage.entropy_bits == pytest.approx(entropy, abs=1e-12)
    assert usage.perplexity == pytest.approx(2**entropy, abs=1e-9)
    assert usage.usage == len(np.unique(tokens)) / 256
    assert usage.tokens == 3200
    if FIXTURES.exists():  # made by the same generator
        fixture = json.loads((FIXTURES / "token_stats.json").read_text())
        assert usage.entropy_bits == pytest.approx(fixture["entropy_bits"], abs=1e-9)
        assert usage.usage * 256 == fixture["used"]


def test_codebook_usage_of_groups_is_the_mean_of_the_groups():
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randint(5, (2, 40), generator=generator),
                           torch.randint(9, (2, 40), generator=generator)], -1)
    both = CodebookUsageMetric((5, 9))
    both.update(indices[:1])
    both.update(indices[1:])
    single = [codebook_usage(indices[..., g], vocab) for g, vocab in enumerate((5, 9))]
    for name in ("usage", "entropy_bits", "perplexity"):
        assert getattr(both.compute(), name) == pytest.approx(sum(getattr(s, name) for s in single) / 2, abs=1e-12)
    assert both.compute().tokens == 80
    with pytest.raises(ConfigError, match="do not fit"):
        both.update(indices.flip(-1) + 4)
    with pytest.raises(ConfigError, match="No tokens"):
        CodebookUsageMetric(4).compute()
