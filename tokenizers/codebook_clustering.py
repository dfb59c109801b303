"""From one codebook to many: smaller codebooks by K-means over its words, one for each rate.

"Extreme Image Compression using Fine-tuned VQGANs" (Mao et al., 2307.08265) takes a VQGAN with 16384 words of 256
dimensions and clusters the words themselves, not the encoder's latents, to S = 8 ... 8192 centres. A token then costs
log2 S bits. Encoder and decoder stay; below S = 512 a short fine-tuning of codebook and 1x1 convolutions pays, which is
`vtc.tokenizers.codebook_finetuning`.

    family = cluster_codebook(model.quantizer.codebook)
    family.save("codebooks.safetensors")
    small = with_codebook(model, family.codebooks[256], family.maps[256])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vtc.errors import ConfigError, FileError, ModelError
from vtc.files import write_file
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.kmeans import kmeans

#: codebook sizes of the paper's rates, and the two that its script names beyond them
SIZES = tuple(2**n for n in range(3, 14))

FORMAT = "vtc codebook family 1"

AnyTokenizer = TypeVar("AnyTokenizer", bound=Tokenizer)


@dataclass(frozen=True)
class CodebookFamily:
    """Codebooks of several sizes that come from one.

    codebooks: S -> (S, d).
    maps: S -> (K,) int64, the new index of each word of the first codebook: tokens of the large model become tokens of
        the small one without the encoder.
    inertia: S -> weighted sum of squared distances between the words and their centres.
    base: SHA-256 of the first codebook (float32, row by row), in hexadecimal.
    """

    codebooks: dict[int, Tensor]
    maps: dict[int, Tensor]
    inertia: dict[int, float]
    base: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes there are, smallest first."""
        return tuple(sorted(self.codebooks))

    def save(self, path: str | Path) -> None:
        """One safetensors file: "codebook.S", "map.S" (int16 or int32), and the rest as metadata. FileError."""
        tensors = {f"codebook.{size}": self.codebooks[size].cpu().contiguous() for size in self.sizes}
        for size in self.sizes:
            tensors[f"map.{size}"] = self.maps[size].to("cpu", torch.int16 if size <= 2**15 else torch.int32)
        metadata = {"format": FORMAT, "base": self.base, "inertia": json.dumps(self.inertia)}
        write_file(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> CodebookFamily:
        """What `save` wrote. FileError where there is no such file, ModelError where it is something else."""
        if not Path(path).is_file():
            raise FileError(f"There is no file {path}.")
        try:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata() or {}, file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as safetensors ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise ModelError(f"{path} is no family of codebooks: its format is {metadata.get('format')!r}.")
        try:
            inertia = {int(size): float(value) for size, value in json.loads(metadata["inertia"]).items()}
            codebooks = {size: tensors.pop(f"codebook.{size}") for size in inertia}
            maps = {size: tensors.pop(f"map.{size}").long() for size in inertia}
            base = metadata["base"]
        except (KeyError, ValueError, AttributeError) as error:
            raise ModelError(f"{path} is an incomplete family of codebooks: {error}.") from error
        if tensors or any(len(codebooks[s]) != s or maps[s].min() < 0 or maps[s].max() >= s for s in maps):
            raise ModelError(f"{path} is a family of codebooks whose sizes and maps contradict each other.")
        return cls(codebooks, maps, inertia, base)


def cluster_codebook(codebook: Tensor, sizes: Sequence[int] = SIZES, usage: Tensor | None = None,
                     start: Literal["k-means++", "random"] = "k-means++", iterations: int = 300,
                     tolerance: float = 1e-4, seed: int = 0) -> CodebookFamily:
    """(K, d) words to a codebook of each size. A size gives the same centres whatever other sizes are asked for.

    usage: (K,) counts or frequencies of the words: how much each counts. The paper counts all alike; with usage, words
        that never occur attract no centre. A row of a tokenizer's `token_frequencies` serves, or counts of a folder.
    start, iterations, tolerance: of `kmeans`.
    """
    if codebook.ndim != 2 or not sizes or not all(1 <= size <= len(codebook) for size in sizes):
        raise ConfigError(f"A codebook of shape {tuple(codebook.shape)} cannot be clustered to sizes {tuple(sizes)}: "
                          "it takes (K, d) words and sizes from 1 to K.")
    codebook = codebook.detach().float()
    family = CodebookFamily({}, {}, {}, hashlib.sha256(codebook.cpu().contiguous().numpy().data).hexdigest())
    for size in sizes:
        generator = torch.Generator().manual_seed(seed * 2**20 + size)
        found = kmeans(codebook, size, usage, start, iterations, tolerance, generator)
        family.codebooks[size], family.maps[size] = found.centres.contiguous(), found.labels
        family.inertia[size] = found.inertia
    return family


def with_codebook(model: AnyTokenizer, codebook: Tensor, old_to_new: Tensor | None = None) -> AnyTokenizer:
    """A copy of a VQ tokenizer (`VQGAN`, `LocalVQ`, ...) with another codebook of the same dimension, (S, d).

    old_to_new: the family's map; the model's entropy-coding tables, where it has some, are added up along it. Without a
        map the copy has the tables of a new model.
    """
    config: dict[str, Any] = dict(getattr(model, "_hub_mixin_config", None) or {})
    tensors = model.state_dict()
    if "codebook_size" not in config or "quantizer.codebook" not in tensors:
        raise ConfigError(f"{type(model).__name__} has no codebook that could be replaced.")
    words, dim = tensors["quantizer.codebook"].shape
    if codebook.ndim != 2 or codebook.shape[1] != dim:
        raise ConfigError(f"The new codebook must be (S, {dim}), not {tuple(codebook.shape)}.")
    if old_to_new is not None and (old_to_new.shape != (words,) or not (old_to_new < len(codebook)).all()):
        raise ConfigError(f"The map must give each of {words} old words one of {len(codebook)} new ones.")
    smaller = type(model)(**(config | {"codebook_size": len(codebook)}))
    frequencies = tensors.pop("token_frequencies", None)
    own = {"token_frequencies": smaller.token_frequencies} if smaller.token_frequencies is not None else {}
    smaller.load_state_dict(tensors | own | {"quantizer.codebook": codebook})
    if frequencies is not None and old_to_new is not None:
        smaller.token_frequencies = _merged(frequencies, old_to_new.to(frequencies.device), len(codebook))
    return smaller.train(model.training)


def _merged(frequencies: Tensor, old_to_new: Tensor, size: int) -> Tensor:
    """(T, K) tables as (T, S), with the same sums; a word that nothing maps to gets 1 from the most frequent."""
    merged = frequencies.new_zeros(len(frequencies), size).index_add_(1, old_to_new, frequencies)
    missing = (merged == 0).to(merged.dtype)
    return (merged + missing).scatter_add(1, merged.argmax(1, keepdim=True), -missing.sum(1, keepdim=True).to(merged))
