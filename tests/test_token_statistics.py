"""Token statistics against the fixture, scipy, brute force, and distributions whose answer is known."""

import itertools
import json
import math
from collections import Counter
from importlib import import_module

import numpy as np
import pytest

from tests.shared import SHARED, needs_shared
from vtc.errors import ConfigError
from vtc.eval.token_entropies import (
    KneserNey,
    context_entropy,
    count_words,
    entropies,
    huffman_bits,
    n_gram,
    shuffled,
    windows,
)
from vtc.eval.token_statistics import (
    benford,
    compressibility,
    cooccurrence,
    expected_words,
    heaps_fit,
    mutual_information,
    token_statistics,
    vocabulary_growth,
    zipf_fit,
)
from vtc.training.tokens import TokenGrids

script = import_module("scripts.token_statistics")
FIXTURES = SHARED / "fixtures" / "eval"


def sticky(length: int, stay: float, vocab: int, seed: int = 0) -> np.ndarray:
    """A chain that keeps its word with probability `stay` and else draws any word: all its numbers are known."""
    rng = np.random.default_rng(seed)
    fresh, keep = rng.integers(vocab, size=length), rng.random(length) < stay
    keep[0] = False
    return fresh[np.maximum.accumulate(np.where(keep, 0, np.arange(length)))]


@needs_shared("fixtures", "eval", "token_stats.json")
def test_the_fixture():
    expected = json.loads((FIXTURES / "token_stats.json").read_text())
    rows = list(np.load(FIXTURES / "token_stats_T.npy"))
    found = token_statistics(rows, 256, order=2, orders=2)
    assert found.entropy.plugin == pytest.approx(expected["entropy_bits"], abs=1e-9)
    assert found.perplexity == pytest.approx(expected["perplexity"], abs=1e-9)
    assert found.used == expected["used"]
    assert huffman_bits(count_words(rows, 256)) == expected["huffman_bits_total"]
    assert found.zipf.slope == pytest.approx(expected["zipf_slope_ols"], abs=1e-9)
    assert found.zipf.r_squared == pytest.approx(expected["zipf_r2"], abs=1e-9)
    assert found.n_grams[1].joint == pytest.approx(expected["bigram_joint_entropy_bits_within_row"], abs=1e-9)
    growth = vocabulary_growth(rows, 256, points=10_000)
    assert list(growth.given) == expected["vocab_growth"]
    exponent, factor, _ = heaps_fit(64 * np.arange(1, 51), np.array(expected["vocab_growth"]))
    assert exponent == pytest.approx(expected["heaps_beta"], abs=1e-9)
    assert math.log(factor) == pytest.approx(expected["heaps_logK"], abs=1e-9)


# Entropies


@pytest.mark.parametrize("counts", [[5, 3, 1, 1], [1, 1, 1], [7], [1], [40, 20, 10, 5, 3, 2, 1, 1, 1]])
def test_estimators_equal_their_formulas(counts):
    special = pytest.importorskip("scipy.special")
    stats = pytest.importorskip("scipy.stats")
    n, total = np.array(counts), sum(counts)
    found = entropies(np.array([0, *counts]))
    assert found.plugin == pytest.approx(stats.entropy(n, base=2), abs=1e-12)
    assert found.miller_madow == pytest.approx(found.plugin + (len(n) - 1) / 2 / total / math.log(2), abs=1e-12)
    sign = np.where(n % 2, -1, 1)
    g = special.digamma(n) + sign / 2 * (special.digamma((n + 1) / 2) - special.digamma(n / 2))
    assert found.grassberger == pytest.approx((math.log(total) - (n * g).sum() / total) / math.log(2), abs=1e-12)
    singles = counts.count(1)
    shrink = 1 - (singles if singles < total else total - 1) / total
    chao_shen = 0.0
    for c in counts:
        p = shrink * c / total
        if 0 < p < 1:
            chao_shen -= p * math.log2(p) / (1 - (1 - p) ** total)
    assert found.chao_shen == pytest.approx(chao_shen, abs=1e-9)


