"""Token statistics as a reader sees them: the rows of a table, and charts for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vtc.eval.charts import Series, line_chart
from vtc.eval.token_statistics import Cooccurrence, TokenStatistics

#: of a corpus what a table shows; None, or nothing, for a dash
Cell = Callable[[TokenStatistics], object]
#: points of a curve
POINTS = 60


def statistics_rows(found: Mapping[str, TokenStatistics]) -> list[tuple[str, list[str]]]:
    """What is measured, and the cell of each corpus; a dash where a corpus is too small for it."""
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, cell: Cell) -> None:
        rows.append((name, [str(cell(statistics) or "-") for statistics in found.values()]))

    row("documents", lambda s: f"{s.documents:,}")
    row("tokens", lambda s: f"{s.tokens:,}")
    row("words used of the vocabulary", lambda s: f"{s.used:,} of {s.vocab:,}")
    row("entropy, plug-in (bit)", lambda s: f"{s.entropy.plugin:.3f}")
    row("entropy, Miller-Madow", lambda s: f"{s.entropy.miller_madow:.3f}")
    row("entropy, Grassberger", lambda s: f"{s.entropy.grassberger:.3f}")
    row("entropy, Chao-Shen", lambda s: f"{s.entropy.chao_shen:.3f}")
    row("entropy over log2 of the vocabulary", lambda s: f"{s.normalised_entropy:.3f}")
    row("Zipf slope, least squares (R2)", lambda s: s.zipf and f"{s.zipf.slope:.2f} ({s.zipf.r_squared:.2f})")
    row("Zipf exponent, likelihood (KS)", lambda s: s.zipf and f"{s.zipf.exponent:.2f} ({s.zipf.distance:.3f})")
    row("Zipf-Mandelbrot exponent, shift (KS)",
        lambda s: s.zipf and f"{s.zipf.mandelbrot_exponent:.2f}, {s.zipf.mandelbrot_shift:.3g} "
                             f"({s.zipf.mandelbrot_distance:.3f})")
    for n in (2, 3, 4):
        row(f"bits given {n - 1} before: plug-in / of shuffled tokens", _given(n))
    for n in (1, 2, 3, 4):
        row(f"bits of held-out documents, {n}-gram model / shuffled", _held_out(n))
    row("the same, given above and left",
        lambda s: s.above_and_left and _pair(s.above_and_left.held_out, s.above_and_left.shuffled_held_out))
    for name, place in (("to the right", (0, 1)), ("below", (1, 0))):
        row(f"information in the neighbour {name}, above its bias (bit)", _information(place))
    row("pairs of one word with itself, by chance (%)",
        _of_pairs(lambda c: f"{100 * c.same:.2f}, {100 * c.same_by_chance:.2f}"))
    row("symmetry of pairs, shuffled", _of_pairs(lambda c: f"{c.symmetry:.3f}, {c.shuffled_symmetry:.3f}"))
    row("correlations of neighbours, three leading (largest of shuffled)",
        _of_pairs(lambda c: f"{' '.join(f'{v:.2f}' for v in c.correlations[:3])} ({c.shuffled_correlations[0]:.2f})"
                  if c.correlations and c.shuffled_correlations else None))
    row("Heaps exponent (R2)",
        lambda s: s.growth and f"{s.growth.heaps_exponent:.2f} ({s.growth.heaps_r_squared:.2f})")
    row("documents until 50, 90, 99 % of the words",
        lambda s: s.growth and ", ".join(f"{n:,}" for n in s.growth.documents_until))
    row("new words per 1,000 tokens, first and last",
        lambda s: s.growth and f"{s.growth.innovation[0]:.0f}, {s.growth.innovation[-1]:.2f}")
    for name in ("huffman", "zlib", "lzma", "shuffled_lzma"):
        row(f"{'lzma of shuffled' if name == 'shuffled_lzma' else name} bytes over packed", _bytes(name))
    row("Benford: divergence (bit), p", lambda s: f"{s.benford.divergence:.3f}, {s.benford.p_value:.2g}")
    return rows


def _given(n: int) -> Cell:
    return lambda s: _pair(s.n_grams[n - 1].conditional, s.n_grams[n - 1].shuffled) if len(s.n_grams) >= n else None


def _held_out(n: int) -> Cell:
    return lambda s: (_pair(s.n_grams[n - 1].held_out, s.n_grams[n - 1].shuffled_held_out) if len(s.n_grams) >= n
                      else None)


def _information(place: tuple[int, int]) -> Cell:
    return lambda s: next((f"{n.information - n.shuffled:.2f} ({n.information:.2f} - {n.shuffled:.2f})"
                           for n in s.neighbours if (n.rows, n.columns) == place), None)


def _bytes(name: str) -> Cell:
    return lambda s: f"{getattr(s.compressibility, name) / s.compressibility.packed:.3f}"


def _pair(bits: float | None, shuffled: float | None) -> str | None:
    return None if bits is None or shuffled is None else f"{bits:.2f} / {shuffled:.2f}"


def _of_pairs(cell: Callable[[Cooccurrence], str | None]) -> Cell:
    return lambda s: cell(s.cooccurrence[0]) if s.cooccurrence else None


class Chart(NamedTuple):
    """title, hint: what it shows and what the kinds of line mean. svg: see `vtc.eval.charts`."""

    title: str
    hint: str
    svg: str


def statistics_charts(found: Mapping[str, TokenStatistics]) -> list[Chart]:
    """Rank and frequency, n-grams, growth of the vocabulary, information at a distance; a colour a corpus."""
    corpora = list(enumerate(found.items()))
    charts = [
        Chart("Rank and frequency", "dashed: fitted Zipf-Mandelbrot", line_chart(
            [line for n, (name, s) in corpora for line in _ranks(name, s, n)], "rank of the word",
            "share of all tokens", log_x=True, log_y=True)),
        Chart("Bits of a token given those before it", "dashed: of shuffled tokens; dots: a model on held-out pictures",
              line_chart([line for n, (name, s) in corpora for line in _n_grams(name, s, n)], "order of the n-gram",
                         "bits a token")),
        Chart("Growth of the vocabulary", "dashed: as many tokens, drawn without regard to pictures", line_chart(
            [line for n, (name, s) in corpora for line in _growth(name, s, n)], "tokens", "different words",
            log_x=True, log_y=True)),
        Chart("Information about a token at a distance", "above shuffled; in the row, dashed: below", line_chart(
            [line for n, (name, s) in corpora for line in _distances(name, s, n)], "tokens away", "bits",
            log_x=True))]
    return [chart for chart in charts if chart.svg]


def _ranks(name: str, s: TokenStatistics, colour: int) -> list[Series]:
    frequency = np.array(s.rank_frequency) / s.tokens
    rank = np.arange(1, len(frequency) + 1)
    at = np.unique(np.geomspace(1, len(rank), POINTS).round().astype(int)) - 1
    lines = [Series(name, _points(rank[at], frequency[at]), colour, dots=False)]
    if s.zipf:
        fit = (rank + s.zipf.mandelbrot_shift) ** -s.zipf.mandelbrot_exponent
        lines.append(Series(name, _points(rank[at], (fit / fit.sum())[at]), colour, dots=False, dashed=True))
    return lines


def _n_grams(name: str, s: TokenStatistics, colour: int) -> list[Series]:
    order = range(1, len(s.n_grams) + 1)
    lines = [Series(name, [(n, g.conditional) for n, g in zip(order, s.n_grams, strict=True)], colour, dots=False),
             Series(name, [(n, g.shuffled) for n, g in zip(order, s.n_grams, strict=True)], colour, dots=False,
                    dashed=True)]
    tested = [(n, g.held_out) for n, g in zip(order, s.n_grams, strict=True) if g.held_out is not None]
    labels = [f"{name}: {bits:.2f} bits on held-out pictures" for _, bits in tested]
    return [*lines, Series(name, tested, colour, labels=labels, line=False)]


def _growth(name: str, s: TokenStatistics, colour: int) -> list[Series]:
    if s.growth is None:
        return []
    return [Series(name, _points(s.growth.tokens, s.growth.mean), colour, dots=False),
            Series(name, _points(s.growth.tokens, s.growth.independent), colour, dots=False, dashed=True)]


def _distances(name: str, s: TokenStatistics, colour: int) -> list[Series]:
    return [Series(name, [(max(n.rows, n.columns), n.information - n.shuffled) for n in s.neighbours
                          if (n.rows if along else n.columns) == 0], colour, dots=along, dashed=not along)
            for along in (True, False)]


def _points(x: Iterable[float], y: Iterable[float]) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
