"""Product and residual quantizers, and the statistics of codebooks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.errors import ConfigError
from vtc.tokenizers.base import TokenLayout, Tokens
from vtc.tokenizers.binary_spherical import BinarySphericalQuantizer
from vtc.tokenizers.codebook_stats import CodebookStatistics
from vtc.tokenizers.finite_scalar import FiniteScalarQuantizer
from vtc.tokenizers.index_backprop import IndexBackpropQuantizer
from vtc.tokenizers.lookup_free import LFQ, GroupLFQ
from vtc.tokenizers.multi_scale_binary import MultiScaleBinaryQuantizer
from vtc.tokenizers.product_quantizer import ProductQuantizer
from vtc.tokenizers.residual_quantizer import ResidualQuantizer
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer, VectorQuantizer


@given(st.lists(st.sampled_from(["ema", "gradient", "fsq", "ibq"]), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_product_is_its_members_side_by_side(kinds, seed):
    torch.manual_seed(seed)
    make: dict[str, Any] = {"ema": lambda: VectorQuantizer(9, 3), "gradient": lambda: GradientVectorQuantizer(7, 2),
            "fsq": lambda: FiniteScalarQuantizer((5, 3)), "ibq": lambda: IndexBackpropQuantizer(6, 4)}
    members = [make[k]() for k in kinds]
    quantizer = ProductQuantizer(members).eval()
    assert quantizer.vocab == tuple({"ema": 9, "gradient": 7, "fsq": 15, "ibq": 6}[k] for k in kinds)
    z = torch.randn(2, quantizer.dim, 3, 4)
    out = quantizer(z)
    assert out.indices.shape == (2, 3, 4, len(kinds))
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    start = 0
    for g, member in enumerate(members):
        alone = member(z[:, start : start + member.dim])
        assert torch.equal(out.indices[..., g], alone.indices)
        assert torch.equal(out.z_q[:, start : start + member.dim], alone.z_q)
        start += member.dim


def test_product_trains_and_starts_from_latents():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(VectorQuantizer(4, 2) for _ in range(3))
    points = torch.randn(4, 6)
    quantizer.start_from(points.repeat(10, 1), torch.Generator().manual_seed(0))
    z = points[:, :, None].clone().requires_grad_()
    out = quantizer(z)
    assert torch.autograd.grad(out.z_q.sum(), z, retain_graph=True)[0].unique().tolist() == [1.0]
    expected = 2 * 0.25 / 3 * (z - out.z_q).detach() / 8  # the mean of three means over eight numbers
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], expected)


@given(st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_residual_stages_code_what_is_left(stages, seed):
    torch.manual_seed(seed)
    quantizer = ResidualQuantizer(VectorQuantizer(8, 3) for _ in range(stages)).eval()
    z = torch.randn(2, 3, 5)
    out = quantizer(z)
    assert out.indices.shape == (2, 5, stages)
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    rest = z
    for s, member in enumerate(quantizer.members):
        part = member(rest)
        assert torch.equal(part.indices, out.indices[..., s])
        rest = rest - part.z_q
        prefix = quantizer(z, stages=s + 1)
        torch.testing.assert_close(prefix.z_q, z - rest)
        assert torch.equal(quantizer.indices_to_codes(out.indices[..., : s + 1]), prefix.z_q)


def test_residual_error_falls_with_every_stage():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2000, 4, generator=generator)
    quantizer = ResidualQuantizer(VectorQuantizer(16, 4) for _ in range(4))
    quantizer.start_from(latents, generator)
    assert quantizer.training
    quantizer.eval()
    errors = [(quantizer(latents, stages=s).z_q - latents).square().mean().item() for s in range(1, 5)]
    assert errors[0] < 0.5
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors))


def test_residual_gradient_is_straight_through():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(GradientVectorQuantizer(8, 3) for _ in range(3))
    z, cotangent = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    out = quantizer(z)
    assert torch.equal(torch.autograd.grad(out.z_q, z, cotangent, retain_graph=True)[0], cotangent)
    out.loss.backward()
    for member in quantizer.members:
        assert member.codebook.grad.abs().max() > 0


def test_wrong_members_are_refused():
    for kind in (ProductQuantizer, ResidualQuantizer):
        with pytest.raises(ConfigError):
            kind([])
        for member in (torch.nn.Linear(2, 2), MultiScaleBinaryQuantizer(2, (1, 2))):
            with pytest.raises(ConfigError, match="members"):
                kind([member])
    with pytest.raises(ConfigError):
        ResidualQuantizer([VectorQuantizer(4, 2), VectorQuantizer(4, 3)])
    with pytest.raises(ConfigError, match="latents"):
        ProductQuantizer([VectorQuantizer(4, 2)])(torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="stages"):
        ResidualQuantizer([VectorQuantizer(4, 2)])(torch.zeros(1, 2), stages=2)


def test_members_of_several_indices_take_as_many_columns():
    torch.manual_seed(0)
    members = [GroupLFQ(2, 3), VectorQuantizer(7, 2), BinarySphericalQuantizer(4, 2, token_bits=(1, 3)),
               ProductQuantizer([LFQ(2), FiniteScalarQuantizer((3, 4))])]
    quantizer = ProductQuantizer(members).eval()
    assert quantizer.dim == 16 and quantizer.vocab == (8, 8, 7, 2, 8, 4, 12)
    z = torch.randn(2, 16, 3)
    out = quantizer(z)
    assert out.indices.shape == (2, 3, 7)
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    parts = [m(part) for m, part in zip(members, z.split((6, 2, 4, 4), 1), strict=True)]
    assert torch.equal(out.indices[..., :2], parts[0].indices)
    assert torch.equal(out.indices[..., 2], parts[1].indices)
    assert torch.equal(out.indices[..., 3:5], parts[2].indices)
    assert torch.equal(out.indices[..., 5:], parts[3].indices)
    assert torch.equal(out.z_q, torch.cat([part.z_q for part in parts], 1))


def test_residual_stages_of_signs_after_words():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer([BinarySphericalQuantizer(6, 3), VectorQuantizer(9, 6), GroupLFQ(3, 2)]).eval()
    assert quantizer.vocab == (8, 8, 9, 4, 4, 4)
    z = torch.randn(2, 6, 5)
    out = quantizer(z)
    signs = torch.where(z > 0, 1.0, -1.0) / 6**0.5
    words = quantizer.members[1](z - signs).z_q
    rest = z - signs - words
    torch.testing.assert_close(out.z_q, signs + words + torch.where(rest > 0, 1.0, -1.0))
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    torch.testing.assert_close(quantizer.indices_to_codes(out.indices[..., :3]), signs + words)
    for count in (0, 1, 4, 7):  # no stage ends there
        with pytest.raises(ConfigError, match="first stages"):
            quantizer.indices_to_codes(torch.zeros(2, 5, count, dtype=torch.long))


def test_members_without_a_codebook_have_nothing_to_start():
    quantizer = ProductQuantizer([LFQ(2), VectorQuantizer(1, 2)])
    points = torch.randn(30, 4)
    quantizer.start_from(points)
    torch.testing.assert_close(quantizer.members[1].codebook, points[:, 2:].mean(0, keepdim=True))


def test_statistics_per_group_by_hand():
    statistics = CodebookStatistics((4, 8))
    statistics.update(torch.tensor([[[0, 5], [0, 5], [1, 5], [1, 5]]]))
    assert statistics.usage().tolist() == [0.5, 0.125]
    assert statistics.entropy_bits().tolist() == [1.0, 0.0]
    assert statistics.perplexity().tolist() == [2.0, 1.0]
    statistics.update(torch.tensor([[2, 0], [3, 1]]))
    assert statistics.counts[0].tolist() == [2, 2, 1, 1]
    statistics.reset()
    assert statistics.usage().tolist() == [0.0, 0.0]
    assert statistics.perplexity().tolist() == [1.0, 1.0]


def test_statistics_of_every_form_of_indices_agree():
    torch.manual_seed(0)
    quantizer = GroupLFQ(3, 4).eval()
    indices = quantizer(torch.randn(2, 12, 5, 6)).indices
    batch, tokens = CodebookStatistics(quantizer.vocab), CodebookStatistics(quantizer.vocab)
    batch.update(indices)
    tokens.update(Tokens(indices.flatten(1, 2), TokenLayout(((5, 6),), quantizer.vocab), 80, 96))
    assert torch.equal(batch.entropy_bits(), tokens.entropy_bits())
    assert (batch.perplexity() > 8).all()

    single = VectorQuantizer(7, 2).eval()
    one, two = CodebookStatistics(single.vocab), CodebookStatistics(single.vocab)
    indices = single(torch.randn(2, 2, 5, 6)).indices
    one.update(indices)
    two.update(indices[..., None])
    assert torch.equal(one.counts[0], two.counts[0])
    assert one.counts[0].sum() == 60


def test_statistics_refuse_what_they_cannot_count():
    for vocab in ((), (0,), (2**40,)):
        with pytest.raises(ConfigError):
            CodebookStatistics(vocab)
    with pytest.raises(ConfigError, match="outside"):
        CodebookStatistics((4,)).update(torch.tensor([[4]]))
    with pytest.raises(ConfigError, match="groups"):
        CodebookStatistics((4, 4)).update(torch.zeros(2, 3, dtype=torch.long))
