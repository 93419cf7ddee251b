"""RLOO: an optimizer step of 4 prompts × K completions of 128 tokens, ours against TRL's `RLOOTrainer`.

Both sides start from the same policy, LoRA, prompts and reward model, sample, score, and take one optimizer step on
micro-batches of 4. Sampling draws different tokens, so the timed runs are held to the same number of completions and
of tokens; that both compute the same thing is checked apart, on a tiny model with the same completions forced on both:
rewards and gradient norms of three steps have to agree.
"""

import random
import tempfile
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Run, Spec

BATCH = 4
GROUPS = 4
COMPLETION = 128
WARM_UP_PROMPT = 16
PARITY_STEPS = 3
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of rewards, and of gradient norms relative to the largest, under forced completions."""


def rows() -> list[Spec]:
    """What is measured, the rows with a target first."""
    return [
        make_row("rloo_step", prompt=500, k=4),
        make_row("rloo_step", prompt=500, k=4, dtype="bfloat16"),
        make_row("rloo_step", prompt=500, k=8),
        make_row("rloo_step", prompt=250, k=4),
        make_row("rloo_step", prompt=250, k=8),
        make_row("rloo_step", prompt=500, k=4, checkpointing=True),
        make_row("rloo_step", prompt=500, k=4, groups=16),
    ]


def make_row(benchmark: str, **changes: Any) -> Spec:
    """A specification: mean prompt of `prompt` tokens, K = `k`, `groups` prompts a step; the rest unless changed."""
    spec: Spec = {
        "prompt": 500,
        "k": 4,
        "groups": GROUPS,
        "completion": COMPLETION,
        "dtype": "float32",
        "checkpointing": False,
        "equal_prompts": False,
        "shape": "STANDARD",
    } | changes
    recompute = "checkpointing" if spec["checkpointing"] else "no-checkpointing"
    parts = (f"prompt{spec['prompt']}", f"k{spec['k']}", f"groups{spec['groups']}", spec["dtype"], recompute)
    return {"name": f"{benchmark}/{'-'.join(parts)}", **spec}


def benchmark(options: Options) -> None:
    """Measure all rows, or with `--quick` one of them at a tiny size."""
    compare(rows(), options)


def compare(specs: list[Spec], options: Options) -> None:
    """Measure these rows, and check once for each dtype that both sides compute the same thing."""
    parity: dict[str, dict[str, Any]] = {}
    for spec in harness.selected(specs, options):
        if options.quick:
            spec |= {"shape": "TINY", "prompt": 24, "completion": 8}
        if spec["dtype"] not in parity:
            parity[spec["dtype"]] = check_parity(spec, options)
        runs = harness.interleaved("benchmarks.rloo_step", spec, options)
        row = harness.comparison(spec, runs, options)
        harness.publish(row | parity[spec["dtype"]] | _checks(runs) | _utilization(runs["ours"]), options)


def check_parity(spec: Spec, options: Options) -> dict[str, Any]:
    """Three steps of both sides on a tiny model, on the same completions.

    Raises:
        ValueError: rewards or gradient norms differ.
    """
    tiny = {"shape": "TINY", "prompt": 24, "completion": 8, "groups": 4, "k": 4, "steps": PARITY_STEPS - 1}
    both = {
        side: harness.run_child("benchmarks.rloo_step", {**spec, **tiny, "forced": "ragged", "side": side}, options)
        for side in harness.SIDES
    }
    ours, trl, tolerance = both["ours"], both["trl"], TOLERANCE[spec["dtype"]]
    rewards = harness.require_equal("Forced rewards", ours["rewards"], trl["rewards"], tolerance)
    largest = max(trl["grad_norms"])
    norms = harness.require_equal("Forced gradients", ours["grad_norms"], trl["grad_norms"], tolerance * largest)
    return {"forced_reward_difference": rewards, "forced_gradient_difference": norms / largest}


def _checks(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Both sides sampled the same number of completions, all of the same length."""
    counted = {(run["completions"], run["completion_tokens"]) for side in harness.SIDES for run in runs[side]}
    if len(counted) != 1:
        raise ValueError(f"The runs sampled different numbers of completions and tokens: {sorted(counted)}.")
    completions, tokens = counted.pop()
    return {"completions": completions, "completion_tokens": tokens}


def _utilization(ours: list[Run]) -> dict[str, Any]:
    """Of our runs: share of the GEMM rate by pass, and sampling against its floor."""
    floor = harness.median(ours, "sampling_floor")
    by_pass = harness.medians(ours, "phase_flops_fraction")
    share = harness.share_of_fastest(ours)
    return {
        "phase_flops_fraction_of_gemm_peak": by_pass,
        "phase_flops_fraction_of_fastest_gemm": {phase: value * share for phase, value in by_pass.items()},
        "sampling_floor_seconds": floor,
        "sampling_over_floor": harness.medians(ours, "phase_seconds")["sampling"] / floor,
    }


def measure(spec: Spec) -> Run:
    """Take the steps of one side, in this process."""
    import torch

    from benchmarks import measure, models, rloo_parts

    imports_bytes = measure.resident_bytes()
    shape, dtype = getattr(models, spec["shape"]), getattr(torch, spec["dtype"])
    gemm_size = 256 if spec["quick"] else 2048
    rates = [measure.gemm_rates(dtype, gemm_size)]
    prompts = _prompts(spec, shape)
    with tempfile.TemporaryDirectory() as directory:
        policy, reward = rloo_parts.make_models(spec, shape, dtype, directory)
        model_bytes = measure.resident_bytes()
        trainer = rloo_parts.make_trainer(spec, (policy, reward), prompts, directory)
        if spec.get("forced"):
            rloo_parts.force_completions(trainer, shape, spec)
        clock = measure.Clock(rloo_parts.phases(spec["side"]))
        result = measure.run(trainer, [policy, reward], clock, warm_up=1)
    rates.append(measure.gemm_rates(dtype, gemm_size))
    common = {
        "imports_bytes": imports_bytes,
        "model_bytes": model_bytes,
        **measure.joined(rates),
        "copy_bytes_per_second": measure.copy_bytes_per_second(),
        "versions": measure.versions(),
    }
    result |= common | rloo_parts.sampled(trainer, spec)
    return result | rloo_parts.needed(spec, shape, [len(prompt) for prompt in prompts[spec["groups"] :]], result)


def _prompts(spec: Spec, shape: Any) -> list[list[int]]:
    """Ids of the prompts of all steps, the first step's short ones to warm up."""
    from benchmarks import profile

    count = spec["groups"] * spec["steps"]
    lengths = [spec["prompt"]] * count
    if not spec["equal_prompts"]:
        lengths = profile.prompt_lengths(count, spec["prompt"], spec["seed"])
    rng = random.Random(spec["seed"])
    warm_up = [min(WARM_UP_PROMPT, spec["prompt"])] * spec["groups"]
    return [[rng.randrange(2, shape.vocabulary) for _ in range(length)] for length in [*warm_up, *lengths]]


if __name__ == "__main__":
    harness.main("RLOO step, ours against TRL", benchmark)
