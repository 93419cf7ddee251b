"""Dimensions of decoders, what follows from them (parameters, operations), and where they are known from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpsteer_rloo.hub import ODD, absence, in_time, network_error, refusal
from helpsteer_rloo.run_dir import read_text
from helpsteer_rloo.settings.flags import nearest_name

ARCHITECTURES = ("qwen3", "llama")
"""Model types that the engine's own passes are made for; others go through TRL's, which are not planned."""
LARGEST = 10**9
"""Of a dimension: beyond any model, and numbers made of it are still written in full."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3 or Llama.

    Attributes:
        hidden: D, the width of the residual stream.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        intermediate: Width of the feed-forward networks.
        vocabulary: V, rows of the embedding.
        tied: Whether the vocabulary head is the embedding.
        head_norms: Whether queries and keys are normed head by head, as in Qwen3.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    head_norms: bool = True

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linear layers of one decoder layer: their names, inputs and outputs."""
        return {
            "self_attn.q_proj": (self.hidden, self.queries),
            "self_attn.k_proj": (self.hidden, self.keys),
            "self_attn.v_proj": (self.hidden, self.keys),
            "self_attn.o_proj": (self.queries, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    def layer_parameters(self) -> int:
        """Weights of one decoder layer, norms among them."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        return sum(inputs * outputs for inputs, outputs in self.linears().values()) + norms

    def body_parameters(self) -> int:
        """Weights of all linear layers of the body, without embeddings, norms and adapters."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears().values())

    def embedding_parameters(self) -> int:
        """Weights of the embedding; a vocabulary head that is not tied has as many."""
        return self.vocabulary * self.hidden

    def classifier_parameters(self) -> int:
        """Weights of a reward model: the decoder and a scalar head."""
        return self.embedding_parameters() + self.layers * self.layer_parameters() + 2 * self.hidden

    def causal_parameters(self) -> int:
        """Weights of a language model: the decoder and a vocabulary head, if that is not the embedding."""
        head = 0 if self.tied else self.embedding_parameters()
        return self.embedding_parameters() + self.layers * self.layer_parameters() + self.hidden + head

    def lora_parameters(self, rank: int, targets: Sequence[str] | None = None) -> int:
        """Weights of LoRA on all linear layers of the body, or on those whose names end in one of `targets`.

        >>> Shape(4096, 36, 32, 8, 128, 12_288, 151_936).lora_parameters(16)
        43646976
        """
        chosen = [size for name, size in self.linears().items() if is_target(name, targets)]
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in chosen)


def is_target(name: str, targets: Sequence[str] | None) -> bool:
    """Whether LoRA is put on a linear layer of a decoder; on every one if no targets are named."""
    return targets is None or name.rpartition(".")[2] in {target.rpartition(".")[2] for target in targets}


def _qwen3(sizes: tuple[int, int, int, int], *, tied: bool = False) -> Shape:
    hidden, layers, heads, intermediate = sizes
    return Shape(hidden, layers, heads, 8, 128, intermediate, 151_936, tied)


_QWEN3 = {
    "0.6B": _qwen3((1024, 28, 16, 3072), tied=True),
    "1.7B": _qwen3((2048, 28, 16, 6144), tied=True),
    "4B": _qwen3((2560, 36, 32, 9728), tied=True),
    "8B": _qwen3((4096, 36, 32, 12_288)),
    "14B": _qwen3((5120, 40, 40, 17_408)),
    "32B": _qwen3((5120, 64, 64, 25_600)),
}

QWEN3 = {f"Qwen/Qwen3-{size}{end}": shape for size, shape in _QWEN3.items() for end in ("", "-Base")}
"""Dimensions of the family, from the configurations that its models were published with."""


def shape_of(model: str, revision: str | None = None) -> Shape:
    """Dimensions of a model: of its directory, of the table, or of its configuration on the hub.

    Raises:
        ValueError: they cannot be found, or the engine's passes are not made for the model.
    """
    if Path(model).is_dir():
        return _shape_in(Path(model) / "config.json")
    if model in QWEN3:
        return QWEN3[model]
    return _shape_in(_fetched(model, revision))


def _shape_in(path: Path) -> Shape:
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"The dimensions of the model are not known: {path} cannot be read ({error}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The dimensions of the model are not known: {path} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"The dimensions of the model are not known: {path} holds no mapping.")
    try:
        return shape_of_config(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fetched(model: str, revision: str | None) -> Path:
    """The configuration of a model on the hub, or of what was downloaded of it earlier where the hub gives nothing.

    The hub is asked before its own function is, which tries again and again, and tells of every time.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    away = absence(model, revision)
    against = refusal(model, revision) if away is None else f"the hub cannot be reached ({away.partition(':')[0]})"
    try:
        here = against is not None
        return Path(in_time(lambda: hf_hub_download(model, "config.json", revision=revision, local_files_only=here)))
    # A cache without the file and no network are OSErrors, a name that no repository can have a ValueError.
    except (network_error(), EntryNotFoundError, OSError, *ODD) as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, OSError)
        reason = "it has no config.json" if missing else f"its config.json cannot be had ({type(error).__name__})"
        nearest = nearest_name(model, QWEN3)
        raise ValueError(
            f"The dimensions of {model!r} are not known: it is no directory, none of the models of Qwen3 that are "
            f"built in, and {against or reason}. {f'Did you mean {nearest!r}? ' if nearest else ''}Give another "
            "--model_name_or_path, or a directory with its config.json."
        ) from None


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """Dimensions from the content of a `config.json`.

    Raises:
        ValueError: one is missing, or the model is of another architecture.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type is {kind!r}; the plan knows {' and '.join(ARCHITECTURES)}.")
    shape = Shape(
        hidden=_size(config, "hidden_size"),
        layers=_size(config, "num_hidden_layers"),
        heads=_size(config, "num_attention_heads"),
        kv_heads=1,
        head_dim=1,
        intermediate=_size(config, "intermediate_size"),
        vocabulary=_size(config, "vocab_size"),
        tied=_is_tied(config),
        head_norms=kind == "qwen3",
    )
    # Their defaults in transformers: of Qwen3 128, of Llama what the heads leave of the hidden size.
    own = 128 if kind == "qwen3" else shape.hidden // shape.heads
    head_dim = own if config.get("head_dim") is None else _size(config, "head_dim")
    kv_heads = shape.heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    if head_dim < 1:
        raise ValueError(f"hidden_size is {shape.hidden}; expected at least that of the {shape.heads} heads.")
    if shape.heads % kv_heads:
        raise ValueError(f"num_key_value_heads is {kv_heads}; expected a divisor of the {shape.heads} heads.")
    return replace(shape, head_dim=head_dim, kv_heads=kv_heads)


def _is_tied(config: Mapping[str, Any]) -> bool:
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {tied!r:.40}; expected true or false.")
    return tied


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ValueError(f"{name} is {value!r:.40}; expected a whole number from 1 to {LARGEST:,}.")
    return value


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass has to compute: tokens that go through the body, and pairs of query and key that attention needs.

    >>> Work.of_group(3, [2]) + Work.of_group(1, [1, 1])
    Work(tokens=8, attended=20)
    """

    tokens: float = 0
    attended: float = 0

    @classmethod
    def of_group(cls, prompt: int, continuations: Sequence[int]) -> "Work":
        """A prompt, computed once, and continuations that each see it and themselves."""
        attended = _triangle(prompt) + sum(prompt * length + _triangle(length) for length in continuations)
        return cls(prompt + sum(continuations), attended)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.attended + other.attended)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.tokens * factor, self.attended * factor)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def forward_flops(shape: Shape, work: Work, adapter: int = 0) -> float:
    """Multiplications and additions of the body: linear layers, adapters, scores and mixing of values.

    Args:
        shape: Of the model.
        work: Tokens, and pairs that attend.
        adapter: Weights of LoRA, if there is any.
    """
    return linear_flops(shape, work, adapter) + _attention_flops(shape, work)


def linear_flops(shape: Shape, work: Work, adapter: int = 0) -> float:
    """Those of the linear layers and adapters alone: what checkpointing computes again where attention is kept."""
    return 2 * (shape.body_parameters() + adapter) * work.tokens


def backward_flops(shape: Shape, work: Work, adapter: int = 0) -> float:
    """Backward of the body: with an adapter, of a frozen one, whose weights need no gradient; else of all of it."""
    trained = adapter or shape.body_parameters()
    linear = 2 * (shape.body_parameters() + adapter + trained)
    return linear * work.tokens + 2 * _attention_flops(shape, work)


def head_flops(shape: Shape, tokens: float) -> float:
    """The vocabulary head on so many tokens; the gradient of its input, with a frozen head, costs the same again."""
    return 2 * shape.hidden * shape.vocabulary * tokens


def _attention_flops(shape: Shape, work: Work) -> float:
    return 4 * shape.layers * shape.queries * work.attended