def test_estimators_correct_the_bias():
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 201)
    p /= p.sum()
    truth = -(p * np.log2(p)).sum()
    found = [entropies(rng.multinomial(400, p)) for _ in range(300)]
    bias = {name: np.mean([getattr(f, name) for f in found]) - truth
            for name in ("plugin", "miller_madow", "grassberger", "chao_shen")}
    assert bias["plugin"] < -0.3  # what is to be corrected
    assert abs(bias["miller_madow"]) < 0.2
    assert abs(bias["grassberger"]) < 0.08 and abs(bias["chao_shen"]) < 0.08
    assert np.mean([f.coverage for f in found]) == pytest.approx(1 - (p * (1 - p) ** 400).sum(), abs=0.005)


def test_huffman_codes_by_hand_and_within_a_bit():
    assert huffman_bits(np.array([1, 1, 2, 3, 5])) == 5 * 1 + 3 * 2 + 2 * 3 + 2 * 4
    assert huffman_bits(np.array([9])) == 9  # one word still takes a bit
    counts = np.random.default_rng(0).integers(1, 500, 300)
    bits = entropies(counts).plugin * counts.sum()
    assert bits <= huffman_bits(counts) < bits + counts.sum()


# N-grams


def test_windows_by_hand():
    grid = np.arange(12).reshape(3, 4)
    above_and_left = windows([grid], [(-1, 0), (0, -1), (0, 0)])
    assert above_and_left.tolist() == [[r * 4 + c - 4, r * 4 + c - 1, r * 4 + c] for r in (1, 2) for c in (1, 2, 3)]
    assert windows([grid], [(0, 0), (1, -1)]).tolist() == [[1, 4], [2, 5], [3, 6], [5, 8], [6, 9], [7, 10]]
    assert windows([grid], n_gram(5)).shape == (0, 5)
    assert windows([np.arange(3), np.arange(5, 7)], n_gram(2)).tolist() == [[0, 1], [1, 2], [5, 6]]


def test_conditional_entropies_of_a_chain_are_known():
    stay, vocab = 0.6, 8
    documents = list(sticky(60_000, stay, vocab).reshape(60, 1000))
    p = [stay + (1 - stay) / vocab, *[(1 - stay) / vocab] * (vocab - 1)]
    truth = -sum(x * math.log2(x) for x in p)
    chance = shuffled(documents, np.random.default_rng(0))
    for order in (2, 3):
        found = context_entropy(documents, vocab, n_gram(order), chance, held_out=range(10))
        assert found.conditional == pytest.approx(truth, abs=0.02)
        assert found.grassberger == pytest.approx(truth, abs=0.02)
        assert found.shuffled == pytest.approx(3, abs=0.01)
        assert found.gain == pytest.approx(3 - truth, abs=0.02)
        assert found.held_out == pytest.approx(truth, abs=0.03)
        assert found.shuffled_held_out == pytest.approx(3, abs=0.01)
    alone = context_entropy(documents, vocab, n_gram(1), chance, held_out=range(10))
    assert alone.conditional == alone.joint == pytest.approx(3, abs=0.01)


def naive_kneser_ney(train: list[tuple[int, ...]], vocab: int, query: tuple[int, ...]) -> float:
    def counts_of(order: int) -> Counter:
        if order == len(train[0]):
            return Counter(train)
        return Counter(longer[1:] for longer in set(counts_of(order + 1)))

    p = 1 / vocab
    for order in range(1, len(query) + 1):
        counts = counts_of(order)
        ones, twos = list(counts.values()).count(1), list(counts.values()).count(2)
        discount = ones / (ones + 2 * twos) if ones else 0.5
        gram = query[len(query) - order :]
        same = {g: c for g, c in counts.items() if g[:-1] == gram[:-1]}
        if same:
            own = max(counts[gram] - discount, 0) if gram in counts else 0
            p = (own + discount * len(same) * p) / sum(same.values())
    return p


