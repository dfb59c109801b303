"""How a token is drawn: against a slow second writing, at the edges of every setting, and where a model is broken."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.errors import ConfigError, ModelError
from vtc.generators.pretrained import GenerationConfig
from vtc.generators.sampling import Guidance, Sampling, check_labels, seeded


def slowly(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """One row in double precision: mask by rank, sort upwards, drop while the sum is at most 1 - p, share the rest."""
    x = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(x):
        x = np.where(x < np.sort(x)[-sampling.top_k], -np.inf, x)
    if 0 < sampling.top_p < 1:
        order = np.argsort(x, kind="stable")
        p = np.exp(x[order] - x.max())
        drop = np.cumsum(p / p.sum()) <= 1 - sampling.top_p
        drop[-1] = False
        x[order[drop]] = -np.inf
    p = np.exp(x - x.max())
    return p / p.sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 15), st.floats(0, 1), st.floats(0.05, 20))
def test_probabilities_are_those_of_the_slow_way(seed: int, words: int, top_k: int, top_p: float,
                                                 temperature: float) -> None:
    # Logits well apart; where the sum comes within rounding of 1 - p either answer is right.
    g = np.random.default_rng(seed)
    ranks = g.permuted(np.tile(np.arange(words), (3, 1)), axis=1)
    logits = (ranks * 0.3 + g.uniform(0, 0.1, (3, 1))).astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p)
    found = sampling.probabilities(torch.from_numpy(logits)).numpy()
    for row, p in zip(logits, found, strict=True):
        expected = slowly(row, sampling)
        sums = np.cumsum(np.sort(slowly(row, Sampling(temperature, top_k))))
        if top_p == 0 or np.abs(sums - (1 - top_p)).min() > 1e-5:
            np.testing.assert_allclose(p, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("sampling", "kept"), [
    (Sampling(), 5), (Sampling(top_k=1), 1), (Sampling(top_k=5), 5), (Sampling(top_k=6), 5), (Sampling(top_k=10**9), 5),
    (Sampling(top_p=1.0), 5), (Sampling(top_p=1e-12), 1), (Sampling(top_k=3, top_p=0.999999), 3),
    (Sampling(1e-30), 1), (Sampling(5e-324), 1), (Sampling(1e30), 5), (Sampling(1e-30, 3, 0.5), 1)])
def test_the_edges_of_the_settings(sampling: Sampling, kept: int) -> None:
    logits = torch.tensor([[3.0, -1.0, 0.5, 2.0, 1.0], [0.0, 0.1, 0.2, 0.3, 90.0]])[:1]
    p = sampling.probabilities(logits)
    assert (p > 0).sum() == kept and p.sum() == pytest.approx(1)
    assert p.argmax() == 0
    assert sampling(logits, torch.Generator().manual_seed(0)) in p.nonzero()[:, 1]


@pytest.mark.parametrize("bad", [
    {"temperature": 0}, {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
    {"top_k": 2.5}, {"top_p": -0.1}, {"top_p": 1.1}, {"top_p": math.nan}])
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Sampling takes"):
        Sampling(**bad)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=1), Sampling(top_k=2, top_p=0.5), Sampling(0.5)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_the_models_fault(sampling: Sampling, value: float) -> None:
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 3] = value
    with pytest.raises(ModelError, match="not numbers"):
        sampling(logits, seeded([0, 1]))
    logits[1, 2, 3] = -math.inf  # a word that somebody has forbidden
    assert (sampling(logits, seeded([0, 1])) < 4).all()
    assert sampling.probabilities(logits)[1, 2, 3] == 0
    logits[1, 2] = -math.inf
    with pytest.raises(ModelError, match="not numbers"):
        sampling(logits)


def test_a_picture_is_its_seeds_whatever_the_batch() -> None:
    logits = torch.randn(6, 7, 9, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(), Sampling(top_k=4), Sampling(0.7, top_p=0.8)):
        together = sampling(logits, seeded(range(6)))
        for size in (1, 2, 3):
            parts = [sampling(logits[i : i + size], seeded(range(i, i + size))) for i in range(0, 6, size)]
            assert torch.equal(torch.cat(parts), together)
        assert not torch.equal(sampling(logits, seeded(range(1, 7))), together)
    with pytest.raises(ConfigError, match="2 random generators do not fit a batch of 6"):
        Sampling()(logits, seeded([0, 1]))


def test_words_come_at_their_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).log_softmax(0).expand(1, 20_000, 4)
    for sampling in (Sampling(), Sampling(0.5, top_k=3), Sampling(top_p=0.9)):
        drawn = sampling(logits, seeded([3]))
        share = torch.bincount(drawn[0], minlength=4) / drawn.shape[1]
        expected = torch.from_numpy(slowly(logits[0, 0].numpy(), sampling))
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / drawn.shape[1]).sqrt() + 1e-9).all()


def test_schedules_of_guidance() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    assert not Guidance().active and Guidance()(logits, 0, 3) is logits
    assert [Guidance(3.0, ramp=True).at(i, 5) for i in range(5)] == [1, 1.5, 2, 2.5, 3]
    assert Guidance(3.0, ramp=True).at(0, 1) == 3
    own = Guidance(weights=(1.0, 4.0))
    assert own.active and [own.at(i, 2) for i in range(2)] == [1, 4]
    torch.testing.assert_close(own(logits, 1, 2), logits[1:] + 4 * (logits[:1] - logits[1:]))
    torch.testing.assert_close(own(logits, 0, 2), logits[:1])
    assert not Guidance(7.0, weights=(1.0, 1.0)).active
    with pytest.raises(ConfigError, match="2 weights of guidance do not fit 3 steps"):
        own.at(0, 3)
    for bad in ({"weight": math.nan}, {"weight": math.inf}, {"weights": (1.0, -math.inf)}, {"layer": 1}):
        with pytest.raises(ConfigError, match="uidance is"):
            Guidance(**bad)


def test_guidance_survives_a_file() -> None:
    config = GenerationConfig(guidance=Guidance(weights=(1.0, 2.0), layer=-2), sampling=Sampling(0.5))
    assert json.loads(config.to_json()) == {"sampling": {"temperature": 0.5},
                                            "guidance": {"weights": [1.0, 2.0], "layer": -2}}
    assert GenerationConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("labels", [torch.tensor([]), torch.tensor([[1]]), torch.tensor(1), torch.tensor([-1]),
                                    torch.tensor([4]), torch.tensor([1.0])])
def test_labels_that_are_no_classes(labels: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="Labels are"):
        check_labels(labels, 3)
    check_labels(torch.tensor([0, 3]), 3)
