"""`helpsteer-rloo score`: the responses of a file scored by a reward model, line by line, and gone on with."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.config import CommandSpec, Settings
from helpsteer_rloo.console import say
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.identity import model_identity
from helpsteer_rloo.judge_command import own_renderer
from helpsteer_rloo.knobs import DataKnobs
from helpsteer_rloo.parsing import parse_command
from helpsteer_rloo.reward_record import check_reward_model
from helpsteer_rloo.run_dir import locked, read_json, require_writable, write_json

if TYPE_CHECKING:
    from helpsteer_rloo.data.sources import RawRow
    from helpsteer_rloo.rendering import Renderer

ROWS_AT_ONCE = 256
"""Rows that are read, scored and written together."""
_ADDED = ("scores", "cut", "error")


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
    description="Score the responses of a file: helpsteer-rloo score FILE --reward_model_dir D --output OUT.jsonl",
    knobs=ScoreKnobs,
)


def parse_score(argv: Sequence[str] | None = None) -> Settings[ScoreKnobs]:
    """Read the file's name and the flags of the command."""
    given = list(argv or ())
    if given and not given[0].startswith("-"):
        given[0] = f"--input={given[0]}"
    return parse_command(SCORE, given, checks=[check_score])


def check_score(settings: Settings[ScoreKnobs]) -> None:
    """Check the flags.

    Raises:
        ValueError: one is missing or out of range.
    """
    own = settings.own
    for name in ("input", "reward_model_dir", "output"):
        if not getattr(own, name):
            raise ValueError(f"--{name} is missing.")
    if not own.output.endswith(".jsonl"):
        raise ValueError(f"--output {own.output}: expected a name that ends in .jsonl.")
    if Path(own.output).resolve() == Path(own.input).resolve():
        raise ValueError(f"--output {own.output} is the file that is read; give another one.")
    if own.batch_size < 1:
        raise ValueError(f"--batch_size is {own.batch_size}; expected at least 1.")


def run_score(settings: Settings[ScoreKnobs]) -> None:
    """Score what has no score yet, and say what came of all rows.

    Raises:
        ValueError: a file cannot be read, a row is not as it should be, or the output is not a part of this one.
    """
    own, source, target = settings.own, Path(settings.own.input), Path(settings.own.output)
    if not source.is_file():
        raise ValueError(f"--input {source}: no such file.")
    require_writable(target, "--output")
    trusted = own.trust_remote_code
    record = check_reward_model(own.reward_model_dir, "--reward_model_dir", trusted=trusted)
    asked = {"reward_model": model_identity(own.reward_model_dir), "input": str(source)}
    with locked(target.with_name(f".{target.name}.lock"), target):
        _take(target, asked)
        _score_file(
            own, target, record, own_renderer(own.reward_model_dir, record, "--reward_model_dir", trusted=trusted)
        )


def _take(target: Path, asked: Mapping[str, Any]) -> None:
    """Say beside the output what it is of; refuse one that is of something else.

    Raises:
        ValueError: the output was not begun by this command, or with another reward model or input.
    """
    beside = target.with_name(f"{target.name}.of.json")
    found = read_json(beside)
    if target.exists() and found is None:
        raise ValueError(f"--output {target} is there, and this command did not begin it; give another name.")
    if target.exists() and found != asked:
        raise ValueError(
            f"--output {target} was begun with another reward model or input ({beside}); give another name."
        )
    write_json(beside, asked)


