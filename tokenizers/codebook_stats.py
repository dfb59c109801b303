"""How much of a codebook is used: usage, entropy and perplexity, per group; a collapse shows here first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.base import Tokens
from vtc.tokenizers.ranks import sum_over_ranks

#: counts of 2^26 words take 512 MiB
MAX_WORDS = 1 << 26


class CodebookStatistics:
    """Counts indices, each group for itself: one histogram for all groups would hide a dead one.

        statistics = CodebookStatistics(quantizer.vocab)
        statistics.update(quantizer(z).indices)
        statistics.perplexity()     # (G,)

    vocab: words of each group.
    counts: one (vocab[g],) int64 tensor a group, on the CPU.
    """

    def __init__(self, vocab: Sequence[int]) -> None:
        if not vocab or min(vocab) < 1:
            raise ConfigError(f"Statistics need vocabularies of at least one word, not {tuple(vocab)}.")
        if sum(vocab) > MAX_WORDS:
            raise ConfigError(f"Counting {sum(vocab)} words takes too much memory: cut the index into smaller tokens.")
        self.vocab = tuple(vocab)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.counts = [torch.zeros(v, dtype=torch.int64) for v in self.vocab]

    def update(self, indices: Tensor | Tokens) -> None:
        """Count a batch: Tokens, (B, ..., G) indices, or (B, ...) indices of a quantizer of one group."""
        if isinstance(indices, Tokens):
            indices = indices.indices
        groups = len(self.vocab)
        columns = indices.reshape(-1, groups) if groups > 1 or indices.shape[-1:] == (1,) else indices.reshape(-1, 1)
        if groups > 1 and indices.shape[-1] != groups:
            raise ConfigError(f"These statistics count {groups} groups; the indices have shape {tuple(indices.shape)}.")
        for count, column in zip(self.counts, columns.cpu().unbind(1), strict=True):
            if len(column) and (int(column.min()) < 0 or int(column.max()) >= len(count)):
                raise ConfigError(f"An index lies outside 0 ... {len(count) - 1}.")
            count += torch.bincount(column, minlength=len(count))

    def reduce_across_ranks(self, device: torch.device | str = "cpu") -> None:
        """Add up the counts of all processes; `device` is where the process group works. Once, before reading."""
        self.counts = [sum_over_ranks(count.to(device)).cpu() for count in self.counts]

    def usage(self) -> Tensor:
        """(G,) share of the words that occurred at least once."""
        return torch.stack([(count > 0).double().mean() for count in self.counts])

    def entropy_bits(self) -> Tensor:
        """(G,) entropy of the indices in bits: what an ideal static entropy coder spends on each."""
        shares = [count.double() / count.sum().clamp(min=1) for count in self.counts]
        return torch.stack([-torch.xlogy(p, p).sum() for p in shares]) / torch.tensor(2.0, dtype=torch.double).log()

    def perplexity(self) -> Tensor:
        """(G,) 2^entropy: the number of equally likely words that are as uncertain."""
        return 2 ** self.entropy_bits()
