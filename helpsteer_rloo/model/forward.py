"""Scores of sequences and groups, and log-probabilities of completions, in chunks.

Neither padding nor packing changes a result: scores are read at the last real token by position, not by searching for
the padding id, so a sequence that ends in that id is scored where it ends. (Padding does where a model's rotations
depend on the longest sequence of a call, `helpsteer_rloo.model.support.UNEVEN_ROTATIONS`.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from helpsteer_rloo.events import counted
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.attention import SHARED_PREFIX, packed_pass, use_shared_prefix
from helpsteer_rloo.model.fused_attention import fuse_attention
from helpsteer_rloo.model.fused_gates import fuse_gates
from helpsteer_rloo.model.fused_linears import fuse_linears
from helpsteer_rloo.model.fused_norms import fuse_norms
from helpsteer_rloo.model.heads import TokenLogProbs, at_least_float32, token_log_probs
from helpsteer_rloo.model.kept_attention import keep_attention
from helpsteer_rloo.model.last_layer import narrow_last_layer
from helpsteer_rloo.model.shadowing import is_hooked
from helpsteer_rloo.model.support import looks_for_tokens, supports_shared_prefix
from helpsteer_rloo.packing import PackedRow, Span, pack, split_group

ROW_MULTIPLE = 16
"""On CPUs rows are filled up to a multiple of this, short ones not: oneDNN writes a program for every new shape."""


def scalar_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The body and the scalar head of a sequence-classification model, through LoRA if there is any: the trained head.

    Raises:
        ValueError: the model has no `score` head.
    """
    inner = base_model(model)
    head = getattr(inner, "score", None)
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]
    body = getattr(inner, str(getattr(inner, "base_model_prefix", "")), None)
    if not isinstance(head, nn.Module) or not isinstance(body, nn.Module):
        raise ValueError(f"{type(inner).__name__} has no scalar head named 'score' and cannot serve as a reward model.")
    return body, head


def base_model(model: nn.Module) -> Any:
    """The transformers model under wrappers of data parallelism and LoRA; its layers are the ones with LoRA inside."""
    inner = extract_model_from_parallel(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def body_of(inner: Any) -> nn.Module:
    """The decoder without its head."""
    return getattr(inner, inner.base_model_prefix)


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
        hidden_BTD, _, mask_BT = _padded_hidden(body, [sequences[i] for i in chunk], weight.device)
        last_B = mask_BT.sum(1) - 1
        hidden_BD = hidden_BTD[torch.arange(len(chunk), device=weight.device), last_B]
        for index, score in zip(chunk, _scores(head, hidden_BD).tolist(), strict=True):
            scores[index] = score
    return scores


def packed_hidden(model: nn.Module, row: PackedRow, positions: Sequence[int]) -> Tensor:
    """Final hidden states at some positions of one packed row, `[C, D]`.

    Args:
        model: A causal language model or sequence classifier that was given `use_shared_prefix`, however wrapped.
        row: Groups without padding.
        positions: C of them, some perhaps several times.
    """
    return _from_hidden(model, row, positions, lambda hidden_CD: (hidden_CD,))[0]


Read = Callable[[Tensor], tuple[Tensor, ...]]
"""What is made of hidden states `[C, D]`."""


def _from_hidden(model: nn.Module, row: PackedRow, positions: Sequence[int], read: Read) -> tuple[Tensor, ...]:
    """What `read` makes of the hidden states at some positions of one packed row.

    The outermost module is called, so that wrappers (adapters, data parallelism) do their part, and `read` is called
    at the end of its forward pass, in place of the model's own head: weights that are shared out over processes are
    whole there, and those of the head are gathered again for the backward pass, since the result is that of the model.
    """
    inner = base_model(model)
    body, device = body_of(inner), next(inner.parameters()).device
    if device.type == "cpu":
        keep_attention(cast(Any, body).layers)
    filler = _filler(row) if device.type == "cpu" else Span(0, 0, ())
    places_C = torch.tensor(positions, dtype=torch.long, device=device)
    causal = {"logits_to_keep": places_C[:0]} if inner.get_output_embeddings() is not None else {}
    states: list[Tensor] = []
    results: list[tuple[Tensor, ...]] = []

    def answer(*_: Any) -> tuple[Tensor, ...]:
        results.append(read(states[0][0].index_select(0, places_C)))
        return results[0]

    handles = [
        body.register_forward_hook(lambda _module, _inputs, output: states.append(output.last_hidden_state)),
        model.register_forward_hook(answer, prepend=True),  # before FSDP's own, which takes the weights away
    ]
    try:
        with packed_pass():
            model(
                input_ids=torch.tensor([[*row.input_ids, *[0] * filler.prompt]], device=device),
                position_ids=torch.tensor([[*row.position_ids, *range(filler.prompt)]], device=device),
                spans=(*row.spans, filler) if filler.prompt else row.spans,
                read=torch.tensor(sorted(set(positions)), dtype=torch.long, device=device),
                use_cache=False,
                **causal,
            )
    finally:
        for handle in handles:
            handle.remove()
    return results[0]  # not what the call returns, whose precision a wrapper may have lowered


def _filler(row: PackedRow) -> Span:
    """A prompt that nothing reads, behind the last group, up to the next multiple of `ROW_MULTIPLE` tokens."""
    tokens = row.spans[-1].end
    return Span(tokens, -tokens % ROW_MULTIPLE if tokens >= 4 * ROW_MULTIPLE else 0, ())


def packed_scores(model: nn.Module, head: nn.Module, row: PackedRow) -> Tensor:
    """Score of each continuation of a row, read at its last token by a scalar head; `[B]`, float32 at least."""
    return _from_hidden(model, row, row.last_positions, lambda hidden_BD: (_scores(head, hidden_BD),))[0]


def _scores(head: nn.Module, hidden_BD: Tensor) -> Tensor:
    """What a scalar head makes of hidden states, `[B]`, in float32 at least.

    A head in half precision is multiplied with in float32: in bfloat16 scores from 4 to 8 would be multiples of 1/32,
    and close pairs ties.
    """
    weight = next(head.parameters())
    if weight.dtype not in (torch.bfloat16, torch.float16) or type(head) is not nn.Linear or is_hooked(head):
        return at_least_float32(head(hidden_BD.to(weight.dtype)))[:, 0]
    bias = None if cast(Tensor | None, head.bias) is None else head.bias.float()
    with torch.autocast(hidden_BD.device.type, enabled=False):
        return linear(hidden_BD.float(), head.weight.float(), bias)[:, 0]


def packed_log_probs(model: nn.Module, row: PackedRow, temperature: float = 1.0) -> TokenLogProbs:
    """Log-probabilities and entropies of all continuation tokens of a row, in the order of `row.predicted_ids`.

    Only those tokens go through the vocabulary head, in chunks.
    """

    def read(hidden_CD: Tensor) -> tuple[Tensor, Tensor]:
        targets_C = torch.tensor(row.predicted_ids, device=hidden_CD.device)
        found = token_log_probs(hidden_CD, base_model(model).get_output_embeddings(), targets_C, temperature)
        return found.log_probs, found.entropies

    return TokenLogProbs(*_from_hidden(model, row, row.predicting_positions, read))


@torch.no_grad()
def score_groups(
    model: nn.Module, groups: Sequence[TokenGroup], batch_size: int, head: nn.Module | None = None
) -> list[list[float]]:
    """Score every continuation of every group with a reward model, each prompt computed once for all of them.

    Args:
        model: As in `score_sequences`; or, with `head`, any model whose body the head belongs to. One that
            `supports_shared_prefix` does not accept scores padded sequences.
        groups: Any number of continuations each.
        batch_size: Continuations in one forward pass; a group with more is scored in several, its prompt in each.
        head: The scalar head, if it is not the model's own.

    Returns:
        One list a group, with one score a continuation, in the order given.
    """
    if not prepare_packed(model):
        sequences = [group.sequence(i) for group in groups for i in range(len(group.continuation_ids))]
        return regroup(score_sequences(model, sequences, batch_size), groups)
    head = head or scalar_head(model)[1]
    pieces = [piece for group in groups for piece in split_group(group, batch_size)]
    scores: list[float] = []
    for indices in counted(pack(pieces, continuations=batch_size), "scoring"):
        scores += packed_scores(model, head, PackedRow(tuple(pieces[i] for i in indices))).tolist()
    return regroup(scores, groups)


def prepare_packed(model: nn.Module) -> bool:
    """Set a model up for packed rows, if it is one that can take them; whether it can."""
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel) or not supports_shared_prefix(inner):
        return False
    if inner.config._attn_implementation != SHARED_PREFIX:  # pyright: ignore[reportPrivateUsage]
        use_shared_prefix(inner)
    narrow_last_layer(body_of(inner))
    fuse_linears(model)
    fuse_norms(model)
    fuse_attention(model)
    fuse_gates(model)
    return True


