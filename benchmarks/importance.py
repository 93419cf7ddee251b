"""What importance weights do about a sampler that is not the policy: the bias of RLOO's gradient, with intervals.

`python -m benchmarks.importance`: a tiny Qwen3 is the policy; the sampler is the same model with noise on its weights,
as an engine of lower precision would have, only more. Completions of two tokens at most can be gone through one by
one, so that the gradient of the expected reward, and the bias without correction, are known exactly. Then `RLOOTrainer`
itself takes many steps of no length on completions of that sampler. Measured is the mean of its gradients' error along
the exact bias, in units of that bias: 1 is the bias of no correction, 0 is none.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM, TrainerCallback

from helpsteer_rloo.data.demo import DemoBaseSettings
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.model.forward import packed_hidden, prepare_packed
from helpsteer_rloo.model.rollout import Sampling, sample_groups, sequence_seed
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.statistics import mean
from helpsteer_rloo.training.demo_base import build_model, build_tokenizer
from helpsteer_rloo.training.rloo import RLOOConfig, RLOOTrainer

SHAPE = DemoBaseSettings(hidden_size=32, intermediate_size=64, layers=2, heads=2, key_value_heads=1, head_dim=16)
PROMPT = "Name a tree."
COMPLETIONS = 1024
"""A step."""
TEMPLATE = {"enable_thinking": False}
NO_CAP = 1e9
VARIANTS = {
    "none": ("none", 2.0),
    "token, cap 2": ("token", 2.0),
    "sequence, cap 2": ("sequence", 2.0),
    "sequence, no cap": ("sequence", NO_CAP),
}


def perturbed(model: Qwen3ForCausalLM, noise: float) -> Qwen3ForCausalLM:
    """A copy with normal noise on every matrix, relative to the root mean square of its entries."""
    sampler, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in sampler.parameters():
            if weight.dim() > 1:
                scale = noise * weight.square().mean().sqrt()
                weight += scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return sampler


def reward_table(size: int) -> Tensor:
    """The reward of a first and a second token; column 0 where the first one ended the completion."""
    return torch.randn(size, size + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def all_log_probs(model: Qwen3ForCausalLM, prompt: tuple[int, ...], end: int) -> Tensor:
    """Log-probability of every completion, `[V, V + 1]`, as in `reward_table`; minus infinity where there is none."""
    size = model.config.vocab_size
    row = PackedRow((TokenGroup((), prompt, tuple((token,) for token in range(size))),))
    hidden_CD = packed_hidden(model, row, [len(prompt) - 1, *row.last_positions])
    log_probs_CV = model.lm_head(hidden_CD).log_softmax(-1)
    first_V, second_VV = log_probs_CV[0], log_probs_CV[1:]
    never_V = torch.full_like(first_V, -torch.inf)
    ends_V = torch.arange(size) == end
    stopped_V = torch.where(ends_V, first_V, never_V)
    return torch.cat([stopped_V[:, None], torch.where(ends_V[:, None], never_V, first_V[:, None] + second_VV)], dim=1)


def gradient(model: Qwen3ForCausalLM, value: Tensor) -> Tensor:
    """Of a number with respect to all weights, as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])


def exact_gradients(
    model: Qwen3ForCausalLM, sampler: Qwen3ForCausalLM, prompt: tuple[int, ...], end: int
) -> tuple[Tensor, Tensor, float]:
    """Gradient of the expected reward, the mean of RLOO's estimate of it on the sampler's completions, and their KL.

    The second is the sum over completions of q(y) (R(y) - E_q R) grad log pi(y): a sample's baseline is independent of
    it and has the mean E_q R.
    """
    log_pi, rewards = all_log_probs(model, prompt, end), reward_table(model.config.vocab_size)
    with torch.no_grad():
        log_q = all_log_probs(sampler, prompt, end)
    q, possible = log_q.exp(), log_q.isfinite()
    kl = (q * (log_q - log_pi.detach())).where(possible, 0.0).sum().item()
    weights = q * (rewards - (q * rewards).sum())
    known = log_pi.where(possible, 0.0)
    estimate = gradient(model, (weights * known).sum())
    log_pi = all_log_probs(model, prompt, end)
    return gradient(model, (log_pi.exp() * rewards).sum()), estimate, kl


