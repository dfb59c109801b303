"""A perceptual loss that is hard to cheat.

A decoder trained on plain LPIPS learns that network's blind spots: it lays a lattice at its own strides that the
network's fixed grid of convolutions does not see. So both pictures are seen through a random window first - scaled,
shifted by a fraction of a pixel, mirrored, turned by a quarter - and what survives all of them is what a person sees.
The idea is that of E-LPIPS (Kettunen et al., 1906.03973).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.tokenizers.lpips import LPIPS


class RandomView(nn.Module):
    """The same random affine view of several batches of images."""

    def __init__(self, min_scale: float = 0.7, max_scale: float = 1.35) -> None:
        super().__init__()
        self.min_scale, self.max_scale = min_scale, max_scale

    def forward(self, *batches: Tensor) -> list[Tensor]:
        """(B, 3, S, S) each; the view is square, of a random side that keeps the content's scale."""
        side = batches[0].shape[-1]
        scale = float(torch.empty(()).uniform_(self.min_scale, self.max_scale))
        shift = torch.rand(2).mul(2).sub(1) * (2 / side) * 2  # up to two pixels either way
        flip = -1.0 if torch.rand(()) < 0.5 else 1.0
        matrix = torch.tensor([[flip, 0.0, shift[0]], [0.0, 1.0, shift[1]]])
        if torch.rand(()) < 0.5:
            matrix = matrix[[1, 0]]
        out = max(16, round(side * scale))
        grid = F.affine_grid(matrix.to(batches[0])[None], [1, 3, out, out], align_corners=False)
        views = []
        for batch in batches:
            if scale < 1:  # bilinear sampling aliases when it shrinks: low-pass first
                batch = F.interpolate(batch, size=(out, out), mode="bilinear", antialias=True, align_corners=False)
            views.append(F.grid_sample(batch, grid.expand(len(batch), -1, -1, -1), mode="bilinear",
                                       padding_mode="reflection", align_corners=False))
        return views


class PerceptualLoss(nn.Module):
    """LPIPS of a random view of both pictures; mean over the batch."""

    def __init__(self, lpips: LPIPS, view: RandomView | None = None) -> None:
        super().__init__()
        self.lpips, self.view = lpips, view or RandomView()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        images, reconstructions = self.view(images.float(), reconstructions.float())
        with torch.no_grad():
            target = self.lpips.unit_features(images)
        return self.lpips.distance(self.lpips.unit_features(reconstructions), target).mean()
