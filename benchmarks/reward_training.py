"""Reward training: an optimizer step of 16 pairs with HelpSteer3's lengths, ours against TRL's `RewardTrainer`.

Both sides train the same model on the same ids in the same order; TRL runs with its defaults, batch 4 × accumulation 4.
Every step holds the same 16 pairs on both sides, so the losses of all steps have to agree. The rows of a prompt lie in
one step: next to each other for ours, which is told with a column `group` which pairs share a prompt, and in random
order for TRL, whose loader would shuffle them. In the rows with length grouping, both get the batches that TRL's
`train_sampling_strategy="group_by_length"` makes of a large sample: evenly spaced ones, the long and the short alike.
"""

import tempfile
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Run, Spec

BATCH, ACCUMULATION = 4, 4
PAIRS_PER_STEP = BATCH * ACCUMULATION
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
WARM_UP_LENGTH = 128
QUICK_SCALE = 1 / 32
SAMPLE_OF_LENGTH_GROUPING = 800
"""Pairs in one mega-batch of TRL's sampler: 50 batches of 16."""

# Trainer methods that are timed. Collation and the optimizer are "other"; what is recomputed under checkpointing is
# part of the backward pass.
PHASES = {"compute_loss": "forward", "accelerator.backward": "backward"}


def rows() -> list[Spec]:
    """What is measured, the rows with a target first."""
    return [
        _row(2048),
        _row(4096),
        _row(2048, data="repeated"),
        _row(1024),
        _row(2048, data="length_grouped"),
        _row(4096, data="length_grouped"),
        _row(2048, checkpointing=False),
        _row(2048, data="repeated", checkpointing=False),
        _row(2048, dtype="bfloat16"),
        _row(4096, dtype="bfloat16"),
    ]


def _row(max_length: int, *, data: str = "distinct", dtype: str = "float32", checkpointing: bool = True) -> Spec:
    recompute = "checkpointing" if checkpointing else "no-checkpointing"
    return {
        "name": f"reward_training/{max_length}-{data}-{dtype}-{recompute}",
        "max_length": max_length,
        "data": data,
        "dtype": dtype,
        "checkpointing": checkpointing,
    }


def benchmark(options: Options) -> None:
    """Measure all rows, or with `--quick` one of them at a tiny size."""
    for spec in harness.selected(rows(), options):
        runs = harness.interleaved("benchmarks.reward_training", spec, options)
        row = harness.comparison(spec, runs, options)
        harness.publish(row | _checks(spec, runs), options)


def _checks(spec: Spec, runs: dict[str, list[Run]]) -> dict[str, Any]:
    ours, trl = runs["ours"][0], runs["trl"][0]
    tolerance = TOLERANCE[spec["dtype"]]
    for side in harness.SIDES:
        for run in runs[side][1:]:
            harness.require_equal(f"Losses of two runs ({side})", run["losses"], runs[side][0]["losses"], tolerance)
    difference = harness.require_equal("Losses of the steps", ours["losses"], trl["losses"], tolerance)
    return {"largest_loss_difference": difference, "losses_ours": ours["losses"], "losses_trl": trl["losses"]}


def measure(spec: Spec) -> Run:
    """Train one side, in this process."""
    import torch

    from benchmarks import measure, models

    imports_bytes = measure.resident_bytes()
    shape, dtype = (models.TINY if spec["quick"] else models.STANDARD), getattr(torch, spec["dtype"])
    rates = [measure.gemm_rates(dtype, _gemm_size(spec))]
    model = models.make_reward_model(shape, dtype, spec["seed"])
    model_bytes = measure.resident_bytes()
    steps = _steps(spec)
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(spec, model, steps, directory)
        result = measure.run(trainer, [model], measure.Clock(dict(PHASES)), warm_up=1)
    rates.append(measure.gemm_rates(dtype, _gemm_size(spec)))
    work = sum((_work(step) for step in steps[1:]), models.Work())
    forward = models.forward_flops(shape, work) / spec["steps"]
    return result | {
        "imports_bytes": imports_bytes,
        "model_bytes": model_bytes,
        **measure.joined(rates),
        "copy_bytes_per_second": measure.copy_bytes_per_second(),
        "flops": forward + models.backward_flops(shape, work) / spec["steps"],
        "recomputed_flops": models.recomputed_flops(shape, work) / spec["steps"] if spec["checkpointing"] else 0,
        "flops_seconds": result["seconds"],
        "versions": measure.versions(),
    }


