"""Token grids of a folder of photographs, for a family of codebooks: what priors and concealment are trained on.

    grids = cached_grids(folder, [model, *members], image_files("photos/"), views=4, seed=0)
    grids[0].grid(7, 8192)      # (rows, columns) indices of the eighth picture's first view

The members of a family share the encoder but for its last projection, so a picture is encoded once, whatever the number
of codebooks. View 0 is the picture as it is; the others are shrunk, cut at the left and the top, and mirrored half of
the time, by a random generator of their own each: a view is the same whatever else is asked for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from vtc.errors import ConfigError, ModelError, TrainingError, first_sentence
from vtc.files import write_file
from vtc.hub import fingerprint
from vtc.images import load_image, to_tensor
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.vector_quantizer import nearest_codeword
from vtc.training.data import PATIENCE

log = logging.getLogger(__name__)

FORMAT = "vtc token grids 1"


@dataclass(frozen=True)
class TokenGrids:
    """The indices of many pictures in several codebooks.

    shapes: (N, 2) int32, rows and columns of each grid.
    tokens: codebook size -> (sum of rows * columns,) int16, grid after grid, each row by row.
    """

    shapes: NDArray[np.int32]
    tokens: dict[int, NDArray[np.int16]]

    def __post_init__(self) -> None:
        lengths = {len(tokens) for tokens in self.tokens.values()}
        if lengths != {int(self.shapes.astype(np.int64).prod(1).sum())}:
            raise ConfigError(f"Grids of {len(self.shapes)} shapes do not have {lengths} tokens.")

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """(N + 1,): where each grid's tokens start, and behind the last."""
        return np.concatenate([[0], self.shapes.astype(np.int64).prod(1).cumsum()])

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The codebooks there are, smallest first."""
        return tuple(sorted(self.tokens))

    def grid(self, n: int, size: int) -> NDArray[np.int16]:
        """(rows, columns) of picture n in the codebook of `size` words."""
        return self.tokens[size][self._starts[n] : self._starts[n + 1]].reshape(self.shapes[n])

    def mapped(self, source: int, maps: dict[int, Tensor]) -> TokenGrids:
        """With codebooks that are coarser than `source`: size -> (K,) new index of each word, as a family's `maps`."""
        coarser = {size: old_to_new.numpy().astype(np.int16)[self.tokens[source]]
                   for size, old_to_new in maps.items()}
        return TokenGrids(self.shapes, {**coarser, **self.tokens})

    def save(self, path: str | Path, facts: dict[str, str]) -> None:
        """One safetensors file with `facts` beside the format in its metadata."""
        tensors: dict[str, NDArray] = {f"tokens.{size}": self.tokens[size] for size in self.sizes}
        tensors["shapes"] = self.shapes
        write_file(path, save(tensors, {"format": FORMAT, **facts}))

    @classmethod
    def load(cls, path: str | Path) -> tuple[TokenGrids, dict[str, str]]:
        """What `save` wrote, and the facts. ModelError where the file is something else."""
        try:
            with safe_open(path, "np") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as token grids ({error}).") from error
        if facts.pop("format", None) != FORMAT:
            raise ModelError(f"{path} holds no token grids.")
        shapes = tensors.pop("shapes")
        return cls(shapes, {int(name.split(".")[1]): tokens for name, tokens in tensors.items()}), facts


