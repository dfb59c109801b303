"""What papers do differently before they compute the same metric: a preset says it, does it, and goes into the result.

rFID of one tokenizer has been reported from 0.92 to 4.28 over such choices (reference set, crop, resize, rounding), so
numbers of two protocols do not stand in one column.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vtc.errors import ConfigError, FileError, ImageError
from vtc.files import reason

Rounding = Literal["nearest", "truncate", "none"]


@dataclass(frozen=True)
class Protocol:
    """One evaluator's way from a picture to the metrics.

    reference_set: what the published numbers compare with.
    resize, crop: how originals come to the size of the evaluation.
    pixel_rounding: of reconstructions, before PSNR, SSIM and the like. feature_rounding: before the feature network.
    feature_network: whose convention `vtc.eval.features.Inception` follows.
    feature_resize: "network" where the extractor resizes, "pillow_bicubic_float" where the protocol does.
    note: what else is known to differ.
    """

    name: str
    reference_set: str
    resize: Literal["none", "shorter_side_bilinear", "halve_box_then_bicubic"]
    crop: Literal["none", "centre"]
    pixel_rounding: Rounding
    feature_rounding: Rounding
    feature_network: Literal["pytorch-fid", "torch-fidelity", "clean-fid"]
    feature_resize: Literal["network", "pillow_bicubic_float"]
    note: str = ""

    def describe(self) -> dict[str, str]:
        """For a result's provenance."""
        return asdict(self)

    def prepare(self, pixels: np.ndarray, size: int) -> np.ndarray:
        """An original, uint8 (H, W, 3), to the picture that is coded and compared with; (size, size, 3) if cropped."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3:
            raise ImageError(f"An original is uint8 (H, W, 3), not {pixels.dtype} {pixels.shape}.")
        if self.resize == "shorter_side_bilinear":
            pixels = _shorter_side_bilinear(pixels, size)
        elif self.resize == "halve_box_then_bicubic":
            pixels = _halve_box_then_bicubic(pixels, size)
        return _centre_crop(pixels, size) if self.crop == "centre" else pixels

    def for_pixels(self, images: Tensor) -> Tensor:
        """Reconstructions (B, 3, H, W) to what PSNR and SSIM see, in [0, 1]."""
        return _rounded(images, self.pixel_rounding)

    def for_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), originals and reconstructions alike, to what the feature network is given, in [0, 1]."""
        images = _rounded(images, self.feature_rounding)
        return _pillow_bicubic_float(images, 299) if self.feature_resize == "pillow_bicubic_float" else images


#: the picture as it is: what a codec is judged by
NATIVE = Protocol("native", "the given pictures", "none", "none", "nearest", "nearest", "pytorch-fid", "network")

PROTOCOLS = {p.name: p for p in (
    NATIVE,
    Protocol("wetok", "ImageNet validation, the same crops", "shorter_side_bilinear", "centre", "truncate", "none",
             "pytorch-fid", "network", "Upstream averages batch means, so a short last batch weighs too much; here "
             "images weigh alike. Upstream's bilinear is OpenCV's, equal within one level."),
    Protocol("adm", "VIRTUAL statistics of the training set (.npz), or the given set", "halve_box_then_bicubic",
             "centre", "truncate", "truncate", "torch-fidelity", "network",
             "Upstream runs the TensorFlow graph; the weights here are its port. Samples are exported as arr_0."),
    Protocol("clean-fid", "the given folder", "none", "none", "nearest", "nearest", "clean-fid",
             "pillow_bicubic_float", "Upstream runs the graph's TorchScript copy; the weights here are its port."),
    Protocol("torch-fidelity", "the given folder", "none", "none", "nearest", "nearest", "torch-fidelity", "network"),
)}


def protocol(name: str) -> Protocol:
    """A preset by name; ConfigError for another.

    >>> protocol("wetok").pixel_rounding
    'truncate'
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"The protocols are {', '.join(PROTOCOLS)}, not {name!r}.")
    return PROTOCOLS[name]


def export_samples(path: str | Path, images: Iterable[np.ndarray], count: int | None = None) -> None:
    """Write uint8 pictures (H, W, 3) of one size as the `.npz` that ADM's evaluator reads: arr_0, (N, H, W, 3).

    count: how many `images` gives; with it they are written as they come, and only one is in memory. The file is
    written beside `path` and renamed. Raises ImageError for pictures of other kinds or sizes or of another number.
    """
    if count is None:
        images = list(images)
        count = len(images)
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive, archive.open("arr_0.npy", "w",
                                                                                     force_zip64=True) as stream:
            _write_samples(stream, images, count)
        os.replace(part, path)
    except FileError:  # of a picture
        raise
    except OSError as error:
        raise FileError(f"The samples cannot be written to {path}: {reason(error)}.") from error
    finally:
        part.unlink(missing_ok=True)


def _write_samples(stream: IO[bytes], images: Iterable[np.ndarray], count: int) -> None:
    shape: tuple[int, ...] | None = None
    written = 0
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or (shape is not None and image.shape != shape):
            raise ImageError("Samples for ADM's evaluator are uint8 pictures (H, W, 3) of one size, not "
                             f"{image.dtype} {image.shape}{f' after {shape}' if shape else ''}: take a protocol "
                             "that crops.")
        if shape is None:
            shape = image.shape
            np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False,
                                                          "shape": (count, *shape)})
        stream.write(np.ascontiguousarray(image).tobytes())
        written += 1
    if not written or written != count:
        raise ImageError(f"There are {written} samples for ADM's evaluator, where {count} were said.")


def _rounded(images: Tensor, rounding: Rounding) -> Tensor:
    if rounding == "none":
        return images.clamp(0, 1)
    levels = images.clamp(0, 1) * 255
    if rounding == "nearest":
        return levels.round() / 255
    # k / 255 * 255 may fall just below k in float32: an 8-bit picture must stay what it is.
    return (levels + 1e-3).floor() / 255


def _centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        raise ImageError(f"A {width}x{height} picture has no {size}x{size} crop.")
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def _shorter_side_bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
    """Half-pixel bilinear without antialiasing, rounded: what OpenCV's INTER_LINEAR does."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    new = (round(height * scale), round(width * scale))
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].double()
    resized = F.interpolate(image, new, mode="bilinear", align_corners=False)
    return resized[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _halve_box_then_bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's loader: halve by 2x2 means while both sides stay at least twice the size, then bicubic."""
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    new = (round(image.width * scale), round(image.height * scale))
    return np.array(image.resize(new, Image.Resampling.BICUBIC))


def _pillow_bicubic_float(images: Tensor, size: int) -> Tensor:
    """Parmar et al., "On Aliased Resizing" (2104.11222): each channel by Pillow's bicubic in float, clipped."""
    planes = [np.array(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
              for plane in (images.float().cpu() * 255).flatten(0, 1).numpy()]
    resized = torch.from_numpy(np.stack(planes)).clamp(0, 255) / 255
    return resized.view(*images.shape[:2], size, size).to(images.device)
