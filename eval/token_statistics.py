"""The language of visual tokens: do a codebook's words behave like the words of a text?

    found = token_statistics(grids, vocab=8192)         # integer arrays (rows, columns), one a picture
    text = token_statistics(documents, vocab=len(words))    # integer arrays (length,), one a document
    found.zipf.exponent, found.entropy.grassberger, found.growth.heaps_exponent

Rank and frequency, entropies, n-grams and neighbours, growth of the vocabulary, compressibility, leading digits and
co-occurrence, after the questions of Chan et al., "Analyzing The Language of Visual Tokens" (2411.05001); the
definitions are the standard ones, stated here, not quoted from there. Every number comes with its number of tokens, and
what depends on the order comes with the same of shuffled tokens.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vtc.errors import ConfigError
from vtc.eval.token_entropies import (
    ContextEntropy,
    Entropies,
    Offsets,
    context_entropy,
    count_words,
    entropies,
    huffman_bits,
    n_gram,
    plugin_entropy,
    shuffled,
    windows,
)

#: where the neighbours lie whose mutual information is measured, (rows, columns)
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (0, 4), (4, 0), (0, 8), (8, 0))
#: the causal neighbourhood of a token in a picture: above, left, and itself
ABOVE_AND_LEFT = ((-1, 0), (0, -1), (0, 0))


# Rank and frequency


@dataclass(frozen=True)
class ZipfFit:
    """How the frequency of a word falls with its rank, over the ranks 1 to `ranks` of the words that occurred.

    slope, r_squared: least squares of log frequency on log rank, as most papers do; the many rare words decide it.
    exponent, distance: f ~ rank^-exponent by maximum likelihood, and the largest gap between the two cumulative
    distributions (Kolmogorov and Smirnov). mandelbrot_...: f ~ (rank + shift)^-exponent, the same way; a shift that
    reaches `ranks`, its bound, means a tail that falls like an exponential rather than a power.
    """

    slope: float
    r_squared: float
    exponent: float
    distance: float
    mandelbrot_exponent: float
    mandelbrot_shift: float
    mandelbrot_distance: float
    ranks: int


def zipf_fit(counts: NDArray) -> ZipfFit:
    """Of how often each word occurred, in any order; at least two words.

    >>> fit = zipf_fit(np.array([1200, 600, 400, 300, 240, 200]))
    >>> round(fit.slope, 6), round(fit.exponent, 3), round(fit.mandelbrot_shift, 2)
    (-1.0, 1.0, 0.0)
    """
    n = np.sort(np.asarray(counts)[np.asarray(counts) > 0])[::-1].astype(np.float64)
    if len(n) < 2:
        raise ConfigError(f"Ranks and frequencies need at least two different words, not {len(n)}.")
    ranks = np.arange(1, len(n) + 1)
    slope, _, r_squared = _line(np.log(ranks), np.log(n))
    p = n / n.sum()

    def likelihood(log_shift: float) -> float:
        places = np.log(ranks + math.expm1(log_shift))
        exponent = _exponent(p, places)
        return float(-exponent * (p @ places) - np.logaddexp.reduce(-exponent * places))

    plain = _exponent(p, np.log(ranks))
    shift = math.expm1(_maximum(likelihood, 0.0, math.log1p(len(n))))
    shifted = np.log(ranks + shift)
    exponent = _exponent(p, shifted)
    return ZipfFit(slope, r_squared, plain, _distance(p, plain, np.log(ranks)), exponent, shift,
                   _distance(p, exponent, shifted), len(n))


def _exponent(p: NDArray, places: NDArray) -> float:
    """The s of p ~ exp(-s places) that makes the sample likeliest: where both have one mean of `places`."""
    wanted = p @ places

    def mean(s: float) -> float:
        weights = np.exp(-s * (places - places[0]))
        return float(weights @ places / weights.sum())

    low, high = 0.0, 1.0
    if mean(0.0) <= wanted:  # all words alike
        return 0.0
    while mean(high) > wanted and high < 2**20:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > wanted else (low, middle)
    return (low + high) / 2


def _maximum(function: Any, low: float, high: float) -> float:
    """Where a function with one peak is largest, by golden section; an end of the range where it is best there."""
    ratio = (math.sqrt(5) - 1) / 2
    start, end = low, high
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    while high - low > 1e-7 * (end - start):
        if at_a >= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return max((start, (low + high) / 2, end), key=function)


def _distance(p: NDArray, exponent: float, places: NDArray) -> float:
    weights = np.exp(-exponent * (places - places[0]))
    return float(np.abs(np.cumsum(p) - np.cumsum(weights) / weights.sum()).max())


def _line(x: NDArray, y: NDArray) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the least-squares line; R^2 is 1 where y is constant."""
    dx, dy = x - x.mean(), y - y.mean()
    if not (dx @ dx):
        raise ConfigError("A line needs two different points.")
    slope = float(dx @ dy / (dx @ dx))
    rest = dy - slope * dx
    return slope, float(y.mean() - slope * x.mean()), float(1 - rest @ rest / (dy @ dy)) if dy @ dy else 1.0


