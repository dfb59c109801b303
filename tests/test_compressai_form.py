"""TokenCodec as CompressAI's evaluation sees a model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.tiny_codecs import with_prior
from tests.tiny_tokenizers import TINY_TOKENIZERS, TinyGrid
from vtc.codecs import container
from vtc.codecs.compressai_form import CompressAIForm
from vtc.codecs.prior import TokenPrior
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError


@pytest.mark.parametrize("name", TINY_TOKENIZERS)
def test_the_loop_of_compressai(name):
    """As `compressai.utils.eval_model` does it: compress, decompress, count the strings' bytes."""
    codec = TokenCodec(TINY_TOKENIZERS[name]())
    model = CompressAIForm(codec)
    x = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    out = model.compress(x)
    decoded = model.decompress(out["strings"], out["shape"])
    bits = sum(len(s) for strings in out["strings"] for s in strings) * 8
    assert decoded["x_hat"].shape == x.shape and bits == 8 * sum(map(len, codec.compress(x)))
    assert torch.equal(decoded["x_hat"], model(x)["x_hat"])
    assert torch.equal(decoded["x_hat"], codec.tokenizer.decode(codec.tokenizer.encode(x)))


def test_likelihoods_are_the_tables():
    for name in ("grid", "groups", "scales"):
        codec = TokenCodec(TINY_TOKENIZERS[name]())
        assert codec.tables is not None
        x = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
        likelihoods = CompressAIForm(codec).forward(x)["likelihoods"]
        assert isinstance(likelihoods, dict)
        tokens = codec.tokenizer.encode(x)
        expected = codec.tables.ideal_bits(tokens.indices[0].numpy(), tokens.layout)
        assert -likelihoods["y"].log2().sum().item() == pytest.approx(expected, rel=1e-12)
    likelihoods = CompressAIForm(TokenCodec(TINY_TOKENIZERS["sequence"]())).forward(x)["likelihoods"]
    assert isinstance(likelihoods, dict)
    assert -likelihoods["y"].log2().sum().item() == pytest.approx(24 * math.log2(37), rel=1e-12)


def test_estimated_bits_are_those_of_the_payload():
    """1536 likely tokens: estimate and payload agree within one per cent."""
    codec = TokenCodec(TinyGrid())
    assert codec.tables is not None
    row = codec.tables.frequencies[0]
    words = np.random.default_rng(0).choice(64, (32, 48), p=row / row.sum())
    x = codec.tokenizer.get_buffer("codebook")[words].permute(2, 0, 1)[None]
    x = x.repeat_interleave(16, -1).repeat_interleave(16, -2)
    model = CompressAIForm(codec)
    likelihoods = model.forward(x)["likelihoods"]
    assert isinstance(likelihoods, dict)
    true = 8 * (len(model.compress(x)["strings"][0][0]) - 24)
    assert true == pytest.approx(-likelihoods["y"].log2().sum().item(), rel=0.01)


def test_estimated_bits_are_those_of_the_learned_prior_where_it_is_used():
    """1536 tokens drawn from the prior's own frequencies: estimate and payload agree within one per cent."""
    codec = with_prior()
    assert isinstance(codec.prior, TokenPrior) and codec.tables is not None
    rng, grid = np.random.default_rng(0), (32, 48)
    words = np.zeros(grid[0] * grid[1], dtype=np.int64)
    for frequencies, positions in codec.prior._parts(words, grid, 64):
        words[positions] = [frequencies.find(n, int(rng.integers(2**24)))[0] for n in range(len(positions))]
    x = codec.tokenizer.get_buffer("codebook")[words.reshape(grid)].permute(2, 0, 1)[None]
    x = x.repeat_interleave(16, -1).repeat_interleave(16, -2)
    model = CompressAIForm(codec)
    (stream,) = model.compress(x)["strings"][0]
    parsed = container.parse(stream)
    likelihoods = model.forward(x)["likelihoods"]
    assert isinstance(likelihoods, dict)
    estimated = -likelihoods["y"].log2().sum().item()
    assert parsed.coder == container.Coder.PRIOR
    assert 8 * len(parsed.payload) == pytest.approx(estimated, rel=0.01)
    layout = codec.tokenizer.layout(*x.shape[-2:])
    assert estimated < 0.98 * codec.tables.ideal_bits(words[:, None], layout)


def test_another_shape_is_refused():
    model = CompressAIForm(TokenCodec(TinyGrid()))
    out = model.compress(torch.zeros(1, 3, 32, 32))
    with pytest.raises(BitstreamError, match="grid of"):
        model.decompress(out["strings"], (3, 2))
