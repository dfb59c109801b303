"""EQ-VAE's transforms against the published ones."""

import pytest
import torch

from tests.fixtures import Fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.equivariance import draw_transform, scale_and_turn


@needs_shared("fixtures")
def test_transforms_equal_upstream():
    fixture = Fixture("scvae/eqvae_transforms")
    for name, scale, turns, shape in fixture.facts["cases"]:
        found = scale_and_turn(fixture[name], scale, turns)
        assert list(found.shape) == shape
        torch.testing.assert_close(found, fixture[f"{name}.s{round(32 * scale)}.k{turns}"], rtol=0, atol=1e-6)


def test_half_a_size_is_the_mean_of_two_by_two_and_a_turn_is_clockwise():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert scale_and_turn(x, 0.5, 0)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert scale_and_turn(x, 0.5, 1)[0, 0].tolist() == [[10.5, 2.5], [12.5, 4.5]]


def test_every_published_transform_is_drawn_and_no_other():
    generator = torch.Generator().manual_seed(0)
    drawn = {draw_transform(generator) for _ in range(2000)}
    assert drawn == {(j / 32, k) for j in range(8, 32) for k in (1, 2, 3)}
    assert draw_transform(generator.manual_seed(1)) == draw_transform(generator.manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 3, 33, 32), (3, 32, 32), (1, 3, 1, 1)])
def test_sides_that_do_not_come_out_whole_are_refused(shape):
    with pytest.raises(ConfigError, match="whole"):
        scale_and_turn(torch.zeros(shape), 0.5, 1)
