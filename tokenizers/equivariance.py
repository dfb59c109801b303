"""EQ-VAE's transforms: latents and images made smaller and turned alike. Kouzelis et al., 2502.09509.

An autoencoder whose latents are to scale and turn as its images do trains, in half of its steps, on the usual loss of

    decode(tau(encode(x)))  against  tau(x),        tau = scale_and_turn(., *draw_transform())

The distance of tau(encode(x)) from encode(tau(x)) is a measure only (`vtc.eval`): as a loss it collapses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError


def scale_and_turn(x: Tensor, scale: float, turns: int) -> Tensor:
    """(B, C, H, W) to `scale` times its size, bilinear without antialiasing as published, and quarter turns clockwise.

    ConfigError where a side does not come out whole: latents and images would not fit each other any more.
    """
    sides = [side * scale for side in x.shape[2:]]
    if x.ndim != 4 or any(side < 1 or side != int(side) for side in sides):
        raise ConfigError(f"A map of shape {tuple(x.shape)} cannot be scaled by {scale} to whole sides.")
    smaller = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    return smaller.rot90(turns, (-1, -2))


def draw_transform(generator: torch.Generator | None = None) -> tuple[float, int]:
    """A scale of 8/32, 9/32, ..., 31/32 and 1, 2 or 3 quarter turns, equally likely."""
    scale = torch.randint(8, 32, (), generator=generator).item() / 32
    return scale, int(torch.randint(1, 4, (), generator=generator))