def test_kneser_ney_equals_a_naive_one_and_sums_to_one():
    rng = np.random.default_rng(0)
    vocab = 6
    train = np.minimum(rng.geometric(0.4, (150, 3)) - 1, vocab - 2)  # the last word never occurs
    queries = np.array(list(itertools.product(range(vocab), repeat=3)))
    p = KneserNey(train, vocab).probabilities(queries)
    naive = [naive_kneser_ney([tuple(row) for row in train.tolist()], vocab, tuple(q)) for q in queries.tolist()]
    np.testing.assert_allclose(p, naive, atol=1e-12)
    np.testing.assert_allclose(p.reshape(-1, vocab).sum(1), 1, atol=1e-12)
    assert p.min() > 0


# Rank and frequency


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.7])
def test_zipf_of_exact_frequencies(exponent):
    ranks = np.arange(1, 301)
    fit = zipf_fit(np.random.default_rng(0).permutation(np.round(1e9 * ranks**-exponent).astype(np.int64)))
    assert fit.slope == pytest.approx(-exponent, abs=1e-5) and fit.r_squared == pytest.approx(1, abs=1e-8)
    assert fit.exponent == pytest.approx(exponent, abs=1e-5) and fit.distance < 1e-6
    assert fit.mandelbrot_exponent == pytest.approx(exponent, abs=1e-3) and fit.mandelbrot_shift < 2e-3
    assert fit.ranks == 300


def test_zipf_mandelbrot_of_exact_frequencies_and_of_a_sample():
    ranks = np.arange(1, 1001)
    p = (ranks + 7.0) ** -1.5
    p /= p.sum()
    fit = zipf_fit(np.round(1e10 * p).astype(np.int64))
    assert fit.mandelbrot_exponent == pytest.approx(1.5, abs=1e-4)
    assert fit.mandelbrot_shift == pytest.approx(7, abs=1e-2)
    assert fit.mandelbrot_distance < 1e-6 < fit.distance
    sample = zipf_fit(np.random.default_rng(0).multinomial(500_000, p))
    assert sample.mandelbrot_exponent == pytest.approx(1.5, abs=0.05)
    assert sample.mandelbrot_shift == pytest.approx(7, abs=0.7)


def test_likelihood_equals_scipys_minimum():
    optimize = pytest.importorskip("scipy.optimize")
    counts = np.sort(np.random.default_rng(1).integers(1, 400, 80))[::-1]
    logs = np.log(np.arange(1, 81))
    best = optimize.minimize_scalar(lambda s: s * (counts @ logs) + counts.sum() * np.log(np.exp(-s * logs).sum()),
                                    bounds=(0, 5), method="bounded", options={"xatol": 1e-9})
    assert zipf_fit(counts).exponent == pytest.approx(best.x, abs=1e-6)
    assert zipf_fit(np.full(10, 3)).exponent == pytest.approx(0, abs=1e-12)  # all words alike
    assert zipf_fit(np.full(10, 3)).slope == 0


# Growth


def test_growth_of_random_orders_is_the_expected_one():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, rng.integers(3, 12)) ** 2 // 40 for _ in range(12)]
    found = vocabulary_growth(documents, 40, orders=3000)
    containing = Counter(word for document in documents for word in set(document.tolist()))
    for t, mean in zip(found.documents, found.mean, strict=True):
        exact = sum(1 - math.comb(12 - d, t) / math.comb(12, t) for d in containing.values())
        assert mean == pytest.approx(exact, abs=0.15)  # 3000 orders: three standard errors
    assert found.mean[-1] == found.given[-1] == found.low[-1] == len(containing)
    assert all(a <= b <= c for a, b, c in zip(found.low, found.mean, found.high, strict=True))
    assert found.independent[-1] == pytest.approx(len(containing), abs=1e-9)
    new = np.array(found.innovation) / 1000 * np.diff(found.tokens, prepend=0)
    np.testing.assert_allclose(new.cumsum(), found.mean)


