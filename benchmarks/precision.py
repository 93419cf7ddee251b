"""Rounding: packed passes and plain unpadded ones in float32 and bfloat16, both against float64.

Both compute the same weights on the same ids, a sequence at a time on the plain side, with stock transformers and PEFT.
The reference is the plain pass in float64 on those very weights, whose norms and rotary angles transformers computes in
float32 even there. For every quantity the row has the largest and the mean difference from it; gradients, of the mean
log-probability and the mean score for all LoRA weights, relative to their length.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options

PROMPTS = (1, 24, 130, 200)
CONTINUATIONS = ((3, 40), (1, 60, 25, 90), (40, 2, 33, 5), (120,))
DTYPES = ("float32", "bfloat16")
QUANTITIES = ("log-probabilities", "entropies", "scores", "gradients")


def benchmark(options: Options) -> None:
    """One row for each type and quantity."""
    names = {dtype: {quantity: f"precision/{dtype} {quantity}" for quantity in QUANTITIES} for dtype in DTYPES}
    wanted = [dtype for dtype, found in names.items() if any(options.only in name for name in found.values())]
    if wanted:
        _measure(wanted, names, options)


def _measure(dtypes: list[str], names: dict[str, dict[str, str]], options: Options) -> None:
    import torch

    from benchmarks import measure, models

    torch.set_num_threads(options.threads)
    shape = models.TINY if options.quick else models.STANDARD
    groups = _groups(shape.vocabulary, options.seed)
    for dtype in dtypes:
        for quantity, values in _differences(shape, getattr(torch, dtype), groups, options.seed).items():
            if options.only in (name := names[dtype][quantity]):
                circumstances = {"threads": options.threads, "seed": options.seed, "quick": options.quick}
                harness.publish({"name": name, **values, **circumstances, "versions": measure.versions()}, options)


def _groups(vocabulary: int, seed: int) -> Any:
    from helpsteer_rloo.groups import TokenGroup

    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, vocabulary) for _ in range(count))

    shapes = zip(PROMPTS, CONTINUATIONS, strict=True)
    return [TokenGroup((), ids(prompt), tuple(ids(length) for length in lengths)) for prompt, lengths in shapes]


def _differences(shape: Any, dtype: Any, groups: Any, seed: int) -> dict[str, dict[str, float]]:
    import torch
    from peft import get_peft_model

    from benchmarks import models
    from helpsteer_rloo.model.forward import prepare_packed
    from helpsteer_rloo.model.fused_linears import fuse_linears
    from helpsteer_rloo.model.fused_norms import fuse_norms

    model = get_peft_model(models.make_policy(shape, dtype, seed), models.make_lora("CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02, generator=generator)
    head = torch.randn(shape.hidden, generator=generator) * 0.02
    exact = _results(copy.deepcopy(model).double(), groups, head, _plain)
    plain = _results(copy.deepcopy(model), groups, head, _plain)
    prepare_packed(model)
    fuse_linears(model)
    fuse_norms(model)
    ours = _results(model, groups, head, _packed)
    return {
        quantity: {
            f"{figure}_{side}": value
            for side, found in (("ours", ours), ("plain", plain))
            for figure, value in _distance(quantity, found[quantity], exact[quantity]).items()
        }
        for quantity in exact
    }


def _distance(quantity: str, found: Any, exact: Any) -> dict[str, float]:
    difference = (found.double() - exact).abs()
    if quantity == "gradients":
        return {"largest": float(difference.max() / exact.abs().max()), "mean": float(difference.norm() / exact.norm())}
    return {"largest": float(difference.max()), "mean": float(difference.mean())}


def _results(model: Any, groups: Any, head: Any, passes: Callable[[Any, Any], tuple[Any, Any, Any]]) -> dict[str, Any]:
    """Log-probabilities, entropies, scores, and the gradients for all LoRA weights."""
    import torch

    model.train()
    log_probs, entropies, last_BD = passes(model, groups)
    wide = torch.promote_types(last_BD.dtype, torch.float32)
    scores = last_BD.to(wide) @ head.to(wide)
    (log_probs.mean() + scores.mean()).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    found = (log_probs, entropies, scores, gradients)
    return {name: values.detach() for name, values in zip(QUANTITIES, found, strict=True)}


def _plain(model: Any, groups: Any) -> tuple[Any, Any, Any]:
    import torch

    log_probs, entropies, last = [], [], []
    for group in groups:
        for number, continuation in enumerate(group.continuation_ids):
            ids = torch.tensor([group.sequence(number)])
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            start = len(group.prompt_ids)
            logits = output.logits[0, start - 1 : -1]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            log_probs.append(wide.gather(-1, torch.tensor(continuation)[:, None])[:, 0])
            entropies.append(-(wide.exp() * wide).sum(-1))
            last.append(output.hidden_states[-1][0, -1])
    return torch.cat(log_probs), torch.cat(entropies), torch.stack(last)


def _packed(model: Any, groups: Any) -> tuple[Any, Any, Any]:
    from helpsteer_rloo.model.forward import packed_hidden, packed_log_probs
    from helpsteer_rloo.packing import PackedRow

    row = PackedRow(tuple(groups))
    found = packed_log_probs(model, row)
    return found.log_probs, found.entropies, packed_hidden(model, row, row.last_positions)


if __name__ == "__main__":
    harness.main("Rounding against float64, ours and plain passes", benchmark)
