"""Frechet distance, KID, precision/recall, the Inception network and the protocols, against independent code."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, multiprocessing, nn

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, FileError, ImageError, ModelError
from vtc.eval.features import Inception, InceptionNetwork, PooledFeatures, tensorflow_bilinear
from vtc.eval.frechet import (
    FrechetDistance,
    _congruent,
    feature_statistics,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from vtc.eval.kid import KernelInceptionDistance, kernel_distance, polynomial_mmd
from vtc.eval.precision_recall import PrecisionRecallMetric, precision_recall
from vtc.eval.protocols import PROTOCOLS, export_samples, protocol

FIXTURES = SHARED / "fixtures" / "eval"


class Pixels(nn.Module):
    """A feature network that hands out the first numbers of each image."""

    name, num_features = "pixels", 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6] * 10


def clouds(seed: int = 0, n: int = 60, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    a, b = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return a @ mix, b @ mix * 1.2 + 0.3


@needs_shared("fixtures", "eval", "fid.json")
@pytest.mark.parametrize("case", [0, 1, 2])
def test_frechet_distance_equals_the_fixtures(case):
    expected = json.loads((FIXTURES / "fid.json").read_text())["cases"][case]
    arrays = np.load(FIXTURES / f"fid_features_case{case}.npz")
    distance = frechet_distance(*(feature_statistics(torch.from_numpy(arrays[k])) for k in ("X", "Y")))
    # With fewer vectors than dimensions the square roots of the zero eigenvalues are rounding noise.
    tolerance = 2e-6 if expected["rank_deficient"] else 1e-9
    assert distance == pytest.approx(expected["pytorch_fid_0_3_0_sqrtm"], abs=tolerance)


@pytest.mark.parametrize("triangular", [True, False])
def test_the_product_in_blocks_is_the_product(triangular):
    """A size that no block divides; only the lower triangle is asked for."""
    generator = torch.Generator().manual_seed(0)
    factor, root = (torch.randn(11, 11, dtype=torch.float64, generator=generator) for _ in range(2))
    factor, symmetric = factor.tril() if triangular else factor, root @ root.T
    found = _congruent(factor, symmetric, triangular, block=4)
    torch.testing.assert_close(found.tril(), (factor.T @ symmetric @ factor).tril(), rtol=1e-12, atol=1e-12)


def test_frechet_distance_equals_scipy_sqrtm():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (feature_statistics(x) for x in clouds())
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_streaming_equals_the_whole_and_processes_add_up():
    a, b = clouds()
    metrics = [FrechetDistance(Pixels()) for _ in range(2)]
    for real, cloud in ((True, a), (False, b)):
        for i, part in enumerate(cloud.split(17)):
            metrics[i % 2].update_features(part, real)
    for name in metrics[0]._reductions:
        getattr(metrics[0], name).add_(getattr(metrics[1], name))
    expected = frechet_distance(feature_statistics(a), feature_statistics(b))
    assert metrics[0].compute().item() == pytest.approx(expected, abs=1e-9)
    assert metrics[0].metric_name == "fd_pixels"
    metrics[0].update_features(a, real=False)  # the cached result is forgotten
    expected = frechet_distance(feature_statistics(a), feature_statistics(torch.cat([b, a])))
    assert metrics[0].compute().item() == pytest.approx(expected, abs=1e-9)


def half_of_the_clouds(rank: int, folder: str) -> None:
    """What one of two processes does: torchmetrics joins the states when it computes."""
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    metrics: dict[str, FrechetDistance | KernelInceptionDistance] = {
        "frechet": FrechetDistance(Pixels()), "kernel": KernelInceptionDistance(Pixels())}
    for real, cloud in zip((True, False), clouds(), strict=True):
        for metric in metrics.values():
            metric.update_features(cloud[rank::2], real)
    torch.save({name: metric.compute() for name, metric in metrics.items()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(),
                    reason="needs torch with gloo")
def test_two_processes_compute_what_one_does(tmp_path):
    multiprocessing.spawn(half_of_the_clouds, (str(tmp_path),), nprocs=2)
    a, b = clouds()
    expected = frechet_distance(feature_statistics(a), feature_statistics(b))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["frechet"].item() == pytest.approx(expected, abs=1e-9)
        assert found["kernel"].mean == pytest.approx(polynomial_mmd(a.float(), b.float()), rel=1e-9)


def test_features_of_another_form_are_refused(tmp_path):
    a = clouds()[0]
    for function in (polynomial_mmd, kernel_distance, precision_recall):
        with pytest.raises(ConfigError, match="come as"):
            function(a, a[:, :3])
        with pytest.raises(ConfigError, match="not all finite"):
            function(a, a * torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        frechet_distance(feature_statistics(a * torch.inf), feature_statistics(a))
    for metric in (FrechetDistance(Pixels()), KernelInceptionDistance(Pixels())):
        with pytest.raises(ConfigError, match="has 6 features"):
            metric.update_features(a[:, :3], real=True)
        with pytest.raises(ImageError, match="not finite"):
            metric.update_features(a * torch.nan, real=True)
        with pytest.raises(ImageError, match="torch tensors, not as ndarray"):
            metric.update(np.zeros((1, 3, 4, 4)), real=True)
    with pytest.raises(FileError, match="does not exist"):
        save_statistics(tmp_path / "none" / "a.npz", feature_statistics(a))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(FileError, match="not finite"):
        load_statistics(tmp_path / "nan.npz")
    with pytest.raises(ConfigError, match="at least one neighbour"):
        PrecisionRecallMetric(Pixels(), neighbours=0)


def test_reference_statistics_go_through_a_file(tmp_path):
    a, b = clouds()
    reference = feature_statistics(a)
    save_statistics(tmp_path / "reference.npz", reference)
    loaded = load_statistics(tmp_path / "reference.npz")
    assert loaded.num_images == 60 and torch.equal(loaded.covariance, reference.covariance)
    metric = FrechetDistance(Pixels(), loaded)
    metric.update_features(b, real=False)
    assert metric.compute().item() == pytest.approx(frechet_distance(reference, feature_statistics(b)), abs=1e-9)
    with pytest.raises(ConfigError, match="no real images"):
        metric.update(torch.zeros(1, 3, 4, 4), real=True)
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(FileError, match="arr_0"):
        load_statistics(tmp_path / "samples.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([None]), sigma=np.array([None]))
    with pytest.raises(FileError):
        load_statistics(tmp_path / "objects.npz")


def test_too_few_or_bad_images_are_refused():
    metric = FrechetDistance(Pixels())
    metric.update(torch.rand(1, 3, 4, 4), real=True)
    metric.update(torch.rand(1, 3, 4, 4), real=False)
    with pytest.raises(ConfigError, match="needs two"):
        metric.compute()
    with pytest.raises(ImageError, match="not finite"):
        metric.update_features(torch.full((1, 6), torch.nan), real=True)
    with pytest.raises(ImageError, match="uint8"):
        metric.update(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), real=True)


def test_kid_equals_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.image.kid")
    a, b = (x.float() for x in clouds())
    features = torchmetrics.KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=60)
    features.real_features, features.fake_features = [a], [b]
    expected, _ = features.compute()
    ours = KernelInceptionDistance(Pixels())
    for part in a.split(7):
        ours.update_features(part, real=True)
    ours.update_features(b, real=False)
    assert ours.compute().mean == pytest.approx(expected.item(), rel=2e-4)  # theirs is float32
    assert ours.metric_name == "kd_pixels"


def test_kid_is_unbiased_and_its_subsets_are_seeded():
    values = [polynomial_mmd(*torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(s))) for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    a, b = clouds()
    first, again = (kernel_distance(a, b, subsets=5, subset_size=20) for _ in range(2))
    assert first == again and first.std > 0
    assert kernel_distance(a, b, subsets=5, subset_size=20, seed=1) != first


def test_precision_and_recall_by_brute_force():
    a, b = clouds(n=25)

    def covered(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
        hits = 0
        for p in points:
            for m in manifold:
                radius = sorted(np.linalg.norm(manifold - m, axis=1))[k]
                if np.linalg.norm(p - m) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    ours = precision_recall(a, b, neighbours=3, chunk=4)
    assert ours.precision == covered(b.numpy(), a.numpy(), 3)
    assert ours.recall == covered(a.numpy(), b.numpy(), 3)
    assert 0 < ours.precision < 1
    metric = PrecisionRecallMetric(Pixels())
    metric.update_features(a, real=True)
    metric.update_features(b, real=False)
    assert metric.compute() == ours


def test_the_kept_sample_does_not_depend_on_the_order():
    a = clouds(n=300)[0].float()
    forward, backward = (KernelInceptionDistance(Pixels(), max_samples=40) for _ in range(2))
    for part in a.split(11):
        forward.update_features(part, real=True)
    for part in a.flip(0).split(50):
        backward.update_features(part, real=True)
    assert sum(len(part) for part in getattr(forward, "real_features")) <= 2 * 40 + 11  # noqa: B009
    assert torch.equal(forward.samples(True), backward.samples(True))
    assert forward.samples(True).shape == (40, 6)
    other = KernelInceptionDistance(Pixels(), max_samples=40, seed=1)
    other.update_features(a, real=True)
    assert not torch.equal(other.samples(True), forward.samples(True))


def test_inception_equals_pytorch_fid():
    """With the same random weights: the network has no other oracle without the download."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    ours = InceptionNetwork().eval()
    reference = theirs._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    blocks = {"5b": theirs.FIDInceptionA(192, 32), "5c": theirs.FIDInceptionA(256, 64),
              "5d": theirs.FIDInceptionA(288, 64), "6b": theirs.FIDInceptionC(768, 128),
              "6c": theirs.FIDInceptionC(768, 160), "6d": theirs.FIDInceptionC(768, 160),
              "6e": theirs.FIDInceptionC(768, 192), "7b": theirs.FIDInceptionE_1(1280),
              "7c": theirs.FIDInceptionE_2(2048)}
    for name, block in blocks.items():
        setattr(reference, f"Mixed_{name}", block)
    reference.load_state_dict(ours.state_dict(), strict=False)
    assert set(reference.state_dict()) - set(ours.state_dict()) == {"fc.weight", "fc.bias"}
    reference.fc = nn.Identity()
    reference.eval()
    x = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=1e-4)


