"""What vtc-eval can put pictures through: token codecs, tokenizers, classical peers, CompressAI's models.

`vtc.eval` knows none of them: each is wrapped here as a `vtc.eval.suite.Method`.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.cli.common import load_codec, load_model
from vtc.codecs.classical import ENCODERS, available_codecs, encode_best
from vtc.codecs.rates import RateControl
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, ImageError, ModelError
from vtc.eval.pairs import Item
from vtc.eval.provenance import sha256, tensors_sha256
from vtc.eval.suite import Method, Reconstruction, timed
from vtc.images import to_tensor, to_uint8
from vtc.models import MODEL_IDS, family_of
from vtc.torchvision_guard import ensure_torchvision_imports

#: other names of the classical peers
PEERS = {**{name: name for name in ENCODERS}, "j2k": "jpeg2000", "jp2": "jpeg2000", "jpegxl": "jxl", "jpg": "jpeg"}
#: bits per pixel of a peer on its own
DEFAULT_RATES = (0.05, 0.1, 0.2, 0.4)


class TokenCodecMethod(Method):
    """A tokenizer as a codec: the image to a whole file and back."""

    kind = "codec"

    def __init__(self, name: str, device: str, label: str | None = None) -> None:
        self.name = label or Path(name).name
        self.family = re.sub(r"-s\d+$", "", self.name)
        self.codec = load_codec(name, device)
        self.description = {"kind": "token codec", **_about(self.codec.tokenizer), **_prior(self.codec),
                            "device": device}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction:
        (data,), encode_seconds = timed(lambda: self.codec.compress(image))
        (decoded,), decode_seconds = timed(lambda: self.codec.decompress([data]))
        self._remember(item, len(data))
        tokens = self.codec.decompress_tokens(data)
        return Reconstruction(decoded.cpu(), len(data), tokens.indices[0].cpu().numpy(),
                              {"encode_seconds": encode_seconds, "decode_seconds": decode_seconds},
                              tokens.layout.scales[-1])

    def num_bytes(self, item: Item, image: Tensor) -> int:
        """Of the file: what a peer gets as its budget."""
        with self._lock:
            if item.name in self._sizes:
                return self._sizes[item.name]
        (data,) = self.codec.compress(image)
        self._remember(item, len(data))
        return len(data)

    def _remember(self, item: Item, num_bytes: int) -> None:
        with self._lock:
            self._sizes[item.name] = num_bytes
            if len(self._sizes) > 256:
                self._sizes.popitem(last=False)


class FamilyMethod(Method):
    """A model and its family at a rate: image by image, the most words whose whole file fits, as `vtc-encode --bpp`."""

    kind = "codec"

    def __init__(self, name: str, rate: float, device: str, label: str | None = None) -> None:
        family = family_of(name)
        if family is None:
            raise ConfigError(f"The model {name} has no family, so no rate can be chosen.")
        self.family, self.rate = label or Path(name).name, rate
        self.name = f"{self.family} at {rate:g} bpp"
        self.sizes = (*family.sizes, None)
        self._codecs: dict[int, TokenCodec] = {}
        self._lock = threading.Lock()
        self._load = lambda quality: load_codec(name, device, self.sizes[quality - 1])
        self.rates = RateControl(self._codec, len(self.sizes))
        whole = self._codec(self.rates.qualities)
        self.description = {"kind": "token codec at a rate", "rate": rate, **_about(whole.tokenizer), **_prior(whole),
                            "members": {str(size): text for size, text in family.fingerprints.items()},
                            "device": device}
        del self.description["vocab"]  # one for every picture

    def _codec(self, quality: int) -> TokenCodec:
        with self._lock:
            if quality not in self._codecs:
                self._codecs[quality] = self._load(quality)
        return self._codecs[quality]

    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction | None:
        try:
            (data, quality), encode_seconds = timed(lambda: self.rates.compress_at(image[0], self.rate))
        except ImageError:  # the coarsest file is larger
            return None
        (decoded,), decode_seconds = timed(lambda: self._codec(quality).decompress([data]))
        return Reconstruction(decoded.cpu(), len(data), None, {
            "encode_seconds": encode_seconds, "decode_seconds": decode_seconds, "quality": float(quality)})


class TokenizerMethod(Method):
    """A tokenizer without a file: encode and decode. Its rate is nominal, of tokens that are all equally likely."""

    kind = "tokenizer"

    def __init__(self, name: str, device: str, label: str | None = None) -> None:
        self.family = label or Path(name).name
        self.name = f"{self.family} (tokenizer)"
        self.tokenizer = load_model(name, device)
        self.device = device
        self.description = {"kind": "tokenizer", **_about(self.tokenizer), "device": device}

    @torch.no_grad()
    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction:
        tokens, encode_seconds = timed(lambda: self.tokenizer.encode(image.to(self.device)))
        generator = torch.Generator(self.device).manual_seed(0)
        decoded, decode_seconds = timed(lambda: self.tokenizer.decode(tokens, generator))
        return Reconstruction(decoded[0].cpu(), None, tokens.indices[0].cpu().numpy(),
                              {"encode_seconds": encode_seconds, "decode_seconds": decode_seconds,
                               "nominal_bits": tokens.layout.bits}, tokens.layout.scales[-1])


def _prior(codec: TokenCodec) -> dict[str, Any]:
    return {"prior": None if codec.prior is None else codec.prior.fingerprint.hex()}


def _about(tokenizer: Any) -> dict[str, Any]:
    return {"class": type(tokenizer).__name__, "fingerprint": tokenizer.fingerprint().hex(),
            "tensors_sha256": tensors_sha256(tokenizer), "model_id": tokenizer.model_id,
            "downsample": tokenizer.downsample, "vocab": list(tokenizer.layout(64, 64).vocab),
            "parameters": sum(p.numel() for p in tokenizer.parameters())}


class Distance:
    """How a peer's down-sampling factor is chosen: by LPIPS, else by the squared error."""

    def __init__(self, lpips: Any | None) -> None:
        self.lpips = lpips  # a vtc.tokenizers.lpips.LPIPS
        self.description = {"by": "psnr"} if lpips is None else {"by": "lpips", "tensors_sha256": tensors_sha256(lpips)}

    @torch.no_grad()
    def __call__(self, original: np.ndarray, decoded: np.ndarray) -> float:
        if self.lpips is None or min(original.shape[:2]) < 31:
            return float(np.square(original.astype(np.float64) - decoded).mean())
        device = next(self.lpips.features.parameters()).device
        a, b = (to_tensor(pixels)[None].to(device) for pixels in (decoded, original))
        return float(self.lpips(a, b))


