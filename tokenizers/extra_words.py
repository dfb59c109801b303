"""Codewords beside a tokenizer's own: how a decoder is given vectors that are no words of the codebook.

Everything between a stream and its picture speaks in indices: layouts, tiles, stages. A vector that was guessed for a
lost token, say, then needs no way of its own: it becomes one more word, and its token the index of that word.
"""

from __future__ import annotations

from copy import copy
from typing import TypeVar

import torch
from torch import Tensor

from vtc.errors import ConfigError
from vtc.tokenizers.codebook_clustering import AnyTokenizer
from vtc.tokenizers.vector_quantizer import NearestCodeword

Module = TypeVar("Module", bound=torch.nn.Module)


def takes_extra_words(model: torch.nn.Module) -> bool:
    """Whether `with_extra_words` knows this tokenizer's kind of codebook."""
    return isinstance(getattr(model, "quantizer", None), NearestCodeword)


def with_extra_words(model: AnyTokenizer, words: Tensor) -> AnyTokenizer:
    """`model` with words (N, d) behind its own K, as the indices K ... K + N - 1, for decoding.

    All else is shared with `model`, which stays as it is. Where codewords live on the unit sphere, the new ones are
    projected on it, too. ConfigError for a model whose words are not vectors of one codebook.
    """
    if not takes_extra_words(model):
        raise ConfigError(f"{type(model).__name__} has no codebook to which words could be added.")
    own: NearestCodeword = model.quantizer  # type: ignore[assignment]  # `takes_extra_words` has looked
    if words.ndim != 2 or words.shape[1] != own.dim:
        raise ConfigError(f"The words must be (N, {own.dim}), not {tuple(words.shape)}.")
    quantizer, extended = _shallow(own), _shallow(model)
    codebook = torch.cat([own.codebook.detach(), words.to(own.codebook)])
    quantizer._parameters.pop("codebook", None)  # of `GradientVectorQuantizer`
    quantizer._buffers["codebook"] = codebook
    quantizer.codebook_size = len(codebook)
    extended._modules["quantizer"] = quantizer
    return extended


def _shallow(module: Module) -> Module:
    """A copy with dictionaries of its own and the same tensors and sub-modules in them."""
    copied = copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(copied, name, dict(getattr(module, name)))
    return copied
