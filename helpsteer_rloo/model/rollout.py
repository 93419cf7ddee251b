"""Sampling of completions with transformers' `generate`, in chunks, reproducible for a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from helpsteer_rloo.model.loading import Model


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids; `ended` is false for one that was cut off at the length limit.

    >>> Completion(ids=(5, 6, 2), ended=True).ids
    (5, 6, 2)
    """

    ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn: the limit in tokens, the distribution, and the ids that end one."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]


@torch.no_grad()
def sample(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, *, batch_size: int, seed: int
) -> list[Completion]:
    """Draw one completion a prompt.

    Every chunk is drawn from a generator of its own, seeded with `seed` and the chunk's number; the random state of
    the program is left as it was. The same seed, prompts and `batch_size` give the same uniform numbers to any model.
    """
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        eos_token_id=list(sampling.end_ids),
        pad_token_id=sampling.end_ids[0],
    )
    completions: list[Completion] = []
    devices = [model.device] if model.device.type == "cuda" else []
    starts = range(0, len(prompts), batch_size)
    with torch.random.fork_rng(devices=devices):
        for number, start in enumerate(tqdm(starts, desc="Sampling", leave=False)):
            torch.manual_seed(seed * 1_000_003 + number)
            chunk = prompts[start : start + batch_size]
            ids, mask = _pad_left(chunk, sampling.end_ids[0], model.device)
            output = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
            completions += [_cut_at_end(row, sampling.end_ids) for row in output[:, ids.shape[1] :].tolist()]
    return completions


def _cut_at_end(ids: Sequence[int], end_ids: Sequence[int]) -> Completion:
    """Keep the ids up to and including the first that ends a completion."""
    for position, token_id in enumerate(ids):
        if token_id in end_ids:
            return Completion(tuple(ids[: position + 1]), ended=True)
    return Completion(tuple(ids), ended=False)


def _pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, sequences))
    ids = [[*[pad_id] * (length - len(sequence)), *sequence] for sequence in sequences]
    mask = [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
