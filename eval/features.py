"""Named feature networks for Frechet distance, KID and precision/recall.

`Inception` is the network of FID; its weights are a download, so they come by path or the metric refuses. The pools of
AlexNet and SqueezeNet work wherever LPIPS does; distances over them are FD-<name>, never FID.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError, ImageError, ModelError
from vtc.eval.provenance import sha256
from vtc.tokenizers.lpips import LPIPS, Backbone

#: the weights of FID in PyTorch: the file's name ends in the first digits of its SHA-256
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")


class PooledFeatures(nn.Module):
    """Mean over space of the last convolution layer of AlexNet (256) or SqueezeNet 1.1 (512), at the image's own size.

    weights: as of `vtc.tokenizers.lpips.LPIPS`; raises ModelError where they are not found.
    """

    def __init__(self, backbone: Literal["alex", "squeeze"] = "alex",
                 weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        names = {"alex": ("alexnet_features_pool", 256), "squeeze": ("squeezenet1_1_features_pool", 512)}
        if backbone not in names:
            raise ConfigError(f"Pooled features come from {', '.join(names)}, not {backbone!r}.")
        self.name, self.num_features = names[backbone]
        self.features = LPIPS(cast(Backbone, backbone), weights).features
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the networks were trained with
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], sides of at least 63, to (B, num_features)."""
        normalised = (images.float() - self.get_buffer("mean")) / self.get_buffer("std")
        return self.features(normalised).mean((2, 3))


