"""Line charts as SVG text, for a page that needs no script and no font from elsewhere.

Colours are CSS variables of the page (--c1, --c2, ...), so that a chart follows its light and dark dress.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line. points: (x, y), in order of x. intervals: (low, high) of each y, or (). colour: from 0 on.

    labels: what a point says when it is pointed at, or (). line, dots: whether it and points are drawn.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    intervals: Sequence[tuple[float, float] | None] = ()
    labels: Sequence[str] = ()
    dots: bool = True
    line: bool = True
    dashed: bool = False


def line_chart(series: Sequence[Series], x_title: str, y_title: str, log_x: bool = False, log_y: bool = False,
               description: str = "") -> str:
    """An <svg> of all series on common axes; "" where there is no point. Logarithmic axes need positive values."""
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    bars = [bound for line in series for interval in line.intervals if interval for bound in interval]
    x_axis = _Axis([x for x, _ in points], log_x, LEFT, WIDTH - RIGHT, wanted=5)
    y_axis = _Axis([y for _, y in points] + bars, log_y, HEIGHT - BOTTOM, TOP, wanted=5)
    label = escape(description or f"{y_title} over {x_title}", quote=True)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for value, text in y_axis.ticks:
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in x_axis.ticks:
        x = x_axis.at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                     f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                 f"{escape(x_title)}</text>")
    parts += [_drawn(line, x_axis, y_axis) for line in reversed(series)]  # the first lies on top
    return "".join([*parts, "</svg>"])


def colour(n: int) -> str:
    """The n-th colour of the page."""
    return f"var(--c{n % COLOURS + 1})"


def _drawn(line: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in line.points]
    parts = [f'<g style="--c:{colour(line.colour)}">']
    if line.line and len(places) > 1:
        kind = "line dashed" if line.dashed else "line"
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    if line.dots:
        intervals = list(line.intervals) or [None] * len(places)
        labels = list(line.labels) or [line.name] * len(places)
        for (x, y), interval, label in zip(places, intervals, labels, strict=True):
            if interval:
                low, high = (y_axis.at(bound) for bound in interval)
                parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(label)}</title></circle>')
    return "".join([*parts, "</g>"])


class _Axis:
    """From values to places between `start` and `end`, with about `wanted` round ticks."""

    def __init__(self, values: Sequence[float], logarithmic: bool, start: float, end: float, wanted: int) -> None:
        self.logarithmic, self.start, self.end = logarithmic, start, end
        low, high = min(values), max(values)
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
            low, high = _at_least(low, high, 0.25)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        self.low, self.high = low - margin, high + margin
        self.ticks = self._log_ticks(wanted) if logarithmic else self._ticks(wanted)

    def at(self, value: float) -> float:
        """The place of a value."""
        position = math.log10(value) if self.logarithmic else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start)

    def _ticks(self, wanted: int) -> list[tuple[float, str]]:
        rough = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (step / unit == 2.5)
        first = math.ceil(self.low / step)
        values = [n * step for n in range(first, math.floor(self.high / step) + 1)]
        return [(value, f"{value:.{digits}f}") for value in values]

    def _log_ticks(self, wanted: int) -> list[tuple[float, str]]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for mantissas in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1,)):
            values = [m * 10.0**d for d in decades for m in mantissas
                      if self.low <= math.log10(m * 10.0**d) <= self.high]
            if len(values) <= wanted:
                break
        if len(values) < 2:  # less than a decade and no two round values in it
            values = [10 ** (self.low + share * (self.high - self.low)) for share in (0.1, 0.5, 0.9)]
        return [(value, _plain(value)) for value in values]


def _at_least(low: float, high: float, span: float) -> tuple[float, float]:
    """The range, widened about its middle where it is smaller than `span`."""
    middle, half = (low + high) / 2, max(high - low, span) / 2
    return middle - half, middle + half


def _plain(value: float) -> str:
    """Three digits, without an exponent up to a million."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
