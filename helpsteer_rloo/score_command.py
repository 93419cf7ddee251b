"""`helpsteer-rloo score`: the responses of a file scored by a reward model, line by line, and gone on with."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.config import CommandSpec, Settings
from helpsteer_rloo.console import say
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.parsing import parse_command
from helpsteer_rloo.reward_record import check_reward_model
from helpsteer_rloo.run_dir import require_writable

if TYPE_CHECKING:
    from helpsteer_rloo.data.sources import RawRow
    from helpsteer_rloo.rendering import Renderer

ROWS_AT_ONCE = 256
"""Rows that are read, scored and written together."""
_ADDED = ("scores", "cut", "error")
_ROLES = ("system", "user", "assistant")


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
        ValueError: a file cannot be read, a row is not as it should be, or the output is that of another input.
    """
    from helpsteer_rloo.data.sources import RowFile, read_rows
    from helpsteer_rloo.judge_command import own_renderer

    own, source, target = settings.own, Path(settings.own.input), Path(settings.own.output)
    if not source.is_file():
        raise ValueError(f"--input {source}: no such file.")
    require_writable(target, "--output")
    record = check_reward_model(own.reward_model_dir, "--reward_model_dir", trusted=own.trust_remote_code)
    renderer = own_renderer(own.reward_model_dir, record, "--reward_model_dir", trusted=own.trust_remote_code)
    rows = iter(read_rows(RowFile(source, None)))
    counts = Counter({"rows": _pass_over(rows, target)})
    if counts["rows"]:
        say(f"Going on behind the {counts['rows']} rows that are in {target}.")
    from helpsteer_rloo.model.forward import score_groups
    from helpsteer_rloo.model.loading import load_reward_model

    model = load_reward_model(own.reward_model_dir)[0]
    with target.open("a", encoding="utf-8") as output:
        while part := list(itertools.islice(rows, ROWS_AT_ONCE)):
            results = [_fitted(raw, renderer, record["rendering"]["max_length"], own) for raw in part]
            groups = [result for result in results if isinstance(result, _Fitted)]
            scores = iter(score_groups(model, [result.group for result in groups], own.batch_size) if groups else [])
            for raw, result in zip(part, results, strict=True):
                line = _line(raw, result, next(scores) if isinstance(result, _Fitted) else None, counts)
                output.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            output.flush()
    say(f"{target}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".")


@dataclass(frozen=True)
class _Fitted:
    """A row as it is scored, and what was cut off to make it fit."""

    group: TokenGroup
    cut: tuple[str, ...]


def _fitted(raw: "RawRow", renderer: "Renderer", max_length: int, own: ScoreKnobs) -> _Fitted | str:
    """A row within the reward model's length; or what is wrong with it."""
    from helpsteer_rloo.data.sources import BadRowError

    try:
        prompt, responses, ended = _asked(raw)
        ids = [renderer.continuation_ids(text, ended=end) for text, end in zip(responses, ended, strict=True)]
        longest = max(map(len, ids))
        found = renderer.fit_prompt(prompt, longest, max_length)
    except BadRowError as error:
        if not own.skip_bad_rows:
            raise ValueError(f"{error}\nMend the row and give the same command again, or --skip_bad_rows.") from None
        return str(error)
    except ValueError as error:  # of the renderer, about the turns
        message = f"{raw.file.path}, line {raw.line}: {error}"
        if not own.skip_bad_rows:
            raise ValueError(f"{message}\nMend the row and give the same command again, or --skip_bad_rows.") from None
        return message
    if found is None:
        return f"the last turn alone leaves no room for a response in {max_length} tokens"
    messages, prompt_ids = found
    room = max_length - len(prompt_ids)
    cut = (("context",) if messages != tuple(prompt) else ()) + (("response",) if longest > room else ())
    return _Fitted(TokenGroup((), prompt_ids, tuple(one[:room] for one in ids)), cut)


def _asked(raw: "RawRow") -> tuple[list[Message], list[str], list[bool]]:
    """Conversation and responses of a row, and whether each response ended.

    Raises:
        BadRowError: something is missing or of another type.
    """
    from helpsteer_rloo.data.fields import FieldReader
    from helpsteer_rloo.data.sources import BadRowError

    if isinstance(raw.content, BadRowError):
        raise raw.content
    reader, row = FieldReader(raw), raw.content
    name = "context" if "context" in row and "messages" not in row else "messages"
    turns = reader.value(row, name)
    if not isinstance(turns, list) or not turns:
        raise reader.bad(name, "expected a list of turns")
    prompt = [
        Message(_role(reader, turn, f"{name}[{place}]."), reader.text(turn, "content", f"{name}[{place}]."))
        for place, turn in enumerate(turns)
    ]
    if name == "context":
        responses = [reader.text(row, side) for side in ("response1", "response2")]
    elif "response" in row:
        responses = [reader.text(row, "response")]
    else:
        responses = list(reader.texts(row, "responses"))
    if not responses:
        raise reader.bad("responses", "is empty")
    ended = row.get("ended", True)
    given = [ended] * len(responses) if isinstance(ended, bool) else ended
    if not isinstance(given, list) or len(given) != len(responses) or not all(isinstance(one, bool) for one in given):
        raise reader.bad("ended", "expected true, false, or a list of them, one a response")
    return prompt, responses, given


def _role(reader: Any, turn: Any, path: str) -> Any:
    role = reader.text(turn, "role", path)
    if role not in _ROLES:
        raise reader.bad(f"{path}role", f"expected one of {', '.join(_ROLES)}, got {role!r}")
    return role


def _line(raw: "RawRow", result: _Fitted | str, scores: list[float] | None, counts: Counter[str]) -> dict[str, Any]:
    """What is written of a row, and its count."""
    counts["rows"] += 1
    row = raw.content if isinstance(raw.content, dict) else {"line": raw.line}
    if scores is not None and not all(map(math.isfinite, scores)):
        raise ValueError(f"{raw.file.path}, line {raw.line}: the score is not finite: the reward model is damaged.")
    if scores is None or isinstance(result, str):
        counts["without scores"] += 1
        return {**row, "scores": None, "error": result}
    for what in result.cut:
        counts[f"{what} cut"] += 1
    return {**row, "scores": scores, **({"cut": list(result.cut)} if result.cut else {})}


def _pass_over(rows: "Iterator[RawRow]", target: Path) -> int:
    """Pass over the rows that are in the output already, cut off a part of a line at its end; how many there are.

    Raises:
        ValueError: the output has other rows.
    """
    if not target.exists():
        return 0
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        raw = next(rows, None)
        done = json.loads(line)
        kept = {name: value for name, value in done.items() if name not in _ADDED}
        expected = None if raw is None else raw.content if isinstance(raw.content, dict) else {"line": raw.line}
        if expected is None or kept != {name: value for name, value in expected.items() if name not in _ADDED}:
            raise ValueError(f"--output {target}, line {number}: is not of this input; give another name.")
    if len(whole) < len(content):
        with target.open("r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")
