"""Charts of a few shapes, drawn by Vega-Lite and returned as static SVG that takes its colours from the page."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import altair as alt
import vl_convert

from helpsteer_rloo.report.readings import around
from helpsteer_rloo.report.records import Bin, Histogram, Point
from helpsteer_rloo.statistics import Estimate

SERIES = 6
"""Colours that series are told apart by; after the last one they begin anew."""
_WIDTH, _HEIGHT, _ROW, _MARGIN = 340, 200, 22, 54
"""Pixels: of a whole chart, of a row of a chart that has rows, and of what stands above and below the rows."""
_TEXT, _MUTED, _GRID = "#010101", "#010102", "#010103"
_COLOURS = [f"#0101{16 + number:02x}" for number in range(SERIES)]
_VARIABLES = {_TEXT: "--ink", _MUTED: "--muted", _GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_COLOURS, start=1)
}
"""Colours that stand for those of the page's style sheet, which has a set for dark and one for light."""
_TICKS, _APART = 5, 8
"""About how many ticks an axis has, and pixels between their labels, which are wider in some browsers' fonts."""
_SHORT, _LONG = 16, 22
"""Letters of a name beside which another one has room in a legend, and of the longest that is shown whole there."""
_END = f"length(datum.label) > {_LONG} ? '…' + slice(datum.label, {1 - _LONG}) : datum.label"
"""Of a longer one the end, which says what part of a run it is."""
_TINY, _HUGE = 1e-3, 1e6
"""Below and from which numbers are written with an exponent."""
_DASHES: list[list[int]] = [[1, 0], [5, 3], [2, 2], [8, 3, 2, 3], [1, 0], [5, 3]]
_MARKS = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
"""So that series can be told apart without colours as well."""
_Chart = alt.Chart | alt.LayerChart | alt.FacetChart


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: its name and its points."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Dot:
    """An estimate in a row of its own, or beside those of other series in the same row."""

    row: str
    series: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Axes:
    """Titles of the axes, and what else is said of them.

    `limits` are those of the vertical one, which with `zero` begins at 0; `marks` shows the points of lines; a dashed
    line is drawn at `rule`; `legend` names a series also where it is the only one.
    """

    x: str
    y: str = ""
    marks: bool = False
    rule: float | None = None
    limits: tuple[float, float] | None = None
    zero: bool = False
    legend: bool = False


def lines(series: Sequence[Line], axes: Axes) -> _Chart:
    """Lines over a common horizontal axis, each through its points in the order that they are given in."""
    points = [(line.name, *point) for line in series for point in line.points]
    rows: list[dict[str, Any]] = [{"i": i, "x": x, "y": y, "s": name} for i, (name, x, y) in enumerate(points)]
    told = _series((line.name for line in series), axes)
    x_axis, y_axis = (_axis_of([row[column] for row in rows]) for column in ("x", "y"))
    x = alt.X("x:Q", title=axes.x, axis=x_axis, scale=alt.Scale(nice=False, zero=False, padding=4))
    limits = axes.limits or _around([row["y"] for row in rows], zero=axes.zero)
    scale = alt.Scale(domain=limits) if limits else alt.Scale(zero=axes.zero, nice=_TICKS)
    y = alt.Y("y:Q", title=axes.y or None, axis=y_axis, scale=scale)
    marks = axes.marks or max(len(line.points) for line in series) < 2
    base = alt.Chart(_data(rows)).encode(x=x, y=y, color=told.colour())
    line = base.mark_line(strokeWidth=2, strokeJoin="round").encode(order="i:Q")
    if marks:
        dotted = base.mark_point(filled=True, size=36, opacity=1).encode(shape=told.told_by(alt.Shape, _MARKS))
        drawn: _Chart = line + dotted
    else:
        drawn = line.encode(strokeDash=told.told_by(alt.StrokeDash, _DASHES, symbolSize=140))
    return _sized(drawn if axes.rule is None else _horizontal(axes.rule) + drawn)


def steps(series: Sequence[tuple[str, Histogram]], axes: Axes) -> _Chart:
    """Histograms over each other, as shares of their totals."""
    rows = [
        {"x": x, "y": count / max(1, histogram.total), "s": name}
        for name, histogram in series
        for x, count in histogram.points
    ]
    told = _series((name for name, _ in series), axes)
    x = alt.X("x:Q", title=axes.x, axis=_axis(), scale=alt.Scale(nice=False, zero=False))
    y = alt.Y("y:Q", title="share", axis=_axis(format="%"))
    base = alt.Chart(_data(rows)).encode(x=x, y=y, color=told.colour(symbolType="stroke", symbolOpacity=1))
    area = base.mark_area(interpolate="step-after", opacity=0.16).encode(y=alt.Y("y:Q", stack=None))
    line = base.mark_line(interpolate="step-after", strokeWidth=1.75)
    return _sized(area + line.encode(strokeDash=told.told_by(alt.StrokeDash, _DASHES, symbolSize=140)))


