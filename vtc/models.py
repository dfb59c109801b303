"""The models that vtc ships, by name and by the number that streams carry, and loading a tokenizer of any class.

A stream names its model by a number, which is looked up here and nowhere else: no stream can make vtc open a path or
a URL. A model's configuration names its class, which is looked up in a table: no file can make vtc import a module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import ConfigError, ModelError
from vtc.generators.classes import CALIBRATION, DRAFT, GENERATION_CONFIG, GENERATOR_CLASSES, TOKENIZER
from vtc.tokenizers.classes import TOKENIZER_CLASSES

if TYPE_CHECKING:
    from vtc.codecs.concealer import Concealer
    from vtc.codecs.prior import TokenPrior
    from vtc.codecs.token_codec import TokenCodec
    from vtc.generators.pretrained import LoadedGenerator
    from vtc.tokenizers.base import Tokenizer
    from vtc.tokenizers.tokenizer_family import FamilyMembers

DEFAULT_MODEL = "localvq-f16-8192-r3"
DEFAULT_GENERATOR = "var-d6-128"

#: codewords of the smaller members of the default model's family
FAMILY_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: bundled models that are members of another's family (`vtc.tokenizers.tokenizer_family`): that other and their size
MEMBERS = {f"localvq-f16-8192-r3-s{size}": ("localvq-f16-8192-r3", size) for size in FAMILY_SIZES}
#: bundled models and the numbers in their streams: written down once, never changed, never given to another model.
#: 0 is every model that vtc does not ship.
MODEL_IDS = {"localvq-f16-8192-r3": 33, **{name: number for number, name in enumerate(MEMBERS, 34)}}
#: models that were bundled once, by their numbers; the folder of one, given by --model, still decodes its streams
RETIRED_IDS = {"localvq-f16-2560": 1, **{f"localvq-f16-2560-s{2 ** (n + 1)}": n for n in range(2, 11)},
               "localvq-f16-8192": 11, **{f"localvq-f16-8192-s{2 ** (n - 9)}": n for n in range(12, 22)},
               "localvq-f16-8192-r2": 22, **{f"localvq-f16-8192-r2-s{2 ** (n - 20)}": n for n in range(23, 33)}}


class _Fingerprints(Mapping[str, str]):
    """Those of single models are written here; those of a family's members stand in its file, read when asked for."""

    def __init__(self, single: dict[str, str]) -> None:
        self.single = single

    def __getitem__(self, name: str) -> str:
        if name not in MEMBERS:
            return self.single[name]
        base, size = MEMBERS[name]
        about = family_of(base)
        if about is None or size not in about.fingerprints:
            raise KeyError(name)
        return about.fingerprints[size]

    def __iter__(self) -> Iterator[str]:
        return (name for name in MODEL_IDS if name in self.single or (name in MEMBERS and self._has(name)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _has(self, name: str) -> bool:
        about = family_of(MEMBERS[name][0])
        return about is not None and MEMBERS[name][1] in about.fingerprints


#: the start of their fingerprints in hexadecimal, by which a stream of a copy of one (model number 0) is recognised
FINGERPRINTS = _Fingerprints({"localvq-f16-8192-r3": "41a90902a6ba050c"})


def name_of(model_id: int) -> str | None:
    """The model, bundled now or once, that a stream's number means; None for 0 and for numbers not given yet."""
    return next((name for name, number in (MODEL_IDS | RETIRED_IDS).items() if number == model_id), None)


def load_tokenizer(name_or_path: str | Path = DEFAULT_MODEL, allow_download: bool = True,
                   size: int | None = None) -> Tokenizer:
    """A tokenizer in eval mode, float32, on the CPU: a bundled name, a local folder, or a repository on the Hub.

    allow_download: False keeps away from the network. The names in MODEL_IDS are never looked for outside the
    installation.
    size: the member of the model's family that has so many codewords, see `family_of`; None is the model itself.
    Raises ModelError with one sentence where there is no such model or it is damaged.
    """
    from vtc import hub

    name = str(name_or_path)
    if name in MEMBERS:
        if size is not None:
            raise ModelError(f"The model {name!r} is a member of a family itself; choose another by its own name.")
        name, size = MEMBERS[name]
    bundled = name in MODEL_IDS
    where = hub.BUNDLED / name if bundled else hub.folder_of(name) or Path(name)
    if bundled and not where.is_dir():
        raise ModelError(f"The model {name!r} belongs to vtc but is missing from this installation; install vtc again.")
    if not where.is_dir() and not allow_download:
        known = [known for known in hub.bundled_names() if known in MODEL_IDS]
        raise ModelError(f"No model {name!r}: the bundled ones are {', '.join(known) or 'missing'}, "
                         "and there is no such folder.")
    tokenizer: Tokenizer = _class_of(where, name, TOKENIZER_CLASSES, "tokenizers").from_pretrained(where.as_posix())
    if size is not None:
        from vtc.tokenizers.tokenizer_family import FAMILY, TokenizerFamily

        tokenizer = TokenizerFamily.load(hub.fetch(where.as_posix(), FAMILY)).member(tokenizer, size)
        name = f"{name}-s{size}"
    if bundled:
        number = MODEL_IDS.get(name, 0)  # a member of a size that vtc does not ship has none
        if tokenizer.model_id not in (0, number):
            raise ModelError(f"The model {name!r} says its number is {tokenizer.model_id}, not {number}; "
                             "install vtc again.")
        tokenizer.model_id = number
    return tokenizer


def _class_of(where: Path, name: str, classes: Mapping[str, str], what: str) -> Any:
    """The class that the config.json of a folder or repository names, out of a table. Raises ModelError."""
    from vtc import hub

    try:
        # Path("owner/name") spells a Hub repository as it was given, except on Windows.
        config = json.loads(hub.fetch(where.as_posix(), hub.CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"The {hub.CONFIG} of the model {name!r} cannot be read: {error}.") from error
    kind = config.get("class") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in classes:
        raise ModelError(f"The model {name!r} is of class {kind!r}; the {what} that vtc knows are "
                         f"{', '.join(classes)}.")
    return getattr(import_module(classes[kind]), kind)


def load_generator(name_or_path: str | Path = DEFAULT_GENERATOR, allow_download: bool = True,
                   weights: bool = True) -> LoadedGenerator:
    """A generator with its tokenizer in eval mode, float32, on the CPU: a bundled name, a folder, or the Hub.

    The folder is described in `vtc.generators.pretrained`. allow_download: False keeps away from the network.
    weights: False gives shapes without numbers, to estimate memory by; only configurations are read or downloaded.
    Raises ModelError with one sentence where there is no such model, or it is damaged, or its parts do not fit.
    """
    from vtc import hub
    from vtc.generators.pretrained import LoadedGenerator, read_config

    name = str(name_or_path)
    each = (hub.CONFIG, hub.WEIGHTS) if weights else (hub.CONFIG,)
    files = [*each, GENERATION_CONFIG, CALIBRATION, *(f"{part}/{file}" for part in (TOKENIZER, DRAFT) for file in each)]
    folder = hub.fetch_folder(name, files, allow_download)

    def loaded(where: Path, name: str, classes: Mapping[str, str], what: str) -> Any:
        kind = _class_of(where, name, classes, what)
        return (kind.from_pretrained if weights else kind.without_weights)(where.as_posix())

    model = loaded(folder, name, GENERATOR_CLASSES, "generators")
    config = read_config(folder)
    shared = config.tokenizer
    if shared is not None and hub.bundled_folder(shared) is None:
        raise ModelError(f"The model {name!r} says that its tokenizer is that of {shared!r}, which is not bundled.")
    if weights:
        tokenizer = load_tokenizer(folder / TOKENIZER if shared is None else shared, allow_download=False)
    else:
        tokenizer = loaded(folder / TOKENIZER if shared is None else hub.BUNDLED / shared, name, TOKENIZER_CLASSES,
                           "tokenizers")
    draft = None
    if (folder / DRAFT).is_dir():
        draft = loaded(folder / DRAFT, f"{name}/{DRAFT}", {"LlamaGen": GENERATOR_CLASSES["LlamaGen"]}, "draft models")
    try:
        return LoadedGenerator(model, tokenizer, config, draft, folder)
    except ConfigError as error:
        raise ModelError(f"The model {name!r} does not fit together: {error}") from error


def family_of(name_or_path: str | Path = DEFAULT_MODEL) -> FamilyMembers | None:
    """Sizes and fingerprints of the smaller models that lie in a model's folder as one file; None where none do.

    Reads the head of that file alone; a repository on the Hub is not asked. Raises ModelError where it is damaged.
    """
    from vtc import hub
    from vtc.tokenizers.tokenizer_family import FAMILY

    name = str(name_or_path)
    path = (hub.BUNDLED / name if name in MODEL_IDS else Path(name)) / FAMILY
    return _members(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=16)
def _members(path: Path, changed: int) -> FamilyMembers:
    from vtc.tokenizers.tokenizer_family import FamilyMembers

    return FamilyMembers.read(path)


def size_of(name_or_path: str | Path, fingerprint: bytes, with_prior: bool = False) -> int | None:
    """The size of the member of a model's family that a stream with this fingerprint needs; None: the model itself.

    with_prior: the stream is coded with the prior in the model's folder, so its fingerprint names both.
    """
    family = family_of(name_or_path)
    known = {} if family is None else {in_streams(hexadecimal, name_or_path, with_prior): size
                                       for size, hexadecimal in family.fingerprints.items()}
    return known.get(fingerprint)


def in_streams(fingerprint: str, name_or_path: str | Path, with_prior: bool = False) -> bytes:
    """A model's fingerprint (hexadecimal) as its streams have it, where they are coded with the prior beside it."""
    prior = companions(name_or_path)[0] if with_prior else None
    if prior is None:
        return bytes.fromhex(fingerprint)
    from vtc.codecs.container import with_prior as both

    return both(bytes.fromhex(fingerprint), prior.fingerprint)


def load_codec(name_or_path: str | Path = DEFAULT_MODEL, allow_download: bool = True, size: int | None = None,
               ) -> TokenCodec:
    """The codec of a model: its tokenizer, with the prior and the concealer that lie in its folder, if any.

    Arguments and errors as of `load_tokenizer`.
    """
    from vtc.codecs.token_codec import TokenCodec

    return TokenCodec(load_tokenizer(name_or_path, allow_download, size), *companions(name_or_path))


def companions(name_or_path: str | Path, device: str = "cpu") -> tuple[TokenPrior | None, Concealer | None]:
    """The prior and the concealer in a model's folder; a repository on the Hub is not asked. Raises ModelError."""
    from vtc import hub
    from vtc.codecs.concealer import CONCEALER
    from vtc.codecs.prior import FILE as PRIOR

    name = str(name_or_path)
    name = MEMBERS[name][0] if name in MEMBERS else name
    folder = hub.BUNDLED / name if name in MODEL_IDS else Path(name)
    prior, concealer = folder / PRIOR, folder / CONCEALER
    return (_prior(prior, prior.stat().st_mtime_ns, device) if prior.is_file() else None,
            _concealer(concealer, concealer.stat().st_mtime_ns, device) if concealer.is_file() else None)


@lru_cache(maxsize=4)
def _prior(path: Path, changed: int, device: str) -> TokenPrior:
    from vtc.codecs.prior import TokenPrior

    return TokenPrior.load(path, device)


@lru_cache(maxsize=4)
def _concealer(path: Path, changed: int, device: str) -> Concealer:
    from vtc.codecs.concealer import Concealer

    return Concealer.load(path).to(device)
