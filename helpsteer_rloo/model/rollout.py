"""Sampling of completions: many of each prompt, each from a seed of its own, so that chunks and order change nothing.

The sampler computes a prompt once for all of its samples, and drops rows that have ended
(`helpsteer_rloo.model.cascade`); its linear layers run merged and laid out for few rows
(`helpsteer_rloo.model.light_linears`). Models that it does not support are sampled with transformers' `generate`.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from helpsteer_rloo.events import counted
from helpsteer_rloo.model.attention import SHARED_PREFIX, packed_pass, use_shared_prefix
from helpsteer_rloo.model.cascade import Decode, read_prompts
from helpsteer_rloo.model.decoding import Step, decoding_step
from helpsteer_rloo.model.drawing import Drawn, draw, widest_float
from helpsteer_rloo.model.light_linears import light_linears
from helpsteer_rloo.model.loading import Model
from helpsteer_rloo.model.support import supports_shared_prefix

_one_at_a_time = threading.RLock()
"""Held while layers are shadowed: two threads would take each other's for the model's own."""
LIVE_SHARE = 0.75
"""Ended rows leave once the rest are no more than this share: dropping them copies the caches of those that stay."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids; `ended` is false for one that was cut off at the length limit.

    `log_probs` has one value a token, in nats: its log-probability under the distribution that it was drawn from, after
    temperature and truncation; `untruncated` is that before top-k and top-p. Both are empty for models that
    `supports_sampler` does not accept.

    >>> Completion(ids=(5, 6, 2), ended=True).ids
    (5, 6, 2)
    """

    ids: tuple[int, ...]
    ended: bool
    log_probs: tuple[float, ...] = ()
    untruncated: tuple[float, ...] = ()

    @property
    def body(self) -> tuple[int, ...]:
        """The ids without the one that ended it."""
        return self.ids[:-1] if self.ended else self.ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn: the limit in tokens, the distribution, and the ids that end one (there may be none).

    >>> Sampling(max_new_tokens=64, temperature=1.0, top_p=1.0, top_k=0, end_ids=(2,)).top_k
    0
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what is no distribution.

        Raises:
            ValueError: the temperature is not positive, `top_p` not in (0, 1], or `top_k` negative.
        """
        if not (0 < self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(f"Sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0; this is {self}.")


@dataclass(frozen=True)
class _Piece:
    """A prompt, the seeds of its completions, and where each of these belongs in the result."""

    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    places: tuple[tuple[int, int], ...]


def sequence_seed(seed: int, *parts: int) -> int:
    """A seed for one of many sequences, in 63 bits; the same for ever, and unlike those of its neighbours.

    >>> sequence_seed(0, 1, 2)
    4727102316523150270
    """
    text = ",".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def supports_sampler(model: Model) -> bool:
    """Whether `sample_groups` takes a model: a language model that `supports_shared_prefix` accepts."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or not supports_shared_prefix(inner):
        return False
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False  # virtual tokens are added by a forward pass that the sampler goes around
    return inner.get_output_embeddings() is not None


@torch.no_grad()
def sample(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, *, batch_size: int, seed: int
) -> list[Completion]:
    """Draw one completion a prompt; the random state of the program is left as it was.

    The uniform numbers of a prompt depend on `seed` and on its index only, whatever the model and `batch_size`. (With
    `generate`, for models that `supports_sampler` does not accept, on `batch_size` as well.)
    """
    if not supports_sampler(model):
        return _generate(model, prompts, sampling, batch_size=batch_size, seed=seed)
    seeds = [[sequence_seed(seed, index)] for index in range(len(prompts))]
    groups = sample_groups(model, prompts, seeds, sampling, rows=batch_size)
    return [completion for group in groups for completion in group]


def sample_groups(
    model: Model,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    rows: int,
) -> list[list[Completion]]:
    """Draw a completion for every seed of every prompt.

    A completion depends on model, prompt, sampling and its seed alone, up to rounding: products of other shapes add in
    another order, so that a draw within an ulp of a boundary may fall to the other side. The model's modes, attention
    and layers are afterwards as they were; it computes in the type of its weights, in evaluation mode.

    Args:
        model: One that `supports_sampler` accepts, in any mode.
        prompts: At least one token each; equal ones are computed once.
        seeds: For each prompt the seeds of its completions, any number of them.
        sampling: Length, distribution and ends.
        rows: Most sequences decoded at once. Prompts are taken whole, longest first, unless one has more seeds.

    Returns:
        For each prompt one completion a seed, in the order of `seeds`.

    Raises:
        ValueError: a prompt is empty, `rows` or the length is not positive, or the model returns something that is no
            number.
    """
    _check(prompts, sampling, rows)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    results: dict[tuple[int, int], Completion] = {}
    with _one_at_a_time, torch.no_grad(), _ready_to_decode(inner, min(rows, sum(map(len, seeds)))) as step:
        for chunk in counted(_chunks(prompts, seeds, rows), "sampling"):
            places = [place for piece in chunk for place in piece.places]
            results |= zip(places, _complete(inner, step, chunk, sampling), strict=True)
    return [[results[i, j] for j in range(len(group))] for i, group in enumerate(seeds)]


def stream(
    model: Model, prompt: Sequence[int], seed: int, sampling: Sampling, goes_on: Callable[[int], bool]
) -> Completion:
    """Draw one completion as `sample_groups` does, and tell its tokens as they are drawn.

    Args:
        model: One that `supports_sampler` accepts.
        prompt: At least one token.
        seed: Of the completion.
        sampling: Length, distribution and ends.
        goes_on: Called with every token that is followed by another one; if it returns false, the completion is cut
            off behind that token.

    Raises:
        ValueError: as `sample_groups`.
    """
    _check([prompt], sampling, 1)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with _one_at_a_time, torch.no_grad(), _ready_to_decode(inner, 1) as step:
        (completion,) = _complete(inner, step, [_Piece(tuple(prompt), (seed,), ((0, 0),))], sampling, goes_on)
    return completion


def _check(prompts: Sequence[Sequence[int]], sampling: Sampling, rows: int) -> None:
    if rows < 1 or sampling.max_new_tokens < 1 or not all(prompts):
        raise ValueError("Sampling needs at least one row, one new token, and one token in every prompt.")


def _chunks(prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], rows: int) -> list[list[_Piece]]:
    """What is decoded together: prompts of about one length, at most `rows` completions."""
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, (prompt, group) in enumerate(zip(prompts, seeds, strict=True)):
        places.setdefault(tuple(prompt), []).extend((i, j) for j in range(len(group)))
    chunks: list[list[_Piece]] = []
    used = rows
    for prompt in sorted(places, key=len, reverse=True):
        for start in range(0, len(places[prompt]), rows):
            cut = tuple(places[prompt][start : start + rows])
            if used + len(cut) > rows:
                chunks.append([])
                used = 0
            chunks[-1].append(_Piece(prompt, tuple(seeds[i][j] for i, j in cut), cut))
            used += len(cut)
    return chunks


@contextmanager
def _ready_to_decode(inner: Any, rows: int) -> Generator[Step]:
    """Evaluation mode (checkpointing in training mode would recompute), shared prefixes, light layers, no autocast."""
    modes = {module: module.training for module in cast(nn.Module, inner).modules()}
    attention = inner.config._attn_implementation
    body, head = getattr(inner, inner.base_model_prefix), inner.get_output_embeddings()
    try:
        inner.eval()
        if attention != SHARED_PREFIX:
            use_shared_prefix(inner)
        autocast = torch.autocast(inner.device.type, enabled=False)
        with autocast, light_linears((body, head), rows) as joined, packed_pass():
            yield decoding_step(body, joined)
    finally:
        for module, mode in modes.items():
            module.training = mode
        if attention != SHARED_PREFIX:
            inner.set_attn_implementation(attention)


def _complete(
    inner: Any,
    step: Step,
    chunk: list[_Piece],
    sampling: Sampling,
    goes_on: Callable[[int], bool] | None = None,
) -> list[Completion]:
    """Decode the completions of one chunk, in its order, until they have ended or `goes_on` of a token is false."""
    body, head = getattr(inner, inner.base_model_prefix), inner.get_output_embeddings()
    prefill, hidden_GD = read_prompts(body, [piece.prompt for piece in chunk], inner.device)
    groups = [group for group, piece in enumerate(chunk) for _ in piece.seeds]
    cascade = Decode(prefill, groups, most=sampling.max_new_tokens)
    del prefill  # whose caches shrink as rows leave
    rows = [(piece.prompt[-1], seed) for piece in chunk for seed in piece.seeds]
    record = _Record(rows, sampling, inner.device)
    logits_RV = head(hidden_GD)[groups]
    # Small operations take less time so; on other devices tensors may be of classes that cannot.
    with torch.inference_mode() if inner.device.type == "cpu" else torch.no_grad():
        while left := record.add(logits_RV):
            if len(left) <= LIVE_SHARE * len(logits_RV):
                cascade.keep(left)
                record.keep(left)
            if goes_on is not None and not goes_on(int(record.last()[0, 0])):
                break
            logits_RV = head(step(record.last(), cascade.advance(), cascade))
    return record.completions()


class _Record:
    """What has been drawn for the rows of a chunk; R are the rows that are still decoded."""

    def __init__(self, rows: Sequence[tuple[int, int]], sampling: Sampling, device: torch.device) -> None:
        """`rows` have the last token of the prompt and the seed."""
        self._sampling = sampling
        self._ends = torch.tensor(sampling.end_ids, dtype=torch.long, device=device)
        # Not torch's generator, which looks at the lower 32 bits of its seed only.
        uniforms = [np.random.Generator(np.random.PCG64(seed)).random(sampling.max_new_tokens) for _, seed in rows]
        self._uniforms_RN = torch.from_numpy(np.stack(uniforms)).to(device, widest_float(device))
        self._last_R = torch.tensor([last for last, _ in rows], device=device)
        self._rows_R = torch.arange(len(rows), device=device)
        self._ended_R = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self._steps: list[tuple[Tensor, Drawn]] = []

    def last(self) -> Tensor:
        """The tokens to read next, `[R, 1]`: those drawn last."""
        return self._last_R[:, None]

    def add(self, logits_RV: Tensor) -> list[int]:
        """Draw the next token of every row; returns the rows that go on."""
        uniform_R = self._uniforms_RN[:, len(self._steps)]
        temperature, top_k, top_p = self._sampling.temperature, self._sampling.top_k, self._sampling.top_p
        drawn = draw(logits_RV, uniform_R, temperature=temperature, top_k=top_k, top_p=top_p)
        drawn_R = drawn.ids_R
        self._steps.append((self._rows_R, drawn))
        self._ended_R = self._ended_R | torch.isin(drawn_R, self._ends)
        # What has ended is still read until it leaves: never the end itself, whose embedding may be anything.
        self._last_R = torch.where(self._ended_R, self._last_R, drawn_R)
        if len(self._steps) == self._sampling.max_new_tokens:
            return []
        return [row for row, ended in enumerate(self._ended_R.tolist()) if not ended]

    def keep(self, rows: Sequence[int]) -> None:
        """Let all rows but these leave."""
        kept = torch.tensor(rows, device=self._rows_R.device)
        self._uniforms_RN, self._rows_R = self._uniforms_RN[kept], self._rows_R[kept]
        self._ended_R, self._last_R = self._ended_R[kept], self._last_R[kept]

    def completions(self) -> list[Completion]:
        """What was drawn for each row of the chunk, up to its end."""
        drawn: dict[int, list[tuple[int, float, float]]] = {row: [] for row in self._steps[0][0].tolist()}
        for rows_R, tokens in self._steps:
            for row, *token in zip(rows_R.tolist(), *(part.tolist() for part in tokens), strict=True):
                if not drawn[row] or drawn[row][-1][0] not in self._sampling.end_ids:
                    drawn[row].append(cast(Any, tuple(token)))
        if any(math.isnan(log_prob) for row in drawn.values() for _, log_prob, _ in row):
            raise ValueError(
                "The model's logits, divided by the temperature, are not numbers (NaN); it cannot be sampled from."
            )
        return [
            Completion(tuple(ids), ids[-1] in self._sampling.end_ids, tuple(log_probs), tuple(untruncated))
            for ids, log_probs, untruncated in (zip(*row, strict=True) for row in drawn.values())
        ]


def _generate(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, *, batch_size: int, seed: int
) -> list[Completion]:
    """One completion a prompt with transformers' `generate`, each chunk from a generator of its own."""
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        eos_token_id=list(sampling.end_ids) or None,
        pad_token_id=sampling.end_ids[0] if sampling.end_ids else 0,
    )
    completions: list[Completion] = []
    devices = [model.device] if model.device.type == "cuda" else []
    starts = range(0, len(prompts), batch_size)
    with torch.random.fork_rng(devices=devices):
        for number, start in enumerate(counted(starts, "sampling")):
            torch.manual_seed(seed * 1_000_003 + number)
            chunk = prompts[start : start + batch_size]
            ids, mask = _pad_left(chunk, cast(int, config.pad_token_id), model.device)
            output = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
            completions += [_cut_at_end(row, sampling.end_ids) for row in output[:, ids.shape[1] :].tolist()]
    return completions


def _cut_at_end(ids: Sequence[int], end_ids: Sequence[int]) -> Completion:
    """Keep the ids up to and including the first that ends a completion."""
    for position, token_id in enumerate(ids):
        if token_id in end_ids:
            return Completion(tuple(ids[: position + 1]), ended=True)
    return Completion(tuple(ids), ended=False)


def _pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, sequences))
    ids = [[*[pad_id] * (length - len(sequence)), *sequence] for sequence in sequences]
    mask = [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
