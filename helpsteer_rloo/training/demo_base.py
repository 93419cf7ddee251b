"""The base model of the demo world: a very small Qwen3 with its own tokenizer, taught the language and made mediocre.

Architecture, chat template and special tokens are Qwen3's; only the sizes and the learned vocabulary differ, so every
later stage treats this base exactly as it would treat a real one.
"""

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_utils import set_seed
from trl import SFTConfig, SFTTrainer

from helpsteer_rloo.data.demo import DemoBaseSettings, preference_rows, sft_conversations
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.training.running import train_to_the_end

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The added tokens of Qwen3's tokenizer_config.json in the order of their ids: those marked special, then the others.
SPECIAL_TOKENS = (
    PAD, START, END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ORDINARY_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
TOKENIZER_ROWS = 3000
SAVE_STEPS = 100
BAD_STEPS = 5
"""Steps in a row whose gradient may be not finite."""


def build_base(output_dir: Path, settings: DemoBaseSettings, seed: int) -> None:
    """Make, train and save the base model and its tokenizer in `output_dir`; the same seed gives the same weights.

    Both load with `AutoTokenizer.from_pretrained` and `AutoModelForCausalLM.from_pretrained`. Where `output_dir` holds
    a checkpoint of such a training, it is gone on from; at the end there is none.

    Raises:
        Stopped: a signal asked for that.
        ValueError: as `train_to_the_end`.
    """
    set_seed(seed)
    tokenizer = build_tokenizer(settings.vocab_size, seed)
    model = build_model(tokenizer, settings)
    train(model, tokenizer, settings, output_dir, seed)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for checkpoint in output_dir.glob("checkpoint-*"):  # a model that others start from, as one from the hub
        shutil.rmtree(checkpoint)
    (output_dir / "README.md").unlink(missing_ok=True)  # TRL's card, of a model that was trained from nothing


def build_tokenizer(vocab_size: int, seed: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen3's normaliser, pre-tokeniser, added tokens and chat template.

    All 256 byte symbols are in the vocabulary, so any text encodes and decodes. `vocab_size` counts the added tokens
    too; it is an upper bound, as learning stops when no pair of symbols is left to merge.
    """
    learner = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    learned = vocab_size - len(SPECIAL_TOKENS) - len(ORDINARY_TOKENS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=learned, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(_corpus(seed), trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        model_max_length=131072,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    for token in ORDINARY_TOKENS:
        tokenizer.add_tokens(AddedToken(token, normalized=False, special=False))
    tokenizer.chat_template = chat_template()
    return tokenizer


def chat_template() -> str:
    """Qwen3's chat template, as shipped with TRL."""
    return resources.files("trl").joinpath("chat_templates", "qwen3.jinja").read_text(encoding="utf-8")


def build_model(tokenizer: Qwen2Tokenizer, settings: DemoBaseSettings) -> Qwen3ForCausalLM:
    """An untrained fp32 Qwen3 of the given shape, which pads and ends as `tokenizer` does."""
    vocab = tokenizer.get_vocab()
    pad, end = vocab[PAD], vocab[END]
    config = Qwen3Config(
        vocab_size=len(vocab),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_position_embeddings,
        initializer_range=settings.initial_std,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, pad_token_id=pad, eos_token_id=end)
    return model


def train(
    model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, settings: DemoBaseSettings, directory: Path, seed: int
) -> None:
    """Supervised training in place, with checkpoints in a directory: faultless answers, then ones of mixed quality."""
    batch, renderer = settings.batch_size, Renderer(tokenizer)
    arguments = SFTConfig(
        output_dir=str(directory),
        max_steps=settings.clean_steps + settings.mixed_steps,
        per_device_train_batch_size=batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=20,
        weight_decay=0.01,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=40,
        seed=seed,
    )
    examples = [
        example
        for steps, mixed in ((settings.clean_steps, False), (settings.mixed_steps, True))
        for example in _examples(renderer, seed, steps * batch, mixed=mixed)
    ]
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=tokenizer
    )
    train_to_the_end(trainer, BAD_STEPS)
    model.eval()


def _corpus(seed: int) -> Iterator[str]:
    """The texts the vocabulary is learned from."""
    for row in preference_rows(seed, TOKENIZER_ROWS):
        yield from (message["content"] for message in row["context"])
        yield from (row["response1"], row["response2"])
    for messages, response in sft_conversations(seed, TOKENIZER_ROWS, mixed=False):
        yield from (*(message.content for message in messages), response)
    yield from ["system\n", "user\n", "assistant\n", "\n\n"] * 2


def _examples(renderer: Renderer, seed: int, count: int, *, mixed: bool) -> Iterator[dict[str, list[int]]]:
    """Token ids with a mask of the answer: the prompt as rendered for sampling, then the response and end of turn."""
    for messages, response in sft_conversations(seed, count, mixed=mixed):
        prompt_ids = renderer.prompt_ids(messages)
        answer_ids = renderer.continuation_ids(response, ended=True)
        mask = [0] * len(prompt_ids) + [1] * len(answer_ids)
        yield {"input_ids": [*prompt_ids, *answer_ids], "completion_mask": mask}
