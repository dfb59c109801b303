"""Checkpoints as their authors published them, to tokenizers of vtc: recognised by keys, mapped strictly.

    load_checkpoint("vqgan_imagenet_f16_16384/last.ckpt") -> VQGAN
    import_checkpoint("wetok.ckpt", "my_folder")           -> config.json + model.safetensors, for `from_pretrained`

    family        recognised by                                        from
    vqgan         quant_conv, encoder.mid.attn_1; no EMA weights       taming-transformers, VQGAN-compression
    ibq           the same keys; EMA weights (`model_ema.`)            SEED-Voken
    llamagen      encoder.conv_blocks                                  LlamaGen
    wetok         decoder.adaptive, 32 or 64 latent channels           WeTok, plain and generative decoder
    open_magvit2  decoder.adaptive, 14 or 18 latent channels           Open-MAGVIT2, SEED-Voken
    var           quantize.quant_resi                                  VAR
    infinity      decoder.conv_in.conv, or no attention and no         Infinity's VAE
                  quant_conv
    sc_vae        a diffusers folder of AutoencoderKL, stride 2        Diffusion-4K
    (diffusers)   a folder whose config.json says VQModel,             diffusers; of a pipeline, its vae, vqvae or movq
                  AutoencoderKL or AutoencoderDC
    (vtc)         a folder with "class" in its config.json             vtc

Widths, depths, and where attention stands are facts of the keys and shapes. What they do not tell has the published
value and can be given: `groups` (WeTok), `sides` (VAR, Infinity), and so on, all arguments of the class. VQGAN and IBQ
have the same keys and shapes: what tells the published ones apart is that IBQ's carry averaged weights and have 4
blocks a level, VQGAN's none and 2. Where these two facts disagree, `family` has to say which it is.

A pickle is a program, and Lightning's checkpoints hold more than tensors. Nothing of it is run: besides the few names
that make up tensors, every name in the pickle becomes an inert placeholder.
"""

from __future__ import annotations

import json
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vtc.errors import ConfigError, ModelError
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.classes import FAMILIES, TOKENIZER_CLASSES

if TYPE_CHECKING:
    from vtc.tokenizers.diffusers_adapters import DiffusersAutoencoder

StateDict = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------- reading files safely


class Inert:
    """Stands for any object of a pickle that is not a tensor or a plain container. It does nothing when asked to."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Forgets the item."""

    def extend(self, items: object) -> None:
        """Forgets the items."""

    def add(self, item: object) -> None:
        """Forgets the item."""


#: the only names a pickle may resolve: what tensors are made of
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch":
            found = getattr(torch, name, None)
            # Storage types are plain tags in legacy files; torch's own loader resolves them in newer ones.
            if isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage")):
                return found
        return Inert


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, of any age; every object that is not a tensor or a plain container is an `Inert`.

    No code that the file names is imported or called.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("constants.pkl") for name in archive.namelist()):
                    raise ModelError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict instead.")
        elif tarfile.is_tarfile(path):
            raise ModelError(f"{path} is of a torch before 0.1.10 or another archive; save its state_dict anew.")
        safe_pickle = SimpleNamespace(Unpickler=_InertUnpickler, load=_load, __name__="vtc's inert unpickler")
        # `weights_only` would refuse the file as a whole; the unpickler above is what makes this safe.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=safe_pickle)
    except ModelError:
        raise
    except Exception as error:  # a file that is no pickle, or a broken one, may fail in any way
        raise ModelError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}).") from error