def _score_file(own: ScoreKnobs, target: Path, record: Mapping[str, Any], renderer: "Renderer") -> None:
    from helpsteer_rloo.data.sources import RowFile, read_rows

    rows, counts = iter(read_rows(RowFile(Path(own.input), None))), Counter[str]()
    _pass_over(rows, target, counts)
    if counts["rows"]:
        say(f"Going on behind the {counts['rows']} rows that are in {target}.")
    from helpsteer_rloo.model.forward import score_groups
    from helpsteer_rloo.model.loading import load_reward_model

    model = load_reward_model(own.reward_model_dir)[0]
    reader = _Reader(renderer, record["rendering"]["max_length"], _entities(record))
    with target.open("a", encoding="utf-8") as output:
        while part := list(itertools.islice(rows, ROWS_AT_ONCE)):
            results = [reader.read(raw) for raw in part]
            for result in results:
                if result.stops and not own.skip_bad_rows:
                    raise ValueError(f"{result.error}\nMend the row and give the command again, or --skip_bad_rows.")
            groups = [result.group for result in results if result.group is not None]
            scores = iter(score_groups(model, groups, own.batch_size) if groups else [])
            for raw, result in zip(part, results, strict=True):
                added = _added(raw, result, next(scores) if result.group is not None else None)
                _count(added, counts)
                output.write(_line(raw, added) + "\n")
            output.flush()
    say(f"{target}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".")


@dataclass(frozen=True)
class _Read:
    """A row as it is scored and what was cut off to make it fit; or what is wrong, and whether that is a mistake."""

    group: TokenGroup | None = None
    cut: tuple[str, ...] = ()
    error: str = ""
    stops: bool = False


@dataclass(frozen=True)
class _Reader:
    """Makes rows what the reward model reads: as in its training, within its length."""

    renderer: "Renderer"
    max_length: int
    html_entities: str

    def read(self, raw: "RawRow") -> _Read:
        """What is scored of a row."""
        from helpsteer_rloo.data.sources import BadRowError

        try:
            prompt, responses, ended = self._asked(raw)
            _line(raw, {})  # what cannot be written again
            ids = [self.renderer.continuation_ids(t, ended=end) for t, end in zip(responses, ended, strict=True)]
            found = self.renderer.fit_prompt(prompt, max(map(len, ids)), self.max_length)
        except BadRowError as error:
            return _Read(error=str(error), stops=True)
        except (ValueError, TypeError) as error:  # of the renderer, about the turns, or of JSON
            return _Read(error=f"{raw.file.path}, line {raw.line}: {error}", stops=True)
        if found is None:
            return _Read(error=f"the last turn alone leaves no room for a response in {self.max_length} tokens")
        messages, prompt_ids = found
        room = self.max_length - len(prompt_ids)
        cut = {"context": messages != tuple(prompt), "response": max(map(len, ids)) > room}
        group = TokenGroup((), prompt_ids, tuple(one[:room] for one in ids))
        return _Read(group, tuple(what for what, is_cut in cut.items() if is_cut))

    def _asked(self, raw: "RawRow") -> tuple[Sequence[Message], Sequence[str], list[bool]]:
        """Conversation and responses of a row, and whether each response ended.

        Raises:
            BadRowError: something is missing or of another type.
        """
        from helpsteer_rloo.data.fields import FieldReader
        from helpsteer_rloo.data.helpsteer3 import Counts, read_row
        from helpsteer_rloo.data.sources import BadRowError

        if isinstance(raw.content, BadRowError):
            raise raw.content
        reader, row = FieldReader(raw), raw.content
        if "context" in row and "messages" not in row:
            found = read_row(raw, Counts(), self.html_entities)
            return found.context, found.responses, [True, True]
        if "response" in row and "responses" in row:
            raise reader.bad("responses", "stands beside response; one of them is to be given")
        prompt = reader.turns(row, "messages")
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


def _entities(record: Mapping[str, Any]) -> str:
    """How HTML entities were decoded in the reward model's training."""
    return str((record.get("settings") or {}).get("html_entities", DataKnobs().html_entities))


def _added(raw: "RawRow", result: _Read, scores: list[float] | None) -> dict[str, Any]:
    """What is written beside the row itself.

    Raises:
        ValueError: a score is not finite.
    """
    if scores is None:
        return {"scores": None, "error": result.error}
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"{raw.file.path}, line {raw.line}: a score is not finite: the reward model is damaged.")
    return {"scores": scores, **({"cut": list(result.cut)} if result.cut else {})}


def _count(added: Mapping[str, Any], counts: Counter[str]) -> None:
    counts["rows"] += 1
    counts.update(f"{what} cut" for what in added.get("cut", ()))
    if added["scores"] is None:
        counts["without scores"] += 1


def _line(raw: "RawRow", added: Mapping[str, Any]) -> str:
    """A row as it is written.

    Raises:
        ValueError, TypeError: it holds what JSON does not.
    """
    try:
        return json.dumps({**_kept(raw), **added}, allow_nan=False)
    except (ValueError, TypeError):
        if "error" in added:
            return json.dumps({"line": raw.line, **added}, allow_nan=False)
        raise


def _kept(raw: "RawRow") -> dict[str, Any]:
    """What is written again of a row: not what an earlier scoring added."""
    content = raw.content if isinstance(raw.content, dict) else {"line": raw.line}
    return {name: value for name, value in content.items() if name not in _ADDED}


def _pass_over(rows: "Iterator[RawRow]", target: Path, counts: Counter[str]) -> None:
    """Pass over the rows that are in the output already, count them, and cut off a part of a line at its end.

    Raises:
        ValueError: the output has other rows.
    """
    if not target.exists():
        return
    with target.open("r+b") as file:
        whole = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            raw = next(rows, None)
            added = _added_before(line)
            if raw is None or added is None or _line(raw, added).encode() + b"\n" != line:
                raise ValueError(f"--output {target}, line {number}: is not of this input; give another name.")
            _count(added, counts)
            whole += len(line)
        file.truncate(whole)


def _added_before(line: bytes) -> dict[str, Any] | None:
    """What an earlier scoring wrote beside a row; none if this is no line of one."""
    try:
        done = json.loads(line)
    except ValueError:
        return None
    return (
        {name: done[name] for name in _ADDED if name in done} if isinstance(done, dict) and "scores" in done else None
    )
