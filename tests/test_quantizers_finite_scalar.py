"""FSQ against upstream's fixture and its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantizer_checks import assert_codes, assert_grad, fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.finite_scalar import FiniteScalarQuantizer


@needs_shared("fixtures")
def test_cosmos_levels():
    tensors, config = fixture("fsq_8_8_8_5_5_5")
    quantizer = FiniteScalarQuantizer(config["levels"], config["eps"])
    z = tensors["input"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.indices, tensors["indices"])
    assert_codes(out.z_q, tensors["quantized"])
    assert_codes(quantizer.indices_to_codes(out.indices), tensors["codes_from_indices"])
    assert_grad(torch.autograd.grad(out.z_q, z, tensors["cotangent"])[0], tensors["grad_input"])


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.sampled_from(["lsb_first", "msb_first"]), st.data())
@settings(max_examples=40, deadline=None)
def test_codes_and_indices_round_trip(levels, order, data):
    quantizer = FiniteScalarQuantizer(levels, bit_order=order)
    size = math.prod(levels)
    indices = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=10)))[None]
    codes = quantizer.indices_to_codes(indices)
    assert codes.abs().max() <= 1
    # Undo the squashing by hand: each code is the middle of its cell.
    span = (torch.tensor(levels, dtype=torch.float64) - 1) * 1.001 / 2
    offset = 0.5 * (torch.tensor(levels) % 2 == 0).double()
    digits = codes.double() * (torch.tensor(levels) // 2)[:, None]
    z = torch.atanh((digits + offset[:, None]) / span[:, None]) - torch.atanh(offset / span)[:, None]
    out = quantizer(z)
    assert torch.equal(out.indices, indices)
    assert torch.equal(out.z_q.float(), codes)


def test_the_stated_channel_counts_ones():
    one_step = torch.tensor([[0.0, 0.0], [1 / 2, 0.0], [0.0, 1.0]])  # levels 5 and 3: steps of 1/2 and of 1
    indices = torch.tensor([[7, 8, 12]])  # 7 = 2 + 5 * 1: the middle
    assert torch.equal(FiniteScalarQuantizer((5, 3)).indices_to_codes(indices)[0].T, one_step)
    assert torch.equal(FiniteScalarQuantizer((5, 3), bit_order="msb_first").indices_to_codes(
        torch.tensor([[7, 10, 8]]))[0].T, one_step)


def test_every_code_can_be_reached_and_half_precision_agrees():
    torch.manual_seed(0)
    quantizer = FiniteScalarQuantizer((4, 3))
    z = torch.randn(1, 2, 2000).mul_(3).bfloat16()
    out = quantizer.half()(z)
    assert sorted(out.indices.unique().tolist()) == list(range(12))
    assert torch.equal(out.indices, FiniteScalarQuantizer((4, 3))(z.float()).indices)
    assert out.z_q.dtype == torch.bfloat16


@pytest.mark.parametrize(("levels", "eps"), [((3, 4), 0.0), ((1001, 2), 1e-3), ((8, 5), 0.5), ((2,), 3.0)])
def test_no_eps_gives_an_index_that_has_no_word(levels, eps):
    """From levels * eps = 1 on, tanh spans further than the outermost level and half a step."""
    quantizer = FiniteScalarQuantizer(levels, eps)
    z = torch.tensor([-9.0, 0.0, 9.0]).expand(1, len(levels), 3)
    out = quantizer(z)
    assert out.indices.min() == 0
    assert out.indices.max() == math.prod(levels) - 1 if eps else out.indices.max() < math.prod(levels)
    assert out.z_q.abs().max() <= 1
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)


def test_wrong_settings_are_refused():
    for levels in ((), (5, 1), (1000,) * 8):
        with pytest.raises(ConfigError):
            FiniteScalarQuantizer(levels)
    for eps in (0, -0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="eps"):
            FiniteScalarQuantizer((2, 2), eps=eps)
    with pytest.raises(ConfigError, match="latents"):
        FiniteScalarQuantizer((5, 5))(torch.zeros(1, 3))
