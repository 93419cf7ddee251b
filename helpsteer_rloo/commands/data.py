"""`helpsteer-rloo data`: what a data set holds, what becomes of every row, and which response each pair prefers."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer_rloo.data.sources import locate
from helpsteer_rloo.display.console import data_table, say, show
from helpsteer_rloo.run_dir import RunDir, write_json
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.knobs import DataKnobs
from helpsteer_rloo.settings.parsing import parse_command

if TYPE_CHECKING:
    from helpsteer_rloo.data.helpsteer3 import Corpus

TEXT_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class DataCommandKnobs(DataKnobs):
    """The data's knobs, the tokenizer that measures it, and what to show."""

    model_name_or_path: str = field(default="Qwen/Qwen3-8B", metadata={"help": "Model whose tokenizer is used."})
    output_dir: str | None = field(default=None, metadata={"help": "Also write data.json to this directory."})
    show: int = field(default=3, metadata={"help": "Number of pairs to print."})

    def __post_init__(self) -> None:
        """Check values that no type can check."""
        super().__post_init__()
        if self.show < 0:
            raise ValueError(f"--show is {self.show}; expected 0 or more.")


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
    knobs = DataKnobs(**{f.name: getattr(own, f.name) for f in dataclasses.fields(DataKnobs)})
    locate(knobs)  # a mistyped path comes out before a tokenizer is fetched
    renderer = Renderer(load_tokenizer(own.model_name_or_path), thinking=own.thinking)
    prepared = prepare(knobs, renderer, allow_empty_split=True)
    show(data_table(prepared.report))
    for line in _described_pairs(prepared.corpus, own.show):
        say(line)
    if own.output_dir:
        path = RunDir(Path(own.output_dir)).data_report
        write_json(path, prepared.report)
        say(f"Written to {path}")


def _described_pairs(corpus: "Corpus", count: int) -> Iterator[str]:
    pairs = [(split, g, p) for split, groups in corpus.groups.items() for g in groups for p in g.preferences]
    for split, group, preference in sorted(pairs, key=lambda pair: pair[2].row)[:count]:
        labels = f"{split}, {preference.domain}, {preference.language}, strength {preference.strength}"
        prompt, *texts = (
            textwrap.shorten(text, TEXT_WIDTH, placeholder=" …")
            for text in (
                group.prompt[-1].content,
                group.continuations[preference.chosen].text,
                group.continuations[preference.rejected].text,
            )
        )
        yield (
            f"row {preference.row} ({labels}) prefers response {preference.chosen_response}\n"
            f"    prompt:   {prompt}\n    chosen:   {texts[0]}\n    rejected: {texts[1]}"
        )
