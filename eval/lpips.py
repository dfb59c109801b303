"""LPIPS as a metric, around the one network of `vtc.tokenizers.lpips`."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vtc.errors import ImageError
from vtc.eval.metric import MeanOverImages, check_pair
from vtc.tokenizers.lpips import LPIPS, Backbone

#: the smallest side that leaves each network's last layer a pixel
MIN_SIDE = {"alex": 31, "squeeze": 17, "vgg": 16}


@torch.no_grad()
def learned_perceptual_image_patch_similarity(preds: Tensor, target: Tensor, network: LPIPS,
                                              target_features: list[Tensor] | None = None) -> Tensor:
    """LPIPS (version 0.1) of each image; lower is closer.

    preds, target: (B, 3, H, W) in [0, 1]. network: `vtc.tokenizers.lpips.LPIPS`. Returns (B,) float32.
    target_features: `network.unit_features(target)`, where one original is compared with several reconstructions.
    """
    check_pair(preds, target)
    smallest = MIN_SIDE[network.backbone]
    if preds.shape[1] != 3 or min(preds.shape[2:]) < smallest:
        raise ImageError(f"LPIPS ({network.backbone}) needs RGB pictures with sides of at least {smallest} pixels, "
                         f"not {tuple(preds.shape[1:])}.")
    if preds.dtype == torch.float64:  # the networks are float32
        preds, target = preds.float(), target.float()
    if target_features is None:
        target_features = network.unit_features(target)
    return network.distance(network.unit_features(preds), target_features)


class LearnedPerceptualImagePatchSimilarity(MeanOverImages):
    """Mean LPIPS over images.

    backbone: "alex" is what papers report as LPIPS of a reconstruction; "vgg" is common as a loss; "squeeze".
    weights: a folder or file with the backbone's convolutions; see `vtc.tokenizers.lpips.LPIPS`, which raises
        ModelError where there are none.

    >>> LearnedPerceptualImagePatchSimilarity("alex", "no/such/folder")
    Traceback (most recent call last):
    vtc.errors.ModelError: ...
    """

    is_differentiable = False
    higher_is_better = False

    def __init__(self, backbone: Backbone = "alex", weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__(data_range=1.0)
        self.network = LPIPS(backbone, weights)

    def per_image(self, preds: Tensor, target: Tensor) -> Tensor:
        """(B,)."""
        return learned_perceptual_image_patch_similarity(preds, target, self.network)