class Conv(nn.Module):
    """Convolution without bias, batch norm with epsilon 0.001, ReLU."""

    def __init__(self, width_in: int, width: int, size: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """3x3 mean that leaves the border's padding out of the count, as TensorFlow does."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class MixedA(nn.Module):
    """35x35: 1x1 | 5x5 | two 3x3 | average."""

    def __init__(self, width: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(width, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(width, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(width, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(_average(x))], 1)


class MixedB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(width, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          F.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """17x17: 7x7 as 1x7 and 7x1."""

    def __init__(self, width: int, c: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(width, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(width, c, 1), self._row(c, c)
        self.branch7x7_3 = self._column(c, 192)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(width, c, 1), self._column(c, c)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = self._row(c, c), self._column(c, c)
        self.branch7x7dbl_5 = self._row(c, 192)
        self.branch_pool = Conv(width, 192, 1)

    @staticmethod
    def _row(width_in: int, width: int) -> Conv:
        return Conv(width_in, width, (1, 7), padding=(0, 3))

    @staticmethod
    def _column(width_in: int, width: int) -> Conv:
        return Conv(width_in, width, (7, 1), padding=(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(_average(x))], 1)


class MixedD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(width, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(width, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """8x8. The last block of the FID graph pools by maximum, which nobody intended and everybody keeps."""

    def __init__(self, width: int, pool: Literal["average", "max"]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(width, 320, 1)
        self.branch3x3_1 = Conv(width, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _average(x) if self.pool == "average" else F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)], 1)


class InceptionNetwork(nn.Module):
    """Inception v3 as the TensorFlow graph of 2015-12-05 has it: (B, 3, 299, 299), normalised, to (B, 2048).

    Names of modules are those of the weights file.
    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (1512.00567).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b, self.Mixed_6c = MixedC(768, 128), MixedC(768, 160)
        self.Mixed_6d, self.Mixed_6e = MixedC(768, 160), MixedC(768, 192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b, self.Mixed_7c = MixedE(1280, "average"), MixedE(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # 71
        x = F.max_pool2d(x, 3, 2)  # 35
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # 17
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # 8


def tensorflow_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's resize: output pixel i reads position i * in / out, without the half-pixel shift or antialiasing.

    >>> tensorflow_bilinear(torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]]), 4)[0, 0, 1]
    tensor([4., 6., 8., 8.])
    """
    for dim in (2, 3):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = position.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (position - low).view(-1, *[1] * (3 - dim))
        images = torch.lerp(images.index_select(dim, low), images.index_select(dim, high), weight)
    return images


class Inception(nn.Module):
    """The feature network of FID, pool3, 2048 numbers an image.

    weights: the file `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity's, torchmetrics') or the same under
        pytorch-fid's name; by default looked for where those packages keep their downloads.
    convention: how images become the network's input. "pytorch-fid": bilinear with half-pixel centres, then 2x - 1.
        "torch-fidelity": levels truncated to 8 bits, TensorFlow 1's bilinear, then (v - 128) / 128.
        "clean-fid": the protocol has resized to 299x299 already, (v - 128) / 128.
    allow_other_weights: accept a file of another hash; the name then says so, and the result is not called FID.
    download: fetch the file (91 MB, hash checked) where it is found nowhere.

    Raises ModelError where there is no such file: FID over other weights is not FID.
    """

    num_features = 2048

    def __init__(self, weights: str | os.PathLike[str] | None = None,
                 convention: Literal["pytorch-fid", "torch-fidelity", "clean-fid"] = "pytorch-fid",
                 allow_other_weights: bool = False, download: bool = False) -> None:
        super().__init__()
        if convention not in ("pytorch-fid", "torch-fidelity", "clean-fid"):
            raise ConfigError("Inception's conventions are pytorch-fid, torch-fidelity and clean-fid, "
                              f"not {convention!r}.")
        path = _inception_file(weights, download)
        self.sha256 = sha256(path)
        genuine = self.sha256.startswith(INCEPTION_SHA256_PREFIX)
        if not genuine and not allow_other_weights:
            raise ModelError(f"{path} is not FID's Inception: its SHA-256 begins with {self.sha256[:8]}, not "
                             f"{INCEPTION_SHA256_PREFIX}.")
        self.name = "inception-2015-12-05" if genuine else f"inception_{self.sha256[:8]}"
        self.convention = convention
        self.network = InceptionNetwork()
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v for k, v in state.items() if not k.startswith(("fc.", "AuxLogits."))}
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise ModelError(f"{path} does not hold the Inception network: {' '.join(str(error).split())}") from error
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 2048)."""
        x = images.float()
        if self.convention == "torch-fidelity":
            levels = (x * 255).clamp(0, 255).byte().float()
            return self.network((tensorflow_bilinear(levels, 299) - 128) / 128)
        if self.convention == "clean-fid":
            if x.shape[2:] != (299, 299):
                raise ImageError(f"Clean-FID resizes to 299x299 before the network, not {tuple(x.shape[2:])}: "
                                 "let vtc.eval.protocols prepare the images.")
            return self.network((x * 255 - 128) / 128)
        return self.network(2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)


def _inception_file(weights: str | os.PathLike[str] | None, download: bool) -> Path:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    if weights is not None:
        path = Path(weights)
        places = [path] if path.is_file() else [path / name for name in INCEPTION_FILES]
    else:
        folders = [Path(os.environ["VTC_FID_WEIGHTS"])] if "VTC_FID_WEIGHTS" in os.environ else []
        places = [folder / name for folder in (*folders, hub) for name in INCEPTION_FILES]
    for place in places:
        if place.is_file():
            return place
    if download:
        try:
            hub.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(hub / INCEPTION_FILES[0]), INCEPTION_SHA256_PREFIX,
                                           progress=False)
            return hub / INCEPTION_FILES[0]
        except (OSError, RuntimeError) as error:  # no network, or a hash that is not the file's
            raise ModelError(f"{INCEPTION_FILES[0]} could not be downloaded from {INCEPTION_URL}: {error}.") from error
    raise ModelError(f"FID needs Inception's weights, {INCEPTION_FILES[0]} (SHA-256 {INCEPTION_SHA256_PREFIX}...): "
                     "give its path, set VTC_FID_WEIGHTS to its folder, or allow the download.")
