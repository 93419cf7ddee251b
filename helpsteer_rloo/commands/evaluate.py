"""`helpsteer-rloo evaluate`: a reward model on its held-out pairs, or it or scores from elsewhere on a benchmark."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.commands.judge import JudgeKnobs, run_judgement
from helpsteer_rloo.display.console import benchmark_table, say, show
from helpsteer_rloo.records.provenance import provenance
from helpsteer_rloo.records.reward_model import check_reward_model
from helpsteer_rloo.run_dir import require_writable, write_json
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import parse_command

if TYPE_CHECKING:
    from helpsteer_rloo.evaluation.benchmarks.items import Benchmark, Item, Scores

MINIMUM_LENGTH = 16
BENCHMARKS = ("judgebench", "rm_bench", "rewardbench2", "helpsteer3")


@dataclass(frozen=True, kw_only=True)
class EvaluateKnobs(JudgeKnobs):
    """What is judged, on which benchmark, and where the result goes."""

    benchmark: str = field(
        default="",
        metadata={"help": f"One of {', '.join(BENCHMARKS)}. Without it, the model is judged on its held-out pairs."},
    )
    benchmark_path: str = field(default="", metadata={"help": "File or directory in the benchmark's published format."})
    scores: str | None = field(
        default=None,
        metadata={"help": 'Judge the scores in this .jsonl file instead: {"id", "field", "score"} a response.'},
    )
    dump_scores: str | None = field(default=None, metadata={"help": "Write the scores to this .jsonl file."})


EVALUATE = CommandSpec(
    program="helpsteer-rloo evaluate",
    description="Judge a reward model on its held-out pairs, on other preferences, or on a benchmark: JudgeBench, "
    "RM-Bench, RewardBench 2.",
    knobs=EvaluateKnobs,
)


def parse_evaluate(argv: Sequence[str] | None = None) -> Settings[EvaluateKnobs]:
    """Read the flags of the command."""
    return parse_command(EVALUATE, argv, checks=[check_evaluate])


def check_evaluate(settings: Settings[EvaluateKnobs]) -> None:
    """Check the flags, and those against each other.

    Raises:
        ValueError: one is missing or out of range, or two exclude each other.
    """
    own = settings.own
    if own.benchmark not in ("", *BENCHMARKS):
        raise ValueError(f"--benchmark is {own.benchmark!r}; expected one of {', '.join(BENCHMARKS)}.")
    _check_target(own)
    if own.batch_size < 1:
        raise ValueError(f"--batch_size is {own.batch_size}; expected at least 1.")
    if own.max_length is not None and own.max_length < MINIMUM_LENGTH:
        raise ValueError(f"--max_length is {own.max_length}; expected at least {MINIMUM_LENGTH} tokens.")


_OF_BENCHMARKS = ("benchmark_path", "scores", "dump_scores")
_OF_MODELS = ("max_length", "batch_size", "trust_remote_code")
_OF_PAIRS = ("compare_with", "dataset_name", "language", "domains", "skip_bad_rows")


def _check_target(own: EvaluateKnobs) -> None:
    """Refuse flags of the other use of the command, with a benchmark or without."""
    if own.scores is not None and (of_models := [f"--{name}" for name in _OF_MODELS if _is_given(own, name)]):
        raise ValueError(f"{', '.join(of_models)} has no effect with --scores, where no model is run.")
    strangers = [f"--{name}" for name in (_OF_PAIRS if own.benchmark else _OF_BENCHMARKS) if getattr(own, name)]
    if strangers and own.benchmark:
        raise ValueError(f"{', '.join(strangers)} cannot be used with --benchmark, which is read as it is.")
    if strangers:
        raise ValueError(f"--benchmark is missing; {', '.join(strangers)} needs one of {', '.join(BENCHMARKS)}.")
    if own.benchmark and not own.benchmark_path.strip():
        raise ValueError("--benchmark_path is missing; expected a file or directory.")
    if (own.reward_model_dir is None) == (own.scores is None):
        raise ValueError("Give either --reward_model_dir or --scores: what is to be judged.")
    if own.dump_scores is not None and not own.dump_scores.endswith(".jsonl"):
        raise ValueError(f"--dump_scores {own.dump_scores}: expected a name that ends in .jsonl.")
    _check_files(own)


def _is_given(own: EvaluateKnobs, name: str) -> bool:
    return getattr(own, name) != getattr(EvaluateKnobs(), name)


def _check_files(own: EvaluateKnobs) -> None:
    """Refuse to write over what is read, and to write two files to one place."""
    read = {Path(name).resolve() for name in (own.benchmark_path, own.scores, own.dataset_name) if name}
    for flag, name in (("--output", own.output), ("--dump_scores", own.dump_scores)):
        if name is not None and Path(name).resolve() in read:
            raise ValueError(f"{flag} {name} is a file that is read or written already; give another one.")
        read |= {Path(name).resolve()} if name else set()


def run_evaluate(settings: Settings[EvaluateKnobs]) -> None:
    """Judge a reward model on its held-out pairs, or the benchmark that was asked for; print the result and write it.

    Raises:
        ValueError: a file cannot be read, the reward model is none of this project, or nothing could be scored.
    """
    for flag, name in (("--output", settings.own.output), ("--dump_scores", settings.own.dump_scores)):
        if name is not None:
            require_writable(Path(name), flag)
    if not settings.own.benchmark:
        run_judgement(settings.own)
        return
    from helpsteer_rloo.evaluation.benchmarks.scores import write_scores

    own = settings.own
    benchmark = _benchmark(own.benchmark)
    items = benchmark.read(Path(own.benchmark_path))
    say(f"{own.benchmark}: {len(items.items)} items of {own.benchmark_path}.")
    scores, counts, judged = _scores(own, items.items)
    scored = [item for item in items.items if item.id in scores]
    if not scored:
        raise ValueError(f"No item could be scored ({dict(counts)}); give a larger --max_length.")
    result = {
        "benchmark": own.benchmark,
        "benchmark_path": own.benchmark_path,
        **judged,
        "items": len(items.items),
        "scored": len(scored),
        "left_out": dict(items.left_out),
        "counts": dict(counts),
        "result": benchmark.result(scored, scores),
        "provenance": provenance(),
    }
    show(benchmark_table(result))
    if own.dump_scores:
        write_scores(Path(own.dump_scores), scores)
        say(f"The scores are in {own.dump_scores}")
    if own.output:
        write_json(Path(own.output), result)
        say(f"The result is in {own.output}")


def _benchmark(name: str) -> "Benchmark":
    from helpsteer_rloo.evaluation.benchmarks.helpsteer3 import HELPSTEER3
    from helpsteer_rloo.evaluation.benchmarks.judgebench import JUDGEBENCH
    from helpsteer_rloo.evaluation.benchmarks.rewardbench2 import REWARDBENCH2
    from helpsteer_rloo.evaluation.benchmarks.rm_bench import RM_BENCH

    known: dict[str, Benchmark] = {
        "judgebench": JUDGEBENCH,
        "rm_bench": RM_BENCH,
        "rewardbench2": REWARDBENCH2,
        "helpsteer3": HELPSTEER3,
    }
    return known[name]


def _scores(own: EvaluateKnobs, items: "list[Item]") -> "tuple[Scores, Counter[str], dict[str, Any]]":
    """The scores, what was counted on the way, and what they are of."""
    from helpsteer_rloo.evaluation.benchmarks.scores import read_scores, score_items

    if own.scores is not None:
        scores, unused = read_scores(Path(own.scores), items)
        return scores, Counter({"scores_of_no_item": unused} if unused else {}), {"scores": own.scores}
    from helpsteer_rloo.model.loading import load_reward_model, own_renderer

    directory = str(own.reward_model_dir)
    record = check_reward_model(directory, "--reward_model_dir", trusted=own.trust_remote_code)
    renderer = own_renderer(directory, record, "--reward_model_dir", trusted=own.trust_remote_code)
    max_length = own.max_length or record["rendering"]["max_length"]
    model, _ = load_reward_model(directory)
    scores, counts = score_items(model, renderer, items, max_length, own.batch_size)
    return scores, counts, {"reward_model": directory, "max_length": max_length}
