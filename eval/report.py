"""The report: one HTML page that holds all it needs, to be opened from a folder, sent by mail and read offline.

Tables with intervals and marks, rate-distortion curves, pictures with a slider between original and reconstruction,
worst and best images, token statistics, every number image by image, and how it was all made.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vtc.errors import FileError, VtcError
from vtc.eval.charts import Series, colour, line_chart
from vtc.eval.measures import MOST_TOKENS
from vtc.eval.names import Quantity, quantity, shown
from vtc.eval.pairs import Item
from vtc.eval.results import (
    MethodResult,
    RateSaving,
    cell_text,
    families,
    letter,
    marks,
    rate_savings,
    result_names,
    to_csv,
    to_json,
)
from vtc.eval.suite import Method, Suite, in_order
from vtc.eval.token_report import statistics_charts, statistics_rows
from vtc.eval.token_statistics import TokenStatistics
from vtc.files import reason, write_file
from vtc.images import to_uint8

TEMPLATE = Path(__file__).with_name("report.html")
#: longest side of a picture on the page, and how it is compressed; the numbers are of the pictures themselves
LONGEST_SIDE, QUALITY = 1024, 86
#: methods that a picture can be compared with
MOST_METHODS = 6
#: rows of the table of single images; the CSV has all
MOST_ROWS = 500
#: tokenizers whose statistics are drawn; the table has all
MOST_LANGUAGES = 4
#: what the key figures and the pictures' order go by, as far as measured
MAIN = ("learned_perceptual_image_patch_similarity_alex", "multiscale_structural_similarity", "structural_similarity",
        "peak_signal_noise_ratio")
#: results of a tokenizer that stand in their own section
TOKENS = ("codebook_usage", "codebook_entropy", "codebook_entropy_corrected", "codebook_perplexity", "codebook_tokens")


@dataclass
class Picture:
    """One image of the gallery. original, reconstructions: files as data URIs, the latter by method."""

    name: str
    width: int
    height: int
    original: str
    reconstructions: dict[str, str] = field(default_factory=dict)


def write_report(folder: str | Path, methods: Sequence[MethodResult], suite: Suite, items: Sequence[Item],
                 about: Mapping[str, Any], most: int = 24,
                 bar: Callable[[Sequence[Item]], Iterable[Any]] = lambda things: things) -> None:
    """Write index.html, results.json and results.csv. Raises FileError where the folder cannot be written.

    items: all pictures; `most` of them are shown. bar: wraps what is waited for, to show progress.
    """
    folder = make_folder(folder)
    pictures = gallery(suite, items, methods, most, bar)
    own = [method for method in methods if not method.origin]
    write_file(folder / "results.json", to_json(methods, about).encode())
    write_file(folder / "results.csv", to_csv(own).encode())
    write_file(folder / "index.html", page(methods, about, pictures).encode())


def make_folder(folder: str | Path) -> Path:
    """The report's folder, so that what is wrong with it is told before hours of measuring; raises FileError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The report's folder {folder} cannot be made: {reason(error)}.") from error
    return folder


