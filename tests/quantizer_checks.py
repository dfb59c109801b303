"""What the quantizer tests share: fixtures, tolerances, and finite differences for straight-through losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fixtures import Fixture


def fixture(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (half ones made float) and configuration of shared/fixtures/NAME."""
    read = Fixture(name)
    return {k: v.float() if v.is_floating_point() else v for k, v in read.tensors.items()}, read.config


def assert_loss(actual: Tensor, expected: Tensor) -> None:
    """The fixtures' tolerance for losses."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def assert_grad(actual: Tensor | None, expected: Tensor) -> None:
    """The fixtures' tolerance for gradients."""
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def assert_codes(actual: Tensor, expected: Tensor) -> None:
    """The fixtures' tolerance for quantized latents."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