def regroup(flat: Sequence[float], groups: Sequence[TokenGroup]) -> list[list[float]]:
    """Cut one list of values a continuation into one list a group."""
    values = iter(flat)
    return [[next(values) for _ in group.continuation_ids] for group in groups]


@torch.no_grad()
def group_log_probs(
    model: nn.Module, groups: Sequence[TokenGroup], tokens: int | None, temperature: float = 1.0
) -> list[list[Tensor]]:
    """Log-probabilities of the tokens of every continuation of every group, in nats.

    Args:
        model: A causal language model, bare or with LoRA.
        groups: Prompts of one token at least.
        tokens: Most tokens in one forward pass; a larger group is computed alone.
        temperature: Divides the logits.

    Returns:
        One list a group, with one tensor `[C]` a continuation, in the order given.
    """
    if not prepare_packed(model):
        return [_padded_log_probs(model, group, temperature) for group in groups]
    results: list[list[Tensor]] = []
    for indices in counted(pack(groups, tokens=tokens), "log-probabilities"):
        row = PackedRow(tuple(groups[i] for i in indices))
        flat = packed_log_probs(model, row, temperature).log_probs
        parts = iter(flat.split([length for span in row.spans for length in span.continuations]))
        results += [[next(parts) for _ in group.continuation_ids] for group in row.groups]
    return results


def _padded_log_probs(model: nn.Module, group: TokenGroup, temperature: float) -> list[Tensor]:
    inner = base_model(model)
    head, start = inner.get_output_embeddings(), len(group.prompt_ids)
    sequences = [group.sequence(i) for i in range(len(group.continuation_ids))]
    hidden_BTD, input_ids_BT, _ = _padded_hidden(body_of(inner), sequences, next(inner.parameters()).device)
    return [
        token_log_probs(
            hidden_BTD[row, start - 1 : len(ids) - 1], head, input_ids_BT[row, start : len(ids)], temperature
        ).log_probs
        for row, ids in enumerate(sequences)
    ]


def _padded_hidden(
    body: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states of sequences, `[B, T, D]`, with their ids and mask.

    Raises:
        ValueError: adapters depend on what PEFT's own forward, which is not called, looks for in the sequences.
    """
    if looks_for_tokens(body):
        raise ValueError("Activated LoRA (alora_invocation_tokens) cannot be scored here: merge the adapter first.")
    input_ids_BT, mask_BT = pad_right(sequences, device)
    hidden_BTD = body(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return hidden_BTD, input_ids_BT, mask_BT


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
