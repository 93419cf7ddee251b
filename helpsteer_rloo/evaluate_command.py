"""`helpsteer-rloo evaluate`: a reward model, or scores that somebody else computed, on an offline benchmark."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.config import CommandSpec, Settings
from helpsteer_rloo.console import benchmark_table, say, show
from helpsteer_rloo.parsing import parse_command
from helpsteer_rloo.provenance import provenance
from helpsteer_rloo.reward_record import check_reward_model
from helpsteer_rloo.run_dir import write_json

if TYPE_CHECKING:
    from helpsteer_rloo.evaluation.benchmarks.items import Benchmark, Item, Scores

MINIMUM_LENGTH = 16
BENCHMARKS = ("judgebench", "rm_bench", "rewardbench2", "helpsteer3")


@dataclass(frozen=True, kw_only=True)
class EvaluateKnobs:
    """What is judged, on which benchmark, and where the result goes."""

    benchmark: str = field(default="", metadata={"help": f"One of {', '.join(BENCHMARKS)}."})
    benchmark_path: str = field(default="", metadata={"help": "File or directory in the benchmark's published format."})
    reward_model_dir: str | None = field(default=None, metadata={"help": "Directory of the reward model to judge."})
    scores: str | None = field(
        default=None,
        metadata={"help": 'Judge the scores in this .jsonl file instead: {"id", "field", "score"} a response.'},
    )
    dump_scores: str | None = field(default=None, metadata={"help": "Write the scores to this .jsonl file."})
    output: str | None = field(default=None, metadata={"help": "Write the result to this .json file."})
    batch_size: int = field(default=8, metadata={"help": "Responses scored in one forward pass."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and response, in tokens (default: the reward model's)."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the reward model."})


EVALUATE = CommandSpec(
    program="helpsteer-rloo evaluate",
    description="Judge a reward model on JudgeBench, RM-Bench, RewardBench 2 or preferences in HelpSteer3's schema.",
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
    if own.benchmark not in BENCHMARKS:
        raise ValueError(f"--benchmark is {own.benchmark!r}; expected one of {', '.join(BENCHMARKS)}.")
    if not own.benchmark_path.strip():
        raise ValueError("--benchmark_path is missing; expected a file or directory.")
    if (own.reward_model_dir is None) == (own.scores is None):
        raise ValueError("Give either --reward_model_dir or --scores: what is to be judged.")
    if own.batch_size < 1:
        raise ValueError(f"--batch_size is {own.batch_size}; expected at least 1.")
    if own.max_length is not None and own.max_length < MINIMUM_LENGTH:
        raise ValueError(f"--max_length is {own.max_length}; expected at least {MINIMUM_LENGTH} tokens.")


def run_evaluate(settings: Settings[EvaluateKnobs]) -> None:
    """Score or read scores, compute the benchmark's result, print it and write it.

    Raises:
        ValueError: a file cannot be read, the reward model is none of this project, or nothing could be scored.
    """
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
    from helpsteer_rloo.model.loading import load_reward_model, load_tokenizer
    from helpsteer_rloo.rendering import Renderer

    directory = str(own.reward_model_dir)
    record = check_reward_model(directory, "--reward_model_dir", trusted=own.trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code=own.trust_remote_code)
    renderer = Renderer(tokenizer, thinking=record["thinking"])
    different = renderer.differences(record["rendering"])
    if different:
        raise ValueError(
            f"--reward_model_dir {directory}: its tokenizer renders text otherwise than in training: "
            f"{', '.join(different)} differ. Copy the directory again."
        )
    max_length = own.max_length or record["rendering"]["max_length"]
    model, _ = load_reward_model(directory)
    scores, counts = score_items(model, renderer, items, max_length, own.batch_size)
    return scores, counts, {"reward_model": directory, "max_length": max_length}
