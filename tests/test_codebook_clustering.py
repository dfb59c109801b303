"""K-means against the plain algorithm in float64, families of codebooks, and fine-tuning of one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from vtc.errors import ConfigError, FileError, ModelError
from vtc.tokenizers import kmeans as kmeans_module
from vtc.tokenizers.codebook_clustering import FORMAT, CodebookFamily, _merged, cluster_codebook, with_codebook
from vtc.tokenizers.codebook_finetuning import CodebookFinetuning
from vtc.tokenizers.discriminators import PatchGAN
from vtc.tokenizers.kmeans import kmeans, plus_plus, rows_equal_to
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.vqgan import VQGAN


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


#: cdist without its GEMM, which loses half of the digits
DIRECT = "donot_use_mm_for_euclid_dist"


def plain_lloyd(points: Tensor, centres: Tensor, weights: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """(centres, labels) by the textbook, in float64; no cluster may run empty."""
    points, centres, weights = points.double(), centres.double(), weights.double()
    for _ in range(iterations):
        labels = torch.cdist(points, centres, compute_mode=DIRECT).argmin(1)
        mask = (labels == torch.arange(len(centres))[:, None]).double() * weights
        assert (mask.sum(1) > 0).all()
        centres = mask @ points / mask.sum(1, keepdim=True)
    return centres, torch.cdist(points, centres, compute_mode=DIRECT).argmin(1)


@pytest.fixture(params=[False, True], ids=["exact", "bfloat16"])
def screened(request, monkeypatch):
    """Both ways to compute bounds, whatever this processor prefers."""
    monkeypatch.setattr(kmeans_module, "_is_bfloat16_fast", lambda points: request.param)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("clusters", [1, 2, 24, 150])
def test_every_iteration_is_the_textbook_s(screened, clusters, offset):
    points = random(300, 16) + offset
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1)) + 0.1
    start = points[:clusters].clone()
    for iterations in (1, 2, 5, 40):
        found = kmeans(points, clusters, weights, start=start, iterations=iterations, tolerance=0)
        centres, labels = plain_lloyd(points, start, weights, iterations)
        assert torch.equal(found.labels, labels)
        torch.testing.assert_close(found.centres.double(), centres, rtol=1e-5, atol=1e-5)
        inertia = ((points.double() - centres[labels]).square().sum(1) * weights).sum()
        assert found.inertia == pytest.approx(inertia.item(), rel=1e-5)
        assert found.iterations <= iterations


@pytest.mark.parametrize("clusters", [8, 100, 500])
@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_scikit_learn_finds_the_same(screened, clusters, tolerance):
    """The same start and rules: the same labels, and inertia to 1e-4 (the benchmark's bar, at its sizes, is 0.5 %)."""
    cluster = pytest.importorskip("sklearn.cluster", reason="compares with scikit-learn: the bench extra")
    points = random(1000, 16)
    start = points[torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:clusters]]
    theirs = cluster.KMeans(clusters, init=start.numpy(), n_init=1, tol=tolerance).fit(points.numpy())
    ours = kmeans(points, clusters, start=start, tolerance=tolerance)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-4)
    assert abs(ours.iterations - theirs.n_iter_) <= 1
    assert (ours.labels == torch.from_numpy(theirs.labels_)).double().mean() > 0.99


def test_a_start_outside_the_points_too(screened):
    points, start = random(400, 8), 0.3 * random(20, 8, seed=1)
    found = kmeans(points, 20, start=start, tolerance=0)
    centres, labels = plain_lloyd(points, start, torch.ones(400), 100)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.centres.double(), centres, rtol=1e-5, atol=1e-5)


def test_the_last_labels_are_those_of_the_last_centres(screened):
    points = random(500, 12)
    found = kmeans(points, 30, iterations=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.labels, torch.cdist(points.double(), found.centres.double()).argmin(1))


def test_the_tolerance_ends_a_run_early():
    points = random(2000, 4)
    early, late = (kmeans(points, 40, start=points[:40], tolerance=t) for t in (1e-1, 0.0))
    assert early.iterations < late.iterations
    assert late.inertia < early.inertia


