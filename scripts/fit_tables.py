"""Fit the static entropy-coding tables of a model to folders of images.

    python scripts/fit_tables.py --model runs/localvq/model --images photographs/ --validate holdout/

Encodes every image, counts the words of each table, and writes the tables into the model's `model.safetensors` as
`token_frequencies`. The tables are part of the fingerprint: streams made with the old ones need the old model.
Each word's count c enters as c + 1/2 (Krichevsky-Trofimov), so a word that was never seen stays affordable.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vtc import hub
from vtc.codecs.entropy import StaticTables, frequencies_from_counts
from vtc.errors import ConfigError
from vtc.files import write_file
from vtc.images import load_image, to_tensor
from vtc.models import load_tokenizer
from vtc.script import run_script
from vtc.tokenizers.base import Tokenizer, Tokens
from vtc.tokenizers.tiling import encode_tiled
from vtc.training.data import image_files

KEY = "token_frequencies"


def main(arguments: list[str] | None = None) -> int:
    """Parse, count, write; 0 done, 1 failed (one sentence on stderr)."""
    args = parse_args(arguments)
    return run_script(lambda: fit(args), "fit_tables")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundled name, folder, or repository on the Hub")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders of pictures to count")
    parser.add_argument("--validate", type=Path, nargs="+", default=[], help="other folders, to measure the tables on")
    parser.add_argument("--tables", choices=("one", "group", "scale"),
                        help="one table; one a group; one a scale and group. Default: as many as the tokens have kinds")
    parser.add_argument("--output", type=Path, help="folder of the new model; by default the model's own")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON on stdout")
    return parser.parse_args(arguments)


def fit(args: argparse.Namespace) -> None:
    """Count, fit, measure, write, print."""
    if args.output is None and not Path(args.model).is_dir():
        raise ConfigError(f"{args.model} is not a folder: say by --output where the model with new tables goes.")
    tokenizer = load_tokenizer(args.model)
    tokens = encoded(tokenizer, args.images)
    counts = count(tokens, args.tables or kind_of(tokens))
    tables = StaticTables(np.stack([row_of(c, max(map(len, counts))) for c in counts]))
    facts: dict[str, float | str] = {"images": len(tokens), "tables": len(counts), **described(counts),
                                     **measured(tokens, tables, "fitted")}
    if args.validate:
        facts |= measured(encoded(tokenizer, args.validate), tables, "validation")
    write(args.model, args.output or Path(args.model), tables)
    facts["fingerprint"] = load_tokenizer(args.output or args.model).fingerprint().hex()
    print(json.dumps(facts) if args.json else "\n".join(f"{key + ':':<34}{value}" for key, value in facts.items()))


def encoded(tokenizer: Tokenizer, folders: list[Path]) -> list[Tokens]:
    """The tokens of every picture in the folders, one by one."""
    files = [file for folder in folders for file in image_files(folder)]
    if not files:
        raise ConfigError(f"There are no pictures in {', '.join(map(str, folders))}.")
    with torch.inference_mode():
        return [encode_tiled(tokenizer, to_tensor(load_image(file).pixels)[None]) for file in tqdm(files, unit="image")]


def kind_of(tokens: list[Tokens]) -> str:
    """The finest kind of tables that the layout has."""
    layout = tokens[0].layout
    return "scale" if len(layout.scales) > 1 else "group" if layout.groups > 1 else "one"


def count(tokens: list[Tokens], kind: str) -> list[NDArray[np.int64]]:
    """Counts of the words of each table, in the order of the tables. Raises ConfigError where layouts do not match."""
    first = tokens[0].layout
    if any(t.layout.vocab != first.vocab or len(t.layout.scales) != len(first.scales) for t in tokens):
        raise ConfigError("The images have token layouts with unlike scales, so no tables can serve them all.")
    if kind == "one" and len(set(first.vocab)) > 1:
        raise ConfigError("The groups have unlike vocabularies, so one table cannot serve all: use --tables group.")
    # (scale, group) -> counts
    parts = [[np.zeros(v, dtype=np.int64) for v in first.vocab] for _ in first.scales]
    for image in tokens:
        for part, grid in zip(parts, image.grids(), strict=True):
            for g, vocab in enumerate(first.vocab):
                part[g] += np.bincount(grid[..., g].flatten().numpy(), minlength=vocab)
    if kind == "scale":
        return [c for part in parts for c in part]
    groups = [sum((part[g] for part in parts), np.zeros(v, dtype=np.int64)) for g, v in enumerate(first.vocab)]
    return groups if kind == "group" else [np.sum(groups, axis=0)]


def row_of(counts: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Frequencies of one table, from counts + 1/2, padded with zeros to `width` words."""
    row = frequencies_from_counts(2 * counts + 1)
    return np.pad(row, (0, width - len(row)))


def described(counts: list[NDArray[np.int64]]) -> dict[str, float]:
    """Entropy, perplexity and usage of the counted words: means over the tables that counted any."""
    entropies, used = [], []
    for table in counts:
        if table.sum():
            p = table[table > 0] / table.sum()
            entropies.append(float(-(p * np.log2(p)).sum()))
            used.append(len(p) / len(table))
    return {"tokens": int(sum(c.sum() for c in counts)), "entropy_bits": float(np.mean(entropies)),
            "perplexity": float(np.mean(np.exp2(entropies))), "usage": float(np.mean(used))}


def measured(tokens: list[Tokens], tables: StaticTables, name: str) -> dict[str, float]:
    """Bits an index of these images, under the tables and packed."""
    bits = sum(tables.ideal_bits(t.indices[0].numpy(), t.layout) for t in tokens)
    indices = sum(t.indices.numel() for t in tokens)
    return {f"{name}_bits_per_index": bits / indices,
            f"{name}_packed_bits_per_index": sum(t.layout.bits for t in tokens) / indices}


def write(model: str, output: Path, tables: StaticTables) -> None:
    """The model with these tables to `output`, once it has been loaded from a temporary folder."""
    source = hub.fetch(model, hub.WEIGHTS)
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors[KEY] = torch.from_numpy(tables.frequencies).int()
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / hub.WEIGHTS
        save_file(tensors, made, metadata)
        shutil.copy(hub.fetch(model, hub.CONFIG), temporary)
        load_tokenizer(temporary)  # a class that cannot hold such tables says so here
        output.mkdir(parents=True, exist_ok=True)
        for file_made in Path(temporary).iterdir():
            write_file(output / file_made.name, file_made.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