def readable(files: Sequence[Path]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(number, pixels (H, W, 3)) of each file that can be read; the others are named and left out.

    TrainingError where a hundred in a row cannot.
    """
    broken = 0
    for n, file in enumerate(files):
        try:
            pixels = load_image(file).pixels
        except MemoryError:
            raise
        except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, ...
            log.warning("%s is left out: %s.", file, first_sentence(error))
            broken += 1
            if broken == PATIENCE:
                raise TrainingError(f"{PATIENCE} pictures in a row cannot be read, the last one is {file}: "
                                    "look at the data.") from error
            continue
        broken = 0
        yield n, pixels


def whole_pictures(files: Sequence[Path]) -> Iterator[Tensor]:
    """(1, 3, H, W) in [0, 1] of each file."""
    return (to_tensor(load_image(file).pixels)[None] for file in files)


def random_views(files: Sequence[Path], view: int, seed: int, min_scale: float = 0.5) -> Iterator[Tensor]:
    """(1, 3, h, w) in [0, 1] of each: shrunk by a factor from [min_scale, 1], up to 15 pixels cut off, mirrored.

    Files that cannot be read are left out. At least 64 pixels a side stay, where the picture has them.
    """
    for n, pixels in readable(files):
        rng = np.random.default_rng((seed, view, n))
        height, width = pixels.shape[:2]
        smallest = min(1.0, max(min_scale, 80 / min(height, width)))
        scale = rng.uniform(smallest, 1.0)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        left, top = rng.integers(0, min(16, size[0])), rng.integers(0, min(16, size[1]))
        # One resampling for both: the box is what remains, in pixels of the file.
        box = (left * width / size[0], top * height / size[1], width, height)
        view_size = (size[0] - int(left), size[1] - int(top))
        shrunk = np.array(Image.fromarray(pixels).resize(view_size, Image.Resampling.LANCZOS, box=box))
        yield to_tensor(np.ascontiguousarray(shrunk[:, ::-1] if rng.random() < 0.5 else shrunk))[None]


@torch.inference_mode()
def token_grids(members: Sequence[LocalVQ], pictures: Iterable[Tensor], bfloat16: bool = False) -> TokenGrids:
    """The grids of `pictures` (1, 3, H, W) for models that differ in codebook and projection only.

    bfloat16: encode in half the time; a few tokens in a hundred, near the border of two words, come out otherwise.
    Raises ConfigError where two members have codebooks of one size, or encoders that differ before the projection.
    """
    base = members[0]
    sizes = [member.quantizer.codebook_size for member in members]
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"The members of a family have codebooks of different sizes, not {sizes}.")
    if max(sizes) > 2**15:
        raise ConfigError("Token grids hold indices below 32768.")
    trunk = {name: t for name, t in base.encoder.state_dict().items() if not name.startswith("head.")}
    for member in members[1:]:
        theirs = member.encoder.state_dict()
        if any(not torch.equal(tensor, theirs[name]) for name, tensor in trunk.items()):
            raise ConfigError("The members of a family share their encoder but for its last projection.")
    shapes: list[torch.Size] = []
    tokens: list[list[NDArray[np.int16]]] = [[] for _ in members]
    for picture in pictures:
        with torch.autocast(picture.device.type, torch.bfloat16, enabled=bfloat16):
            features = base.features(picture)
        features = features.float()
        shapes.append(features.shape[-2:])
        for member, parts in zip(members, tokens, strict=True):
            z = member.encoder.project(features)[0].flatten(1).T
            parts.append(nearest_codeword(z, member.quantizer.codewords).numpy().astype(np.int16))
    if not shapes:
        raise ConfigError("There are no pictures to encode.")
    return TokenGrids(np.array(shapes, dtype=np.int32),
                      {size: np.concatenate(parts) for size, parts in zip(sizes, tokens, strict=True)})


def cached_grids(folder: str | Path, members: Sequence[LocalVQ], files: Sequence[Path], views: int,
                 seed: int, bfloat16: bool = False) -> list[TokenGrids]:
    """A `TokenGrids` for each view of the files, kept in `folder`: a view that lies there is not encoded again.

    A cache of other models, files or another seed is told by its facts and made anew; one that holds more codebooks
    than `members`, such as a prior's, serves.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [member.quantizer.codebook_size for member in members]
    encoders = [f"{size}: {token_fingerprint(member)}" for size, member in zip(sizes, members, strict=True)]
    found = []
    for view in range(views):
        path = folder / f"view-{view:03}.safetensors"
        facts = {"seed": str(seed), "files": json.dumps([f"{f.name} {f.stat().st_size}" for f in files]),
                 **({"type": "bfloat16"} if bfloat16 else {})}
        if path.is_file():
            grids, theirs = TokenGrids.load(path)
            stored = json.loads(theirs.pop("encoders", "[]"))
            if theirs == facts and set(encoders) <= set(stored):
                found.append(TokenGrids(grids.shapes, {size: grids.tokens[size] for size in sizes}))
                continue
        pictures = random_views(files, view, seed) if view else (to_tensor(p)[None] for _, p in readable(files))
        pictures = tqdm(pictures, total=len(files), unit="image", desc=f"view {view}")
        found.append(token_grids(members, pictures, bfloat16))
        found[-1].save(path, facts | {"encoders": json.dumps(encoders)})
    return found


def token_fingerprint(member: LocalVQ) -> str:
    """Of all that decides which index a picture gets: encoder and codebook."""
    return fingerprint(member, ("encoder.", "quantizer.")).hex()