# Growth


@dataclass(frozen=True)
class VocabularyGrowth:
    """How many different words have been seen, at some numbers of documents.

    documents, tokens: the points of the curves, tokens as the mean over the orders. given: in the order given.
    mean, low, high: over `orders` random orders of the documents, low and high hold 90 % of them. independent: expected
    of as many tokens drawn from the whole corpus without regard to documents; what the mean lies below that is how
    much a document repeats its own words. innovation: new words per thousand tokens between a point and the one before
    (from nothing to the first), of the mean.
    heaps_exponent, heaps_factor, heaps_r_squared: words = factor * tokens^exponent, least squares of the logarithms
    over all numbers of documents; a closed vocabulary saturates, and then R^2 says that this is no power.
    documents_until: documents (mean curve) until 50, 90 and 99 % of the corpus' words were seen.
    """

    documents: tuple[int, ...]
    tokens: tuple[float, ...]
    given: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    independent: tuple[float, ...]
    innovation: tuple[float, ...]
    heaps_exponent: float
    heaps_factor: float
    heaps_r_squared: float
    documents_until: tuple[int, int, int]
    orders: int


def vocabulary_growth(sequences: Sequence[NDArray], vocab: int, orders: int = 20, points: int = 60,
                      seed: int = 0) -> VocabularyGrowth:
    """Of at least two documents, in `orders` random orders.

    >>> vocabulary_growth([np.array([0, 1]), np.array([1, 2])], 3, orders=2).mean
    (2.0, 3.0)
    """
    counts = count_words(sequences, vocab)
    lengths = np.array([np.size(sequence) for sequence in sequences])
    keep = np.flatnonzero(lengths)
    if len(keep) < 2 or orders < 1:
        raise ConfigError(f"Growth needs at least two documents with tokens and one order, not {len(keep)}, {orders}.")
    lengths = lengths[keep]
    words = [np.unique(sequences[n]).astype(np.int64) for n in keep]
    document = np.repeat(np.arange(len(words)), [len(w) for w in words])
    by_word = np.argsort(np.concatenate(words), kind="stable")
    document = document[by_word]
    starts = np.concatenate([[0], np.cumsum(np.bincount(np.concatenate(words), minlength=vocab)[counts > 0])[:-1]])

    def curve(place: NDArray[np.int64]) -> NDArray[np.int64]:
        """place: where each document comes in the order; words seen after 1, 2, ... documents."""
        first = np.minimum.reduceat(place[document], starts)
        return np.cumsum(np.bincount(first, minlength=len(words)))

    rng = np.random.default_rng(seed)
    curves, tokens = [], []
    for _ in range(orders):
        order = rng.permutation(len(words))
        curves.append(curve(np.argsort(order)))
        tokens.append(np.cumsum(lengths[order]))
    given, mean = curve(np.arange(len(words))), np.mean(curves, 0)
    seen = np.mean(tokens, 0)
    low, high = np.quantile(curves, [0.05, 0.95], axis=0)
    exponent, factor, r_squared = heaps_fit(seen, mean)
    at = np.unique(np.geomspace(1, len(words), points).round().astype(int)) - 1
    steps = np.diff(mean[at], prepend=0) / np.diff(seen[at], prepend=0)
    until = [int(np.searchsorted(mean, share * mean[-1])) + 1 for share in (0.5, 0.9, 0.99)]
    return VocabularyGrowth(
        tuple((at + 1).tolist()), tuple(seen[at].tolist()), tuple(given[at].tolist()), tuple(mean[at].tolist()),
        tuple(low[at].tolist()), tuple(high[at].tolist()),
        tuple(expected_words(counts, round(t)) for t in seen[at]), tuple((1000 * steps).tolist()),
        exponent, factor, r_squared, (until[0], until[1], until[2]), orders)


