"""The tables of docs/performance.md from the JSON lines of a run.

    python -m benchmarks --output results.jsonl
    python -m benchmarks.tables results.jsonl docs/performance.md

A table stands between `<!-- benchmarks: NAME -->` and `<!-- end -->`, where NAME is the part of the rows' names before
the slash; what stood there before is replaced. Without a document, the tables are printed. Where a row was measured
more than once, the last one counts; rows of `--quick` are left out, and so is what the document has no place for.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
MARKED = re.compile(r"(<!-- benchmarks: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _number(key: str, unit: float = 1.0, digits: int = 2, suffix: str = "") -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(key)
        return "–" if value is None else f"{value / unit:,.{digits}f}{suffix}"

    return text


def _percent(key: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(key)
        return "–" if value is None else f"{value:.1%}".replace("%", " %")

    return text


def _scientific(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.1e}"


def _range(row: Row) -> str:
    lowest, *others = sorted(row["pair_ratios"])
    return f"{lowest:.2f}–{others[-1]:.2f}" if others else f"{lowest:.2f}"


def _phases(row: Row) -> str:
    return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in sorted(row["phase_seconds_ours"].items()))


def _passes(row: Row) -> str:
    shares, strict = (row.get(f"phase_flops_fraction_of_{rate}", {}) for rate in ("gemm_peak", "fastest_gemm"))
    texts = (f"{name} {share:.0%} ({strict[name]:.0%})" for name, share in shares.items() if name in strict)
    return ", ".join(texts).replace("%", " %")


def _short_name(row: Row) -> str:
    return row["name"].split("/", 1)[1]


_NAME: Column = ("", _short_name)
_TIMES: list[Column] = [
    ("ours, s", _number("ours")),
    ("TRL, s", _number("trl")),
    ("ratio", _number("ratio", suffix="×")),
    ("ratio by pair", _range),
]
_MEMORY: list[Column] = [
    ("peak ours, GiB", _number("peak_bytes_ours", 2**30)),
    ("peak TRL, GiB", _number("peak_bytes_trl", 2**30)),
]
_WORK: list[Column] = [
    ("tokens ours", _number("tokens_ours", digits=0)),
    ("tokens TRL", _number("tokens_trl", digits=0)),
    ("of GEMM rate", _percent("flops_fraction_of_gemm_peak")),
    ("with recomputation", _percent("flops_fraction_with_recomputation")),
    ("of fastest GEMM", _percent("flops_fraction_of_fastest_gemm")),
]


def _seconds_of(stage: str) -> Callable[[Row], str]:
    return lambda row: (
        f"{row[f'{stage}_seconds_ours']:.1f} / {row[f'{stage}_seconds_trl']:.1f} ({row[f'{stage}_ratio']:.2f}×)"
    )


def _quality(side: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        change = row[f"gold_change_{side}"]
        low, high = change["interval"]
        return f"{row[f'accuracy_{side}']:.3f}, {change['value']:+.3f} [{low:.3f}, {high:.3f}]"

    return text


_FIGURES = ("largest", "mean")
_COMPARISON: list[Column] = [_NAME, *_TIMES, *_MEMORY, *_WORK]
COLUMNS: dict[str, list[Column]] = {
    "reward_training": _COMPARISON,
    "rloo_step": [
        *_COMPARISON,
        ("by pass, of GEMM rate (of fastest GEMM)", _passes),
        ("sampling over floor", _number("sampling_over_floor", suffix="×")),
    ],
    "growth-k": _COMPARISON,
    "growth-prompt": _COMPARISON,
    "growth-groups": _COMPARISON,
    "vocabulary": [
        _NAME,
        *_MEMORY,
        ("peak of the body alone, GiB", _number("peak_bytes_body", 2**30)),
        ("growth beyond it, ours", _percent("growth_beyond_body_ours")),
        ("growth beyond it, TRL", _percent("growth_beyond_body_trl")),
    ],
    "demo": [
        _NAME,
        ("reward stage, s: ours / TRL", _seconds_of("reward")),
        ("RLOO stage, s: ours / TRL", _seconds_of("rloo")),
        ("ours: accuracy, gain in true quality", _quality("ours")),
        ("TRL: accuracy, gain in true quality", _quality("trl")),
    ],
    "precision": [
        _NAME,
        *((f"{figure}, {side}", _scientific(f"{figure}_{side}")) for side in ("ours", "plain") for figure in _FIGURES),
    ],
    "qwen3_8b": [
        _NAME,
        ("seconds", _number("ours", digits=1)),
        ("peak, GiB", _number("peak_bytes_ours", 2**30)),
        ("TRL needs at the least (computed), GiB", _number("peak_bytes_trl", 2**30)),
        ("seconds by phase", _phases),
    ],
    "plan": [
        _NAME,
        ("measured, GiB", _number("ours", 2**30)),
        ("all runs", lambda row: ", ".join(f"{peak / 2**30:.2f}" for peak in row["peaks"])),
        ("predicted, GiB", _number("predicted", 2**30)),
        ("error of the worst run", _percent("worst_error")),
        ("worst moment", lambda row: row["worst_phase"]),
    ],
}


def read_rows(lines: Iterable[str]) -> dict[str, list[Row]]:
    """Rows by benchmark, in the order in which their names came first.

    Raises:
        ValueError: a line is no row.
    """
    newest: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            quick, name = row["quick"], row["name"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Line {number} of the results is no row of a benchmark: {error!r}") from None
        if not quick:
            newest[name] = row
    found: dict[str, list[Row]] = {}
    for name, row in newest.items():
        found.setdefault(name.split("/", 1)[0], []).append(row)
    return found


def table(benchmark: str, rows: Sequence[Row]) -> str:
    """A markdown table of one benchmark, with a line about the circumstances."""
    columns = COLUMNS[benchmark]
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join([*lines, "", _circumstances(rows)]) + "\n"


def _circumstances(rows: Sequence[Row]) -> str:
    threads = sorted({row["threads"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    text = f"Threads {', '.join(map(str, threads))}; seed {', '.join(map(str, seeds))}; {versions}"
    for name, key in (("GEMM", "gemm_flops_range"), ("fastest GEMM", "fastest_gemm_flops_range")):
        rates = [rate / 1e9 for row in rows for rate in row.get(key, [])]
        text += f"; {name} {min(rates):.0f}–{max(rates):.0f} GFLOP/s" if rates else ""
    return f"{text}."


def fill(document: str, rows: dict[str, list[Row]]) -> str:
    """The document with the table of every benchmark that was measured between its markers, if it has such.

    Raises:
        ValueError: no benchmark has markers in the document, or markers name none.
    """
    marked = {match["name"] for match in MARKED.finditer(document)}
    if unknown := marked - set(COLUMNS):
        raise ValueError(f"The document has markers of unknown benchmarks: {sorted(unknown)}.")
    if marked.isdisjoint(rows):
        raise ValueError(f"The document has no markers for any of {sorted(rows)}.")

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        return match[1] + table(name, rows[name]) + match[3] if name in rows else match[0]

    return MARKED.sub(replaced, document)


def main(argv: Sequence[str] | None = None) -> None:
    """Fill a document, or print the tables."""
    parser = argparse.ArgumentParser(description="Markdown tables from the JSON lines of benchmarks")
    parser.add_argument("results", type=Path, help="file with one JSON line a row")
    parser.add_argument("document", type=Path, nargs="?", help="document whose tables are replaced")
    given = parser.parse_args(argv)
    try:
        rows = read_rows(given.results.read_text(encoding="utf-8").splitlines())
        if not rows:
            raise ValueError(f"{given.results} holds no measured row (those of --quick are none).")
        if given.document is None:
            print("\n".join(f"## {name}\n\n{table(name, found)}" for name, found in rows.items()))
            return
        text = given.document.read_text(encoding="utf-8")
        document = fill(text, rows)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if left := sorted(set(rows) - {match["name"] for match in MARKED.finditer(text)}):
        print(f"{given.document} has no place for {', '.join(left)}.", file=sys.stderr)
    given.document.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