def test_expected_words_equals_combinatorics():
    counts = [7, 3, 3, 1, 1, 0]
    for draws in range(16):
        exact = sum(1 - math.comb(15 - c, draws) / math.comb(15, draws) for c in counts if c)
        assert expected_words(np.array(counts), draws) == pytest.approx(exact, abs=1e-10)
    with pytest.raises(ConfigError, match="cannot be drawn"):
        expected_words(np.array(counts), 16)


# The rest


def test_mutual_information_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    pairs = windows([sticky(5000, 0.5, 12)], n_gram(2))
    assert mutual_information(pairs, 12) == pytest.approx(metrics.mutual_info_score(*pairs.T) / math.log(2), abs=1e-9)


def test_cooccurrence_of_a_chain_is_known():
    stay, vocab = 0.7, 10
    documents = [sticky(200_000, stay, vocab)]
    found = cooccurrence(documents, vocab, (0, 1), shuffled(documents, np.random.default_rng(0)))
    assert found.same == pytest.approx(stay + (1 - stay) / vocab, abs=0.01)
    assert found.same_by_chance == pytest.approx(1 / vocab, abs=0.002)
    assert found.symmetry > 0.97  # in the chain, forward and backward are alike
    np.testing.assert_allclose(found.correlations, stay, atol=0.015)
    assert max(found.shuffled_correlations) < 0.015
    one_way = [np.tile(np.arange(vocab), 1000)]
    found = cooccurrence(one_way, vocab, (0, 1), shuffled(one_way, np.random.default_rng(0)))
    assert found.symmetry == found.same == 0 and found.shuffled_symmetry > 0.8
    np.testing.assert_allclose(found.correlations, 1, atol=1e-3)