def heaps_fit(tokens: NDArray, words: NDArray) -> tuple[float, float, float]:
    """Exponent, factor and R^2 of words = factor * tokens^exponent, by least squares of the logarithms.

    >>> [round(x, 6) for x in heaps_fit(np.array([100, 400, 900]), np.array([50, 100, 150]))]
    [0.5, 5.0, 1.0]
    """
    slope, intercept, r_squared = _line(np.log(tokens), np.log(words))
    return slope, math.exp(intercept), r_squared


def expected_words(counts: NDArray, draws: int) -> float:
    """Different words among `draws` tokens that are taken at random, without replacement, from all.

    >>> round(expected_words(np.array([1, 1]), 1), 12), round(expected_words(np.array([5, 3]), 8), 12)
    (1.0, 2.0)
    """
    n = torch.from_numpy(np.asarray(counts)[np.asarray(counts) > 0].astype(np.float64))
    total = float(n.sum())
    if draws > total:
        raise ConfigError(f"{draws} tokens cannot be drawn from {total:.0f}.")
    rest = total - n  # the word is missed where all draws come from the rest: C(rest, draws) / C(total, draws)
    possible = rest >= draws
    missed = torch.exp(torch.lgamma(rest + 1) - torch.lgamma((rest - draws).clamp(min=0) + 1)
                       - math.lgamma(total + 1) + math.lgamma(total - draws + 1))
    return float((1 - torch.where(possible, missed, 0.0)).sum())


# Compressibility


@dataclass(frozen=True)
class Compressibility:
    """Bytes of `tokens` tokens, stream after stream: packed into ceil(log2 vocab) bits each, in a Huffman code of
    their own (without its table), and by zlib 9 and LZMA 9 from whole bytes, of the tokens as they are and shuffled.

    zlib and LZMA see one byte a token up to 256 words, two up to 65,536, else four.
    """

    tokens: int
    packed: int
    huffman: int
    zlib: int
    lzma: int
    shuffled_zlib: int
    shuffled_lzma: int

    @property
    def saving(self) -> float:
        """Share of the packed bytes that the better of zlib and LZMA saves; negative where both only add."""
        return 1 - min(self.zlib, self.lzma) / self.packed


