"""A figure: a chart, what it shows in words, and its numbers as a table; and how those of each shape are made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from helpsteer_rloo.report import charts
from helpsteer_rloo.report.charts import Axes, Dot, Line
from helpsteer_rloo.report.readings import distribution
from helpsteer_rloo.report.records import Point
from helpsteer_rloo.statistics import Estimate

MOST_POINTS = 300
"""Of a line; of a longer one, means of neighbours are drawn."""
_TABLE_ROWS = 40
STEPS = "optimizer step"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its title, a caption, and the numbers in it."""

    name: str
    title: str
    caption: str
    svg: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def named(run: str, part: str) -> str:
    """What a part of a run is called where there are several runs."""
    return f"{run}: {part}"


def slug(name: str) -> str:
    """A name as it can stand in an id."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """The points, or the means of as many neighbours as make them few enough.

    >>> thinned([(1.0, 0.0), (2.0, 2.0), (3.0, 4.0)], most=2)
    [(1.5, 1.0), (3.0, 4.0)]
    """
    size = -(-len(points) // most)
    if size <= 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def curves(
    name: str, title: str, caption: str, series: Sequence[tuple[str, Sequence[Point]]], axes: Axes
) -> Iterator[Figure]:
    """Lines over the steps of a training, if there are any."""
    drawn = [Line(label, points) for label, points in series if points]
    yield from line_figure(name, title, caption, drawn, replace(axes, legend=len(series) > 1))


def line_figure(name: str, title: str, caption: str, series: Sequence[Line], axes: Axes) -> Iterator[Figure]:
    """Lines, if there are any."""
    if not series:
        return
    thin = [Line(line.name, thinned(line.points)) for line in series]
    said = "; ".join(
        f"{line.name}: from {line.points[0][1]:z.4g} at {line.points[0][0]:z.4g} to {line.points[-1][1]:z.4g} at "
        f"{line.points[-1][0]:z.4g}"
        for line in series
    )
    rows = [(line.name, f"{x:z.6g}", f"{y:z.6g}") for line in thin for x, y in thinned(line.points, _TABLE_ROWS)]
    drawn = charts.svg(charts.lines(thin, axes), name, title, f"Over {axes.x}: {said}.")
    yield Figure(name, title, caption, drawn, ("series", axes.x, axes.y or title.lower()), tuple(rows))


def dot_figure(name: str, title: str, caption: str, rows: Sequence[Dot], axes: Axes) -> Iterator[Figure]:
    """Estimates with their intervals, if there are any."""
    if not rows:
        return
    several = len({dot.series for dot in rows}) > 1
    said = "; ".join(f"{dot.row}{f', {dot.series}' if several else ''}: {dot.estimate}" for dot in rows)
    table = tuple((dot.row, dot.series, *_cells(dot.estimate)) for dot in rows)
    drawn = charts.svg(charts.dots(rows, axes), name, title, said)
    yield Figure(name, title, caption, drawn, ("row", "of", axes.x, "95 % interval", "n"), table)


def _cells(estimate: Estimate) -> tuple[str, str, str]:
    return f"{estimate.value:z.3f}", estimate.brackets(), str(estimate.count)


def distributions(
    name: str, title: str, caption: str, first: tuple[str, Sequence[float]], second: tuple[str, Sequence[float]]
) -> Iterator[Figure]:
    """Histograms of two samples over each other, if both are there."""
    if not (first[1] and second[1]):
        return
    parts = distribution(first[1], second[1])
    series = [(first[0], parts[0]), (second[0], parts[1])]
    means = ", ".join(f"{label} {sum(values) / len(values):z.3f}" for label, values in (first, second))
    drawn = charts.svg(charts.steps(series, Axes("score")), name, title, means)
    rows = histogram_rows([part.points for part in parts])
    yield Figure(name, title, f"{caption} Means: {means}.", drawn, ("from", first[0], second[0]), rows)


def histogram_rows(columns: Sequence[Sequence[Point]]) -> tuple[tuple[str, ...], ...]:
    """The rows of a table of histograms: where a bin begins, and its counts."""
    starts = sorted({x for column in columns for x, _ in column[:-1]})
    found = [dict(column) for column in columns]
    return tuple((f"{x:z.4g}", *(f"{column.get(x, 0):g}" for column in found)) for x in starts)