def test_fid_without_the_right_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ModelError, match=r"weights-inception-2015-12-05-6726825d\.pth"):
        Inception()
    def unreachable(url, *rest, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ModelError, match=r"6726825d\.pth could not be downloaded"):
        Inception(download=True)
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="not FID's Inception"):
        Inception(tmp_path / "other.pth")


@needs_shared("weights", "squeezenet1_1_features.safetensors")
@pytest.mark.parametrize(("backbone", "dim"), [("alex", 256), ("squeeze", 512)])
def test_distances_over_other_features_have_their_own_name(backbone, dim):
    metric = FrechetDistance(PooledFeatures(backbone, SHARED / "weights"))
    assert metric.metric_name.startswith("fd_") and "fid" not in metric.metric_name
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    metric.update(images, real=True)
    metric.update(images * 0.5, real=False)
    assert metric.statistics(True).mean.shape == (dim,)
    assert metric.compute() > 0


def test_tensorflow_bilinear_reads_the_upper_left_corner():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    resized = tensorflow_bilinear(image, 6)
    expected = [image[0, 0, int(y / 2)] * (1 - y / 2 % 1) + image[0, 0, min(int(y / 2) + 1, 2)] * (y / 2 % 1)
                for y in range(6)]
    columns = np.arange(6) * 4 / 6
    by_hand = np.stack([np.interp(columns, np.arange(4), row.numpy()) for row in expected])
    np.testing.assert_allclose(resized[0, 0].numpy(), by_hand, atol=1e-5)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_eight_bit_pictures_pass_through_a_protocols_rounding(name):
    levels = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    torch.testing.assert_close(protocol(name).for_pixels(levels), levels, atol=1e-7, rtol=0)
    between = levels.clamp(max=254 / 255) + 0.6 / 255
    rounded = protocol(name).for_pixels(between) * 255
    step = 1 if PROTOCOLS[name].pixel_rounding == "nearest" else 0
    torch.testing.assert_close(rounded, (levels * 255).clamp(max=254) + step, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["wetok", "adm"])
