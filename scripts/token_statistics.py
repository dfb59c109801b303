"""Statistics of a tokenizer's tokens over photographs, beside those of a text: JSON, a table and a figure.

    python scripts/token_statistics.py OUT --images photos=DIR [--model NAME] [--text NAME=DIR] [--matched N]

--images encodes a folder; --grids takes a file of token grids instead, as vtc.training.tokens caches them. --text reads
words (and characters) of the .txt, .md, .rst and .py files under a folder, of .py files the docstrings; without it, the
docstrings of the Python that runs this. A document is a picture or a file. Entropies of few tokens are too low, so
every corpus of more than --matched tokens is measured a second time on randomly chosen documents of that many.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vtc.errors import ConfigError, FileError
from vtc.eval.provenance import provenance
from vtc.eval.token_report import statistics_rows
from vtc.eval.token_statistics import TokenStatistics, token_statistics
from vtc.files import write_file
from vtc.images import load_image, to_tensor
from vtc.models import DEFAULT_MODEL, load_tokenizer
from vtc.script import run_script
from vtc.training.data import image_files
from vtc.training.tokens import TokenGrids

TEXTS = {".txt", ".md", ".rst", ".py"}


@dataclass(frozen=True)
class Corpus:
    name: str
    vocab: int
    documents: list[np.ndarray]
    about: str

    @property
    def tokens(self) -> int:
        return sum(document.size for document in self.documents)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for statistics.json, statistics.md and figure.svg, figure.png")
    parser.add_argument("--images", type=named, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--grids", type=named, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="what encodes --images; default %(default)s")
    parser.add_argument("--size", type=int, help="which codebook of --grids; default the largest")
    parser.add_argument("--text", type=named, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--matched", type=int, default=250_000, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    return run_script(lambda: report(args), "token_statistics")


def named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"write NAME=PATH, not {text!r}")
    return name, Path(path)


def report(args: argparse.Namespace) -> None:
    corpora = [encoded(name, folder, args.model) for name, folder in args.images]
    corpora += [from_grids(name, file, args.size) for name, file in args.grids]
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    for name, folder in args.text or [("docstrings", standard_library)]:
        corpora += texts(name, folder)
    found = {}
    for corpus in tqdm(matched(corpora, args.matched, args.seed), unit="corpus"):
        found[corpus.name] = (corpus, token_statistics(corpus.documents, corpus.vocab, seed=args.seed))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The folder {args.out} cannot be made: {error.strerror}.") from error
    data = {"corpora": {name: {"about": corpus.about, **statistics.to_json()}
                        for name, (corpus, statistics) in found.items()}, "provenance": provenance()}
    write_file(args.out / "statistics.json", (json.dumps(data) + "\n").encode())
    write_file(args.out / "statistics.md", table({n: s for n, (_, s) in found.items()}).encode())
    draw(args.out, {n: s for n, (_, s) in found.items()})
    print(table({n: s for n, (_, s) in found.items()}))


# Corpora


def encoded(name: str, folder: Path, model: str) -> Corpus:
    """The tokens of a folder's pictures; of several groups the first, of several scales the last and largest."""
    import torch

    files = image_files(folder)
    if not files:
        raise FileError(f"There are no pictures in {folder}.")
    tokenizer = load_tokenizer(model)
    documents = []
    with torch.inference_mode():
        for file in tqdm(files, unit="image"):
            tokens = tokenizer.encode(to_tensor(load_image(file).pixels)[None])
            rows, columns = tokens.layout.scales[-1]
            documents.append(tokens.indices[0, -rows * columns :, 0].reshape(rows, columns).numpy())
    return Corpus(name, tokens.layout.vocab[0], documents, f"{len(files)} pictures, {model}")


def from_grids(name: str, file: Path, size: int | None) -> Corpus:
    grids, _ = TokenGrids.load(file)
    size = grids.sizes[-1] if size is None else size
    if size not in grids.sizes:
        raise ConfigError(f"{file} has the codebooks {', '.join(map(str, grids.sizes))}, not {size}.")
    return Corpus(name, size, [grids.grid(n, size) for n in range(len(grids))],
                  f"{len(grids)} pictures, codebook of {size} words")


def texts(name: str, folder: Path) -> list[Corpus]:
    """Words (letters, in lower case) and characters of a folder's texts, indexed in the order of the alphabet."""
    read = [text for text in map(text_of, text_files(folder)) if text]
    words = [re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower()) for text in read]
    return [indexed(f"{name}, words", words, f"words of {len(read)} texts"),
            indexed(f"{name}, characters", read, f"characters of {len(read)} texts")]


def indexed(name: str, documents: Sequence[Sequence[str]], about: str) -> Corpus:
    vocab = sorted(set().union(*documents))
    place = {word: n for n, word in enumerate(vocab)}
    found = [np.array([place[word] for word in document], dtype=np.int32) for document in documents if document]
    return Corpus(name, len(vocab), found, about)


def text_of(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix != ".py":
        return data.decode(errors="replace")
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n".join(filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))))


def text_files(folder: Path) -> list[Path]:
    """Sorted; other people's packages and tests, which lie in the standard library's folder, are left out."""
    if not folder.is_dir():
        raise FileError(f"There is no folder {folder}.")
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in TEXTS and file.is_file()
                   and not left_out & set(file.relative_to(folder).parts))
    if not files:
        raise FileError(f"{folder} has no files that end in {', '.join(sorted(TEXTS))}.")
    return files