def _load(file: IO[bytes], **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


def read_tensors(path: Path, inside: Sequence[str] = ("state_dict", "vae", "ema", "model")) -> StateDict:
    """All tensors of a .safetensors file, or of the state dict in a pickle; inside: under which names it may lie there.

    The first of the names that there is counts, and again within it. Raises ModelError.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read as safetensors ({error}).") from error
    content = read_pickle(path)
    while isinstance(content, Mapping):
        within = [content[key] for key in inside if isinstance(content.get(key), Mapping)]
        if not within:
            break
        content = within[0]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ModelError(f"{path} holds no state dict of tensors.")
    # What distributed and compiled training puts before every name.
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------- names of parameters


def ema_weights(tensors: StateDict) -> StateDict:
    """The state dict with averaged weights in place of the last ones, where it has any (`model_ema.`).

    Averages are stored under names without dots. ModelError for an average that belongs to no parameter.
    """
    averages = {k.removeprefix("model_ema."): v for k, v in tensors.items() if k.startswith("model_ema.")}
    live = {k: v for k, v in tensors.items() if not k.startswith("model_ema.")}
    for bookkeeping in ("decay", "num_updates"):
        averages.pop(bookkeeping, None)
    names: dict[str, str] = {}
    for name in live:
        dotless = name.replace(".", "")
        if dotless in names and dotless in averages:
            raise ModelError(f"The average {dotless!r} may belong to {names[dotless]!r} or {name!r}.")
        names[dotless] = name
    strangers = sorted(a for a in averages if a not in names)
    if strangers:
        raise ModelError(f"Averaged weights without a parameter: {_some(strangers)}.")
    return live | {names[dotless]: value for dotless, value in averages.items()}


def _renamed(tensors: StateDict, rules: list[tuple[str, str]]) -> StateDict:
    """Every key through every rule (pattern, replacement); two keys must not meet."""
    renamed: StateDict = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ModelError(f"The key {old!r} of the checkpoint and another one both mean {new!r}.")
        renamed[new] = tensor
    return renamed


def _without(tensors: StateDict, *prefixes: str) -> StateDict:
    """What a tokenizer does not need to encode and decode: losses, discriminators, statistics of training."""
    return {k: v for k, v in tensors.items() if not k.startswith(prefixes)}


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --------------------------------------------------------------------------------------------- what keys and shapes say


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the one group of the pattern takes among the keys."""
    return len({m[1] for m in (re.match(pattern, k) for k in tensors) if m})


def _network(tensors: StateDict) -> dict[str, Any]:
    """channels, channel_multipliers, num_res_blocks of an autoencoder whose encoder has `down.i.block.j`."""
    channels = tensors["encoder.conv_in.weight"].shape[0]
    levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    if any(w % channels for w in widths):
        raise ModelError(f"Levels of {widths} channels are no multiples of the first convolution's {channels}.")
    return {"channels": channels, "channel_multipliers": tuple(w // channels for w in widths),
            "num_res_blocks": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")}


def _attention_levels(tensors: StateDict) -> tuple[int, ...]:
    return tuple(sorted({int(m[1]) for m in (re.match(r"encoder\.down\.(\d+)\.attn\.", k) for k in tensors) if m}))


def _vq(tensors: StateDict) -> dict[str, Any]:
    """codebook_size, embed_dim, z_channels and the network of a VQGAN whose keys are vtc's."""
    codebook_size, embed_dim = tensors["quantizer.codebook"].shape
    return {"codebook_size": codebook_size, "embed_dim": embed_dim,
            "z_channels": tensors["quant_conv.weight"].shape[1], **_network(tensors)}


Family = Callable[[StateDict], tuple[str, StateDict, dict[str, Any]]]


def _vqgan(tensors: StateDict) -> tuple[str, StateDict, dict[str, Any]]:
    ours = _renamed(_without(tensors, "loss.", "colorize"), [(r"^quantize\.embedding\.weight$", "quantizer.codebook")])
    return "VQGAN", ours, {**_vq(ours), "attention_levels": _attention_levels(ours)}


def _ibq(tensors: StateDict) -> tuple[str, StateDict, dict[str, Any]]:
    _, ours, config = _vqgan(tensors)
    return "IBQ", ours, config


def _llamagen(tensors: StateDict) -> tuple[str, StateDict, dict[str, Any]]:
    last = _count(tensors, r"encoder\.conv_blocks\.(\d+)\.") - 1
    rules = [(r"^quantize\.embedding\.weight$", "quantizer.codebook"),
             (r"^encoder\.conv_blocks\.", "encoder.down."),
             (r"\.mid\.0\.", ".mid.block_1."), (r"\.mid\.1\.", ".mid.attn_1."), (r"\.mid\.2\.", ".mid.block_2.")]
    # The decoder counts its levels from the coarsest one.
    rules += [(rf"^decoder\.conv_blocks\.{i}\.", f"decoder.up.{last - i}.") for i in range(last + 1)]
    rules += [(r"^((?:en|de)coder\.(?:down|up)\.\d+)\.res\.", r"\1.block.")]
    ours = _renamed(_without(tensors, "quantize.codebook_used"), rules)
    return "LlamaGenVQ", ours, _vq(ours)


def _wetok(tensors: StateDict) -> tuple[str, StateDict, dict[str, Any]]:
    ours = _without(tensors, "loss.")
    z_channels = ours["encoder.conv_out.weight"].shape[0]
    published = z_channels in (32, 64)  # in groups of 8; the checkpoint does not say how others group
    return "WeTok", ours, {**_network(ours), "groups": z_channels // 8 if published else None,
                           "bits_per_group": 8 if published else None,
                           "generative": ours["decoder.conv_in.weight"].shape[1] == 2 * z_channels}


def _open_magvit2(tensors: StateDict) -> tuple[str, StateDict, dict[str, Any]]:
    ours = _without(tensors, "loss.")
    z_channels = ours["encoder.conv_out.weight"].shape[0]
    return "OpenMAGVIT2", ours, {**_network(ours), "bits": z_channels,
                                 "generative": ours["decoder.conv_in.weight"].shape[1] == 2 * z_channels}


def _var(tensors: StateDict) -> tuple[str, StateDict, dict[str, Any]]:
    rules = [(r"^quantize\.embedding\.weight$", "quantizer.codebook"),
             (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phi."),
             (r"^quantize\.quant_resi\.qresi\.", "quantizer.phi.0."),
             (r"^quantize\.quant_resi\.(\d+)\.", r"quantizer.phi.\1.")]
    ours = _renamed(_without(tensors, "quantize.ema_vocab_hit_SV"), rules)
    codebook_size, z_channels = ours["quantizer.codebook"].shape
    return "VARVQVAE", ours, {**_network(ours), "codebook_size": codebook_size, "z_channels": z_channels,
                              "phis": _count(ours, r"quantizer\.phi\.(\d+)\.weight"),
                              "attention": bool(_attention_levels(ours)),
                              "mid_attention": "encoder.mid.attn_1.norm.weight" in ours}


def _infinity(tensors: StateDict) -> tuple[str, StateDict, dict[str, Any]]:
    # Every convolution and norm sits in a wrapper of that name; the quantizer stores powers of two, twice.
    rules = [(r"\.conv\.(weight|bias)$", r".\1"), (r"\.norm\.(weight|bias)$", r".\1"),
             (r"\.downsample\.(weight|bias)$", r".downsample.conv.\1"),
             (r"\.upsample\.(weight|bias)$", r".upsample.conv.\1")]
    ours = _renamed(_without(tensors, "quantizer.lfq.mask", "quantize.lfq.mask"), rules)
    return "InfinityVAE", ours, {**_network(ours), "bits": ours["encoder.conv_out.weight"].shape[0]}


MAPS: dict[str, Family] = {"vqgan": _vqgan, "ibq": _ibq, "llamagen": _llamagen, "wetok": _wetok,
                           "open_magvit2": _open_magvit2, "var": _var, "infinity": _infinity}


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """The family of a state dict, by its keys and shapes. ModelError where it is none of them."""
    if "encoder.conv_blocks.0.res.0.norm1.weight" in tensors:
        return "llamagen"
    if "decoder.adaptive.0.gamma.weight" in tensors:
        return "open_magvit2" if tensors["encoder.conv_out.weight"].shape[0] in (14, 18) else "wetok"
    if any(k.startswith("quantize.quant_resi.") for k in tensors):
        return "var"
    plain = "encoder.down.0.block.0.conv1.weight" in tensors and not any(
        k.startswith(("quant_conv.", "quantize.embedding.", "encoder.mid.attn_1.")) for k in tensors)
    if "decoder.conv_in.conv.weight" in tensors or plain:  # convolutions in wrappers, or bare as in older files
        return "infinity"
    if "quantize.embedding.weight" in tensors and "encoder.down.0.block.0.conv1.weight" in tensors:
        return _vqgan_or_ibq(tensors)
    raise ModelError(f"The keys of this checkpoint ({_some(sorted(tensors)[:4])}, ...) are those of none of the known "
                     f"families: {', '.join(MAPS)}.")


def _vqgan_or_ibq(tensors: Mapping[str, Tensor]) -> str:
    """By averaged weights and depth, the two things in which the published ones differ.

    ModelError where the two contradict each other; a RuntimeWarning where the depth is neither's.
    """
    blocks = _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
    by_average = "ibq" if any(k.startswith("model_ema.") for k in tensors) else "vqgan"
    by_depth = {2: "vqgan", 4: "ibq"}.get(blocks)
    facts = f"{'' if by_average == 'ibq' else 'no '}averaged weights, {blocks} residual blocks a level"
    published = "the published VQGANs have none and 2, the IBQs have them and 4"
    if by_depth is None:
        warnings.warn(f"VQGAN and IBQ have the same keys; this checkpoint ({facts}) is taken for {by_average} by its "
                      f"averages alone ({published}). Give the family, vqgan or ibq, to say which it is.",
                      RuntimeWarning, stacklevel=4)
    elif by_depth != by_average:
        raise ModelError(f"This checkpoint ({facts}) may be a VQGAN or an IBQ, which have the same keys: {published}. "
                         "Give the family: vqgan (nearest codeword) or ibq (largest inner product).")
    return by_average


# ----------------------------------------------------------------------------------------------------------- the way in


def tokenizer_class(name: str) -> type[Any]:
    """The class of a tokenizer of vtc by its name; imported when asked for."""
    if name not in TOKENIZER_CLASSES:
        raise ModelError(f"No tokenizer of vtc is called {name!r}; there are {', '.join(TOKENIZER_CLASSES)}.")
    cls: type[Any] = getattr(import_module(TOKENIZER_CLASSES[name]), name)
    return cls


def from_state_dict(tensors: Mapping[str, Tensor], family: str | None = None, **settings: Any) -> Tokenizer:
    """A tokenizer in eval mode with the weights of a state dict of upstream names; averaged weights where it has them.

    family: one of MAPS where the keys leave it open, or to insist on it; settings: arguments of the class.
    ModelError names the keys that are missing or left over.
    """
    family = family or recognise(tensors)
    if family not in MAPS:
        raise ConfigError(f"The family of a state dict is one of {', '.join(MAPS)}, not {family!r}.")
    # Averages of the discriminator have no place here, nor do they always have their parameter.
    kept = {k: v for k, v in tensors.items() if not k.startswith("model_ema.loss")}
    try:
        name, ours, config = MAPS[family](ema_weights(kept))
    except KeyError as error:
        raise ModelError(f"The checkpoint is no {family}: its key {error.args[0]} is missing.") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"The checkpoint is no {family}: its tensors have other shapes ({error}).") from error
    unknown = sorted(k for k, v in config.items() if v is None and k not in settings)
    if unknown:
        raise ModelError(f"The checkpoint, a {family} by its keys, does not tell {name}'s {', '.join(unknown)}: give "
                         "them as settings, or another family.")
    config |= settings
    try:
        with torch.device("meta"):
            model = tokenizer_class(name)(**config)
    except ConfigError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"{name} does not take these settings: {error}.") from error
    expected = model.state_dict()
    missing, left = sorted(expected.keys() - ours.keys()), sorted(ours.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & ours.keys() if expected[k].shape != ours[k].shape)
    for what, names in (("lacks", missing), ("has left over", left), ("has in other shapes", wrong)):
        if names:
            raise ModelError(f"The checkpoint does not fit {name}: it {what} {_some(names)}.")
    broken = sorted(k for k, v in ours.items() if v.is_floating_point() and not v.isfinite().all())
    if broken:
        raise ModelError(f"The checkpoint is damaged: values that are not finite in {_some(broken)}.")
    model = tokenizer_class(name)(**config)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in ours.items()})
    model.exact_weights = True
    return model.eval()


