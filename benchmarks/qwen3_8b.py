"""Qwen3-8B's true shape, random bf16 weights: one reward step and one RLOO step of ours on a machine of 24 GiB.

The reward step has one pair of 512 tokens in all, the RLOO step one prompt of 128 tokens with 4 completions of 32. Each
runs twice in a process of its own, the second time measured. The weights are made in place, so nothing is downloaded
and memory never holds them twice. TRL is not run: what it needs is computed from sizes (`trl_bytes`) and stated.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Run, Spec

GIB = 2**30
TARGET_BYTES = 18.5 * GIB
PAIR = {"prompt": 256, "chosen": 128, "rejected": 128}
PROMPT, K, COMPLETION = 128, 4, 32


def benchmark(options: Options) -> None:
    """Measure both steps, ours only."""
    for step in ("reward", "rloo"):
        spec: Spec = {"name": f"qwen3_8b/{step}", "step": step, "seed": options.seed, "quick": options.quick}
        if options.only not in spec["name"]:
            continue
        run = harness.run_child("benchmarks.qwen3_8b", spec, options)
        for phase, seconds in run["phase_seconds"].items():
            harness.say(f"  {spec['name']} {phase}: {seconds:.1f} s")
        harness.publish(_row(spec, run, options), options)


def _row(spec: Spec, run: Run, options: Options) -> dict[str, Any]:
    return {
        "name": spec["name"],
        "ours": run["seconds"],
        "trl": None,
        "ratio": None,
        "peak_bytes_ours": run["peak_bytes"],
        "peak_bytes_trl": run["trl_bytes"],
        "peak_bytes_trl_is_computed": True,
        "tokens_ours": run["tokens"],
        "tokens_trl": None,
        "flops_fraction_of_gemm_peak": None,
        "within_target": run["peak_bytes"] <= TARGET_BYTES,
        "target_bytes": TARGET_BYTES,
        "phase_seconds_ours": run["phase_seconds"],
        "threads": options.threads,
        "huge_pages": options.huge_pages,
        "seed": options.seed,
        "quick": options.quick,
        "spec": spec,
        "versions": run["versions"],
    }


def measure(spec: Spec) -> Run:
    """One of the two steps, in this process."""
    from benchmarks import measure, models

    shape = models.TINY if spec["quick"] else models.QWEN3_8B
    with tempfile.TemporaryDirectory() as directory:
        run = {"reward": _reward_step, "rloo": _rloo_step}[spec["step"]](spec, shape, directory)
    return run | {"trl_bytes": trl_bytes(shape, spec["step"]), "versions": measure.versions()}


def _reward_step(spec: Spec, shape: Any, directory: str) -> Run:
    import trl
    from datasets import Dataset
    from transformers import Qwen3ForSequenceClassification

    from benchmarks import measure, models, profile, reward_training
    from helpsteer_rloo.training.reward import RewardTrainer

    model = materialized(Qwen3ForSequenceClassification, models.make_config(shape, labels=1), spec["seed"])
    rows = profile.fill([profile.Pair(group, **PAIR) for group in range(2)], shape.vocabulary, spec["seed"])
    args = trl.RewardConfig(
        output_dir=directory,
        per_device_train_batch_size=1,
        max_steps=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=models.make_tokenizer(shape),
        peft_config=models.make_lora("SEQ_CLS"),
    )
    return measure.run(trainer, [model], measure.Clock(dict(reward_training.PHASES)), warm_up=1)


def _rloo_step(spec: Spec, shape: Any, directory: str) -> Run:
    from transformers import Qwen3ForCausalLM

    from benchmarks import measure, models, rloo_parts

    policy = materialized(Qwen3ForCausalLM, models.make_config(shape), spec["seed"])
    changes = {"side": "ours", "shape": "TINY" if spec["quick"] else "QWEN3_8B", "k": K, "groups": 1}
    changes |= {"completion": COMPLETION, "checkpointing": True, "steps": 1}
    prompts = [[2 + number] * PROMPT for number in range(2)]
    adapter = Path(directory) / "reward"
    models.write_reward_adapter(shape, adapter, spec["seed"])
    trainer = rloo_parts.make_trainer({**spec, **changes}, (policy, adapter), prompts, directory)
    return measure.run(trainer, [policy], measure.Clock(rloo_parts.phases("ours")), warm_up=1)


def materialized(model_class: Any, config: Any, seed: int) -> Any:
    """A frozen bf16 model of this class, made on the meta device and filled with random weights tensor by tensor.

    Matrices are cut from one block of normal numbers at shifting places, which takes seconds where drawing 8 billion
    takes minutes. Rotary frequencies are not parameters, so the meta device loses them: that module is made anew.
    """
    import torch
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    block = (torch.randn(2**24, generator=torch.Generator().manual_seed(seed)) * 0.02).to(torch.bfloat16)
    with torch.device("meta"):
        model = model_class(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weights = torch.empty(parameter.shape, dtype=torch.bfloat16)
            _fill(weights.view(-1), block) if parameter.dim() > 1 else weights.fill_(1)
            setattr(module, name, torch.nn.Parameter(weights, requires_grad=False))
    model.model.rotary_emb = Qwen3RotaryEmbedding(config)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"These tensors were left without data: {left}.")
    return model


def _fill(flat: Any, block: Any) -> None:
    """Copy pieces of the block into a tensor, each from a place of its own."""
    shift = 7919
    piece = block.numel() - shift
    for number, start in enumerate(range(0, flat.numel(), piece)):
        count = min(piece, flat.numel() - start)
        offset = (number * 31 + flat.numel()) % shift
        flat[start : start + count] = block[offset : offset + count]


def trl_bytes(shape: Any, step: str) -> int:
    """What TRL 1.16 needs at the least for the same step, from sizes: weights, adapters with optimizer, activations.

    - Weights in bf16: for the reward step one sequence-classification model, which has embeddings and no vocabulary
      head; for RLOO the policy (with its head) and, since TRL's reward model is a model of its own, a second model.
    - LoRA in fp32 with gradient and two Adam moments: 16 bytes a weight.
    - Activations under gradient checkpointing: the bf16 input of every layer for every token of one micro-batch of
      padded sequences, prompt repeated in each.

    The vocabulary head is computed in tiles and not counted, nor are the activations of the layer that is recomputed,
    the cache of keys and values while sampling, and the libraries: TRL's true need is higher.
    """
    embedding = shape.vocabulary * shape.hidden
    body = shape.body_parameters() + embedding
    head = 0 if shape.tied else embedding
    if step == "reward":
        weights, tokens = body, 2 * (PAIR["prompt"] + max(PAIR["chosen"], PAIR["rejected"]))
    else:
        weights, tokens = body + head + body, K * (PROMPT + COMPLETION)
    from benchmarks.models import LORA_RANK

    return 2 * weights + 16 * shape.lora_parameters(LORA_RANK) + 2 * shape.layers * tokens * shape.hidden


if __name__ == "__main__":
    harness.main("Qwen3-8B's shape, one reward step and one RLOO step", benchmark)
