"""Loading and saving models: a bundled name, a local folder, or a repository on the Hugging Face Hub.

A model on disk is a folder of two files, `config.json` (constructor arguments) and `model.safetensors` (float16
tensors, exact in float32; in models imported from others float32 where float16 would round; int8 where config.json says
"weights": "int8", see `vtc.int8`), and a card, `README.md`. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Self, cast

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtc import int8
from vtc.errors import ModelError
from vtc.files import save_tensors

#: folder of the models that the wheel carries, one sub-folder a name
BUNDLED = Path(__file__).parent / "pretrained"

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def bundled_names() -> list[str]:
    """Names of the models that came with this installation."""
    return sorted(p.parent.name for p in BUNDLED.glob(f"*/{CONFIG}"))


def bundled_folder(name: str | Path) -> Path | None:
    """The folder of a bundled name, or of a part of one ("var-d6-128/tokenizer"); None where that is not one."""
    plain = PurePath(name)
    is_path = plain.is_absolute() or ".." in plain.parts or str(name).startswith((".", "~"))
    return BUNDLED / plain if plain.parts and not is_path and (BUNDLED / plain).is_dir() else None


def folder_of(name_or_path: str | Path) -> Path | None:
    """The folder of a bundled name, else the local one; None: neither."""
    path = Path(name_or_path)
    return bundled_folder(name_or_path) or (path if path.is_dir() else None)


def fetch(name_or_path: str | Path, file: str) -> Path:
    """The local path of a model's file; downloads it where the name is a Hub repository.

    Raises ModelError where there is no such model, no such file in it, or no network.
    """
    if (folder := folder_of(name_or_path)) is not None:
        if not (folder / file).is_file():
            raise ModelError(f"The model folder {folder} has no {file}.")
        return folder / file
    try:
        return Path(hf_hub_download(str(name_or_path), file))
    except _NOT_ON_THE_HUB as error:
        raise _no_model(name_or_path, f"the Hub gave no {file} ({type(error).__name__})") from error


def fetch_folder(name_or_path: str | Path, files: Sequence[str], allow_download: bool = True) -> Path:
    """A model's folder, with sub-folders; downloads it where the name is a Hub repository.

    files: patterns of what is downloaded; nothing else of a repository is. Raises ModelError as `fetch`.
    """
    folder = folder_of(name_or_path)
    if folder is None and allow_download:
        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=list(files)))
        except _NOT_ON_THE_HUB as error:
            raise _no_model(name_or_path, f"the Hub gave none ({type(error).__name__})") from error
    if folder is None:
        raise _no_model(name_or_path, "the Hub was not asked")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"The model folder {folder} has no {CONFIG}.")
    return folder


_NOT_ON_THE_HUB = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def _no_model(name_or_path: str | Path, hub: str) -> ModelError:
    return ModelError(f"No model {str(name_or_path)!r}: not bundled ({', '.join(bundled_names()) or 'none'}), not a "
                      f"folder, and {hub}.")


class PretrainedMixin(PyTorchModelHubMixin):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for an `nn.Module`.

    Keys are strict both ways. Floating tensors are stored as float16; a finished model's weights are rounded to
    float16 when saved, so what was measured after loading is what everybody loads. A model that others published was
    measured by them: it has `exact_weights`, and every weight is stored as it is.
    """

    #: whether saving keeps tensors that float16 would change as float32; set by importing and by loading such a file
    exact_weights: bool = False
    #: names of weights that saving stores as int8; set by `vtc.int8.quantize_weights` and by loading such a file
    int8_weights: frozenset[str] = frozenset()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:  # type: ignore[override]  # one argument, on purpose
        """A model in eval mode, float32, on the CPU, from a bundled name, a folder, or a Hub repository."""
        config, tensors, int8_weights = _read(name_or_path)
        if config.pop("class", cls.__name__) != cls.__name__:
            raise ModelError(f"The model {str(name_or_path)!r} is not a {cls.__name__}.")
        try:
            model = cls(**config)
            module = cast(nn.Module, model)
            module.load_state_dict(tensors)
        except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"The model {str(name_or_path)!r} does not fit {cls.__name__}: {reason}") from error
        model.exact_weights = any(t.dtype == torch.float32 for t in tensors.values())
        model.int8_weights = int8_weights
        module.eval()
        return model

    @classmethod
    def without_weights(cls, name_or_path: str | Path) -> Self:
        """The model's shapes alone, on torch's "meta" device: only its config.json is read."""
        config = read_json(name_or_path)
        config.pop("class", None)
        config.pop("weights", None)
        try:
            with torch.device("meta"):
                model = cls(**config)
        except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"The model {str(name_or_path)!r} does not fit {cls.__name__}: {reason}") from error
        return cast(Self, cast(nn.Module, model).eval())

    def _save_pretrained(self, save_directory: Path) -> None:
        save_directory.mkdir(parents=True, exist_ok=True)
        tensors = stored_tensors(cast(nn.Module, self), exact=self.exact_weights, int8_weights=self.int8_weights)
        save_tensors(tensors, save_directory / WEIGHTS)
        form = {"weights": int8.FORMAT} if self.int8_weights else {}
        config = {"class": type(self).__name__, **form, **self.arguments()}
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, as they stand in config.json."""
        return cast(dict[str, Any], self._hub_mixin_config)


def read_json(name_or_path: str | Path) -> dict[str, Any]:
    """config.json of a model's folder; see `fetch`. ModelError where it cannot be read."""
    try:
        config = json.loads(fetch(name_or_path, CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"The model {str(name_or_path)!r} is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"The model {str(name_or_path)!r} is damaged: its {CONFIG} is no object.")
    return config


def read_model(name_or_path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a model's folder; see `fetch`. ModelError where they cannot be read."""
    config, tensors, _ = _read(name_or_path)
    return config, tensors


def _read(name_or_path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], frozenset[str]]:
    """`read_model`, and the names of the weights that were int8."""
    try:
        config, tensors = read_json(name_or_path), load_file(fetch(name_or_path, WEIGHTS))
    except SafetensorError as error:
        raise ModelError(f"The model {str(name_or_path)!r} is damaged: {error}.") from error
    form = config.pop("weights", None)
    if form is None:
        return config, tensors, frozenset()
    if form != int8.FORMAT:
        raise ModelError(f"The model {str(name_or_path)!r} has {form!r} weights, which this vtc cannot read.")
    try:
        return config, *int8.unpack(tensors)
    except ModelError as error:
        raise ModelError(f"The model {str(name_or_path)!r} is damaged: {error}.") from error


def stored_tensors(model: nn.Module, prefixes: tuple[str, ...] = ("",), exact: bool = False,
                   int8_weights: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """The state dict as it goes to disk: floating tensors as float16, contiguous, on the CPU.

    prefixes: only tensors whose names begin with one of them; by default all.
    exact: tensors that float16 would change are float32.
    int8_weights: names of those that are int8, each with a tensor of scales; see `vtc.int8`.
    Raises ModelError where a value is too large for float16 and not `exact`.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefixes):
            continue
        if name in int8_weights:
            q, scale = int8.quantize(tensor.cpu())
            stored |= {name: q.contiguous(), name + int8.SUFFIX: scale}
            continue
        if tensor.is_floating_point():
            half = tensor.half()
            if exact and not torch.equal(half.to(tensor.dtype), tensor):
                tensor = tensor.float()
            elif not exact and _overflows(half, tensor):
                raise ModelError(f"The tensor {name} has values beyond float16, in which models are stored: up to "
                                 f"{tensor.abs().max().item():.3g}.")
            else:
                tensor = half
        stored[name] = tensor.cpu().contiguous()
    return stored


def _overflows(half: Tensor, tensor: Tensor) -> bool:
    return bool(half.isinf().any() and tensor.isfinite().all())


def fingerprint(model: nn.Module, prefixes: tuple[str, ...]) -> bytes:
    """Eight bytes of SHA-256 over the tensors whose names begin with one of `prefixes`, in float16.

    Name, type, shape and bytes of each, in the order of names: two models agree just where they decode alike, but for
    what float16 rounds. A tensor with values beyond float16 counts in float32.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(prefixes):
            continue
        if tensor.is_floating_point():
            half = tensor.half()
            tensor = tensor.float() if _overflows(half, tensor) else half
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:8]
