"""`helpsteer-rloo score`: the responses of a file scored by a reward model, line by line, and gone on with."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from helpsteer_rloo.data.fields import FieldReader
from helpsteer_rloo.data.helpsteer3 import Counts, read_row
from helpsteer_rloo.data.results import ROWS_AT_ONCE, Read, Results, check_finite, check_output, read_prompt
from helpsteer_rloo.data.sources import RawRow
from helpsteer_rloo.display.console import say
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.identity import model_identity
from helpsteer_rloo.records.reward_model import check_reward_model, html_entities_of
from helpsteer_rloo.run_dir import locked
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import named_positions, parse_command

if TYPE_CHECKING:
    from helpsteer_rloo.rendering import Renderer


@dataclass(frozen=True, kw_only=True)
class ScoreKnobs:
    """What is scored by which reward model, and where the scores go."""

    input: str = field(
        default="",
        metadata={
            "help": 'File of rows (.jsonl, .jsonl.gz or .parquet): {"messages": [{"role", "content"}, …], "responses": '
            "[…]}, or rows in HelpSteer3's schema."
        },
    )
    reward_model_dir: str = field(default="", metadata={"help": "Directory of the reward model."})
    output: str = field(
        default="", metadata={"help": "Rows with their scores go to this .jsonl file; a part of it is gone on with."}
    )
    batch_size: int = field(default=64, metadata={"help": "Responses scored in one forward pass."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Write what is wrong with a row instead of stopping."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the reward model."})


SCORE = CommandSpec(
    program="helpsteer-rloo score",
    description="Score the responses of a file by a reward model.",
    knobs=ScoreKnobs,
    usage="FILE --reward_model_dir D --output OUT.jsonl [FLAGS]",
)


def parse_score(argv: Sequence[str] | None = None) -> Settings[ScoreKnobs]:
    """Read the file's name and the flags of the command."""
    return parse_command(SCORE, named_positions(argv or (), ["input"]), checks=[check_score])


def check_score(settings: Settings[ScoreKnobs]) -> None:
    """Check the flags.

    Raises:
        ValueError: one is missing or out of range.
    """
    own = settings.own
    for name in ("input", "reward_model_dir", "output"):
        if not getattr(own, name):
            raise ValueError(f"--{name} is missing.")
    check_output(own.input, own.output)
    if own.batch_size < 1:
        raise ValueError(f"--batch_size is {own.batch_size}; expected at least 1.")


def run_score(settings: Settings[ScoreKnobs]) -> None:
    """Score what has no score yet, and say what came of all rows.

    Raises:
        ValueError: a file cannot be read, a row is not as it should be, or the output is not a part of this one.
    """
    own, trusted = settings.own, settings.own.trust_remote_code
    record = check_reward_model(own.reward_model_dir, "--reward_model_dir", trusted=trusted)
    results = Results(Path(own.input), Path(own.output), ("scores",), "scores", "scoring")
    with locked(results.target.with_name(f".{results.target.name}.lock"), results.target):
        results.begin({"reward_model": model_identity(own.reward_model_dir), "input": str(results.source)})
        from helpsteer_rloo.model.loading import own_renderer

        _score_file(
            own, results, record, own_renderer(own.reward_model_dir, record, "--reward_model_dir", trusted=trusted)
        )


def _score_file(own: ScoreKnobs, results: Results, record: Mapping[str, Any], renderer: "Renderer") -> None:
    counts = Counter[str]()

    def seen(added: Mapping[str, Any]) -> None:
        results.count(added, counts)

    rows = results.rest(seen)
    if counts["rows"]:
        say(f"Going on behind the {counts['rows']} rows that are in {results.target}.")
    from helpsteer_rloo.model.forward import score_groups
    from helpsteer_rloo.model.loading import load_reward_model

    model = load_reward_model(own.reward_model_dir)[0]

    def compute(part: Sequence[tuple[RawRow, TokenGroup]]) -> Iterator[dict[str, Any]]:
        scored = score_groups(model, [group for _, group in part], own.batch_size)
        for (raw, _), scores in zip(part, scored, strict=True):
            check_finite(raw, scores)
            yield {"scores": scores}

    reader = _Reader(renderer, record["rendering"]["max_length"], html_entities_of(record))
    results.write(rows, reader.read, compute, seen, at_once=ROWS_AT_ONCE, skip_bad_rows=own.skip_bad_rows)
    say(f"{results.target}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".")


@dataclass(frozen=True)
class _Reader:
    """Makes rows what the reward model reads: as in its training, within its length."""

    renderer: "Renderer"
    max_length: int
    html_entities: str

    def read(self, raw: RawRow) -> Read:
        """What is scored of a row.

        Raises:
            ValueError: it is not as it should be.
        """
        prompt, responses, ended = self._asked(raw)
        ids = [self.renderer.continuation_ids(t, ended=end) for t, end in zip(responses, ended, strict=True)]
        found = self.renderer.fit_prompt(prompt, max(map(len, ids)), self.max_length)
        if found is None:
            return Read(error=f"the last turn alone leaves no room for a response in {self.max_length} tokens")
        messages, prompt_ids = found
        room = self.max_length - len(prompt_ids)
        cut = {"context": messages != tuple(prompt), "response": max(map(len, ids)) > room}
        group = TokenGroup((), prompt_ids, tuple(one[:room] for one in ids))
        return Read(group, tuple(what for what, is_cut in cut.items() if is_cut))

    def _asked(self, raw: RawRow) -> tuple[Sequence[Message], Sequence[str], list[bool]]:
        """Conversation and responses of a row, and whether each response ended.

        Raises:
            BadRowError: something is missing or of another type.
        """
        prompt = read_prompt(raw, self.html_entities)
        reader, row = FieldReader(raw), cast(dict[str, Any], raw.content)
        if "context" in row and "messages" not in row:
            found = read_row(raw, Counts(), self.html_entities)
            return found.context, found.responses, [True, True]
        if "response" in row and "responses" in row:
            raise reader.bad("responses", "stands beside response; one of them is to be given")
        responses = (reader.text(row, "response"),) if "response" in row else reader.texts(row, "responses")
        if not responses:
            raise reader.bad("responses", "is empty")
        ended = row.get("ended", True)
        given = [ended] * len(responses) if isinstance(ended, bool) else ended
        if not isinstance(given, list) or len(given) != len(responses) or {type(one) for one in given} != {bool}:
            raise reader.bad("ended", "expected true, false, or a list of them, one a response")
        if not all(text or end for text, end in zip(responses, given, strict=True)):
            raise reader.bad("responses", "one is empty and did not end, so that there is nothing to score")
        return prompt, responses, given
