"""The models that vtc ships, by name and by the number that streams carry, and loading a tokenizer of any class.

A stream names its model by a number, which is looked up here and nowhere else: no stream can make vtc open a path or
a URL. A model's configuration names its class, which is looked up in a table: no file can make vtc import a module.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vtc.errors import ModelError
from vtc.tokenizers.classes import TOKENIZER_CLASSES

if TYPE_CHECKING:
    from vtc.tokenizers.base import Tokenizer

#: bundled models and the numbers in their streams: written down once, never changed, never given to another model.
#: 0 is every model that vtc does not ship.
MODEL_IDS = {"localvq-f16-2560": 1}
#: the start of their fingerprints in hexadecimal, by which a stream of a copy of one (model number 0) is recognised
FINGERPRINTS = {"localvq-f16-2560": "75f4165e1ae0bc05"}
DEFAULT_MODEL = "localvq-f16-2560"


def name_of(model_id: int) -> str | None:
    """The bundled model that a stream's number means; None for 0 and for numbers this version does not know."""
    return next((name for name, number in MODEL_IDS.items() if number == model_id), None)


def load_tokenizer(name_or_path: str | Path = DEFAULT_MODEL, allow_download: bool = True) -> Tokenizer:
    """A tokenizer in eval mode, float32, on the CPU: a bundled name, a local folder, or a repository on the Hub.

    allow_download: False keeps away from the network. The names in MODEL_IDS are never looked for outside the
    installation. Raises ModelError with one sentence where there is no such model or it is damaged.
    """
    from vtc import hub

    name = str(name_or_path)
    bundled = name in MODEL_IDS
    where = hub.BUNDLED / name if bundled else Path(name)
    if bundled and not where.is_dir():
        raise ModelError(f"The model {name!r} belongs to vtc but is missing from this installation; install vtc again.")
    if not where.is_dir() and not allow_download:
        raise ModelError(f"No model {name!r}: the bundled ones are {', '.join(hub.bundled_names()) or 'missing'}, "
                         "and there is no such folder.")
    try:
        # Path("owner/name") spells a Hub repository as it was given, except on Windows.
        config = json.loads(hub.fetch(where.as_posix(), hub.CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"The {hub.CONFIG} of the model {name!r} cannot be read: {error}.") from error
    kind = config.get("class") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in TOKENIZER_CLASSES:
        raise ModelError(f"The model {name!r} is of class {kind!r}; the tokenizers that vtc knows are "
                         f"{', '.join(TOKENIZER_CLASSES)}.")
    tokenizer: Tokenizer = getattr(import_module(TOKENIZER_CLASSES[kind]), kind).from_pretrained(where.as_posix())
    if bundled:
        if tokenizer.model_id not in (0, MODEL_IDS[name]):
            raise ModelError(f"The model {name!r} says its number is {tokenizer.model_id}, not {MODEL_IDS[name]}; "
                             "install vtc again.")
        tokenizer.model_id = MODEL_IDS[name]
    return tokenizer