def matched(corpora: Iterable[Corpus], tokens: int, seed: int) -> list[Corpus]:
    """Each corpus, and after a larger one a random part of it with about so many tokens, of whole documents."""
    found = []
    for corpus in corpora:
        found.append(corpus)
        if corpus.tokens <= 1.2 * tokens:
            continue
        chosen, total = [], 0
        for n in np.random.default_rng(seed).permutation(len(corpus.documents)):
            if total + corpus.documents[n].size <= tokens:
                chosen.append(corpus.documents[n])
                total += corpus.documents[n].size
        if len(chosen) > 1:
            size = f"{total // 1000}k" if total >= 10_000 else str(total)
            found.append(Corpus(f"{corpus.name} ({size})", corpus.vocab, chosen,
                                f"{len(chosen)} documents at random, of {corpus.about}"))
    return found


# Table and figure


def table(found: dict[str, TokenStatistics]) -> str:
    """Markdown, a column a corpus."""
    lines = ["| | " + " | ".join(found) + " |", "|-" * (len(found) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells) + " |"
                              for name, cells in statistics_rows(found)]) + "\n"


def draw(folder: Path, found: dict[str, TokenStatistics]) -> None:
    """Six panels, as SVG and PNG; needs matplotlib (extra `eval`)."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no figure: pip install vtc[eval]", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "vtc", "font.size": 8, "axes.grid": True, "grid.alpha": 0.25,
                         "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    colours = {name: f"C{n}" for n, name in enumerate(found)}
    panels = zip(axes.flat, (ranks, growth, n_grams, distances, correlations, digits), strict=True)
    for axis, panel in panels:
        panel(axis, found, colours)
    handles = [plt.Line2D([], [], color=colours[name], label=name) for name in found]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(found), frameon=False)
    figure.savefig(folder / "figure.svg", metadata={"Date": None})
    figure.savefig(folder / "figure.png", dpi=130)
    plt.close(figure)


def ranks(axis, found, colours) -> None:
    for name, s in found.items():
        frequency = np.array(s.rank_frequency) / s.tokens
        rank = np.arange(1, len(frequency) + 1)
        at = np.unique(np.geomspace(1, len(rank), 300).round().astype(int)) - 1
        axis.loglog(rank[at], frequency[at], color=colours[name], lw=1.4)
        if s.zipf:
            fit = (rank + s.zipf.mandelbrot_shift) ** -s.zipf.mandelbrot_exponent
            axis.loglog(rank[at], (fit / fit.sum())[at], color=colours[name], lw=0.8, ls="--")
    axis.set(title="rank and frequency (dashed: Zipf-Mandelbrot)", xlabel="rank", ylabel="share of all tokens",
             ylim=(min(1 / s.tokens for s in found.values()) / 2, 1))


def growth(axis, found, colours) -> None:
    for name, s in found.items():
        if s.growth:
            axis.fill_between(s.growth.tokens, s.growth.low, s.growth.high, color=colours[name], alpha=0.2, lw=0)
            axis.loglog(s.growth.tokens, s.growth.mean, color=colours[name], lw=1.4)
            axis.loglog(s.growth.tokens, s.growth.independent, color=colours[name], lw=0.8, ls=":")
    axis.set(title="growth of the vocabulary (dotted: independent tokens)", xlabel="tokens", ylabel="different words")


def n_grams(axis, found, colours) -> None:
    for name, s in found.items():
        order = np.arange(1, len(s.n_grams) + 1)
        axis.plot(order, [g.conditional for g in s.n_grams], color=colours[name], lw=1.4, marker=".")
        axis.plot(order, [g.shuffled for g in s.n_grams], color=colours[name], lw=0.8, ls=":")
        if all(g.held_out is not None for g in s.n_grams):
            axis.plot(order, [g.held_out for g in s.n_grams], color=colours[name], lw=0.9, ls="--", marker="x", ms=4)
    axis.set(title="bits of a token given those before it\n(line: plug-in; dotted: shuffled; crosses: held-out)",
             xlabel="order of the n-gram", ylabel="bit", xticks=[1, 2, 3, 4], ylim=(0, None))


def distances(axis, found, colours) -> None:
    for name, s in found.items():
        for across, mark in ((True, "o-"), (False, "s--")):
            points = [(max(n.rows, n.columns), n.information - n.shuffled) for n in s.neighbours
                      if (n.rows == 0 if across else n.columns == 0)]
            if points:
                axis.plot(*zip(*points, strict=True), mark, color=colours[name], lw=1, ms=3)
    axis.set(title="information about a token at a distance\n(above shuffled; line: in the row, dashed: below)",
             xlabel="distance", ylabel="bit", xscale="log", ylim=(0, None))
    axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axis.minorticks_off()


def correlations(axis, found, colours) -> None:
    for name, s in found.items():
        if not s.cooccurrence:
            continue
        found_here = s.cooccurrence[0]
        place = np.arange(1, len(found_here.correlations) + 1)
        axis.plot(place, found_here.correlations, color=colours[name], lw=1.4, marker=".")
        axis.plot(place, found_here.shuffled_correlations, color=colours[name], lw=0.8, ls=":")
    axis.set(title="correlations of right-hand neighbours (dotted: shuffled)", xlabel="component",
             ylabel="singular value", ylim=(0, 1))


def digits(axis, found, colours) -> None:
    places = np.arange(1, 10)
    for n, (name, s) in enumerate(found.items()):
        shift = 0.8 * ((n + 0.5) / len(found) - 0.5)
        share = np.array(s.benford.digits) / sum(s.benford.digits)
        axis.bar(places + shift, share, 0.8 / len(found), color=colours[name])
    axis.plot(places, np.log10(1 + 1 / places), "k.-", lw=0.8)
    axis.set(title="leading digits of the words' counts (black: Benford)", xlabel="digit", ylabel="share of words",
             xticks=places)


if __name__ == "__main__":
    sys.exit(main())
