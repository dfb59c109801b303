"""LPIPS, the one implementation: training losses use it here and `vtc.eval` wraps it as a metric.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (1801.03924), version 0.1:
features of a frozen ImageNet network, unit length over channels, squared difference, a learned weight a channel,
mean over space, sum over layers. No torchvision: the three backbones are written out under torchvision's key names.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError, ModelError

Backbone = Literal["alex", "squeeze", "vgg"]

#: file that holds a backbone's features in a weights folder, and where torchvision publishes the same tensors
WEIGHT_FILES = {"alex": "alexnet_features.safetensors", "squeeze": "squeezenet1_1_features.safetensors",
                "vgg": "vgg16_features.safetensors"}


class Fire(nn.Module):
    """SqueezeNet's module: 1x1 to few channels, then 1x1 and 3x3 side by side."""

    def __init__(self, width: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def _alex() -> tuple[nn.Sequential, tuple[int, ...], tuple[int, ...]]:
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU())
    return layers, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)


def _squeeze() -> tuple[nn.Sequential, tuple[int, ...], tuple[int, ...]]:
    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers = nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool(), Fire(128, 32, 128),
        Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256))
    return layers, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)


def _vgg() -> tuple[nn.Sequential, tuple[int, ...], tuple[int, ...]]:
    layers: list[nn.Module] = []
    taps, width = [], 3
    for stage, (out, convs) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if stage:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(convs):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(taps), (64, 128, 256, 512, 512)


BACKBONES = {"alex": _alex, "squeeze": _squeeze, "vgg": _vgg}


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity; frozen, in eval mode, differentiable in both images.

    backbone: "alex" (for judging), "squeeze" or "vgg".
    weights: a folder or file with the backbone's convolutions under torchvision's names (`features.N.weight`),
        by default the folder in VTC_LPIPS_WEIGHTS, else the one torchvision keeps its downloads in.

    Raises ModelError where the weights are not found: LPIPS with random weights is not LPIPS.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone = "alex", weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ConfigError(f"LPIPS has the backbones {', '.join(BACKBONES)}, not {backbone!r}.")
        self.backbone = backbone
        self.features, self.taps, widths = BACKBONES[backbone]()
        try:
            self.features.load_state_dict(_backbone_weights(backbone, weights))
        except ModelError:
            raise
        except Exception as error:  # a damaged file and other tensors raise whatever they hit
            raise ModelError(f"The weights for LPIPS are not the features of {backbone!r}: "
                             f"{' '.join(str(error).split())[:200]}.") from error
        self.heads = nn.ParameterList(_linear_heads(backbone, widths))
        # ImageNet normalisation as LPIPS applies it to images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of images (B, 3, H, W) in [0, 1]; (B,)."""
        return self.distance(self.unit_features(a), self.unit_features(b))

    def unit_features(self, images: Tensor) -> list[Tensor]:
        """The tapped layers' activations, of unit length over channels; each (B, C, h, w)."""
        x = (images * 2 - 1 - self.shift) / self.scale
        if x.device.type == "cpu":  # where torch pools channels that lie side by side twelve times as fast
            x = x.contiguous(memory_format=torch.channels_last)
        tapped = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                tapped.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return tapped

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Distance from two lists of `unit_features`; (B,). Lets a fixed image's features be computed once."""
        return torch.stack([((x - y).pow(2) * head).sum(1).mean((1, 2))
                            for x, y, head in zip(a, b, self.heads, strict=True)]).sum(0)


def _backbone_weights(backbone: str, weights: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    name = WEIGHT_FILES[backbone]
    places = [Path(weights)] if weights else [Path(os.environ[v]) for v in ("VTC_LPIPS_WEIGHTS",) if v in os.environ]
    for place in places:
        path = place / name if place.is_dir() else place
        if path.is_file():
            tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            return {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
    if weights:  # other weights than the ones asked for would be a silent mistake
        raise ModelError(f"LPIPS needs the ImageNet features of {backbone!r}: {weights} does not hold {name}.")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    stem = {"alex": "alexnet-owt", "squeeze": "squeezenet1_1", "vgg": "vgg16-"}[backbone]
    for path in sorted(hub.glob(f"{stem}*.pth")):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
    raise ModelError(f"LPIPS needs the ImageNet features of {backbone!r}: set VTC_LPIPS_WEIGHTS to a folder that "
                     f"holds {name}, or run torchvision's download once ({stem}*.pth in {hub}).")


def _linear_heads(backbone: str, widths: tuple[int, ...]) -> list[nn.Parameter]:
    """The published weight of each channel (version 0.1), which the `lpips` package carries; (1, C, 1, 1) each."""
    spec = importlib.util.find_spec("lpips")  # found, not imported: importing it needs torchvision
    if spec is None or spec.origin is None:
        raise ModelError("LPIPS takes its linear heads from the package 'lpips': pip install lpips.")
    path = Path(spec.origin).parent / "weights" / "v0.1" / f"{backbone}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    heads = [nn.Parameter(state[f"lin{i}.model.1.weight"]) for i in range(len(widths))]
    if [h.shape[1] for h in heads] != list(widths):
        raise ModelError(f"{path} does not hold the heads of {backbone!r}.")
    return heads