def test_whole_weights_are_copies():
    points = random(60, 3)
    weights = torch.arange(60) % 4
    start = points[[1, 2, 3, 5, 6]]
    weighted = kmeans(points, 5, weights.float(), start=start, tolerance=0)
    copied = kmeans(points.repeat_interleave(weights, 0), 5, start=start, tolerance=0)
    torch.testing.assert_close(weighted.centres, copied.centres, rtol=1e-5, atol=1e-5)
    assert weighted.inertia == pytest.approx(copied.inertia, rel=1e-5)


def test_an_empty_cluster_takes_the_furthest_point(screened):
    points = torch.tensor([[0.0, 0.0], [0.2, 0.0], [0.0, 0.1], [5.0, 5.0], [5.1, 5.0], [9.0, 0.0]])
    start = torch.tensor([[0.0, 0.0], [5.0, 5.0], [-90.0, -90.0]])  # nothing is near the third
    found = kmeans(points, 3, start=start)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert torch.equal(found.centres[2], points[5])


def test_a_centre_that_jumped_is_not_the_end(screened):
    """The move to a far point counts against the tolerance: the points around it must still follow."""
    far = torch.tensor([[9.0, 0.0], [9.0, 1.0], [9.0, -1.0]])
    points = torch.cat([0.1 * random(50, 2), far])
    start = torch.cat([points[:50].mean(0, keepdim=True), torch.full((1, 2), -90.0)])
    found = kmeans(points, 2, start=start, tolerance=0.5)
    assert found.labels.tolist() == [0] * 50 + [1] * 3


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 10), st.sampled_from(["k-means++", "random"]))
@settings(max_examples=60, deadline=None)
def test_no_cluster_is_empty_while_there_are_points_enough(count, clusters, seed, start):
    points = torch.randint(0, 3, (count, 2), generator=torch.Generator().manual_seed(seed)).float()
    found = kmeans(points, clusters, start=start, generator=torch.Generator().manual_seed(seed))
    different = len(points.unique(dim=0))
    assert found.centres.shape == (clusters, 2) and found.centres.isfinite().all()
    # Every cluster has a point, as far as there are different ones.
    assert len(found.labels.unique()) == min(clusters, different)
    assert found.inertia > 0 or clusters >= different
    if clusters >= different:
        assert found.inertia == pytest.approx(0, abs=1e-6)
        assert torch.cdist(found.centres, points, compute_mode=DIRECT).amin(1).max() < 1e-5