def page(methods: Sequence[MethodResult], about: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page. about: as in the results file, see `vtc.eval.results.to_json`."""
    sections = [("results", "Results", _results(methods)), ("curves", "Rate and distortion", _curves(methods)),
                ("pictures", "Pictures", _pictures(methods, pictures)),
                ("extremes", "Worst and best", _extremes(methods)), ("fidelity", "Text and faces", _fidelity(methods)),
                ("tokens", "Token statistics", _tokens(methods)),
                ("images", "Each image", _images(methods)), ("made", "How it was made", _made(methods, about))]
    sections = [section for section in sections if section[2]]
    conditions = methods[0].conditions
    title = about.get("title") or f"{methods[0].name} on {conditions['reference_set'] or 'pictures'}"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), subtitle=escape(_subtitle(methods, about)), problems=_problems(about),
        figures=_figures(methods[0]),
        links="".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections),
        sections="\n".join(f'<section><h2 id="{key}">{escape(name)}</h2>\n{body}</section>'
                           for key, name, body in sections),
        footer="Made by vtc-eval. Everything on this page is in the page; results.json and results.csv beside it hold "
               "the same numbers in full precision.")


# The pictures


def gallery(suite: Suite, items: Sequence[Item], methods: Sequence[MethodResult], most: int,
            bar: Callable[[Sequence[Item]], Iterable[Any]]) -> list[Picture]:
    """Small copies of the chosen images and of what the chosen methods make of them."""
    own = [method for method in methods if not method.origin]
    if not own:
        return []
    shown_methods = {method.name for method in compared(own)}
    makers = [method for method in suite.methods if method.name in shown_methods]
    chosen = set(choose_images(own[0], most))
    picked = [item for item in items if item.name in chosen]
    done = in_order(lambda item: _picture(suite, item, makers), picked, suite.jobs)
    return [picture for _, picture in zip(bar(picked), done, strict=True) if picture is not None]


def _picture(suite: Suite, item: Item, methods: Sequence[Method]) -> Picture | None:
    try:
        original = suite.prepared(item)
    except VtcError:  # it was told when it was measured
        return None
    picture = Picture(item.name, original.shape[3], original.shape[2], data_uri(original[0]))
    for method in methods:
        if not method.has(item):
            continue
        try:
            image = suite.reconstructed(item, method, original)
        except VtcError:
            continue
        if image is not None and image.shape == original[0].shape:
            picture.reconstructions[method.name] = data_uri(image)
    return picture


def compared(methods: Sequence[MethodResult]) -> list[MethodResult]:
    """Which methods pictures are shown of: the first, then of every family the one whose rate is nearest to its."""
    first = methods[0]
    found = {first.family: first}
    for method in methods[1:]:
        old = found.get(method.family)
        if old is None or (old is not first and _rate_distance(method, first) < _rate_distance(old, first)):
            found[method.family] = method
    chosen = list(found.values())[:MOST_METHODS]
    for method in methods:  # with few families, more of each
        if len(chosen) < MOST_METHODS and method not in chosen:
            chosen.append(method)
    return [method for method in methods if method in chosen]


def _rate_distance(a: MethodResult, b: MethodResult) -> float:
    return abs(math.log(a.rate / b.rate)) if a.rate and b.rate else math.inf


def choose_images(method: MethodResult, most: int) -> list[str]:
    """Worst and best by every metric, then evenly between them by the main one; names, at most `most`."""
    if len(method.images) <= most:
        return list(method.images)
    metrics = _judging(method)
    found: dict[str, None] = {}
    for rank in range(most):
        for name in metrics:
            order = _ordered(method, name)
            if rank < min(2, len(order)):
                found |= dict.fromkeys([method.images[order[rank]], method.images[order[-1 - rank]]])
    order = _ordered(method, metrics[0]) if metrics else np.arange(len(method.images))
    for place in np.linspace(0, len(order) - 1, most).round().astype(int):
        found[method.images[order[place]]] = None
    return list(found)[:most]


def _judging(method: MethodResult) -> list[str]:
    """Results that say which image is worse, the main ones first."""
    names = [name for name in method.results if name in method.columns and quantity(name).better
             and not name.endswith("_seconds") and "bits_per_pixel" not in name]
    return sorted(names, key=_main_first)  # a stable sort: the others stay in the order of the tables


def _main_first(name: str) -> int:
    return MAIN.index(name) if name in MAIN else len(MAIN)


def _ordered(method: MethodResult, name: str) -> np.ndarray:
    """Places of the images, worst first, without those that have no number."""
    column = method.columns[name]
    order = np.argsort(column if quantity(name).better == "higher" else -column, kind="stable")
    return order[~np.isnan(column[order])]


def data_uri(image: Tensor) -> str:
    """(3, H, W) in [0, 1] as a small WebP (or JPEG, where Pillow has none) inside a URI."""
    picture = Image.fromarray(to_uint8(image))
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    format = "WEBP" if "WEBP" in Image.SAVE or ".webp" in Image.registered_extensions() else "JPEG"
    picture.save(stream, format, quality=QUALITY)
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


# The sections


def _subtitle(methods: Sequence[MethodResult], about: Mapping[str, Any]) -> str:
    conditions = methods[0].conditions
    protocol = conditions["protocol"]
    how = "as they are" if protocol["resize"] == protocol["crop"] == "none" else (
        f"resized ({protocol['resize'].replace('_', ' ')}), crop {protocol['crop']} of {conditions['size']} pixels")
    rounding = {"nearest": "rounded to 8 bits", "truncate": "truncated to 8 bits", "none": "not rounded"}
    return (f"{conditions['n']} pictures of {conditions['reference_set'] or 'one file'}, {how}; reconstructions "
            f"{rounding[protocol['pixel_rounding']]} before they are judged. Protocol {protocol['name']}.")


def _problems(about: Mapping[str, Any]) -> str:
    problems = list(about.get("problems", ()))
    if not problems:
        return ""
    lines = "".join(f"<li>{escape(text)}</li>" for text in problems[:20])
    more = f"<li>and {len(problems) - 20} more, in results.json</li>" if len(problems) > 20 else ""
    return (f'<div class="problems" role="note"><b>{len(problems)} not measured</b><ul>{lines}{more}</ul></div>')


def _figures(method: MethodResult) -> str:
    names = [name for name in ("bits_per_pixel", "nominal_bits_per_pixel", *reversed(MAIN)) if name in method.results]
    cells = []
    for name in names:
        q = quantity(name)
        text = cell_text(name, method.results[name], method.results[name].n)
        cells.append(f"<div><b>{escape(text)}</b><span>{escape(_heading(q))}</span></div>")
    if not cells:
        return ""
    return f'<p class="soft small key">{escape(method.name)}</p><div class="figures">{"".join(cells)}</div>'


def _heading(q: Quantity) -> str:
    arrow = {"higher": " \u2191", "lower": " \u2193", "": ""}[q.better]
    return q.title + arrow + (f" ({q.unit})" if q.unit else "")


def _results(methods: Sequence[MethodResult]) -> str:
    names = [name for name in result_names(methods) if name not in TOKENS]
    letters, notes = marks(methods)
    best = {name: _best(name, [m for m, mark in zip(methods, letters, strict=True) if not mark]) for name in names}
    rows = []
    for method, mark in zip(methods, letters, strict=True):
        n = method.conditions["n"]
        cells = []
        for name in names:
            result = method.results.get(name)
            interval = ""
            if result is not None and result.interval is not None:
                interval = f"<small>{shown(name, result.interval[0])} \u2013 {shown(name, result.interval[1])}</small>"
            kind = ' class="best"' if best[name] == method.name else ""
            cells.append(f"<td{kind}>{escape(cell_text(name, result, n))}{interval}</td>")
        sign = f'<sup class="mark">{mark}</sup>' if mark else ""
        source = f"<small>from {escape(method.origin)}</small>" if method.origin else ""
        rows.append(f'<tr{" class=marked" if mark else ""}><td><b>{escape(method.name)}</b>{sign}{source}</td>'
                    f"<td>{n}</td>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{escape(_heading(quantity(name)))}</th>' for name in names)
    footnotes = "".join(f"<li>[{letter(i)}] {escape(note)}</li>" for i, note in enumerate(notes))
    return ("<p class=soft>Means over images; below each the interval that holds 95 % of 2,000 bootstrap resamples of "
            "the images. An arrow says which way is better. Sets (Fr\u00e9chet distances and the like) have one number "
            "and no interval.</p>"
            '<div class="scroll"><table><thead><tr><th scope="col">method</th><th scope="col">n</th>'
            f'{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
            + (f'<ul class="notes">{footnotes}</ul>' if footnotes else ""))


def _best(name: str, methods: Sequence[MethodResult]) -> str:
    """The method with the best number, among rows that were made alike and have about one rate; "" without a choice."""
    rates = [method.rate for method in methods if method.rate]
    if rates and max(rates) > 1.15 * min(rates):
        return ""
    better = quantity(name).better
    found = [(value, m.name) for m in methods if (value := m.value(name)) is not None]
    if not better or len(found) < 2 or "bits_per_pixel" in name or name.endswith("_seconds"):
        return ""
    return (max if better == "higher" else min)(found)[1]


def _curves(methods: Sequence[MethodResult]) -> str:
    curves = families(methods)
    names = [name for name in result_names(methods) if quantity(name).better and "bits_per_pixel" not in name
             and not name.endswith("_seconds") and name not in TOKENS and "wavelet" not in name]
    if len([m for members in curves.values() for m in members]) < 2:
        return ""
    colours = {family: n for n, family in enumerate(curves)}
    charts = []
    for name in sorted(names, key=_main_first):
        q = quantity(name)
        series = []
        for family, members in curves.items():
            have = [m for m in members if m.value(name) is not None]
            series.append(Series(family, [(m.rate or 0, m.value(name) or 0) for m in have], colours[family],
                                 [m.results[name].interval for m in have],
                                 [f"{m.name}: {m.rate:.4f} bpp, {q.title} {shown(name, m.value(name))}" for m in have]))
        drawn = line_chart(series, "bits per pixel, whole files", _heading(q), log_x=True,
                           description=f"{q.title} over bits per pixel")
        if drawn:
            way = {"higher": "higher is better", "lower": "lower is better"}[q.better]
            charts.append(f'<figure class="card"><h3>{escape(q.title)}{f" in {q.unit}" if q.unit else ""} '
                          f"<span>{way}</span></h3>{drawn}</figure>")
    legend = "".join(f'<li style="--c:{colour(n)}">{escape(family)}</li>' for family, n in colours.items())
    return ("<p class=soft>A point a method, bars are the 95 % intervals of the mean. Peers are searched by whole-file "
            "bytes and may shrink the picture first where that does better.</p>"
            f'<ul class="legend">{legend}</ul><div class="grid">{"".join(charts)}</div>'
            + _savings(rate_savings(methods, next(iter(curves)), [name for name in MAIN if name in names])))


def _savings(savings: Sequence[RateSaving]) -> str:
    if not savings:
        return ""
    rows = []
    for s in savings:
        value = "-" if s.value is None else f"{s.value:+.1f} %"
        share = "-" if s.overlap_share is None else f"{s.overlap_share:.0%}"
        note = s.note or ("says little: the curves overlap over less than half" if (s.overlap_share or 1) < 0.5 else "")
        rows.append(f"<tr><td>{escape(s.family)}</td><td>{escape(quantity(s.metric).title)}</td><td>{value}</td>"
                    f'<td>{share}</td><td class="words">{escape(note)}</td></tr>')
    return (f"<details open><summary>Bytes against {escape(savings[0].anchor)} at equal quality (BD-rate, pchip; "
            'negative is fewer)</summary><div class="scroll"><table><thead><tr><th>family</th><th>metric</th>'
            '<th>bytes</th><th>overlap</th><th class="words">note</th></tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table></div></details>')


def _pictures(methods: Sequence[MethodResult], pictures: Sequence[Picture]) -> str:
    by_name = {method.name: method for method in methods if not method.origin}
    names = [name for name in by_name if any(name in picture.reconstructions for picture in pictures)]
    if not names:
        return ""
    first = by_name[names[0]]
    judging = _judging(first)
    options = "".join(f'<option value="{escape(name, quote=True)}">{escape(name)}</option>' for name in names)
    orders = "".join(f'<option value="{metric}|{_worst_way(metric, worst)}">{word} {escape(quantity(metric).title)} '
                     "first</option>" for metric in judging for word, worst in (("worst", True), ("best", False)))
    cards = "".join(_card(picture, names, by_name) for picture in _worst_first(pictures, first, judging))
    total = len(first.images)
    which = "All pictures" if len(pictures) == total else (
        f"{len(pictures)} of {total} pictures, the worst, the best and some between")
    return (f'<p class="soft">{which}: original on the left of the line, reconstruction on the right. Drag '
            f"it, or use the arrow keys. Copies for this page are compressed again (WebP {QUALITY}, at most "
            f"{LONGEST_SIDE} pixels a side); the numbers are of the pictures themselves.</p>"
            f'<div class="tools"><label>Reconstruction <select id="method">{options}</select></label>'
            f'<label>Order <select id="order">{orders}<option value="name|up">by name</option></select></label></div>'
            f'<div class="gallery">{cards}</div>')


def _worst_way(metric: str, worst: bool) -> str:
    return "up" if (quantity(metric).better == "higher") == worst else "down"


def _worst_first(pictures: Sequence[Picture], method: MethodResult, judging: Sequence[str]) -> list[Picture]:
    if not judging:
        return list(pictures)
    place = {method.images[i]: n for n, i in enumerate(_ordered(method, judging[0]))}
    return sorted(pictures, key=lambda picture: place.get(picture.name, len(place)))


def _card(picture: Picture, names: Sequence[str], by_name: Mapping[str, MethodResult]) -> str:
    alt = escape(picture.name, quote=True)
    images, tags, facts = [], [], []
    for name in names:
        if name not in picture.reconstructions:
            continue
        label = escape(name, quote=True)
        hidden = "" if name == names[0] else " hidden"
        method = by_name[name]
        row = method.images.index(picture.name) if picture.name in method.images else None
        values = {} if row is None else {
            metric: float(method.columns[metric][row]) for metric in method.results
            if metric in method.columns and not math.isnan(method.columns[metric][row])}
        images.append(f'<img class="rec" data-method="{label}"{hidden} src="{picture.reconstructions[name]}" '
                      f'alt="{alt}, {label}">')
        tags.append(f'<span class="tag right" data-method="{label}"{hidden}>{escape(name)}</span>')
        texts = [f"<span>{escape(quantity(metric).title)} <i>{shown(metric, value)}</i></span>"
                 for metric, value in values.items() if metric in ("bits_per_pixel", *MAIN)]
        # Infinity is no JSON: as a string, JavaScript's parseFloat understands it.
        data = escape(json.dumps({k: repr(v).replace("inf", "Infinity") for k, v in values.items()}), quote=True)
        facts.append(f'<span data-method="{label}"{hidden} data-values="{data}" style="display:contents">'
                     f"{''.join(texts)}</span>")
    return (f'<article class="card" data-name="{alt}"><div class="compare" style="aspect-ratio:{picture.width}/'
            f'{picture.height}"><img src="{picture.original}" alt="{alt}, original">{"".join(images)}'
            f'<input type="range" min="0" max="100" step="0.5" value="50" aria-label="{alt}: original or '
            f'reconstruction"><div class="edge"></div><span class="tag left">original</span>{"".join(tags)}</div>'
            f'<div class="facts"><b>{escape(picture.name)}</b>{"".join(facts)}</div></article>')


def _extremes(methods: Sequence[MethodResult], count: int = 3) -> str:
    method = methods[0]
    if len(method.images) < 2 * count:
        return ""
    rows = []
    for name in _judging(method):
        order, column = _ordered(method, name), method.columns[name]
        cells = ["<br>".join(f"{escape(method.images[i])} {shown(name, float(column[i]))}" for i in places)
                 for places in (order[:count], order[::-1][:count])]
        middle = float(np.nanmedian(column))
        rows.append(f"<tr><td>{escape(_heading(quantity(name)))}</td><td class=words>{cells[0]}</td>"
                    f"<td class=words>{cells[1]}</td><td>{shown(name, middle)}</td></tr>")
    return (f"<p class=soft>Of {escape(method.name)}, over all {len(method.images)} pictures.</p>"
            '<div class="scroll"><table><thead><tr><th>metric</th><th class="words">worst</th>'
            '<th class="words">best</th><th>median</th></tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table></div>') if rows else ""


def _fidelity(methods: Sequence[MethodResult]) -> str:
    """TokBench's buckets of every engine; what rests on fewer than 50 has a star."""
    rows = []
    for method in methods:
        for name, found in method.extra.items():
            if not name.startswith(("text_fidelity_", "face_fidelity_")):
                continue
            engine = found["engine"]
            for measure, means in found.items():
                if not (isinstance(means, dict) and "mean_of_buckets" in means):
                    continue
                cells = "".join(f"<td>{_share(means[b]['mean'])}{'*' if means[b]['few'] else ''}"
                                f"<small>n {means[b]['n']}</small></td>" for b in ("small", "medium", "large"))
                rows.append(f"<tr><td><b>{escape(method.name)}</b><small>{escape(engine['name'])} "
                            f"{escape(engine['version'])}</small></td><td>{escape(measure.replace('_', ' '))}</td>"
                            f"{cells}<td>{_share(means['mean_of_buckets'])}</td><td>{_share(means['micro'])}"
                            f"<small>n {means['n']}</small></td></tr>")
    if not rows:
        return ""
    heads = "".join(f"<th>{head}</th>" for head in ("method", "measure", "small", "medium", "large",
                                                    "mean of buckets", "all"))
    return ("<p class=soft>By the size of what is shown, in TokBench's buckets; a star marks fewer than 50. The mean "
            "of the buckets is TokBench's headline, and stands only where none is empty.</p>"
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>')


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _tokens(methods: Sequence[MethodResult]) -> str:
    having = [method for method in methods if any(name in method.results for name in TOKENS)]
    if not having:
        return ""
    names = [name for name in TOKENS if any(name in method.results for method in having)]
    heads = "".join(f"<th>{escape(_heading(quantity(name)))}</th>" for name in names)
    rows = "".join(f"<tr><td><b>{escape(m.name)}</b></td><td>{escape(_vocabulary(m))}</td>"
                   + "".join(f"<td>{shown(name, m.value(name))}</td>" for name in names) + "</tr>" for m in having)
    return ("<p class=soft>How the words of the codebook are used over all pictures. Entropy is biased low where the "
            "tokens are not many times the words; the corrected one adds the Miller-Madow term.</p>"
            f'<div class="scroll"><table><thead><tr><th>method</th><th>words</th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>{_language(having)}")


def _language(methods: Sequence[MethodResult]) -> str:
    """The tokens as a language: curves, and a table with a column a method."""
    found = {method.name: TokenStatistics.from_json(method.extra["token_statistics"]) for method in methods
             if "token_statistics" in method.extra}
    if not found:
        return ""
    drawn = dict(list(found.items())[:MOST_LANGUAGES])
    legend = "".join(f'<li style="--c:{colour(n)}">{escape(name)}</li>' for n, name in enumerate(drawn))
    charts = "".join(f'<figure class="card"><h3>{escape(chart.title)} <span>{escape(chart.hint)}</span></h3>{chart.svg}'
                     "</figure>" for chart in statistics_charts(drawn))
    heads = "".join(f"<th>{escape(name)}</th>" for name in found)
    rows = "".join(f'<tr><td class="label">{escape(name)}</td>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}'
                   "</tr>" for name, cells in statistics_rows(found))
    return (f'<ul class="legend">{legend}</ul><div class="grid">{charts}</div>'
            "<details><summary>The tokens as a language: entropies, n-grams, growth, compressibility</summary>"
            "<p class=soft>A picture is a document, read row by row; of several groups of tokens the first, of several "
            f"scales the finest; the first pictures, until they have {MOST_TOKENS:,} tokens. Plug-in entropies of "
            "n-grams are too low, so the same of shuffled tokens stands beside each: what both have in common is bias. "
            "A Kneser-Ney model on held-out pictures is never too low.</p>"
            f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
            "</details>")


def _vocabulary(method: MethodResult) -> str:
    vocab = list(method.description.get("vocab", ()))
    return " + ".join(f"{v:,}" for v in vocab[:4]) + (" + ..." if vocab[4:] else "")


def _images(methods: Sequence[MethodResult]) -> str:
    own = [method for method in methods if method.images]
    parts = []
    for method in own:
        names = [name for name in method.columns if name not in ("height", "width")]
        heads = "".join(f"<th>{escape(quantity(name).title)}</th>" for name in names)
        rows = []
        for row, image in enumerate(method.images[:MOST_ROWS]):
            cells = []
            for name in names:
                value = float(method.columns[name][row])
                whole = value.is_integer() and name not in method.results
                cells.append(f"<td>{f'{value:,.0f}' if whole else shown(name, value)}</td>")
            rows.append(f"<tr><td>{escape(image)}</td>{''.join(cells)}</tr>")
        more = len(method.images) - MOST_ROWS
        note = f"<p class=soft>{more:,} more are in results.csv.</p>" if more > 0 else ""
        parts.append(f"<details><summary>{escape(method.name)}</summary><div class=scroll><table><thead><tr>"
                     f"<th>image</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}</details>")
    return "".join(parts)


def _made(methods: Sequence[MethodResult], about: Mapping[str, Any]) -> str:
    conditions, p = methods[0].conditions, about.get("provenance", {})
    boot = about.get("bootstrap", {})
    lines = {"command": " ".join(p.get("command", ())), "pictures": f"{conditions['n']} of "
             f"{conditions['reference_set']}, SHA-256 of their names and files {conditions['images_sha256']}",
             "bootstrap": ", ".join(f"{key} {value}" for key, value in boot.items()),
             "machine": f"{p.get('processor', '')}, {p.get('threads', '')} threads, {p.get('system', '')}, device "
                        f"{conditions['device']}",
             "packages": ", ".join(f"{name} {version}" for name, version in p.get("packages", {}).items())
             + f", Python {p.get('python', '')}"}
    protocol = {key.replace("_", " "): str(value) for key, value in conditions["protocol"].items() if value}
    metrics = {alias: ", ".join(f"{key} {value}" for key, value in settings.items()) or "no settings"
               for alias, settings in conditions["metrics"].items()}
    described = "".join(f"<details><summary>{escape(m.name)}</summary>"
                        f"<pre>{escape(json.dumps(m.description, indent=1))}</pre></details>" for m in methods)
    return (f'<div class="card">{_list(lines)}</div>'
            f'<h3 style="margin-top:22px">Protocol</h3><div class="card">{_list(protocol)}</div>'
            f'<h3 style="margin-top:22px">Metrics</h3><div class="card">{_list(metrics)}</div>'
            f'<h3 style="margin-top:22px">Methods</h3>{described}')


def _list(lines: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in lines.items() if text)
    return f"<dl>{rows}</dl>"
