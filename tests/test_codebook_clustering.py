"""K-means against the plain algorithm in float64, and families of codebooks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers import kmeans as kmeans_module
from vtc.tokenizers.kmeans import kmeans, plus_plus, rows_equal_to


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


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 10), st.sampled_from(["k-means++", "random"]))
@settings(max_examples=60, deadline=None)
def test_no_cluster_is_empty_while_there_are_points_enough(count, clusters, seed, start):
    points = torch.randint(0, 3, (count, 2), generator=torch.Generator().manual_seed(seed)).float()
    found = kmeans(points, clusters, start=start, generator=torch.Generator().manual_seed(seed))
    different = len(points.unique(dim=0))
    assert found.centres.shape == (clusters, 2) and found.centres.isfinite().all()
    assert len(found.labels.unique()) >= min(clusters, different) or found.inertia > 0
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
