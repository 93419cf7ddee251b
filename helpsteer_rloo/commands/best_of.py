"""`helpsteer-rloo best-of`: for each prompt of a file the best of n answers, by a reward model."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.chat.playing import Play, PlayKnobs, check_play, open_play, policy_of
from helpsteer_rloo.data.results import Read, Results, check_finite, check_output, read_prompt
from helpsteer_rloo.data.sources import RawRow
from helpsteer_rloo.display.console import best_of_table, say, show, warn
from helpsteer_rloo.events import PATIENCE, Task
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.identity import model_identity
from helpsteer_rloo.records.reward_model import html_entities_of
from helpsteer_rloo.run_dir import locked
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import named_positions, parse_command

if TYPE_CHECKING:
    from helpsteer_rloo.model.roles import RewardRole
    from helpsteer_rloo.model.rollout import Completion
    from helpsteer_rloo.model.voices import Voice

AT_ONCE = 64
"""Most answers that are decoded, or scored, together."""
BLOCK = 16 * AT_ONCE
"""Answers of a prompt that are drawn, then scored, and but for the best forgotten."""
MOST = 1_000_000
"""Answers to a prompt."""
MOST_KEPT = 10_000
"""Answers to a prompt that are written; they stand in one line of the output."""
_ADDED = ("response", "responses", "ended", "finish_reason", "score", "scores", "best_of")


@dataclass(frozen=True, kw_only=True)
class BestOfKnobs(PlayKnobs):
    """How many answers to which prompts, and where the best go."""

    n: int = field(default=0, metadata={"help": "Answers drawn for each prompt.", "needed": True})
    input: str = field(
        default="",
        metadata={
            "help": 'File of prompts (.jsonl, .jsonl.gz or .parquet): {"messages": [{"role", "content"}, …]}, or rows '
            "in HelpSteer3's schema; responses that a row has are passed over."
        },
    )
    output: str = field(
        default="", metadata={"help": "Rows with the best answer go to this .jsonl file; a part of it is gone on with."}
    )
    keep_all: bool = field(default=False, metadata={"help": "Write all answers with their scores, not only the best."})
    batch_size: int = field(
        default=16,
        metadata={"help": "Prompts that are read and looked at for mistakes together; changes no result."},
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "Write what is wrong with a row instead of stopping."})


BEST_OF = CommandSpec(
    program="helpsteer-rloo best-of",
    description="The best of N answers to each prompt of a file, by a reward model.",
    knobs=BestOfKnobs,
    usage="N FILE --policy_dir D --output OUT.jsonl [FLAGS]",
)


def parse_best_of(argv: Sequence[str] | None = None) -> Settings[BestOfKnobs]:
    """Read the number, the file's name and the flags of the command."""
    return parse_command(BEST_OF, named_positions(argv or (), ["n", "input"]), checks=[check_best_of])


def check_best_of(settings: Settings[BestOfKnobs]) -> None:
    """Check the flags.

    Raises:
        ValueError: one is missing or out of range.
    """
    own = settings.own
    for name in ("input", "output"):
        if not getattr(own, name):
            raise ValueError(f"--{name} is missing.")
    for name in ("n", "batch_size"):
        if getattr(own, name) < 1:
            raise ValueError(f"--{name} is {getattr(own, name)}; expected at least 1.")
    if own.n > MOST:
        raise ValueError(
            f"--n is {own.n}; expected at most {MOST}: time grows with n, and what choosing can gain with log n only "
            f"(KL is at most {math.log(MOST) - 1:.1f} nats there, and {math.log(own.n) - 1:.1f} with {own.n})."
        )
    if own.keep_all and own.n > MOST_KEPT:
        raise ValueError(
            f"--keep_all writes all answers to a prompt in one line; expected --n {MOST_KEPT} at most with it, not "
            f"{own.n}."
        )
    check_play(own)
    check_output(own.input, own.output)


