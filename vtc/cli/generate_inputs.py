"""What vtc-generate draws from: classes or texts, and tokens that are given."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import ConfigError, ImageError, VtcError, sentence
from vtc.files import read_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vtc.generators.pretrained import Condition, LoadedGenerator
    from vtc.images import LoadedImage

#: what a picture is resized by
Size = tuple[int, int]


@dataclass(frozen=True)
class Conditions:
    """What to draw, in turn: picture i is number i modulo how many there are.

    facts: for each, what --json says of it. names: for each, the part of a file's name; '' for none.
    """

    condition: Condition
    facts: list[dict[str, Any]]
    names: list[str]

    def __len__(self) -> int:
        return len(self.facts)

    def of(self, pictures: range) -> Condition:
        """Those of some pictures."""
        import torch

        rows = torch.tensor([i % len(self) for i in pictures])
        if isinstance(self.condition, tuple):
            text, mask = self.condition
            return text[rows.to(text.device)], mask[rows.to(mask.device)]
        return self.condition[rows.to(self.condition.device)]


def conditions(args: argparse.Namespace, generator: LoadedGenerator) -> Conditions:
    """Of the arguments; classes in turn where they name none. Raises VtcError."""
    import torch

    from vtc.generators.infinity import Infinity
    from vtc.generators.text import encode_texts, load_features

    model = generator.model
    if not isinstance(model, Infinity):
        if args.prompt or args.features:
            raise ConfigError("This model draws classes and reads no texts: say which by --class.")
        numbers = [generator.label(c) for c in args.classes] if args.classes else list(range(model.classes))
        known = generator.config.class_names
        facts = [{"class": n} | ({"class_name": known[n]} if known else {}) for n in numbers]
        names = [_in_file_names(known[n]) if known else f"class{n}" for n in numbers]
        return Conditions(torch.tensor(numbers, device=generator.device), facts, names)
    if args.classes:
        raise ConfigError("This model draws from texts and has no classes: say what by --prompt or --features.")
    if args.features:
        text, mask = load_features(args.features, model.text_width)
        facts = [{"features": i} for i in range(len(text))]
    elif args.prompt:
        encoder = args.text_encoder or generator.config.text_encoder
        text, mask = encode_texts(args.prompt, encoder, model.text_width, len(model.no_text), generator.device)
        facts = [{"prompt": prompt} for prompt in args.prompt]
    else:
        raise ConfigError("This model draws from texts: say what by --prompt, or give --features.")
    return Conditions((text.to(generator.device), mask.to(generator.device)), facts, [""] * len(facts))


def _in_file_names(name: str) -> str:
    """Letters and digits, and _ for what is between them.

    >>> _in_file_names("English springer")
    'English_springer'
    """
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


@dataclass(frozen=True)
class Given:
    """Tokens of one picture, (1, L, G), and which of them are taken, (1, L) bool. notes: what was done to the files."""

    words: Tensor
    held: Tensor
    notes: tuple[str, ...] = ()

    def of(self, batch: int) -> tuple[Tensor, Tensor]:
        """For each picture of a batch."""
        return self.words.expand(batch, -1, -1), self.held.expand(batch, -1)


def given_tokens(args: argparse.Namespace, generator: LoadedGenerator, height_to_width: float) -> Given | None:
    """Of --given or --image, --mask and --keep. Raises VtcError."""
    import torch

    source = args.given or args.image
    if not source:
        return None
    layout, height, width = generator.layout(height_to_width)
    notes: tuple[str, ...] = ()
    if args.given and os.path.splitext(args.given)[1].lower() == ".vtc":
        words, arrived = _of_stream(generator, Path(args.given))
        if words.shape[1:] != (layout.length, layout.groups):
            raise ConfigError(f"{args.given} has {words.shape[1]} tokens, and this model draws {layout.length}: encode "
                              f"a picture of {width}x{height} pixels with its own tokenizer.")
    else:
        from vtc.images import load_image, to_tensor

        pixels, note = _fitted(load_image(read_file(source), name=source), (height, width))
        notes += (f"{source}: {note}",) if note else ()
        words = generator.encode(to_tensor(pixels)[None].to(generator.device), height_to_width).indices
        arrived = torch.ones(1, layout.length, dtype=torch.bool, device=words.device)
    held = arrived
    if args.mask or args.keep is not None:
        held = torch.zeros_like(arrived)
    if args.mask:
        from vtc.images import load_image, to_tensor

        pixels, note = _fitted(load_image(read_file(args.mask), name=args.mask), (height, width))
        notes += (f"{args.mask}: {note}",) if note else ()
        anew = to_tensor(pixels)[None, :1]
        cells = [torch.nn.functional.interpolate(anew, grid, mode="area").flatten() for grid in layout.scales]
        held = held | (torch.cat(cells) < 0.5).to(held.device)
    if args.keep is not None:
        steps = [rows * columns for rows, columns in layout.scales]
        if len(steps) == 1:
            steps = [layout.scales[0][1]] * layout.scales[0][0]
        if not 0 < args.keep < len(steps):
            raise ConfigError(f"--keep {args.keep}: this model draws {len(steps)} "
                              f"{'scales' if len(layout.scales) > 1 else 'rows'}; keep fewer than that.")
        held[:, : sum(steps[: args.keep])] = True
    held = held & arrived
    if held.all():
        raise ConfigError(f"All tokens of {source} are given, so nothing is left to draw: say what to draw anew by "
                          "--mask, or how many scales (or rows) to keep by --keep.")
    return Given(words, held, notes)


def _of_stream(generator: LoadedGenerator, path: Path) -> tuple[Tensor, Tensor]:
    from vtc.codecs.token_codec import TokenCodec

    stream = read_file(path)
    try:
        received = TokenCodec(generator.tokenizer).receive(stream)
    except VtcError as error:
        raise type(error)(sentence(error, str(path))) from error
    return received.tokens.indices, ~received.lost.any(2)


def _fitted(image: LoadedImage, size: Size) -> tuple[np.ndarray, str]:
    """uint8 (H, W, 3) of this size: the middle of the picture, and a word for what was done to it."""
    import numpy as np
    from PIL import Image, ImageOps

    height, width = size
    if (image.height, image.width) == size:
        return image.pixels, ""
    if min(image.height, image.width) < 1:
        raise ImageError("The picture has no pixels.")
    fitted = ImageOps.fit(Image.fromarray(image.pixels), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted), f"resized from {image.width}x{image.height} to {width}x{height}, its middle"
