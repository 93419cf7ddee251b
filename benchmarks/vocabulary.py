"""Memory of the policy pass at Qwen3's vocabulary of 151,936, for completions of 128 to 1,024 tokens.

One prompt of 64 tokens with 4 completions, forced so that nothing is sampled, scored by a function that needs no
memory: what is left of a step is the reference and the policy pass and its backward. A third process runs the body
alone over as many tokens, forward and backward without a vocabulary head. What peak memory gains from 128 tokens to
more, less what the body alone gains, is the growth that the head causes; it is given as a share of the peak at 128.
"""

from typing import Any

from benchmarks import harness, rloo_step
from benchmarks.harness import Options, Run, Spec

LENGTHS = (128, 256, 512, 1024)
PROMPT, K = 64, 4
SIDES = (*harness.SIDES, "body")


def rows(quick: bool) -> list[Spec]:
    """One specification for each length of completions."""
    changes: dict[str, Any] = {"prompt": PROMPT, "k": K, "groups": 1, "checkpointing": True, "equal_prompts": True}
    changes |= {"forced": "full", "constant_reward": True, "shape": "TINY" if quick else "REAL_VOCABULARY"}
    lengths = (8, 16) if quick else LENGTHS
    rows = [rloo_step.make_row("vocabulary", completion=length, **changes) for length in lengths]
    return [row | {"name": f"vocabulary/completion{row['completion']}"} for row in rows]


def benchmark(options: Options) -> None:
    """Measure every length, or none if `--only` is in no name: the growth of a row is against the first."""
    first: dict[str, float] = {}
    specs = rows(options.quick)
    for spec in specs if any(options.only in spec["name"] for spec in specs) else []:
        spec |= {"steps": options.steps, "seed": options.seed, "quick": options.quick}
        runs: dict[str, list[Run]] = {side: [] for side in SIDES}
        for _ in range(options.pairs):
            for side in SIDES:
                runs[side].append(harness.run_child("benchmarks.vocabulary", {**spec, "side": side}, options))
        row = harness.comparison(spec, runs, options)
        row["peak_bytes_body"] = round(harness.median(runs["body"], "peak_bytes"))
        peaks = {side: row[f"peak_bytes_{side}"] for side in SIDES}
        first = first or peaks
        row |= {f"growth_beyond_body_{side}": _growth(first, peaks, side) for side in harness.SIDES}
        harness.say(
            f"  {row['name']}: {row['growth_beyond_body_ours']:.1%} ours, {row['growth_beyond_body_trl']:.1%} TRL"
        )
        harness.publish(row, options)


def _growth(first: dict[str, float], now: dict[str, float], side: str) -> float:
    return ((now[side] - first[side]) - (now["body"] - first["body"])) / first[side]


def measure(spec: Spec) -> Run:
    """One side, or the body alone, in this process."""
    return _body_alone(spec) if spec["side"] == "body" else rloo_step.measure(spec)


def _body_alone(spec: Spec) -> Run:
    """Forward and backward of the body with LoRA over as many tokens as the policy pass, twice as in a run."""
    import peft
    import torch

    from benchmarks import measure, models

    shape = getattr(models, spec["shape"])
    policy = models.make_policy(shape, getattr(torch, spec["dtype"]), spec["seed"])
    adapted = peft.get_peft_model(policy, models.make_lora("CAUSAL_LM"))
    adapted.enable_input_require_grads()
    policy.gradient_checkpointing_enable()
    policy.train()
    for completion in (spec["completion"], spec["completion"]):
        input_ids = torch.randint(2, shape.vocabulary, (spec["k"], spec["prompt"] + completion))
        policy.model(input_ids=input_ids, use_cache=False).last_hidden_state.float().square().mean().backward()
    return {"peak_bytes": measure.peak_bytes()}


if __name__ == "__main__":
    harness.main("Memory at a vocabulary of 151,936, ours against TRL", benchmark)