def compressibility(sequences: Sequence[NDArray], vocab: int, baseline: Sequence[NDArray] | None = None,
                    seed: int = 0) -> Compressibility:
    """Of all tokens, grids row by row. baseline: `shuffled(sequences)`, made with `seed` where it is not given.

    >>> found = compressibility([np.zeros(8000, dtype=int)], 16)
    >>> found.packed, found.zlib < 100
    (4000, True)
    """
    counts = count_words(sequences, vocab)
    if baseline is None:
        baseline = shuffled(sequences, np.random.default_rng(seed))
    kind = "u1" if vocab <= 2**8 else "<u2" if vocab <= 2**16 else "<u4"
    data, chance = (np.concatenate([np.ravel(s) for s in corpus]).astype(kind).tobytes()
                    for corpus in (sequences, baseline))
    tokens = int(counts.sum())
    bits = max(1, (vocab - 1).bit_length())
    return Compressibility(tokens, -(-tokens * bits // 8), -(-huffman_bits(counts) // 8), len(zlib.compress(data, 9)),
                           len(_lzma(data)), len(zlib.compress(chance, 9)), len(_lzma(chance)))


def _lzma(data: bytes) -> bytes:
    return lzma.compress(data, preset=9)


# Leading digits


@dataclass(frozen=True)
class Benford:
    """Leading digits 1 to 9 of the words' counts, against Benford's log10(1 + 1 / d).

    digits: how many words have each. chi_squared, p_value: Pearson's, eight degrees of freedom. divergence: Kullback
    and Leibler's from Benford's law, in bits.
    """

    digits: tuple[int, ...]
    chi_squared: float
    p_value: float
    divergence: float


def benford(counts: NDArray) -> Benford:
    """Of how often each word occurred; words that did not do not count.

    >>> benford(np.array([1, 10, 19, 2, 250])).digits
    (3, 2, 0, 0, 0, 0, 0, 0, 0)
    """
    leading = [int(str(n)[0]) for n in np.asarray(counts).tolist() if n > 0]
    if not leading:
        raise ConfigError("There are no tokens to count.")
    digits = np.bincount(leading, minlength=10)[1:]
    law = np.log10(1 + 1 / np.arange(1, 10))
    expected = law * len(leading)
    chi_squared = float(((digits - expected) ** 2 / expected).sum())
    p = digits[digits > 0] / len(leading)
    tail = torch.special.gammaincc(torch.tensor(4.0, dtype=torch.float64),
                                   torch.tensor(chi_squared / 2, dtype=torch.float64))
    return Benford(tuple(digits.tolist()), chi_squared, float(tail), float(p @ np.log2(p / law[digits > 0])))


# Neighbours


@dataclass(frozen=True)
class Neighbour:
    """Mutual information, plug-in, in bits, of a token and the one (rows, columns) away; shuffled is its bias."""

    rows: int
    columns: int
    information: float
    shuffled: float
    pairs: int


def mutual_information(pairs: NDArray[np.int64], vocab: int) -> float:
    """Plug-in, in bits, of (N, 2) indices.

    >>> mutual_information(np.array([[0, 0], [1, 1]]), 2)
    1.0
    """
    if not len(pairs):
        raise ConfigError("There are no pairs of tokens.")
    joint = np.unique(pairs[:, 0] * vocab + pairs[:, 1], return_counts=True)[1]
    sides = [plugin_entropy(np.bincount(side, minlength=1)) for side in pairs.T]
    return max(sum(sides) - plugin_entropy(joint), 0.0)


@dataclass(frozen=True)
class Cooccurrence:
    """Which words stand beside each other, of the `words` most frequent; pairs with others are left out, since two
    words that occur once each, side by side, seem to be bound by law.

    same, same_by_chance: share of pairs of one word with itself, and of two independent tokens. symmetry,
    shuffled_symmetry: share of the pairs (a, b) that have a pair (b, a) to match: pictures can be mirrored, sentences
    cannot. correlations: the leading singular values of P(a, b) / sqrt(P(a) P(b)) but for the first, which is 1
    (correspondence analysis): the largest is the highest correlation that a function of a token can have with one of
    its neighbour; a cluster of words that keep to themselves gives a value near 1. shuffled_correlations: what noise
    reaches.
    """

    offset: tuple[int, int]
    pairs: int
    words: int
    same: float
    same_by_chance: float
    symmetry: float
    shuffled_symmetry: float
    correlations: tuple[float, ...]
    shuffled_correlations: tuple[float, ...]


def cooccurrence(sequences: Sequence[NDArray], vocab: int, offset: tuple[int, int], baseline: Sequence[NDArray],
                 most_words: int = 2048, least_count: int = 10, correlations: int = 8) -> Cooccurrence | None:
    """Of tokens and the ones `offset` away; baseline: `shuffled(sequences)`.

    most_words, least_count: which words are taken; None where no two of them lie so.
    """
    counts = count_words(sequences, vocab)
    frequent = np.argsort(-counts, kind="stable")[:most_words]
    frequent = frequent[counts[frequent] >= least_count]
    tables = [_pair_table(corpus, vocab, offset, frequent) for corpus in (sequences, baseline)]
    table, chance = tables
    total = int(table.sum())
    if not total or not chance.sum():
        return None
    first, second = table.sum(1) / total, table.sum(0) / total
    found = [_correlations(t, correlations) for t in tables]
    return Cooccurrence(offset, total, len(frequent), float(np.trace(table) / total), float(first @ second),
                        _symmetry(table), _symmetry(chance), found[0], found[1])


def _pair_table(sequences: Sequence[NDArray], vocab: int, offset: tuple[int, int],
                frequent: NDArray[np.int64]) -> NDArray[np.int64]:
    """(words, words): how often a frequent word (row) has another (column) at `offset`."""
    place = np.full(vocab, -1)
    place[frequent] = np.arange(len(frequent))
    pairs = place[windows(sequences, [(0, 0), offset])]
    pairs = pairs[(pairs >= 0).all(1)]
    flat = np.bincount(pairs[:, 0] * len(frequent) + pairs[:, 1], minlength=len(frequent) ** 2)
    return flat.reshape(len(frequent), len(frequent))


def _symmetry(table: NDArray[np.int64]) -> float:
    return float(np.minimum(table, table.T).sum() / table.sum())


def _correlations(table: NDArray[np.int64], count: int) -> tuple[float, ...]:
    """Singular values 2 to count + 1 of the table over the roots of its sums, by subspace iteration."""
    scaled = torch.from_numpy(table.astype(np.float64))
    rows, columns = scaled.sum(1), scaled.sum(0)
    scaled = scaled / (rows.sqrt()[:, None] * columns.sqrt()).clamp(min=1e-300)
    # What independence explains has the singular value 1 and known vectors; without it the next is the first.
    scaled = scaled - torch.outer((rows / rows.sum()).sqrt(), (columns / columns.sum()).sqrt())
    width = min(len(table), count + 8)
    basis = torch.linalg.qr(torch.randn(len(table), width, dtype=torch.float64,
                                        generator=torch.Generator().manual_seed(0))).Q
    for _ in range(12):
        basis = torch.linalg.qr(scaled.T @ (scaled @ basis)).Q
    return tuple(torch.linalg.svdvals(scaled @ basis)[:count].clamp(max=1.0).tolist())


# All of it


@dataclass(frozen=True)
class TokenStatistics:
    """Everything about one corpus of tokens; `to_json` is plain data.

    documents, tokens, vocab, used: how much there was. scan: in which order n-grams and streams read. entropy: of
    single tokens. n_grams: of orders 1 to 4, where they fit 64 bits. above_and_left: a token given those two; None for
    documents of one row. neighbours: pairs in all directions. cooccurrence: of neighbours to the right, and below,
    where enough words are frequent. growth: None for a single document. rank_frequency: counts of the words that
    occurred, largest first.
    """

    documents: int
    tokens: int
    vocab: int
    used: int
    scan: str
    seed: int
    entropy: Entropies
    zipf: ZipfFit | None
    n_grams: tuple[ContextEntropy, ...]
    above_and_left: ContextEntropy | None
    neighbours: tuple[Neighbour, ...]
    cooccurrence: tuple[Cooccurrence, ...]
    growth: VocabularyGrowth | None
    compressibility: Compressibility
    benford: Benford
    rank_frequency: tuple[int, ...]

    @property
    def normalised_entropy(self) -> float:
        """The plug-in entropy over that of `vocab` equally frequent words; 0 for a vocabulary of one."""
        return self.entropy.plugin / math.log2(self.vocab) if self.vocab > 1 else 0.0

    @property
    def perplexity(self) -> float:
        """Equally frequent words with the plug-in entropy."""
        return float(2**self.entropy.plugin)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the properties."""
        found = asdict(self)
        found["normalised_entropy"], found["perplexity"] = self.normalised_entropy, self.perplexity
        found["compressibility"]["saving"] = self.compressibility.saving
        for context, plain in zip(self.n_grams, found["n_grams"], strict=True):
            plain["gain"] = context.gain
        if self.above_and_left is not None:
            found["above_and_left"]["gain"] = self.above_and_left.gain
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TokenStatistics:
        """What `to_json` gave, also after a file. Raises ConfigError where it is something else."""
        try:
            return cls(**{field.name: _restored(field.name, data[field.name]) for field in fields(cls)})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"That is not what token_statistics measured: {error}.") from error


def _restored(name: str, value: Any) -> Any:
    """A field of `TokenStatistics` from plain data: lists to tuples, the properties left out."""
    kinds: dict[str, Any] = {"entropy": Entropies, "zipf": ZipfFit, "n_grams": ContextEntropy,
                             "above_and_left": ContextEntropy, "neighbours": Neighbour, "cooccurrence": Cooccurrence,
                             "growth": VocabularyGrowth, "compressibility": Compressibility, "benford": Benford}
    if name not in kinds or value is None:
        return _tuples(value)
    if isinstance(value, list | tuple):
        return tuple(_restored(name, one) for one in value)
    return kinds[name](**{field.name: _tuples(value[field.name]) for field in fields(kinds[name])})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list | tuple) else value


def token_statistics(sequences: Sequence[NDArray], vocab: int, *, order: int = 4, held_out: float = 0.1,
                     orders: int = 20, seed: int = 0) -> TokenStatistics:
    """Of one corpus.

    sequences: integer arrays below `vocab`, one a picture (rows, columns) or a document (length,).
    order: of the longest n-grams. held_out: share of the documents that test the n-gram models, chosen by `seed`, at
    least one; 0 trains none. orders: random orders of the documents behind the growth of the vocabulary.
    Raises ConfigError for what are no indices.

    >>> found = token_statistics([np.arange(12).reshape(3, 4) % 5] * 4, 5, order=2)
    >>> found.tokens, found.used, found.growth.documents_until
    (48, 5, (1, 1, 1))
    """
    if order < 1 or not 0 <= held_out < 1:
        raise ConfigError(f"n-grams have an order of at least 1, and less than all is held out, not {order}, "
                          f"{held_out}.")
    counts = count_words(sequences, vocab)
    grids = [np.asarray(s) for s in sequences if np.size(s)]
    rng = np.random.default_rng(seed)
    test = rng.permutation(len(grids))[: max(1, round(held_out * len(grids)))].tolist() if held_out else []
    chance = shuffled(grids, rng)
    length, height = max(np.atleast_2d(g).shape[1] for g in grids), max(np.atleast_2d(g).shape[0] for g in grids)
    longest = max(n for n in range(1, order + 1) if n == 1 or (vocab**n < 2**63 and n <= length))

    def given(offsets: Offsets) -> ContextEntropy:
        return context_entropy(grids, vocab, offsets, chance, test)

    def pair(offset: tuple[int, int]) -> Neighbour | None:
        real, random = (windows(corpus, [(0, 0), offset]) for corpus in (grids, chance))
        return Neighbour(*offset, mutual_information(real, vocab), mutual_information(random, vocab),
                         len(real)) if len(real) else None

    neighbours = [found for found in map(pair, NEIGHBOURS) if found is not None]
    ordered = np.sort(counts[counts > 0])[::-1]
    beside = [cooccurrence(grids, vocab, offset, chance) for offset in ((0, 1), (1, 0))]
    return TokenStatistics(
        len(grids), int(counts.sum()), vocab, len(ordered), "row by row, n-grams within rows" if height > 1 else
        "one row a document", seed, entropies(counts), zipf_fit(counts) if len(ordered) > 1 else None,
        tuple(given(n_gram(n)) for n in range(1, longest + 1)),
        given(ABOVE_AND_LEFT) if len(windows(grids, ABOVE_AND_LEFT)) and vocab**3 < 2**63 else None,
        tuple(neighbours), tuple(found for found in beside if found is not None),
        vocabulary_growth(grids, vocab, orders, seed=seed) if len(grids) > 1 else None,
        compressibility(grids, vocab, chance), benford(counts), tuple(ordered.tolist()))