def test_correlations_equal_the_whole_decomposition():
    grids = [sticky(3000, 0.4, 30, seed) ** 2 // 30 for seed in range(3)]
    pairs = windows(grids, n_gram(2))
    table = np.zeros((30, 30))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    used = np.flatnonzero(table.sum(1) * table.sum(0))
    table = table[np.ix_(used, used)]
    values = np.linalg.svd(table / np.sqrt(np.outer(table.sum(1), table.sum(0))), compute_uv=False)
    found = cooccurrence(grids, 30, (0, 1), shuffled(grids, np.random.default_rng(0)), least_count=1)
    assert values[0] == pytest.approx(1)
    np.testing.assert_allclose(found.correlations[:4], values[1:5], atol=1e-4)


def test_compressibility_of_noise_and_of_repetition():
    rng = np.random.default_rng(0)
    noise = compressibility([rng.integers(0, 256, 20_000)], 256)
    assert noise.packed == 20_000 <= noise.zlib < 20_100 and noise.lzma >= 20_000 and noise.saving < 0
    assert compressibility([rng.integers(0, 2560, 16_000)], 2560).packed == 24_000  # 12 bits each
    repeated = compressibility([np.tile(rng.integers(0, 256, 100), 200)], 256)
    assert repeated.saving > 0.95 and repeated.shuffled_lzma > 15 * repeated.lzma


def test_benford_of_powers_and_scipys_test():
    stats = pytest.importorskip("scipy.stats")
    powers = benford(np.array([2**k for k in range(600)], dtype=object))
    assert powers.digits[0] == 181 and powers.p_value > 0.99 and powers.divergence < 0.01
    counts = np.random.default_rng(0).integers(1, 1000, 900)
    found = benford(counts)
    assert found.digits == tuple(sum(str(c).startswith(str(d)) for c in counts) for d in range(1, 10))
    theirs = stats.chisquare(found.digits, 900 * np.log10(1 + 1 / np.arange(1, 10)))
    assert found.chi_squared == pytest.approx(theirs.statistic) and found.p_value == pytest.approx(theirs.pvalue)


def test_everything_of_grids_is_plain_data_and_seeded():
    grids = [sticky(20 * 15, 0.5, 20, seed).reshape(20, 15) for seed in range(6)]
    first, again = (token_statistics(grids, 20, orders=3) for _ in range(2))
    assert first == again
    data = json.loads(json.dumps(first.to_json()))
    assert data["tokens"] == 1800 and data["documents"] == 6 and len(data["n_grams"]) == 4
    assert data["above_and_left"]["gain"] == pytest.approx(
        data["above_and_left"]["shuffled"] - data["above_and_left"]["conditional"])
    assert [(n["rows"], n["columns"]) for n in data["neighbours"]][:2] == [(0, 1), (1, 0)]
    right, below = (next(n for n in first.neighbours if (n.rows, n.columns) == o) for o in ((0, 1), (1, 0)))
    assert right.information - right.shuffled > 10 * abs(below.information - below.shuffled)
    text = token_statistics([grid.ravel() for grid in grids], 20, orders=3)
    assert text.above_and_left is None and all(n.rows == 0 for n in text.neighbours) and len(text.cooccurrence) == 1
    assert text.rank_frequency == first.rank_frequency


@pytest.mark.parametrize("sequences", [
    [np.array([3])], [np.zeros((4, 1), np.int64)], [np.array([1, 1, 1])], [np.array([0]), np.array([], np.int64)],
    [np.arange(4, dtype=np.uint8)]], ids=["one token", "one column", "one word", "an empty one", "uint8"])
def test_little_input_is_measured_as_far_as_it_goes(sequences):
    found = token_statistics(sequences, 4)
    assert found.n_grams[0].windows == found.tokens
    assert json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(("sequences", "vocab", "words"), [
    ([], 4, "no tokens"), ([np.array([], np.int64)], 4, "no tokens"), ([np.array([4])], 4, "do not fit"),
    ([np.array([-1])], 4, "do not fit"), ([np.array([0.5])], 4, "are integers, not float64"),
    ([np.array([np.nan])], 4, "are integers"), ([np.zeros((2, 2, 2), int)], 4, "as grids"),
    ([np.array([0])], 0, "at least one word")])
def test_what_are_no_tokens_is_refused(sequences, vocab, words):
    with pytest.raises(ConfigError, match=words):
        token_statistics(sequences, vocab)


def test_the_script_compares_grids_with_a_text(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shapes = np.array([[6, 5]] * 8, dtype=np.int32)
    tokens = np.concatenate([sticky(30, 0.5, 16, seed) for seed in range(8)]).astype(np.int16)
    TokenGrids(shapes, {16: tokens}).save(tmp_path / "grids.safetensors", {})
    (tmp_path / "text").mkdir()
    for n in range(3):
        (tmp_path / "text" / f"{n}.txt").write_text(f"It's the {n} th text, and it is the same as the others. " * 5)
    (tmp_path / "text" / "code.py").write_text('"""Words of a docstring."""\nnumber = 1\n')
    arguments = [str(tmp_path / "out"), "--grids", f"pictures={tmp_path / 'grids.safetensors'}", "--text",
                 f"text={tmp_path / 'text'}", "--matched", "180"]
    assert script.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "out" / "statistics.md").read_text() + "\n"
    assert shown.startswith("| | pictures | pictures (180) | text, words | text, characters |")
    corpora = json.loads((tmp_path / "out" / "statistics.json").read_text())["corpora"]
    assert corpora["text, words"]["used"] == 14  # it's the th text and it is same as others; words of a docstring
    assert corpora["pictures"]["tokens"] == 240 and corpora["pictures (180)"]["tokens"] == 180
    assert (tmp_path / "out" / "figure.svg").read_bytes().startswith(b"<?xml")
    assert script.main([*arguments[:3], "--size", "32"]) == 1
    assert "has the codebooks 16, not 32." in capsys.readouterr().err
    assert script.main([str(tmp_path), "--images", f"none={tmp_path / 'none'}"]) == 1
    assert "There are no pictures in" in capsys.readouterr().err
