"""Rows in HelpSteer3's schema for the tests of data, and the ways to write them to a file."""

import gzip
import json
from pathlib import Path
from typing import Any


def make_row(prompt: str = "Name two trees.", first: str = "oak, elm", second: str = "oak", **changes: Any) -> dict:
    """A valid row whose response 1 is better; `changes` replace whole fields."""
    row = {
        "domain": "general",
        "language": "english",
        "context": [{"role": "user", "content": prompt}],
        "response1": first,
        "response2": second,
        "overall_preference": -2,
        "individual_preference": [{"score": -2, "reasoning": "Response 2 names one tree only."}],
    }
    return row | changes


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that begins with a user and takes turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write rows one a line, compressed if the name ends in .gz; make the directory if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """Write rows as a parquet file."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
