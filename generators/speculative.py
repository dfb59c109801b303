"""Speculative decoding of raster models: a small model proposes several tokens, the large one judges them at once.

Leviathan et al. (2211.17192). With p the target's and q the draft's distribution of a token, a proposed x is accepted
with probability min(1, p(x) / q(x)); at the first refusal a token is drawn from max(0, p - q), scaled to 1, and the
later proposals are forgotten. What comes out has exactly the target's distribution, after guidance and sampling rules:
only the time depends on the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.llamagen import PUBLISHED_GUIDANCE, PUBLISHED_SAMPLING, LlamaGen
from vtc.generators.sampling import Guidance, Sampling
from vtc.tokenizers.base import Tokenizer, Tokens


@dataclass(frozen=True)
class SpeculativeResult:
    """tokens, images: of one image, as `LlamaGen.generate` gives them. passes: of the target.

    accepted: proposals that the target kept; proposed: all of them.
    """

    tokens: Tokens
    images: Tensor
    passes: int
    accepted: int
    proposed: int

    @property
    def tokens_per_pass(self) -> float:
        """Tokens for each pass of the target; plain decoding has 1."""
        return self.tokens.layout.length / self.passes


class _Model:
    """A model, its cache, and the words it has been given: the distribution of the next token after any of them."""

    def __init__(self, model: LlamaGen, label: Tensor, sampling: Sampling, guidance: Guidance) -> None:
        self.model, self.sampling, self.guidance = model, sampling, guidance
        self.labels = torch.cat([label, torch.full_like(label, model.classes)]) if guidance.active else label
        self.cache, self.positions, self.read = KVCache(model.schedule()), model.positions(), 0

    def distributions(self, words: list[int], count: int) -> Tensor:
        """(count, V): of the token after words[:-count + 1], ..., after all the words."""
        x = self.model.class_embedding(self.labels)[:, None]
        if words:
            new = torch.tensor(words, device=x.device).expand(len(self.labels), -1)
            x = torch.cat([x, self.model.word(new)], 1)
        logits = self.model.extend(x[:, self.read :], self.cache, self.read, self.positions)
        self.read = x.shape[1]
        first = len(words) - count + 1  # the number of the first token asked for, which guidance may depend on
        guided = [self.guidance(logits[:, i - count], first + i, self.model.tokens)[0] for i in range(count)]
        return self.sampling.probabilities(torch.stack(guided))

    def forget(self, words: int) -> None:
        """Keep what was read up to the first `words` words."""
        self.read = min(self.read, words + 1)
        self.cache.truncate(self.read)


@torch.no_grad()
def generate_speculatively(target: LlamaGen, draft: LlamaGen, label: int, tokenizer: Tokenizer, ahead: int = 4,
                           sampling: Sampling = PUBLISHED_SAMPLING, guidance: Guidance = PUBLISHED_GUIDANCE,
                           generator: torch.Generator | None = None) -> SpeculativeResult:
    """One image of the target's distribution. ahead: tokens that the draft proposes at a time.

    Raises ConfigError where the two models do not draw the same tokens.
    """
    layout = target.check_tokenizer(tokenizer)
    if (draft.codebook_size, draft.side, draft.classes) != (target.codebook_size, target.side, target.classes):
        raise ConfigError("Draft and target must draw the same grid of the same words for the same classes.")
    if ahead < 1:
        raise ConfigError(f"The draft proposes at least one token at a time, not {ahead}.")
    labels = torch.tensor([label], device=target.head.weight.device)
    target.check_labels(labels)
    guidance.check_at_logits()
    large, small = (_Model(model, labels, sampling, guidance) for model in (target, draft))
    words: list[int] = []
    passes = accepted = proposed = 0
    while len(words) < target.tokens:
        proposals, guesses = list[int](), list[Tensor]()
        for _ in range(min(ahead, target.tokens - len(words) - 1)):
            q = small.distributions(words + proposals, 1)[0]
            guesses.append(q)
            proposals.append(_draw(q, generator))
        p = large.distributions(words + proposals, len(proposals) + 1)
        passes, proposed = passes + 1, proposed + len(proposals)
        kept, word = judge(proposals, guesses, p, generator)
        accepted += kept
        words += [*proposals[:kept], word]
        large.forget(len(words) - 1)
        small.forget(len(words) - 1)
    side = target.side * tokenizer.downsample
    tokens = Tokens(torch.tensor(words, device=labels.device)[None, :, None], layout, side, side)
    return SpeculativeResult(tokens, tokenizer.decode(tokens), passes, accepted, proposed)


def judge(proposals: Sequence[int], guesses: Sequence[Tensor], p: Tensor,
          generator: torch.Generator | None = None) -> tuple[int, int]:
    """How many of the proposals stay, and the word after them: together a draw from the target, whatever the draft.

    proposals: words, each drawn from one of `guesses`, (V,). p: (len(proposals) + 1, V) the target's distributions of
    these words and of the next one.
    """
    for kept, (x, q) in enumerate(zip(proposals, guesses, strict=True)):
        if torch.rand((), generator=generator, device=q.device) * q[x] < p[kept, x]:
            continue
        rest = (p[kept] - q).clamp(min=0)
        # Distributions that differ by rounding alone may refuse a word and leave nothing to draw from.
        return kept, _draw(rest if rest.sum() > 0 else p[kept], generator)
    return len(proposals), _draw(p[-1], generator)


def _draw(p: Tensor, generator: torch.Generator | None) -> int:
    """A number at its share of (V,) weights, which need not sum to 1."""
    return int(torch.multinomial(p, 1, generator=generator))