class ClassicalMethod(Method):
    """JPEG, WebP, AVIF, JPEG XL or JPEG 2000, with at most so many bytes: of a rate, or of another codec's file.

    budget: bits per pixel, or the codec whose files' bytes are the limit, image by image.
    """

    kind = "codec"

    def __init__(self, codec: str, budget: float | TokenCodecMethod, factors: Sequence[int],
                 distance: Distance) -> None:
        self.codec = PEERS[codec]
        if self.codec not in available_codecs():
            raise ConfigError(f"Pillow cannot write {self.codec} here; it can {', '.join(available_codecs())}."
                              + (" JPEG XL needs the package pillow-jxl-plugin." if self.codec == "jxl" else ""))
        self.budget, self.factors, self.distance = budget, list(factors), distance
        self.family = self.codec
        label, about = ((f"{budget.name}'s bytes", budget.description) if isinstance(budget, TokenCodecMethod)
                        else (f"{budget:g} bpp", budget))
        self.name = f"{self.codec} at {label}"
        self.description = {"kind": "classical", "codec": self.codec, "factors": self.factors,
                            "choice": distance.description, "budget": about}

    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction | None:
        height, width = image.shape[2:]
        limit = (self.budget.num_bytes(item, image) if isinstance(self.budget, TokenCodecMethod)
                 else int(self.budget * height * width / 8))
        pixels = to_uint8(image)
        best = encode_best(self.codec, pixels, limit, self.factors, lambda decoded: self.distance(pixels, decoded))
        if best is None:
            return None
        stream, _ = best
        decoded, seconds = timed(stream.decode)
        return Reconstruction(to_tensor(decoded), len(stream.data), None,
                              {"downsample": stream.downsample, "quality": stream.quality, "decode_seconds": seconds})


