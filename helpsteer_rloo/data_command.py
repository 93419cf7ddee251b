"""`helpsteer-rloo data`: what a data set holds, what becomes of every row, and which response each pair prefers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from helpsteer_rloo.config import CommandSpec, DataKnobs, Settings, parse_command
from helpsteer_rloo.console import data_table, say, show
from helpsteer_rloo.run_dir import RunDir, write_json


@dataclass(frozen=True, kw_only=True)
class DataCommandKnobs(DataKnobs):
    """The data's knobs, the tokenizer that measures it, and what to show."""

    model_name_or_path: str = field(default="Qwen/Qwen3-8B", metadata={"help": "Model whose tokenizer is used."})
    output_dir: str | None = field(default=None, metadata={"help": "Also write data.json to this directory."})
    show: int = field(default=3, metadata={"help": "Number of pairs to print."})


DATA = CommandSpec(
    program="helpsteer-rloo data", description="Read, select and split a data set; report it.", knobs=DataCommandKnobs
)


def parse_data(argv: Sequence[str] | None = None) -> Settings[DataCommandKnobs]:
    """Read the flags of the command."""
    return parse_command(DATA, argv)


def run_data(settings: Settings[DataCommandKnobs]) -> None:
    """Print the report of a data set, and some of its pairs; a split may be empty here.

    Raises:
        ValueError: as `helpsteer_rloo.data.preparation.prepare`.
    """
    from helpsteer_rloo.data.preparation import prepare
    from helpsteer_rloo.model.loading import load_tokenizer
    from helpsteer_rloo.rendering import Renderer

    own = settings.own
    renderer = Renderer(load_tokenizer(own.model_name_or_path), thinking=own.thinking)
    knobs = DataKnobs(**{f.name: getattr(own, f.name) for f in dataclasses.fields(DataKnobs)})
    prepared = prepare(knobs, renderer, allow_empty_split=True)
    show(data_table(prepared.report))
    show(_pairs_table(prepared.corpus, own.show))
    if own.output_dir:
        path = RunDir(Path(own.output_dir)).data_report
        write_json(path, prepared.report)
        say(f"Written to {path}")


def _pairs_table(corpus: Any, count: int) -> Table:
    table = Table(title="Some pairs", title_justify="left")
    for name in ("row", "split", "domain", "language", "strength", "prompt", "chosen", "rejected"):
        table.add_column(name)
    pairs = [(s, g, p) for s, groups in corpus.groups.items() for g in groups for p in g.preferences]
    for split, group, preference in pairs[:count]:
        texts = [group.prompt[-1].content, *(group.continuations[i].text for i in (preference.chosen, preference.rejected))]
        labels = (str(preference.row), split, preference.domain, preference.language, str(preference.strength))
        table.add_row(*map(escape, labels), *(escape(" ".join(text.split())[:60]) for text in texts))
    return table