def test_the_same_seed_gives_the_same_centres():
    points = random(300, 8)
    a, b, c = (kmeans(points, 20, generator=torch.Generator().manual_seed(seed)).centres for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_plus_plus_draws_by_squared_distance():
    # From the heavy first point, the others lie at squared distances 1, 4 and 9 on axes of their own.
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
    weights = torch.tensor([1e9, 1.0, 1.0, 1.0])
    generator, runs, second, last = torch.Generator().manual_seed(0), 1000, torch.zeros(4), torch.zeros(4)
    for _ in range(runs):
        rows = plus_plus(points, 4, weights, generator, block=3)
        assert sorted(rows.tolist()) == [0, 1, 2, 3]
        second[rows[1]] += 1
        last[rows[3]] += 1
    expected = torch.tensor([0.0, 1, 4, 9]) / 14
    assert (second / runs - expected).abs().max() < 0.06  # four standard deviations
    # In order without replacement: P(last = i) by summing over the two orders of the others.
    p = expected[1:]
    order = torch.tensor([sum(p[j] * p[k] / (1 - p[j]) for j, k in ((a, b), (b, a)))
                          for a, b in ((1, 2), (0, 2), (0, 1))])
    # What was drawn shortens no distance of the rest: on orthogonal axes the first point stays nearest.
    assert (last[1:] / runs - order).abs().max() < 0.06


def test_plus_plus_starts_better_than_at_random():
    centres = 20 * random(30, 8)
    points = (centres[:, None] + random(30, 20, 8, seed=1)).flatten(0, 1)
    inertia = {start: min(kmeans(points, 30, start=start, generator=torch.Generator().manual_seed(s)).inertia
                          for s in range(3)) for start in ("k-means++", "random")}
    assert inertia["k-means++"] < 0.5 * inertia["random"]


def test_copies_are_found_by_their_bits():
    points = random(50, 12)
    centres = torch.cat([random(3, 12, seed=1), points[[7, 3]], points[[7]] + 1e-6])
    expected = torch.full((50,), -1)
    expected[7], expected[3] = 3, 4
    assert torch.equal(rows_equal_to(points, centres), expected)
    assert torch.equal(rows_equal_to(points.double()[:, :5], centres.double()[:, :5]), expected)


def test_what_cannot_be_clustered_is_refused():
    points = random(10, 2)
    for call in (lambda: kmeans(points, 0), lambda: kmeans(points[:0], 2), lambda: kmeans(points, 2, torch.ones(9)),
                 lambda: kmeans(points, 2, -torch.ones(10)), lambda: kmeans(points, 2, torch.zeros(10)),
                 lambda: kmeans(points, 2, start=points[:3]), lambda: kmeans(points / 0, 2),
                 lambda: kmeans(points, 2, start="middle"), lambda: kmeans(points, 2, iterations=0)):
        with pytest.raises(ConfigError):
            call()


def small_vqgan() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(codebook_size=64, embed_dim=8, channels=32, channel_multipliers=(1, 1), num_res_blocks=1,
                 z_channels=16, attention_levels=()).eval()


def test_a_family_survives_its_file(tmp_path):
    codebook = random(200, 6)
    family = cluster_codebook(codebook, (4, 32, 100))
    family.save(tmp_path / "family.safetensors")
    loaded = CodebookFamily.load(tmp_path / "family.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["family.safetensors"]
    assert loaded.sizes == family.sizes == (4, 32, 100)
    assert loaded.base == family.base and loaded.inertia == family.inertia
    for size in family.sizes:
        assert torch.equal(loaded.codebooks[size], family.codebooks[size])
        assert torch.equal(loaded.maps[size], family.maps[size])
        # the map is the nearest new word, each new word has an old one, and is the mean of its old ones
        nearest = torch.cdist(codebook.double(), loaded.codebooks[size].double()).argmin(1)
        assert torch.equal(loaded.maps[size], nearest) and len(nearest.unique()) == size
        means = torch.stack([codebook[nearest == n].mean(0) for n in range(size)])
        torch.testing.assert_close(loaded.codebooks[size], means, rtol=1e-5, atol=1e-5)
    assert family.inertia[4] > family.inertia[32] > family.inertia[100]
    alone = cluster_codebook(codebook, (32,))
    assert torch.equal(alone.codebooks[32], family.codebooks[32])


def test_unused_words_attract_no_centre():
    codebook = torch.cat([random(20, 4), 50 + random(20, 4, seed=1)])
    usage = torch.tensor([3.0] * 20 + [0.0] * 20)
    assert cluster_codebook(codebook, (5,), usage).codebooks[5].abs().max() < 10
    assert cluster_codebook(codebook, (5,)).codebooks[5].max() > 40


def test_files_that_are_no_family_are_refused(tmp_path):
    with pytest.raises(FileError):
        CodebookFamily.load(tmp_path / "none")
    (tmp_path / "text").write_text("not safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    save_file({"codebook.2": torch.zeros(2, 2)}, tmp_path / "half",
              {"format": FORMAT, "base": "", "inertia": '{"2": 0.0}'})
    save_file({"codebook.2": torch.zeros(2, 2), "map.2": torch.tensor([0, 2])}, tmp_path / "beyond",
              {"format": FORMAT, "base": "", "inertia": '{"2": 0.0}'})
    for name in ("text", "other", "half", "beyond"):
        with pytest.raises(ModelError, match=name):
            CodebookFamily.load(tmp_path / name)
    with pytest.raises(ConfigError):
        cluster_codebook(random(20, 2), (21,))


def test_a_tokenizer_with_a_smaller_codebook(tmp_path):
    model = small_vqgan()
    model.token_frequencies = torch.full((1, 64), 16, dtype=torch.int32)
    family = cluster_codebook(model.quantizer.codebook, (8,))
    small = with_codebook(model, family.codebooks[8], family.maps[8])
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    tokens = small.encode(images)
    assert tokens.layout.vocab == (8,) and tokens.indices.max() < 8
    assert small.bits_per_pixel(16, 24) == pytest.approx(3 / 4)  # log2 8 bits for 2 x 2 pixels
    expected = small.quantizer.codebook[torch.cdist(model.latents(images).movedim(1, -1).reshape(-1, 8),
                                                    family.codebooks[8]).argmin(1)]
    torch.testing.assert_close(small.codes(tokens).movedim(1, -1).reshape(-1, 8), expected)
    counts = torch.bincount(family.maps[8], minlength=8)
    assert small.token_frequencies.tolist() == (16 * counts)[None].tolist()
    assert model.quantizer.codebook.shape == (64, 8)  # the model itself is as it was
    for name, tensor in small.state_dict().items():
        if name not in ("quantizer.codebook", "token_frequencies"):
            assert torch.equal(tensor, model.state_dict()[name]), name
    without_tables = with_codebook(small_vqgan(), family.codebooks[8])
    without_tables.save_pretrained(tmp_path)
    assert VQGAN.from_pretrained(tmp_path).quantizer.codebook_size == 8
    with pytest.raises(ConfigError, match="map"):
        with_codebook(model, family.codebooks[8], family.maps[8] + 1)
    with pytest.raises(ConfigError, match="codebook"):
        with_codebook(model, random(8, 5))


def test_merged_tables_keep_every_word_codable():
    tables = torch.tensor([[4, 2, 1, 1]], dtype=torch.int32)
    assert _merged(tables, torch.tensor([0, 0, 1, 1]), 3).tolist() == [[5, 2, 1]]


def test_finetuning_trains_codebook_and_convolutions_only():
    model = small_vqgan()
    family = cluster_codebook(model.quantizer.codebook, (8,))
    small = with_codebook(model, family.codebooks[8] * 20, family.maps[8])
    tuning = CodebookFinetuning(small, lambda a, b: (a - b).square().mean((1, 2, 3)),
                                PatchGAN(channels=8, num_layers=1, norm="none"))
    assert small.quantizer.training and not small.encoder.training and not small.decoder.training
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    optimizer = torch.optim.Adam(tuning.trained_parameters(), lr=1e-2, betas=(0.5, 0.9))
    other = torch.optim.Adam(tuning.discriminator.parameters(), lr=1e-4, betas=(0.5, 0.9))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    history = []
    for step in range(30):
        out = tuning.generator_step(images, adversarial=step >= 25)
        optimizer.zero_grad()
        out["loss"].backward()
        assert all(p.grad is None for p in small.decoder.parameters())
        optimizer.step()
        terms = tuning.discriminator_step(images, out["output"])
        other.zero_grad()
        terms["loss"].backward()
        assert all(p.grad is not None for p in tuning.discriminator.parameters())
        other.step()
        history.append(out["pixel"].item())
    assert history[24] < history[0] and out["adaptive_weight"] > 0
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"quantizer.codebook", "quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight",
                       "post_quant_conv.bias"}
    assert tuning(images).shape == images.shape
    tuning.eval()
    assert not small.quantizer.training


def test_finetuning_of_other_networks_names_what_trains():
    model = LocalVQ(16, 4, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), 4)
    with pytest.raises(ConfigError, match="quant_conv"):
        CodebookFinetuning(model)
    tuning = CodebookFinetuning(model, trained=("quantizer.", "encoder.head.", "decoder.stem."),
                                balance="decoder.stem.weight")
    terms = tuning.generator_step(torch.rand(1, 3, 32, 32))
    terms["loss"].backward()
    assert model.encoder.head.weight.grad is not None and model.encoder.stem.weight.grad is None
    with pytest.raises(ConfigError, match="discriminator"):
        tuning.discriminator_step(terms["output"], terms["output"])
    with pytest.raises(ConfigError, match="balance"):
        CodebookFinetuning(model, trained=("quantizer.",), balance="decoder.stem.weight")
