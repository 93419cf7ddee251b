"""Memory that the plan predicts, against memory that training takes: both stages, as the commands run them.

Every configuration is trained in a process of its own, by the very functions that the commands call, on a model read
from files and on rows that are as long as the settings allow. What is measured is the peak of resident memory above
what the process had after its imports; what is predicted comes from the same settings, by the function that the
pipeline asks before it starts.

The peak of one configuration differs from run to run, mostly by where in the heap its tensors happen to come to lie.
Each is therefore run `--pairs` times; shown are the median and all runs, and held against the bar of 15 % is every one
of them. The environment is that of the commands, huge pages among it.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Run, Spec

BAR = 0.15
GIB = 2**30
SHORT = 16
"""Tokens of the prompts of pairs, the shortest that a plan expects."""
BASE = {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 4, "head_dim": 64, "intermediate": 2048}
WIDE = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 64, "intermediate": 1536}
SHAPES: dict[str, dict[str, Any]] = {
    "88M": {**BASE, "vocabulary": 16_384, "tied": True},
    "104M-vocabulary": {**WIDE, "vocabulary": 151_936, "tied": True},
    "112M-untied": {**BASE, "layers": 14, "vocabulary": 16_384, "tied": False},
}


@dataclass(frozen=True)
class Reward:
    """A reward training: pairs of twice `length` tokens less a prompt, `pairs` of them in each of two steps."""

    shape: str
    dtype: str
    lora: bool
    checkpointing: bool
    length: int
    pairs: int = 2

    def flags(self) -> list[str]:
        """As the command takes them."""
        return [
            f"--per_device_train_batch_size={self.pairs}", "--gradient_accumulation_steps=1", "--max_steps=2",
            f"--max_length={self.length}",
        ]  # fmt: skip


@dataclass(frozen=True)
class RLOO:
    """An RLOO training: two steps of `groups` prompts of `prompt` tokens with k completions of `response` tokens."""

    shape: str
    dtype: str
    lora: bool
    checkpointing: bool
    prompt: int
    response: int
    k: int
    groups: int = 2

    @property
    def length(self) -> int:
        """The longest sequence."""
        return self.prompt + self.response

    def flags(self) -> list[str]:
        """As the command takes them."""
        return [
            f"--per_device_train_batch_size={self.k}", f"--gradient_accumulation_steps={self.groups}",
            f"--rloo_k={self.k}", f"--total_episodes={2 * self.groups * self.k}",
            f"--response_length={self.response}", "--local_rollout_forward_batch_size=8",
        ]  # fmt: skip


F32, BF16 = "float32", "bfloat16"
CONFIGURATIONS: Sequence[Reward | RLOO] = (
    Reward("88M", F32, True, False, 512),
    Reward("88M", F32, True, True, 1024),
    Reward("88M", F32, False, False, 384, pairs=4),
    Reward("88M", F32, False, True, 1024),
    Reward("88M", BF16, True, False, 1024),
    Reward("112M-untied", BF16, False, True, 768),
    Reward("104M-vocabulary", F32, True, False, 512),
    Reward("104M-vocabulary", BF16, True, True, 2048),
    Reward("104M-vocabulary", F32, False, True, 512),
    RLOO("88M", F32, True, False, 512, 128, 4),
    RLOO("88M", F32, True, True, 1024, 128, 8),
    RLOO("88M", F32, False, False, 256, 128, 4),
    RLOO("112M-untied", F32, False, True, 512, 128, 4),
    RLOO("112M-untied", BF16, True, False, 512, 256, 4),
    RLOO("104M-vocabulary", F32, True, True, 512, 128, 4),
    RLOO("104M-vocabulary", BF16, True, False, 512, 256, 2, groups=4),
    RLOO("104M-vocabulary", F32, False, True, 256, 64, 4, groups=4),
)


def rows() -> list[Spec]:
    """What is measured."""
    return [_row(configuration) for configuration in CONFIGURATIONS]


def _row(one: Reward | RLOO) -> Spec:
    stage = "reward" if isinstance(one, Reward) else "rloo"
    sizes = f"{one.length}" if isinstance(one, Reward) else f"{one.prompt}+{one.k}x{one.response}"
    kind = "lora" if one.lora else "full"
    recompute = "checkpointing" if one.checkpointing else "no-checkpointing"
    name = f"plan/{stage}-{kind}-{one.dtype}-{one.shape}-{sizes}-{recompute}"
    return {"name": name, "stage": stage, **asdict(one), "length": one.length}


def benchmark(options: Options) -> None:
    """Measure all configurations, or with `--quick` the first with a tiny model."""
    worst = 0.0
    selected = harness.selected(rows(), replace(options, huge_pages=False))  # which would be told by their names
    options = replace(options, huge_pages=True)  # as the commands ask for
    with tempfile.TemporaryDirectory() as directory:
        for spec in selected:
            spec = {**spec, "directory": directory}
            if options.quick:
                spec |= {"shape": "tiny", "length": 64}
            harness.run_child("benchmarks.plan", {**spec, "make": True}, options)
            row = _compared(spec, [harness.run_child("benchmarks.plan", spec, options) for _ in range(options.pairs)])
            row |= {name: getattr(options, name) for name in ("pairs", "threads", "seed", "quick", "huge_pages")}
            worst = max(worst, abs(row["worst_error"]))
            peaks = ", ".join(f"{peak / GIB:.2f}" for peak in row["peaks"])
            harness.say(f"  {spec['name']}: {peaks} GiB, {row['worst_error']:+.1%}")
            harness.publish(row, options)
    harness.say(f"  largest error {worst:.1%}, the bar is {BAR:.0%}")


def _compared(spec: Spec, runs: Sequence[Run]) -> dict[str, Any]:
    run, peaks = runs[0], sorted(run["peak_bytes"] for run in runs)
    median = harness.median(runs, "peak_bytes")
    worst = max((run["predicted_bytes"] / peak - 1 for peak in peaks), key=abs)
    return {
        "name": spec["name"],
        "ours": median,
        "peaks": peaks,
        "predicted": run["predicted_bytes"],
        "error": run["predicted_bytes"] / median - 1,
        "worst_error": worst,
        "within_bar": abs(worst) <= BAR,
        "worst_phase": run["worst_phase"],
        "items": run["items"],
        "seconds": harness.median(runs, "seconds"),
        "imports_bytes": harness.median(runs, "imports_bytes"),
        "spec": {name: value for name, value in spec.items() if name != "directory"},
        "versions": run["versions"],
    }


# ---- in a process of its own ----------------------------------------------------------------------------------------


def measure(spec: Spec) -> Run:
    """Write the models of a configuration; or train it, and compare."""
    if spec.get("make"):
        _write_models(spec)
        return {}
    return _measure_reward(spec) if spec["stage"] == "reward" else _measure_rloo(spec)


def _shape(spec: Spec) -> Any:
    from benchmarks import models

    return models.TINY if spec["shape"] == "tiny" else models.Shape(**SHAPES[spec["shape"]])


def _base(spec: Spec) -> Path:
    return Path(spec["directory"]) / f"base-{spec['shape']}-{spec['dtype']}"


def _reward_model(spec: Spec) -> Path:
    return _base(spec).with_name(f"reward-{spec['shape']}-{spec['dtype']}-{spec['lora']}-{spec['length']}")


def _write_models(spec: Spec) -> None:
    import torch

    from benchmarks import models
    from helpsteer_rloo.training.demo_base import build_tokenizer

    base, dtype = _base(spec), getattr(torch, spec["dtype"])
    if not base.exists():
        models.make_policy(_shape(spec), dtype, spec["seed"]).save_pretrained(base)
        build_tokenizer(_TOKENIZER_WORDS, 0).save_pretrained(base)
    if spec["stage"] == "rloo" and not _reward_model(spec).exists():
        _write_reward_model(spec, _reward_model(spec))


_TOKENIZER_WORDS = 500


def _write_reward_model(spec: Spec, directory: Path) -> None:
    """A reward model as the project leaves one: weights, record, and held-out prompts."""
    import torch

    from benchmarks import models
    from helpsteer_rloo.model.loading import Base, load_tokenizer
    from helpsteer_rloo.rendering import Renderer
    from helpsteer_rloo.run_dir import HELDOUT_PROMPTS, REWARD_MODEL_RECORD, write_json, write_text

    shape, directory_of_base = _shape(spec), _base(spec)
    directory.mkdir()
    if spec["lora"]:
        models.write_reward_adapter(shape, directory, spec["seed"])
    else:
        models.make_reward_model(shape, getattr(torch, spec["dtype"]), spec["seed"]).save_pretrained(directory)
    record = {
        "base_model": str(directory_of_base),
        "base": asdict(Base(str(directory_of_base.resolve()), dtype=spec["dtype"])),
        "adapter": spec["lora"],
        "thinking": False,
        "rendering": Renderer(load_tokenizer(str(directory_of_base))).fingerprint(spec["length"]),
    }
    write_json(directory / REWARD_MODEL_RECORD, record)
    write_text(directory / HELDOUT_PROMPTS, "0" * 32 + "\n")


def _flags(spec: Spec, kind: type[Reward] | type[RLOO]) -> list[str]:
    fields = {name: spec[name] for name in kind.__dataclass_fields__}
    return [
        f"--model_name_or_path={_base(spec)}",
        f"--output_dir={spec['directory']}/{spec['name'].replace('/', '-')}",
        f"--use_peft={str(spec['lora']).lower()}",
        f"--dtype={spec['dtype']}",
        f"--gradient_checkpointing={str(spec['checkpointing']).lower()}",
        f"--seed={spec['seed'] + 1}",
        "--save_strategy=no",
        "--disable_tqdm=true",
        "--report_to=none",
        *kind(**fields).flags(),
    ]


def _measure_reward(spec: Spec) -> Run:
    from helpsteer_rloo.model.loading import load_tokenizer
    from helpsteer_rloo.planning.needs import needs_of
    from helpsteer_rloo.planning.request import Rig
    from helpsteer_rloo.planning.requesting import request_of_reward
    from helpsteer_rloo.settings.config import REWARD
    from helpsteer_rloo.settings.parsing import parse_command
    from helpsteer_rloo.training.reward_model import train_reward_model

    settings = parse_command(REWARD, _flags(spec, Reward))
    tokenizer, groups = load_tokenizer(str(_base(spec))), _pairs(spec)
    need = needs_of(request_of_reward(settings, Rig(cpu=True)))[0]
    return _peak_of(need, lambda: train_reward_model(settings, tokenizer, groups, groups[:1], [[2, 3, 4]]))


def _pairs(spec: Spec) -> list[Any]:
    """Groups of one pair: two responses at the length limit on a short prompt, ids over all of the vocabulary."""
    from helpsteer_rloo.groups import Message, Preference, TokenGroup

    rng, words = random.Random(spec["seed"]), _shape(spec).vocabulary

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(words) for _ in range(count))

    return [
        TokenGroup(
            (Message("user", str(number)),),
            ids(SHORT),
            (ids(spec["length"] - SHORT), ids(spec["length"] - SHORT)),
            (Preference(0, 1, 1, number, "general", "english"),),
        )
        for number in range(2 * spec["pairs"])
    ]


def _measure_rloo(spec: Spec) -> Run:
    from helpsteer_rloo.model.loading import load_tokenizer
    from helpsteer_rloo.planning.needs import needs_of
    from helpsteer_rloo.planning.request import Rig
    from helpsteer_rloo.planning.requesting import request_of_rloo
    from helpsteer_rloo.settings.config import RLOO as COMMAND
    from helpsteer_rloo.settings.parsing import parse_command
    from helpsteer_rloo.training.policy import train_policy

    argv = [*_flags(spec, RLOO), f"--reward_model_path={_reward_model(spec)}"]
    settings = parse_command(COMMAND, argv)
    tokenizer = load_tokenizer(str(_base(spec)))
    prompts = _prompts(spec, tokenizer)
    need = needs_of(request_of_rloo(settings, Rig(cpu=True)))[0]
    return _peak_of(need, lambda: train_policy(settings, tokenizer, prompts, []))


def _prompts(spec: Spec, tokenizer: Any) -> list[Any]:
    """Prompts that are rendered to exactly as many tokens as there is room for."""
    from helpsteer_rloo.groups import Message, PromptGroup
    from helpsteer_rloo.rendering import Renderer

    renderer, rng = Renderer(tokenizer), random.Random(spec["seed"])

    def prompt(number: int) -> PromptGroup:
        text = f"{number}."
        while (left := spec["prompt"] - len(renderer.prompt_ids([Message("user", text)]))) > 0:
            text += "".join(f" {rng.choice('abcdefgh')}" for _ in range(max(1, left // 2)))
        return PromptGroup((Message("user", text),), ())

    return [prompt(number) for number in range(2 * spec["groups"])]


def _peak_of(need: Any, work: Any) -> Run:
    """Peak of resident memory while something runs, above what there was before, and what was said of it."""
    import time

    import scipy.stats  # noqa: F401 - what training imports on its way belongs to the imports
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    from benchmarks import measure

    before = measure.resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    begin = time.perf_counter()
    work()
    return {
        "imports_bytes": before,
        "peak_bytes": measure.peak_bytes() - before,
        "predicted_bytes": need.worst.total,
        "worst_phase": need.worst.name,
        "items": dict(need.worst.items),
        "phases": {phase.name: phase.total for phase in need.phases},
        "seconds": time.perf_counter() - begin,
        "versions": measure.versions(),
    }


if __name__ == "__main__":
    harness.main("Memory: predicted and measured", benchmark)