def run_best_of(settings: Settings[BestOfKnobs]) -> None:
    """Answer the prompts that have no answer yet, and say what choosing gains.

    Raises:
        ValueError: a model or a file cannot be read, a row is not as it should be, or the output is not a part of this
            one.
    """
    own = settings.own
    play = _play(own)
    for doubt in play.doubts:
        warn(doubt)
    results = Results(Path(own.input), Path(own.output), _ADDED, "answers", "answering")
    with locked(results.target.with_name(f".{results.target.name}.lock"), results.target):
        results.begin(_asked(own, play))
        _answer_file(own, play, results)


def _play(own: BestOfKnobs) -> Play:
    source = policy_of(own)
    judge = Path(own.reward_model_dir) if own.reward_model_dir else source.judge("reward_model")
    if judge is None:
        raise ValueError(source.absence_of_judge("reward_model", "--reward_model_dir"))
    return open_play(own, source, {"reward": ("--reward_model_dir", judge)})


def _asked(own: BestOfKnobs, play: Play) -> dict[str, Any]:
    """Everything that an answer depends on."""
    source = play.source
    return {
        "policy": model_identity(own.policy_dir),
        "base": model_identity(source.base["name"]) if source.adapter else None,
        "reward_model": model_identity(str(play.judges["reward"])),
        "input": own.input,
        **{name: getattr(play, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")},
        "n": own.n,
        "keep_all": own.keep_all,
    }


def _answer_file(own: BestOfKnobs, play: Play, results: Results) -> None:
    counts, gains = Counter[str](), _Gains()

    def seen(added: Mapping[str, Any]) -> None:
        results.count(added, counts)
        gains.add(added)

    rows = results.rest(seen)
    if counts["rows"]:
        say(f"Going on behind the {counts['rows']} rows that are in {results.target}.")
    from helpsteer_rloo.model.voices import load_judge, load_voice

    voice = load_voice(play.source, play.renderer.tokenizer)
    judge = load_judge(play.judges["reward"], play.source, voice, "reward")
    answering = _Answering(own, play, voice, judge)
    reader = _Reader(play, html_entities_of(play.records["reward"]))
    results.write(rows, reader.read, answering.compute, seen, at_once=own.batch_size, skip_bad_rows=own.skip_bad_rows)
    say(f"{results.target}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".")
    if gains.best:
        show(best_of_table(gains.summary(own.n)))


@dataclass(frozen=True)
class _Reader:
    """Makes rows prompts, cut at turn boundaries as in the policy's training."""

    play: Play
    html_entities: str

    def read(self, raw: RawRow) -> Read:
        """The prompt of a row, in a group that has no answers yet.

        Raises:
            ValueError: it is not as it should be.
        """
        prompt = read_prompt(raw, self.html_entities)
        found = self.play.renderer.fit_prompt(prompt, 0, self.play.room)
        if found is None:
            return Read(error=f"the last turn alone has more than the {self.play.room} tokens that a prompt may have")
        return Read(TokenGroup((), found[1], ()), ("context",) if found[0] != prompt else ())


class _Answering:
    """Answers prompts and scores the answers.

    Each prompt is answered and scored in passes of its own: in passes with others, whose shapes depend on these, the
    last bits of a number would be others, and now and then a token. So what a row gets depends on the row alone.
    """

    def __init__(self, own: BestOfKnobs, play: Play, voice: "Voice", judge: "RewardRole") -> None:
        from helpsteer_rloo.model.memory import AtOnce

        self._own, self._play, self._voice, self._judge = own, play, voice, judge
        self._sampling = play.sampling(voice.ends)
        self._drawn_at_once, self._scored_at_once = AtOnce(), AtOnce()

    def compute(self, part: Sequence[tuple[RawRow, TokenGroup]]) -> Iterator[dict[str, Any]]:
        """What is added to each row.

        Raises:
            ValueError: a score is not finite.
        """
        for raw, group in part:
            yield self._row(raw, group.prompt_ids)

    def _row(self, raw: RawRow, prompt: tuple[int, ...]) -> dict[str, Any]:
        """The best answer to a prompt; of all others no more is held than the scores, unless they are to be written."""
        from helpsteer_rloo.evaluation.best_of_n import best_of_n_kl

        n, kept = self._own.n, list[dict[str, Any]]()
        scores, best, place = array("d"), dict[str, Any](), 0
        task = Task(f"row {raw.line}", n, unit="answers", patience=PATIENCE)
        try:
            for numbers in blocks(n, BLOCK if self._voice.draws_one_by_one else n):
                answers = self._draw(raw, prompt, numbers)
                found = self._score(raw, prompt, answers)
                first = max(range(len(found)), key=found.__getitem__)  # of equal ones
                if not best or found[first] > best["score"]:
                    best, place = self._sample(answers[first], found[first]), numbers[first]
                kept += map(self._sample, answers, found) if self._own.keep_all else ()
                scores.extend(found)
                task.reach(numbers.stop)
        finally:
            task.end()
        about = {"n": n, "kl": best_of_n_kl(n), "mean_score": sum(scores) / n, "sample": place}
        return {**best, "best_of": {**about, **({"samples": kept} if kept else {})}}

    def _draw(self, raw: RawRow, prompt: tuple[int, ...], numbers: range) -> "list[Completion]":
        from helpsteer_rloo.model.rollout import sequence_seed

        seeds = [sequence_seed(self._play.seed, raw.line, number) for number in numbers]

        def run(rows: int) -> "list[Completion]":
            return self._voice.draw(prompt, seeds, self._sampling, rows=rows)

        return self._drawn_at_once.run(run, min(self._own.n, AT_ONCE), 1)

    def _score(self, raw: RawRow, prompt: tuple[int, ...], answers: "Sequence[Completion]") -> list[float]:
        group = TokenGroup((), prompt, tuple(answer.ids for answer in answers))
        (scores,) = self._scored_at_once.run(partial(self._judge.score, [group]), min(self._own.n, AT_ONCE), 1)
        check_finite(raw, scores)
        return scores

    def _sample(self, answer: "Completion", score: float) -> dict[str, Any]:
        (text,) = self._play.renderer.tokenizer.batch_decode([list(answer.body)])
        return {"response": text, "ended": answer.ended, "finish_reason": finish_reason(answer), "score": score}


def blocks(n: int, size: int) -> Iterator[range]:
    """The numbers of n answers in blocks of a size; the last is larger by what would be too few for one of its own.

    So the sampler, which arranges itself for as many answers at once as a block has up to `AT_ONCE`, does so alike.

    >>> list(blocks(200, 64))
    [range(0, 64), range(64, 128), range(128, 200)]
    """
    start = 0
    while start < n:
        end = start + size if n - start - size >= AT_ONCE else n
        yield range(start, end)
        start = end


def finish_reason(answer: "Completion") -> str:
    """Why an answer ends where it does, as OpenAI's interface has it: "stop" by itself, "length" at the limit."""
    return "stop" if answer.ended else "length"


@dataclass
class _Gains:
    """Of every prompt the score of its best answer, the mean score of all, and whether the best ended by itself."""

    best: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def add(self, added: Mapping[str, Any]) -> None:
        """Take a row, if it has an answer."""
        if added["response"] is not None:
            self.best.append(added["score"])
            self.one.append(added["best_of"]["mean_score"])
            self.ended.append(added["ended"])

    def summary(self, n: int) -> dict[str, Any]:
        """What choosing among n comes to, each with its interval over prompts."""
        from helpsteer_rloo.evaluation.best_of_n import best_of_n_kl
        from helpsteer_rloo.statistics import mean, proportion

        gains = [best - one for best, one in zip(self.best, self.one, strict=True)]
        return {
            "n": n,
            "score of one": mean(self.one).to_json(),
            "score of the best": mean(self.best).to_json(),
            "gain": mean(gains).to_json(),
            "share of the best that ended": proportion(self.ended).to_json(),
            "kl": best_of_n_kl(n),
        }