def bars(rows: Sequence[tuple[str, str, float]], axes: Axes) -> _Chart:
    """Horizontal bars: row, series, value."""
    told = _series((series for _, series, _ in rows), axes)
    data = [{"r": row, "s": series, "x": value} for row, series, value in rows]
    chart = alt.Chart(_data(data)).mark_bar(cornerRadiusEnd=2)
    chart = chart.encode(
        x=alt.X("x:Q", title=axes.x, axis=_axis(format=".0%")),
        y=_rows([row for row, _, _ in rows]),
        yOffset=told.offset,
        color=told.colour(),
    )
    return _sized(chart, len({row for row, _, _ in rows}) * max(1.0, 0.7 * len(told.names)))


def dots(rows: Sequence[Dot], axes: Axes) -> _Chart:
    """Estimates with their intervals, a row each; a dashed line at `axes.rule`."""
    told = _series((dot.series for dot in rows), axes)
    data: list[dict[str, Any]] = [
        {"r": d.row, "s": d.series, "x": d.estimate.value, "low": d.estimate.low, "high": d.estimate.high} for d in rows
    ]
    for row in data:
        row |= {end: row["x"] for end in ("low", "high") if math.isnan(row[end])}
    scale = alt.Scale(zero=False, nice=True, padding=6)
    base = alt.Chart(_data(data)).encode(y=_rows([dot.row for dot in rows]), yOffset=told.offset, color=told.colour())
    whiskers = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=axes.x, scale=scale), x2="high:Q")
    points = base.mark_point(filled=True, size=48, opacity=1).encode(
        x=alt.X("x:Q", title=axes.x, scale=scale, axis=_axis_of([row[end] for row in data for end in ("low", "high")])),
        shape=told.told_by(alt.Shape, _MARKS),
    )
    drawn = whiskers + points
    if axes.rule is not None:
        rule = alt.Chart(_data([{"x": axes.rule}])).mark_rule(color=_MUTED, strokeDash=[4, 3])
        drawn = rule.encode(x=alt.X("x:Q", scale=scale)) + drawn
    return _sized(drawn, len({dot.row for dot in rows}) * max(1.0, 0.7 * len(told.names)))


def reliability(models: Sequence[tuple[str, Sequence[Bin]]], axes: Axes) -> _Chart:
    """How sure a reward model is against how often it is right; points by their number of pairs."""
    told = _series((name for name, _ in models), axes)
    rows: list[dict[str, Any]] = [
        {"x": b.confidence, "y": b.right, "n": b.count, "s": name} for name, bins in models for b in bins
    ]
    low = min([0.5, *(row["y"] for row in rows)])
    percent = _axis(format=".0%")
    x = alt.X("x:Q", title=axes.x, axis=percent, scale=alt.Scale(domain=[0.5, 1.0]))
    y = alt.Y("y:Q", title=axes.y, axis=percent, scale=alt.Scale(domain=[math.floor(low * 10) / 10, 1.0]))
    base = alt.Chart(_data(rows)).encode(x=x, y=y, color=told.colour())
    points = base.mark_point(filled=True, opacity=0.9).encode(
        size=alt.Size("n:Q", legend=None, scale=alt.Scale(range=[20, 160])),
        shape=told.told_by(alt.Shape, _MARKS),
    )
    ideal = alt.Chart(_data([{"x": 0.5, "y": 0.5}, {"x": 1.0, "y": 1.0}]))
    diagonal = ideal.mark_line(color=_MUTED, strokeDash=[4, 3], strokeWidth=1.5).encode(x=x, y=y)
    return _sized(diagonal + base.mark_line(strokeWidth=1.5) + points)


# ---- what the shapes share ------------------------------------------------------------------------------------------


def _data(rows: Sequence[dict[str, Any]]) -> alt.Data:
    return alt.Data(values=list(rows))


def _axis(**more: Any) -> alt.Axis:
    return alt.Axis(tickCount=_TICKS, labelOverlap=True, labelSeparation=_APART, **more)


def _axis_of(values: Sequence[float]) -> alt.Axis:
    """An axis on which such values lie, its numbers written so that they are short."""
    largest = max((abs(value) for value in values), default=1.0)
    short = {"format": ".1e"} if 0 < largest < _TINY else {"format": ".3~g"} if largest >= _HUGE else {}
    return _axis(**short)