def test_protocols_crop_the_middle(name):
    x = np.tile(np.linspace(0, 255, 96)[None, :, None], (40, 1, 3)).astype(np.uint8)
    prepared = protocol(name).prepare(x, 16)
    assert prepared.shape == (16, 16, 3)
    centre = prepared.astype(float).mean()
    assert centre == pytest.approx(127.5, abs=2)  # the ramp's middle
    assert prepared[0, -1, 0] - prepared[0, 0, 0] == pytest.approx(255 * 40 / 96 * 15 / 16, abs=6)
    with pytest.raises(ImageError, match="uint8"):
        protocol(name).prepare(x.astype(float), 16)


def test_clean_fid_resizes_by_pillow():
    image = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    resized = protocol("clean-fid").for_features(image)
    levels = (image[0, 1] * 255).round().numpy()
    expected = np.array(Image.fromarray(levels).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    np.testing.assert_allclose(resized[0, 1].numpy() * 255, expected, atol=1e-3)


def test_samples_for_adm(tmp_path):
    pictures = [np.full((4, 5, 3), i, np.uint8) for i in range(3)]
    export_samples(tmp_path / "samples.npz", pictures)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], np.stack(pictures))
    export_samples(tmp_path / "streamed.npz", iter(pictures), count=3)
    assert np.array_equal(np.load(tmp_path / "streamed.npz")["arr_0"], np.stack(pictures))
    before = (tmp_path / "samples.npz").read_bytes()
    for bad, count in (([pictures[0], pictures[1][:2]], None), (pictures, 4), ([], None), ([pictures[0] / 255], None)):
        with pytest.raises(ImageError, match=r"one size|samples"):
            export_samples(tmp_path / "samples.npz", bad, count)
    assert (tmp_path / "samples.npz").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.npz", "streamed.npz"]
    with pytest.raises(FileError, match="cannot be written"):
        export_samples(tmp_path / "nowhere" / "samples.npz", pictures)