def _gemm_size(spec: Spec) -> int:
    return 256 if spec["quick"] else 2048


def _steps(spec: Spec) -> list[list[Any]]:
    """Lengths of the pairs of each optimizer step, the first of them short ones to warm up."""
    from benchmarks import profile

    assumptions = profile.Profile(scale=QUICK_SCALE if spec["quick"] else 1.0)
    limit, seed, count = int(spec["max_length"] * assumptions.scale), spec["seed"], spec["steps"] * PAIRS_PER_STEP
    if spec["data"] == "repeated":
        steps = profile.whole_groups(profile.repeated_pairs(count, seed, limit, assumptions), PAIRS_PER_STEP)
    elif spec["data"] == "length_grouped":
        pairs = _spread(profile.distinct_pairs(SAMPLE_OF_LENGTH_GROUPING, seed, limit, assumptions), count)
        steps = _cut(pairs)
    else:
        steps = _cut(profile.distinct_pairs(count, seed, limit, assumptions))
    warm_up = profile.distinct_pairs(PAIRS_PER_STEP, seed + 1, min(WARM_UP_LENGTH, limit), assumptions)
    return [profile.shifted(warm_up, 1_000_000), *steps]


def _cut(pairs: list[Any]) -> list[list[Any]]:
    return [pairs[start : start + PAIRS_PER_STEP] for start in range(0, len(pairs), PAIRS_PER_STEP)]


def _spread(pairs: list[Any], count: int) -> list[Any]:
    """Evenly spaced batches of 4 from one mega-batch of TRL's sampler, which sorts it by length."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(0)
    lengths = [pair.longer for pair in pairs]
    order = get_length_grouped_indices(lengths, PAIRS_PER_STEP, mega_batch_mult=50, generator=generator)
    wanted = count // BATCH
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    chosen = [batches[int((number + 0.5) * len(batches) / wanted)] for number in range(wanted)]
    return [pairs[index] for batch in chosen for index in batch]


def _work(pairs: list[Any]) -> Any:
    """What the pairs of a step need, each prompt computed once."""
    from benchmarks import models

    groups: dict[int, list[Any]] = {}
    for pair in pairs:
        groups.setdefault(pair.group, []).append(pair)
    work = models.Work()
    for group in groups.values():
        continuations = [length for pair in group for length in (pair.chosen, pair.rejected)]
        work += models.Work.of_group(group[0].prompt, continuations)
    return work


def _trainer(spec: Spec, model: Any, steps: list[list[Any]], directory: str) -> Any:
    """Our trainer or TRL's, with the same arguments."""
    import trl
    from datasets import Dataset

    from benchmarks import models, profile
    from helpsteer_rloo.training.reward import RewardTrainer

    shape = models.TINY if spec["quick"] else models.STANDARD
    ours = spec["side"] == "ours"
    rows = _ordered(spec, profile.fill([pair for step in steps for pair in step], shape.vocabulary, spec["seed"]))
    dataset = Dataset.from_list(rows)
    args = trl.RewardConfig(
        output_dir=directory,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=len(steps),
        max_length=spec["max_length"],
        gradient_checkpointing=spec["checkpointing"],
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        seed=spec["seed"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return (RewardTrainer if ours else trl.RewardTrainer)(
        model=model,
        args=args,
        train_dataset=dataset if ours else dataset.remove_columns("group"),
        processing_class=models.make_tokenizer(shape),
        peft_config=models.make_lora("SEQ_CLS"),
    )


def _ordered(spec: Spec, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every step: groups together for ours, in random order for TRL where prompts repeat."""
    import random

    if spec["side"] == "ours" or spec["data"] != "repeated":
        return rows
    rng = random.Random(spec["seed"])
    steps = [rows[start : start + PAIRS_PER_STEP] for start in range(0, len(rows), PAIRS_PER_STEP)]
    return [row for step in steps for row in rng.sample(step, len(step))]


if __name__ == "__main__":
    harness.main("Reward training, ours against TRL", benchmark)