class Projections(TrainerCallback):
    """The error of each step's gradient along a direction; the trainer goes down, so its gradient is negated."""

    def __init__(self, exact: Tensor, bias: Tensor) -> None:
        self.exact, self.direction = exact, bias / bias.dot(bias)
        self.found: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradient."""
        taken = torch.cat([parameter.grad.flatten() for parameter in kwargs["model"].parameters()])
        self.found.append((-taken - self.exact).dot(self.direction).item())


def errors_of(  # noqa: PLR0913 - an experiment's parts
    model: Qwen3ForCausalLM,
    sampler: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    callback: Projections,
    variant: tuple[str, float],
    steps: int,
    scratch: str,
) -> dict[str, float]:
    """Let the trainer take steps on the sampler's completions; the last logged gap between the two."""
    rewards = reward_table(model.config.vocab_size)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [rewards[ids[0], ids[1] + 1 if len(ids) > 1 else 0].item() for ids in completion_ids]

    args = RLOOConfig(
        output_dir=scratch,
        max_steps=steps,
        num_train_epochs=steps,
        per_device_train_batch_size=COMPLETIONS,
        num_generations=8,
        max_completion_length=2,
        learning_rate=0.0,
        max_grad_norm=0.0,
        beta=0.0,
        importance_correction=variant[0],
        importance_cap=variant[1],
        optim="sgd",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=steps,
        disable_tqdm=True,
        gradient_checkpointing=False,
        chat_template_kwargs=TEMPLATE,
    )
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": PROMPT}]}] * (COMPLETIONS // 8))
    trainer = RLOOTrainer(
        model=copy.deepcopy(model), reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer
    )

    def generate(prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
        settings = Sampling(2, 1.0, 1.0, 0, tuple(trainer.eos_token_ids))
        seeds = [[sequence_seed(trainer.state.global_step, place)] for place in range(len(prompt_ids))]
        drawn = sample_groups(sampler, prompt_ids, seeds, settings, rows=len(prompt_ids))
        trainer._drawn = [completion for group in drawn for completion in group]
        return [list(completion.ids) for completion in trainer._drawn]

    trainer._generate_single_turn = generate
    trainer.add_callback(callback)
    trainer.train()
    return next(row for row in trainer.state.log_history if "sampler_gap/mean" in row)


def experiment(noise: float, steps: int) -> list[dict[str, Any]]:
    """One row a variant: its bias in units of the uncorrected one, with a 95 % interval."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(300, 0)
    model = build_model(tokenizer, SHAPE).double().eval()
    sampler = perturbed(model, noise)
    for each in (model, sampler):
        prepare_packed(each)
    prompt = Renderer(tokenizer, template_kwargs=TEMPLATE).prompt_ids((Message("user", PROMPT),))
    exact, estimate, kl = exact_gradients(model, sampler, prompt, tokenizer.eos_token_id)
    bias = estimate - exact
    rows = []
    for name, variant in VARIANTS.items():
        callback = Projections(exact, bias)
        with tempfile.TemporaryDirectory() as scratch:
            logged = errors_of(model, sampler, tokenizer, callback, variant, steps, scratch)
        found = mean(callback.found)
        rows.append(
            {
                "correction": name,
                "bias": found.value,
                "interval": found.interval(),
                "steps": steps,
                "kl_of_sampler": kl,
                "bias_of_gradient": (bias.norm() / exact.norm()).item(),
                "gap_mean": logged["sampler_gap/mean"],
                "share_over_0.1": logged["sampler_gap/over_0.1"],
            }
        )
    return rows


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps a variant")
    parser.add_argument("--noise", type=float, default=2.0, help="on the sampler's weights, relative")
    parser.add_argument("--output", type=Path, help="append the rows to this file as JSON lines")
    options = parser.parse_args()
    for row in experiment(options.noise, options.steps):
        low, high = row["interval"]
        print(f"{row['correction']:18} bias {row['bias']:6.3f} [{low:6.3f}, {high:6.3f}]  " + json.dumps(row))
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps({"benchmark": "importance", **row}) + "\n")


if __name__ == "__main__":
    main()