def load_checkpoint(source: str | Path, family: str | None = None,
                    **settings: Any) -> Tokenizer | DiffusersAutoencoder:
    """A tokenizer in eval mode from a file (.ckpt, .pt, .pth, .bin, .safetensors) or folder, as published.

    A folder is diffusers' or vtc's own. AutoencoderKL, AutoencoderDC and SC-VAE have no tokens: they come as
    `DiffusersAutoencoder`. family: says outright what a file is, one of `FAMILIES`, "sc_vae" for a folder of
    AutoencoderKL; settings: arguments of the class. Nothing is executed.
    """
    path = Path(source)
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"The family is one of {', '.join(FAMILIES)}, not {family!r}.")
    if not path.exists():
        raise ModelError(f"There is no checkpoint at {path}.")
    if path.is_file():
        return from_state_dict(read_tensors(path), family, **settings)
    return _load_folder(_part_of_pipeline(path), family, settings)


def _part_of_pipeline(folder: Path) -> Path:
    """The autoencoder's folder within that of a diffusers pipeline; any other folder is what is meant itself."""
    if not (folder / "config.json").exists():
        for part in ("vae", "vqvae", "movq"):
            if (folder / part / "config.json").is_file():
                return folder / part
    return folder


def _load_folder(path: Path, family: str | None, settings: dict[str, Any]) -> Tokenizer | DiffusersAutoencoder:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"The folder {path} has no readable config.json.") from error
    name = (config.get("class") or config.get("_class_name")) if isinstance(config, dict) else None
    autoencoder = name in ("AutoencoderKL", "AutoencoderDC", "ScaleConsistentVAE", "DiffusersAutoencoder")
    if family not in (None, "sc_vae") or (family and not autoencoder) or (settings and not autoencoder):
        raise ConfigError(f"The folder {path} says itself that it holds a {name}: it takes no family and no settings.")
    if autoencoder:
        from vtc.tokenizers.diffusers_adapters import DiffusersAutoencoder

        # AutoencoderKL with a stride is SC-VAE.
        stride = {"stride": 2} if family else {}
        return DiffusersAutoencoder.from_pretrained(path, **{**stride, **settings})
    if name == "VQModel":
        tokenizer: Tokenizer = tokenizer_class("DiffusersVQ").from_diffusers(path)
    elif isinstance(name, str) and "class" in config:
        tokenizer = tokenizer_class(name).from_pretrained(path)
    else:
        raise ModelError(f"The folder {path} holds a {name or 'model of no name'}; of diffusers, VQModel, "
                         "AutoencoderKL and AutoencoderDC can be read.")
    return tokenizer


def import_checkpoint(source: str | Path, out: str | Path, family: str | None = None, exact: bool = True,
                      **settings: Any) -> Tokenizer | DiffusersAutoencoder:
    """`load_checkpoint`, then `config.json` and `model.safetensors` in the folder `out`; the model is returned.

    exact: tensors that float16 would change are stored as float32, so that every token and pixel stays what it was;
        otherwise all are rounded to float16, in half the room.
    """
    model = load_checkpoint(source, family, **settings)
    model_: Any = model
    model_.exact_weights = exact
    model_.save_pretrained(out)
    return model
