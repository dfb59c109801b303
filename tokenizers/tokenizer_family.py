"""One tokenizer at several rates: a base model, and the few tensors in which each smaller member differs from it.

    image -> encoder -> nearest of S codewords* -> decoder, of which entry, scales and biases* -> image   * its own

The rest is the base's, so a member of S words costs 33 S numbers with the bundled model, 19,107 more where its decoder
was tuned, and ten of them 0.6 MiB. A member is a tokenizer like any other: its own number, fingerprint and
entropy-coding table.

    family = TokenizerFamily.load("family.safetensors")
    small = family.member(base, 64)

`scripts/finetune_codebook.py` makes such a file: clusters the base's codebook, fine-tunes, counts the tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vtc.errors import ConfigError, FileError, ModelError
from vtc.files import write_file
from vtc.hub import stored_tensors
from vtc.tokenizers.base import Tokenizer

#: the family's name in a model's folder, beside model.safetensors
FAMILY = "family.safetensors"
FORMAT = "vtc tokenizer family 1"

AnyTokenizer = TypeVar("AnyTokenizer", bound=Tokenizer)


@dataclass(frozen=True)
class FamilyMembers:
    """What a family's file says of itself: the base's fingerprint and each member's, in hexadecimal, by its size."""

    base: str
    fingerprints: dict[int, str]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codewords of the members, smallest first."""
        return tuple(sorted(self.fingerprints))

    @classmethod
    def read(cls, path: str | Path) -> FamilyMembers:
        """From the head of a file; no tensor is read. FileError where there is none, ModelError where it is not one."""
        if not Path(path).is_file():
            raise FileError(f"There is no file {path}.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as safetensors ({error}).") from error
        if FORMAT not in metadata:
            raise ModelError(f"{path} is no family of tokenizers.")
        try:
            facts = json.loads(metadata[FORMAT])
            fingerprints = {int(size): str(known) for size, known in facts["fingerprints"].items()}
            if not fingerprints or min(fingerprints) < 1:
                raise ValueError("it names no members")
            return cls(str(facts["base"]), fingerprints)
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ModelError(f"{path} is an incomplete family of tokenizers: {error}.") from error


@dataclass(frozen=True)
class TokenizerFamily:
    """The members of a base model.

    members: S -> the tensors that member S has instead of the base's, by their names in its state dict; always
        `quantizer.codebook` (S, d) and `token_frequencies` (1, S), and what of the decoder was fine-tuned.
    about: the base's fingerprint and the members'.
    """

    members: dict[int, dict[str, Tensor]]
    about: FamilyMembers

    @classmethod
    def of(cls, base: Tokenizer, members: dict[int, Tokenizer]) -> TokenizerFamily:
        """The family of finished models that share all other tensors with `base`; tensors are kept as they are stored.

        Raises ConfigError where a member differs from the base in nothing, or has tensors of other names.
        """
        shared, differences, fingerprints = stored_tensors(base), {}, {}
        for size, model in members.items():
            own = stored_tensors(model)
            if own.keys() != shared.keys():
                raise ConfigError(f"Member {size} and the base model have tensors of different names.")
            differences[size] = {name: t for name, t in own.items() if not torch.equal(t, shared[name])}
            if not differences[size]:
                raise ConfigError(f"Member {size} is the base model itself.")
            fingerprints[size] = model.fingerprint().hex()
        return cls(differences, FamilyMembers(base.fingerprint().hex(), fingerprints))

    def member(self, base: AnyTokenizer, size: int) -> AnyTokenizer:
        """The tokenizer of `size` words, in eval mode; `base` stays as it is, and no tensor is shared with it.

        Raises ModelError where the family has no such member or was made for another model.
        """
        if size not in self.members:
            raise ModelError(f"The family has no member of {size} words; it has {_listed(self.about.sizes)}.")
        if base.fingerprint().hex() != self.about.base:
            raise ModelError(f"The family was made for the model with fingerprint {self.about.base}, and this one's is "
                             f"{base.fingerprint().hex()}; make it anew with scripts/finetune_codebook.py.")
        config: dict[str, Any] = dict(getattr(base, "_hub_mixin_config", None) or {})
        try:
            model = type(base)(**(config | {"codebook_size": size}))
            model.load_state_dict({**base.state_dict(), **self.members[size]})
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"Member {size} does not fit {type(base).__name__}: {reason}") from error
        return model.eval()

    def save(self, path: str | Path) -> None:
        """One safetensors file: tensors "S.name", and the fingerprints as metadata. FileError."""
        tensors = {f"{size}.{name}": t for size, member in sorted(self.members.items()) for name, t in member.items()}
        # One entry: several would come in any order, and the same family should be the same bytes.
        facts = {"base": self.about.base, "fingerprints": dict(sorted(self.about.fingerprints.items()))}
        write_file(path, save(tensors, {FORMAT: json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path) -> TokenizerFamily:
        """What `save` wrote. FileError where there is no such file, ModelError where it is something else."""
        about = FamilyMembers.read(path)
        members: dict[int, dict[str, Tensor]] = {size: {} for size in about.sizes}
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  a safetensors file is no dict
                    size, _, name = key.partition(".")
                    members[int(size)][name] = file.get_tensor(key)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"{path} is a damaged family of tokenizers: {error}.") from error
        return cls(members, about)


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