class CompressAIMethod(Method):
    """A model of CompressAI's zoo with weights from a file, through its own strings.

    A file is taken to hold the strings, four bytes of length for each and eight for the picture's size.
    """

    kind = "codec"

    def __init__(self, architecture: str, weights: str, device: str) -> None:
        ensure_torchvision_imports()
        try:
            from compressai.zoo import load_state_dict
            from compressai.zoo.image import model_architectures
        except ImportError as error:
            raise ModelError("CompressAI's models need the extra compressai: pip install compressai.") from error
        if architecture not in model_architectures:
            raise ConfigError(f"CompressAI has {', '.join(model_architectures)}, not {architecture!r}.")
        if not Path(weights).is_file():
            raise ModelError(f"There are no weights {weights} for {architecture}.")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            state = {name.removeprefix("module."): t for name, t in state.get("state_dict", state).items()}
            self.model = model_architectures[architecture].from_state_dict(load_state_dict(state)).eval()
        except Exception as error:  # a damaged file and missing keys raise whatever they hit
            raise ModelError(f"{weights} does not hold a {architecture} of CompressAI: "
                             f"{' '.join(str(error).split())[:200]}.") from error
        self.model.update()
        self.model.to(device)
        self.device = device
        self.family, self.name = architecture, f"{architecture}:{Path(weights).name.partition('.')[0]}"
        self.description = {"kind": "compressai", "architecture": architecture, "weights_sha256": sha256(weights),
                            "compressai": _version("compressai"), "device": device}

    @torch.no_grad()
    def reconstruct(self, item: Item, image: Tensor) -> Reconstruction:
        height, width = image.shape[2:]
        bottom, right = -height % 64, -width % 64
        padded = F.pad(image.to(self.device), (0, right, 0, bottom), mode="replicate")
        coded, encode_seconds = timed(lambda: self.model.compress(padded))
        decoded, decode_seconds = timed(lambda: self.model.decompress(coded["strings"], coded["shape"]))
        num_bytes = 8 + sum(4 + len(one) for strings in coded["strings"] for one in strings)
        return Reconstruction(decoded["x_hat"][0, :, :height, :width].clamp(0, 1).cpu(), num_bytes, None,
                              {"encode_seconds": encode_seconds, "decode_seconds": decode_seconds})


def _version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


def codec_methods(names: Sequence[str], rates: Sequence[float | str], factors: Sequence[int], distance: Distance,
                  device: str, failed: Callable[[str, Exception], None]) -> list[Method]:
    """The methods of --codec, in its order.

    names: bundled models, '*' and '?' in them, folders, peers, "compressai:ARCHITECTURE:WEIGHTS".
    rates: of the peers, and of models with a family; "match" is the bytes of the first token codec for the peers, and
        stands where nothing is given beside one.
    failed: is told of a name that could not be had, and why; the others are still made.
    """
    methods: list[Method] = []
    models = [name for name in expanded(names) if name not in PEERS]
    for name, label in zip(models, labels(models), strict=True):
        try:
            if name.startswith("compressai:"):
                architecture, colon, weights = name.removeprefix("compressai:").partition(":")
                if not colon or not weights:
                    raise ConfigError(f"CompressAI's models are compressai:ARCHITECTURE:WEIGHTS, not {name!r}.")
                methods.append(CompressAIMethod(architecture, weights, device))
            else:
                methods.append(TokenCodecMethod(name, device, label))
                numbers = [rate for rate in rates if not isinstance(rate, str)]
                if numbers and family_of(name) is not None:
                    methods += [FamilyMethod(name, rate, device, label) for rate in numbers]
        except Exception as error:
            failed(name, error)
    anchor = next((method for method in methods if isinstance(method, TokenCodecMethod)), None)
    for name in dict.fromkeys(PEERS[name] for name in names if name in PEERS):
        for rate in rates or (("match",) if anchor else DEFAULT_RATES):
            try:
                if isinstance(rate, str) and anchor is None:
                    raise ConfigError("--rates match needs a token codec whose bytes the peers may have.")
                budget = anchor if isinstance(rate, str) else rate
                assert budget is not None
                methods.append(ClassicalMethod(name, budget, factors, distance))
            except Exception as error:
                failed(name, error)
                break
    return methods


def labels(paths: Sequence[str]) -> list[str]:
    """The last part of each path, and as many of those before it as tell it from the others.

    >>> labels(["runs/a/model", "runs/b/model", "other/"])
    ['a/model', 'b/model', 'other']
    """
    parts = [Path(os.path.normpath(path)).parts or (path,) for path in paths]

    def label(own: tuple[str, ...]) -> str:
        for length in range(1, len(own)):
            if sum(other[-length:] == own[-length:] for other in set(parts)) == 1:
                return "/".join(own[-length:])
        return str(Path(*own))

    return [label(own) for own in parts]


def expanded(names: Sequence[str]) -> list[str]:
    """Names with '*' or '?' to the bundled models that fit; each name once."""
    found: list[str] = []
    for name in names:
        fitting = [known for known in MODEL_IDS if fnmatch(known, name)] if "*" in name or "?" in name else [name]
        found += fitting or [name]
    return list(dict.fromkeys(found))
