"""How much of a codebook is used: a word that no picture needs is capacity that was paid for and lies idle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.eval.metric import Metric

#: words over all groups that may be counted: 512 MiB of counters
MAX_WORDS = 2**26


class CodebookUsage(NamedTuple):
    """Statistics of the words of one codebook, or the mean over the groups of several.

    usage: share of the words that occurred, 0 to 1.
    entropy_bits: -sum p log2 p of the words' frequencies. It is biased low where `tokens` is not many times the
        number of words; the Miller-Madow term (used - 1) / (2 tokens ln 2) is `entropy_bits_corrected`.
    perplexity: 2 ** entropy_bits, the number of equally likely words with that entropy.
    tokens: how many were counted in each group.
    """

    usage: float
    entropy_bits: float
    entropy_bits_corrected: float
    perplexity: float
    tokens: int


def codebook_usage(indices: Tensor, vocab: int | tuple[int, ...]) -> CodebookUsage:
    """Usage of one codebook (`vocab` words) or of G codebooks (`vocab` a tuple of G).

    indices: integers, any shape; with a tuple, the last dimension is G.

    >>> codebook_usage(torch.tensor([0, 0, 1, 1]), 4)
    CodebookUsage(usage=0.5, entropy_bits=1.0, entropy_bits_corrected=1.18033688..., perplexity=2.0, tokens=4)
    """
    return _usage(_count(indices, _as_groups(vocab)), _as_groups(vocab))


def _as_groups(vocab: int | tuple[int, ...]) -> tuple[int, ...]:
    groups = (vocab,) if isinstance(vocab, int) else tuple(vocab)
    if not groups or min(groups) < 1 or sum(groups) > MAX_WORDS:
        raise ConfigError(f"Codebooks of 1 to {MAX_WORDS} words in all can be counted, not {vocab}.")
    return groups


def _count(indices: Tensor, vocab: tuple[int, ...]) -> Tensor:
    """Occurrences of every word, group after group; (sum of vocab,) int64."""
    if indices.is_floating_point() or indices.is_complex():
        raise ConfigError(f"Token indices are integers, not {indices.dtype}.")
    if len(vocab) > 1 and (not indices.ndim or indices.shape[-1] != len(vocab)):
        raise ConfigError(f"The last dimension of {tuple(indices.shape)} is not the {len(vocab)} groups.")
    flat = indices.reshape(-1, len(vocab)).long()
    sizes = torch.tensor(vocab, device=flat.device)
    if flat.numel() and bool(((flat < 0) | (flat >= sizes)).any()):
        raise ConfigError(f"Token indices from {int(flat.min())} to {int(flat.max())} do not fit codebooks of {vocab}.")
    return torch.bincount((flat + sizes.cumsum(0) - sizes).reshape(-1), minlength=sum(vocab))


def _usage(counts: Tensor, vocab: tuple[int, ...]) -> CodebookUsage:
    tokens = int(counts[: vocab[0]].sum())
    if tokens == 0:
        raise ConfigError("No tokens were counted.")
    per_group = []
    for group in counts.split(list(vocab)):
        p = group[group > 0].double() / tokens
        entropy = float(-(p * p.log2()).sum())
        correction = (len(p) - 1) / (2 * tokens * torch.log(torch.tensor(2.0, dtype=torch.float64)))
        per_group.append((len(p) / len(group), entropy, entropy + float(correction), 2**entropy))
    usage, entropy, corrected, perplexity = torch.tensor(per_group, dtype=torch.float64).mean(0).tolist()
    return CodebookUsage(usage, entropy, corrected, perplexity, tokens)


class CodebookUsageMetric(Metric):
    """`codebook_usage` over a data set; the state is the count of each word, whatever the number of images.

    >>> metric = CodebookUsageMetric(4)
    >>> metric.update(torch.tensor([[0, 0]]))
    >>> metric.update(torch.tensor([[1, 1]]))
    >>> metric.compute().perplexity
    2.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, vocab: int | tuple[int, ...]) -> None:
        super().__init__()
        self.vocab = _as_groups(vocab)
        self.add_state("counts", torch.zeros(sum(self.vocab), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Add integers of any shape; with several groups, the last dimension is the group."""
        self.counts += _count(indices.to(self.counts.device), self.vocab)

    def compute(self) -> CodebookUsage:
        """Means over the groups; ConfigError before the first token."""
        return _usage(self.counts, self.vocab)
