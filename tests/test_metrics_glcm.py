"""GLCM score and compression ratio against upstream's numbers and scikit-image."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError, ImageError
from vtc.eval import glcm
from vtc.eval.glcm import (
    CompressionRatio,
    GLCMScore,
    compression_ratio,
    glcm_patch_scores,
    glcm_score,
    grey_levels,
    jpeg_bytes,
)

FIXTURES = SHARED / "fixtures" / "scvae"


def levels(kind: str) -> np.ndarray:
    """(70, 130): two whole patches and a rest that does not count."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 64, (70, 130)).astype(np.uint8)
    y, x = np.mgrid[:70, :130]
    return (32 + 20 * np.sin(x / 9) + 8 * np.cos(y / 5) + rng.normal(0, 1, (70, 130))).astype(np.uint8)


@pytest.mark.parametrize("engine", ["numba", "numpy"])
@pytest.mark.parametrize("kind", ["noise", "photograph"])
def test_scores_equal_scikit_image(engine, kind, monkeypatch):
    feature = pytest.importorskip("skimage.feature")
    measure = pytest.importorskip("skimage.measure")
    if engine == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(glcm, "_compiled", lambda: None)
    image = levels(kind)
    scores = {form: glcm_patch_scores(image, form) for form in ("upstream", "textbook")}
    assert scores["upstream"].shape == (1, 2)
    for column in range(2):
        matrices = feature.graycomatrix(image[:64, 64 * column : 64 * column + 64], (1, 2, 3, 4),
                                        (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4), levels=64, normed=True)
        assert scores["upstream"][0, column] == pytest.approx(measure.shannon_entropy(matrices), abs=1e-9)
        p = np.where(matrices > 0, matrices, 1)
        textbook = -(matrices * np.log2(p)).sum((0, 1)).mean()
        assert scores["textbook"][0, column] == pytest.approx(textbook, abs=1e-9)


@needs_shared("fixtures", "scvae", "glcm_compression.json")
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_scores_equal_upstream(name):
    expected = json.loads((FIXTURES / "glcm_compression.json").read_text())["images"][name]
    arrays = load_file(FIXTURES / "glcm_gray64.safetensors")
    image = arrays[next(k for k in arrays if name in k)].astype(np.uint8)
    scores = glcm_patch_scores(image)
    np.testing.assert_allclose(scores, expected["entropy"]["per_patch"], atol=1e-9)
    assert scores.mean() == pytest.approx(expected["entropy"]["full_grid_mean"], abs=1e-9)
    side = min(image.shape) // 64
    assert scores[:side, :side].mean() == pytest.approx(expected["entropy"]["top_left_square_mean"], abs=1e-9)
    data = pytest.importorskip("skimage.data")
    pixels = getattr(data, name)()
    assert np.array_equal(grey_levels(pixels), image)
    ratio = pixels.size / jpeg_bytes(pixels)  # libjpeg versions differ a little
    assert ratio == pytest.approx(expected["compression_ratio_jpeg_q95"], rel=0.01)


def test_metrics_average_images_and_sum_bytes():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 130, generator=generator)
    images[1] *= 0.1
    pixels = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    for form in ("upstream", "textbook"):
        metric = GLCMScore(form)
        metric.update(images[:1])
        metric.update(images[1:])
        assert metric.compute().item() == pytest.approx(np.mean([glcm_score(p, form) for p in pixels]), abs=1e-12)
    ratio = CompressionRatio()
    ratio.update(images)
    assert ratio.compute().item() == pytest.approx(2 * 3 * 64 * 130 / sum(jpeg_bytes(p) for p in pixels))
    assert compression_ratio(pixels) == pytest.approx(ratio.compute().item())
    with pytest.raises(ConfigError, match="no pictures"):
        compression_ratio([])


def test_sizes_and_forms_are_checked():
    pixels = np.zeros((100, 200, 3), np.uint8)
    assert glcm_score(pixels, size=64) == glcm_score(pixels[:64, :64])
    with pytest.raises(ImageError, match="no square"):
        glcm_score(pixels, size=128)
    with pytest.raises(ImageError, match="at least 64x64"):
        glcm_score(pixels[:63])
    with pytest.raises(ConfigError, match="textbook"):
        glcm_score(pixels, form="entropy")
    with pytest.raises(ImageError, match="levels below 64"):
        glcm_patch_scores(np.full((64, 64), 64, np.uint8))
    with pytest.raises(ImageError, match=r"levels \(H, W\)"):
        glcm_patch_scores(pixels // 4)
    with pytest.raises(ImageError, match="uint8"):
        jpeg_bytes(pixels.astype(float))
