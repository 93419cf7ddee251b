"""Scores of sequences and groups, and log-probabilities of completions, in chunks.

Neither padding nor packing changes a result: scores are read at the last real token by position, not by searching for
the padding id, so a sequence that ends in that id is scored where it ends.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.attention import SHARED_PREFIX, supports_shared_prefix, use_shared_prefix
from helpsteer_rloo.model.loading import Model
from helpsteer_rloo.packing import PackedRow, pack_continuations, split_group


def scalar_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The body and the scalar head of a sequence-classification model, through LoRA if there is any.

    Raises:
        ValueError: the model has no `score` head.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    head = getattr(inner, "score", None)
    body = getattr(inner, str(getattr(inner, "base_model_prefix", "")), None)
    if not isinstance(head, nn.Module) or not isinstance(body, nn.Module):
        raise ValueError(f"{type(inner).__name__} has no scalar head named 'score' and cannot serve as a reward model.")
    return body, head


@torch.no_grad()
def score_sequences(model: nn.Module, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """Score token sequences with a reward model.

    Args:
        model: A sequence-classification model with one label, bare or with LoRA; used in the mode it is in.
        sequences: Ids of prompt and continuation together, at least one id each.
        batch_size: Sequences in one forward pass; sorted by length, so that little is padding.

    Returns:
        One score a sequence, in the order given.
    """
    body, head = scalar_head(model)
    weight = next(head.parameters())
    scores = [0.0] * len(sequences)
    for chunk in _by_length(sequences, batch_size):
        input_ids_BT, mask_BT = pad_right([sequences[i] for i in chunk], weight.device)
        hidden_BTD = body(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        last_B = mask_BT.sum(1) - 1
        hidden_BD = hidden_BTD[torch.arange(len(chunk), device=weight.device), last_B]
        for index, score in zip(chunk, head(hidden_BD.to(weight.dtype)).float()[:, 0].tolist(), strict=True):
            scores[index] = score
    return scores


@torch.no_grad()
def score_groups(model: nn.Module, groups: Sequence[TokenGroup], batch_size: int) -> list[list[float]]:
    """Score every continuation of every group with a reward model, each prompt computed once for all of them.

    Args:
        model: As in `score_sequences`. One that `supports_shared_prefix` does not accept scores padded sequences.
        groups: Any number of continuations each.
        batch_size: Continuations in one forward pass; a group with more is scored in several, its prompt in each.

    Returns:
        One list a group, with one score a continuation, in the order given.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or not supports_shared_prefix(inner):
        sequences = [group.sequence(i) for group in groups for i in range(len(group.continuation_ids))]
        return regroup(score_sequences(model, sequences, batch_size), groups)
    if inner.config._attn_implementation != SHARED_PREFIX:  # pyright: ignore[reportPrivateUsage]
        use_shared_prefix(inner)
    body, head = scalar_head(model)
    weight = next(head.parameters())
    pieces = [piece for group in groups for piece in split_group(group, batch_size)]
    scores: list[float] = []
    for indices in pack_continuations(pieces, batch_size):
        row = PackedRow(tuple(pieces[i] for i in indices))
        hidden_TD = body(
            input_ids=torch.tensor([row.input_ids], device=weight.device),
            position_ids=torch.tensor([row.position_ids], device=weight.device),
            spans=row.spans,
            use_cache=False,
        ).last_hidden_state[0]
        scores += head(hidden_TD[row.last_positions].to(weight.dtype)).float()[:, 0].tolist()
    return regroup(scores, groups)


def regroup(flat: Sequence[float], groups: Sequence[TokenGroup]) -> list[list[float]]:
    """Cut one list of values a continuation into one list a group."""
    values = iter(flat)
    return [[next(values) for _ in group.continuation_ids] for group in groups]


@torch.no_grad()
def completion_log_probs(
    model: Model,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int,
    temperature: float = 1.0,
) -> list[float]:
    """Sum of the log-probabilities of each completion's tokens, given its prompt, in nats.

    Only the completions' positions go through the vocabulary head.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    body, head = getattr(inner, inner.base_model_prefix), inner.get_output_embeddings()
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    sums = [0.0] * len(sequences)
    for chunk in _by_length(sequences, batch_size):
        input_ids_BT, mask_BT = pad_right([sequences[i] for i in chunk], head.weight.device)
        hidden_BTD = body(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        for row, index in enumerate(chunk):
            start, end = len(prompts[index]), len(sequences[index])
            logits_CV = head(hidden_BTD[row, start - 1 : end - 1]).float() / temperature
            targets_C1 = input_ids_BT[row, start:end, None]
            sums[index] = logits_CV.log_softmax(-1).gather(-1, targets_C1).sum().item()
    return sums


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequences as one tensor, zeros behind the shorter ones, and the mask of real tokens; both `[B, T]`."""
    length = max(map(len, sequences))
    ids = [[*sequence, *[0] * (length - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Chunks of indices, longest sequences first, so that memory runs out at once or not at all."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
