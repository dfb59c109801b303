"""How uncertain a token is, alone and given others: entropies whose bias is corrected, n-grams, and a model that is
tested on documents it has not seen.

A count is no probability: with few tokens the entropy of their frequencies is too low, and that of their n-grams much
too low, since most n-grams occur once. So nothing here stands alone: estimators that correct the bias stand beside the
plug-in one, the same number of shuffled tokens beside each n-gram, and beside both what a Kneser-Ney model needs for
held-out documents, which is never too low.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtc.errors import ConfigError

Offsets = Sequence[tuple[int, int]]

EULER_GAMMA = 0.5772156649015329


def count_words(sequences: Sequence[NDArray], vocab: int) -> NDArray[np.int64]:
    """How often each of `vocab` words occurs in arrays of any shape, (vocab,).

    Raises ConfigError for what are no indices into `vocab` words, or where there are none at all.

    >>> count_words([np.array([[0, 1], [1, 3]])], 4)
    array([1, 2, 0, 1])
    """
    if vocab < 1:
        raise ConfigError(f"A vocabulary has at least one word, not {vocab}.")
    if not sum(np.asarray(sequence).size for sequence in sequences):
        raise ConfigError("There are no tokens to count.")
    counts = np.zeros(vocab, dtype=np.int64)
    for sequence in sequences:
        tokens = np.asarray(sequence)
        if tokens.dtype.kind not in "iu":
            raise ConfigError(f"Token indices are integers, not {tokens.dtype}.")
        if not tokens.size:
            continue
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab:
            raise ConfigError(f"Token indices from {low} to {high} do not fit a vocabulary of {vocab}.")
        counts += np.bincount(tokens.ravel().astype(np.int64), minlength=vocab)
    return counts


# Of counts


@dataclass(frozen=True)
class Entropies:
    """Of one distribution, in bits, from `tokens` draws of `words` different ones.

    plugin: -sum p log2 p of the frequencies, too low. miller_madow: plus (words - 1) / (2 tokens ln 2).
    grassberger: Grassberger 2003 (physics/0307138), equation 35. chao_shen: Chao and Shen 2003, for samples that have
    not seen every word. coverage: Good and Turing's estimate of the probability of the words that were seen.
    """

    plugin: float
    miller_madow: float
    grassberger: float
    chao_shen: float
    coverage: float
    tokens: int
    words: int


def entropies(counts: NDArray) -> Entropies:
    """All estimates from how often each word (or n-gram) occurred; zeros do not matter.

    >>> entropies(np.array([2, 2])).plugin
    1.0
    """
    n = _occurring(counts)
    total = int(n.sum())
    p = n / total
    plugin = -float(p @ np.log2(p))
    singles = int((n == 1).sum())
    return Entropies(plugin, plugin + (len(n) - 1) / (2 * total * np.log(2)), _grassberger(n), _chao_shen(n),
                     1 - singles / total, total, len(n))


def plugin_entropy(counts: NDArray) -> float:
    """-sum p log2 p of the frequencies, in bits."""
    n = _occurring(counts)
    p = n / n.sum()
    return -float(p @ np.log2(p))


def _occurring(counts: NDArray) -> NDArray[np.int64]:
    n = np.asarray(counts)
    if n.dtype.kind not in "iu" or n.ndim != 1 or (n < 0).any():
        raise ConfigError(f"Counts are whole numbers that are not negative, (words,), not {n.dtype} {n.shape}.")
    n = n[n > 0].astype(np.int64)
    if not len(n):
        raise ConfigError("There are no tokens to count.")
    return n


def _grassberger(n: NDArray[np.int64]) -> float:
    """(ln N - 1/N sum n G(n)) / ln 2, where G(n) = -gamma - ln 2 + sum of 2 / (2k + 1) for k < n // 2."""
    values, times = np.unique(n, return_counts=True)
    halves = np.arange(values[-1] // 2)
    sums = np.concatenate([[0.0], np.cumsum(2 / (2 * halves + 1))])
    g = -EULER_GAMMA - np.log(2) + sums[values // 2]
    total = int(n.sum())
    return float((np.log(total) - (values * g) @ times / total) / np.log(2))


def _chao_shen(n: NDArray[np.int64]) -> float:
    """Frequencies shrunk by the coverage, each term divided by the chance that its word was seen."""
    total = int(n.sum())
    singles = min(int((n == 1).sum()), total - 1)  # if all are singletons, coverage would be 0
    if total == 1:
        return 0.0
    p = n / total * (1 - singles / total)
    return -float((p * np.log2(p) / -np.expm1(total * np.log1p(-np.minimum(p, 1 - 1e-16)))).sum())


def huffman_bits(counts: NDArray) -> int:
    """Bits of all tokens in a Huffman code of their own frequencies, without the table.

    >>> huffman_bits(np.array([4, 2, 1, 1]))
    14
    """
    heap = _occurring(counts).tolist()
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return bits


# Of tokens and their neighbours


def windows(sequences: Sequence[NDArray], offsets: Offsets) -> NDArray[np.int64]:
    """The tokens at `offsets` (row, column) from every place where all of them lie inside, (N, len(offsets)).

    sequences: grids (rows, columns), or (length,), which are one row. Rows do not run on: a line's end has no right
    neighbour.

    >>> windows([np.array([[1, 2], [3, 4]])], [(0, 0), (1, 0)])
    array([[1, 3],
           [2, 4]])
    """
    top, left = (-min(offset[axis] for offset in offsets) for axis in (0, 1))
    height, width = (max(offset[axis] for offset in offsets) + edge for axis, edge in ((0, top), (1, left)))
    parts = []
    for sequence in sequences:
        grid = np.atleast_2d(sequence)
        if grid.ndim != 2:
            raise ConfigError(f"Tokens come as grids (rows, columns) or as (length,), not as {grid.shape}.")
        rows, columns = grid.shape[0] - height, grid.shape[1] - width
        if rows > 0 and columns > 0:
            parts.append(np.stack([grid[r + top : r + top + rows, c + left : c + left + columns].ravel()
                                   for r, c in offsets], 1).astype(np.int64))
    return np.concatenate(parts) if parts else np.empty((0, len(offsets)), dtype=np.int64)


def n_gram(n: int) -> Offsets:
    """The offsets of n tokens in a row."""
    return [(0, k) for k in range(n)]


def shuffled(sequences: Sequence[NDArray], rng: np.random.Generator) -> list[NDArray]:
    """The same tokens in the same shapes, at random places of the whole corpus: frequencies stay, structure goes."""
    flat = rng.permutation(np.concatenate([np.ravel(sequence) for sequence in sequences]))
    ends = np.cumsum([np.size(sequence) for sequence in sequences])
    parts = np.split(flat, ends[:-1])
    return [part.reshape(np.shape(sequence)) for part, sequence in zip(parts, sequences, strict=True)]


def _keys(found: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
    """(N, n) to (N,): one number for each n-gram, the first token most significant."""
    if vocab ** found.shape[1] >= 2**63:
        raise ConfigError(f"{found.shape[1]} tokens of {vocab} words have no number of 64 bits; take fewer.")
    keys = np.zeros(len(found), dtype=np.int64)
    for column in found.T:
        keys = keys * vocab + column
    return keys


@dataclass(frozen=True)
class ContextEntropy:
    """A token given its context, in bits; the last of `offsets` is the token.

    distinct, coverage: of the n-grams, token and context together. joint: plug-in entropy of these. conditional: the
    plug-in entropy of the token given the context, `grassberger` the corrected one; both are too low where the
    coverage is. shuffled, shuffled_grassberger: of the same number of shuffled tokens, so what these lie below the
    entropy of one token is bias, and what the real ones lie below these is structure. held_out: bits per token of a
    Kneser-Ney model on documents it was not trained on; shuffled_held_out the same of shuffled tokens; None where
    there are too few documents.
    """

    offsets: tuple[tuple[int, int], ...]
    windows: int
    distinct: int
    coverage: float
    joint: float
    conditional: float
    grassberger: float
    shuffled: float
    shuffled_grassberger: float
    held_out: float | None
    shuffled_held_out: float | None

    @property
    def gain(self) -> float:
        """Bits that the context tells, plug-in, beyond what it seems to tell of shuffled tokens."""
        return self.shuffled - self.conditional


def context_entropy(sequences: Sequence[NDArray], vocab: int, offsets: Offsets, baseline: Sequence[NDArray],
                    held_out: Sequence[int] = ()) -> ContextEntropy:
    """Of the tokens at the last of `offsets`, given those at the others.

    baseline: `shuffled(sequences)`. held_out: which of the sequences are kept for the test of the Kneser-Ney model.
    Raises ConfigError where no sequence is as large as the offsets ask.

    >>> grids = [np.array([[0, 1, 0, 1, 0, 1]])]
    >>> found = context_entropy(grids, 2, n_gram(2), shuffled(grids, np.random.default_rng(0)))
    >>> found.conditional, found.windows
    (0.0, 5)
    """
    found, chance = windows(sequences, offsets), windows(baseline, offsets)
    if not len(found):
        raise ConfigError(f"No sequence has room for tokens at {list(offsets)}.")
    joint, context = _joint_and_context(found, vocab)
    chance_joint, chance_context = _joint_and_context(chance, vocab)
    tested: list[float | None] = [None, None]
    test = set(held_out)
    if test and len(test) < len(sequences):
        for i, corpus in enumerate((sequences, baseline)):
            train, tests = (windows([s for n, s in enumerate(corpus) if (n in test) == wanted], offsets)
                            for wanted in (False, True))
            if len(train) and len(tests):
                tested[i] = held_out_bits(train, tests, vocab)
    return ContextEntropy(
        tuple((int(r), int(c)) for r, c in offsets), len(found), joint.words, joint.coverage, joint.plugin,
        _without_sign(joint.plugin - context.plugin), joint.grassberger - context.grassberger,
        _without_sign(chance_joint.plugin - chance_context.plugin),
        chance_joint.grassberger - chance_context.grassberger, tested[0], tested[1])


def _joint_and_context(found: NDArray[np.int64], vocab: int) -> tuple[Entropies, Entropies]:
    """Of the windows, and of the windows without their last token."""
    keys, counts = np.unique(_keys(found, vocab), return_counts=True)
    starts = _starts(keys // vocab)
    return entropies(counts), entropies(np.add.reduceat(counts, starts))


def _without_sign(bits: float) -> float:
    """A difference of sums that may be -1e-16 where it is zero."""
    return max(bits, 0.0)


def _starts(ordered: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each new value of a sorted array begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


# The model


class KneserNey:
    """Interpolated Kneser-Ney smoothing of n-grams (Kneser and Ney 1995; Chen and Goodman 1999, section 2.8).

    train: windows (N, n), the token last; the context loses its first token first. The discount of each order is
    n1 / (n1 + 2 n2) of its counts of one and two, or 1/2 where no count is one. Below the order n, counts are those of
    different tokens in front. A word that was never seen shares what the discount of single words left.
    """

    def __init__(self, train: NDArray[np.int64], vocab: int) -> None:
        if not len(train):
            raise ConfigError("There are no n-grams to train on.")
        self.vocab = vocab
        self.orders: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        keys, counts = np.unique(_keys(train, vocab), return_counts=True)
        for order in range(train.shape[1], 0, -1):
            self.orders.insert(0, (keys, counts))
            if order > 1:
                keys, counts = np.unique(keys % vocab ** (order - 1), return_counts=True)

    def probabilities(self, found: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of the last token of each window given the others, (N, n) to (N,)."""
        keys = _keys(found, self.vocab)
        p = np.full(len(found), 1 / self.vocab)
        for order, (known, counts) in enumerate(self.orders, 1):
            p = self._interpolated(keys % self.vocab**order, p, known, counts)
        return p

    def _interpolated(self, query: NDArray[np.int64], lower: NDArray[np.float64], known: NDArray[np.int64],
                      counts: NDArray[np.int64]) -> NDArray[np.float64]:
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        discount = ones / (ones + 2 * twos) if ones else 0.5
        starts = _starts(known // self.vocab)
        contexts = known[starts] // self.vocab
        totals, kinds = np.add.reduceat(counts, starts), np.diff(np.append(starts, len(known)))
        at = np.minimum(np.searchsorted(contexts, query // self.vocab), len(contexts) - 1)
        has_context = contexts[at] == query // self.vocab
        place = np.minimum(np.searchsorted(known, query), len(known) - 1)
        own = np.where(known[place] == query, counts[place] - discount, 0.0)
        return np.where(has_context, (own + discount * kinds[at] * lower) / totals[at], lower)


def held_out_bits(train: NDArray[np.int64], test: NDArray[np.int64], vocab: int) -> float:
    """Mean bits of the last token of `test` windows under `KneserNey(train)`: an upper bound of the entropy.

    >>> held_out_bits(np.array([[0, 1], [1, 0]] * 50), np.array([[0, 1], [1, 0]]), 2) < 0.05
    True
    """
    return -float(np.log2(KneserNey(train, vocab).probabilities(test)).mean())
