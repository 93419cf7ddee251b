"""The models that are measured, their tokenizer and adapter, and how many floating-point operations they need.

The policy is a Qwen3 of the given shape with random weights, the reward model one of the same shape with a scalar head.
The end-of-sequence id lies just outside the model's vocabulary, so it is never sampled: every completion has exactly
the length asked for, on both sides.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from helpsteer_rloo.planning import shapes
from helpsteer_rloo.planning.shapes import QWEN3, Shape, Work, head_flops

__all__ = ["Shape", "Work", "backward_flops", "forward_flops", "head_flops"]

PAD_ID, UNKNOWN_ID = 0, 1
LORA_RANK = 16


TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=512)
STANDARD = Shape(512, 8, 8, 4, 64, 1536, 16_384)
"""The 30-million-parameter model of the benchmarks (34 with the scalar head)."""
REAL_VOCABULARY = replace(STANDARD, vocabulary=151_936, tied=True)
QWEN3_8B = QWEN3["Qwen/Qwen3-8B"]


def make_config(shape: Shape, *, labels: int | None = None) -> Qwen3Config:
    """The configuration of a shape; with `labels`, of a sequence-classification model."""
    extra = {} if labels is None else {"num_labels": labels}
    return Qwen3Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        pad_token_id=PAD_ID,
        eos_token_id=None,
        attn_implementation="sdpa",
        **extra,
    )


def make_policy(shape: Shape, dtype: torch.dtype, seed: int) -> Qwen3ForCausalLM:
    """A policy with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(make_config(shape)).to(dtype)


def write_reward_adapter(shape: Shape, directory: Path, seed: int) -> None:
    """A reward model as the project saves one: a LoRA adapter with random weights, and its scalar head."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.02

    weights = {"base_model.model.score.weight": random(1, shape.hidden)}
    for layer in range(shape.layers):
        for name, (columns, rows) in shape.linears().items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{module}.lora_A.weight"] = random(LORA_RANK, columns)
            weights[f"{module}.lora_B.weight"] = random(rows, LORA_RANK)
    config = make_lora("SEQ_CLS")
    config.target_modules = {name.rpartition(".")[2] for name in shape.linears()}
    config.modules_to_save = ["score"]
    config.save_pretrained(str(directory))
    save_file(weights, directory / "adapter_model.safetensors")


def make_reward_model(shape: Shape, dtype: torch.dtype, seed: int) -> Qwen3ForSequenceClassification:
    """A reward model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return Qwen3ForSequenceClassification(make_config(shape, labels=1)).to(dtype)


def merged_reward_model(policy: Qwen3ForCausalLM, shape: Shape, directory: Path) -> Qwen3ForSequenceClassification:
    """A written reward model on a body of its own, the policy's, with the adapter merged: as TRL takes one."""
    model = Qwen3ForSequenceClassification(make_config(shape, labels=1)).to(policy.dtype)
    model.model.load_state_dict(policy.model.state_dict())
    return PeftModel.from_pretrained(model, str(directory)).merge_and_unload()


def make_lora(task_type: str) -> LoraConfig:
    """LoRA of rank 16 on all linear layers, without dropout."""
    return LoraConfig(
        r=LORA_RANK, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type=task_type, bias="none"
    )


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One word an id: "t2", "t3", … No special token is a prefix of a word, or the tokenizer would cut words there."""
    words = {"<pad>": PAD_ID, "<unk>": UNKNOWN_ID} | {f"t{i}": i for i in range(2, shape.vocabulary)}
    words["<eos>"] = shape.vocabulary
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def as_text(ids: Iterable[int]) -> str:
    """The string that the tokenizer turns into these ids; it ends with a space, so that text can be put behind it."""
    return "".join(f"t{i} " for i in ids)


def forward_flops(shape: Shape, work: Work) -> float:
    """Multiplications and additions of the body with LoRA: linear layers, adapters, scores and mixing of values."""
    return shapes.forward_flops(shape, work, shape.lora_parameters(LORA_RANK))


def recomputed_flops(shape: Shape, work: Work) -> float:
    """What checkpointing computes again on a CPU: the linear layers, not attention."""
    return shapes.linear_flops(shape, work, shape.lora_parameters(LORA_RANK))


def backward_flops(shape: Shape, work: Work) -> float:
    """Backward of a frozen body: gradients of its inputs, gradients of inputs and weights of LoRA, and of attention."""
    return shapes.backward_flops(shape, work, shape.lora_parameters(LORA_RANK))