def _around(values: Sequence[float], *, zero: bool) -> tuple[float, float] | None:
    """Limits around values that are all the same, which would have no axis; None if they are not."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low != high or (zero and low):
        return None
    return around(low)


def _rows(names: Sequence[str]) -> alt.Y:
    axis = alt.Axis(title=None, labelLimit=125, ticks=False, domain=False, labelPadding=6)
    return alt.Y("r:N", sort=list(dict.fromkeys(names)), axis=axis)


@dataclass(frozen=True, slots=True)
class _Series:
    """The series of a chart, and whether they are named in it."""

    names: Sequence[str]
    named: bool

    def told_by(self, channel: Any, values: Sequence[Any], **legend: Any) -> Any:
        """A channel with a value of its own for each series, as far as there are values."""
        shown = list(itertools.islice(itertools.cycle(values), len(self.names)))
        scale = alt.Scale(domain=list(self.names), range=shown)
        columns = 2 if max(map(len, self.names)) <= _SHORT else 1
        legend = {"title": None, "orient": "top", "columns": columns, "labelLimit": 0, "labelExpr": _END, **legend}
        return channel("s:N", scale=scale, legend=alt.Legend(**legend) if self.named else None, sort=list(self.names))

    def colour(self, **legend: Any) -> Any:
        """The colour of each series."""
        return self.told_by(alt.Color, _COLOURS, **legend)

    @property
    def offset(self) -> alt.YOffset:
        """The place of each series in a row."""
        return alt.YOffset("s:N", sort=list(self.names))


def _series(names: Iterable[str], axes: Axes) -> _Series:
    unique = list(dict.fromkeys(names))
    return _Series(unique, named=axes.legend or len(unique) > 1)


def _horizontal(value: float) -> alt.Chart:
    rule = alt.Chart(_data([{"y": value}])).mark_rule(color=_MUTED, strokeDash=[4, 3])
    return rule.encode(y="y:Q")


def _sized(chart: _Chart, rows: float = 0) -> _Chart:
    height = _HEIGHT if not rows else _MARGIN + round(rows * _ROW)
    return chart.properties(width=_WIDTH, height=height)


_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "autosize": {"type": "fit", "contains": "padding"},
    "padding": {"left": 16, "right": 8, "top": 4, "bottom": 4},
    "font": "system-ui, sans-serif",
    "aria": False,
    "view": {"stroke": None},
    "axis": {
        "labelColor": _MUTED,
        "titleColor": _MUTED,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "gridColor": _GRID,
        "domainColor": _MUTED,
        "tickColor": _GRID,
        "labelFlush": False,
    },
    "axisY": {"titlePadding": 12},
    "legend": {
        "labelColor": _TEXT,
        "labelFontSize": 11,
        "symbolStrokeWidth": 2,
        "symbolSize": 60,
        "rowPadding": 2,
        "columnPadding": 26,
        "offset": 4,
    },
}

_NOISE = re.compile(
    r"""<path class="(?:background|foreground)"[^>]*?(?:display="none"|d="M0,0h0v0h0Z"[^>]*)/>"""
    r"""|\s(?:role|aria-[\w-]+|pointer-events|class|opacity="1"|xmlns:xlink|version)(?:="[^"]*")?(?=[\s/>])"""
)
"""What the drawing library says for the use of its own scripts, and nobody reads in a picture."""
_ID = re.compile(r'\b(id="|url\(#|href="#)')
_SIZE = re.compile(r'<svg ([^>]*?)width="([\d.]+)" height="([\d.]+)"')


def svg(chart: _Chart, name: str, title: str, description: str) -> str:
    """A chart as an SVG element that stands by itself in a page.

    Args:
        chart: To be drawn.
        name: Unique in the page; ids inside of the element begin with it.
        title: Its accessible name.
        description: What can be seen in it.
    """
    spec = json.loads(json.dumps(chart.to_dict(validate=False)))
    spec["config"] = _CONFIG
    drawn = vl_convert.vegalite_to_svg(spec)
    drawn = _ID.sub(lambda found: found[0] + name + "-", _NOISE.sub("", drawn))
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(f'"{colour}"', f'"var({variable})"')
    labelled = rf'<svg \1width="\2" height="\3" role="img" aria-labelledby="{name}-title {name}-desc"'
    drawn = _SIZE.sub(labelled, drawn)
    head, _, rest = drawn.partition(">")
    said = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    return f"{head}>{said}{rest}"
