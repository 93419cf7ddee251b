"""Bytes of one pass over one packed row: what is kept for the backward pass, and what exists besides at the worst time.

The formulas follow the engine, layer by layer, as its modules say what they keep (`model/fused_*.py`, `heads.py`,
`last_layer.py`, `shared_prefix_cpu.py`); a test counts what autograd really saves. Letters are those of `Shape`: D
hidden, Q all query heads, K all key heads, E a head, F feed-forward, V vocabulary, H and G numbers of heads.

On a CPU, attention computes half precision in float32 and gathers ranges of tokens; on CUDA it is FlexAttention, which
does neither. What is said of CUDA has not been compared with a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from helpsteer_rloo.planning.shapes import Shape, is_target
from helpsteer_rloo.sizes import CHUNK, MOST_SCORES

FLOAT32 = 4
"""Bytes of sums and exponentials, whatever the model's type."""
HEAP_BYTES = 32 * 2**20
"""Size from which glibc always gives a freed tensor back to the system."""
HUGE_PAGE = 2 * 2**20
"""What the memory of a tensor of that size or more is aligned to."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA of a rank, on every linear layer of the decoder or on those whose names end in one of `targets`."""

    rank: int
    targets: tuple[str, ...] | None = None

    def parameters(self, shape: Shape) -> int:
        """Its weights."""
        return shape.lora_parameters(self.rank, self.targets)


@dataclass(frozen=True, slots=True)
class Quantization:
    """A frozen base whose linear layers are held in fewer bits, as bitsandbytes does; the rest of it is not.

    In 4 bits there is a float32 factor for 64 weights (Dettmers et al. 2023, arXiv 2305.14314, section 3), or if
    `nested` one of 8 bits, with a float32 one for 256 of these; in 8 bits one for a row, which is not counted.
    """

    bits: int
    nested: bool = False

    def saved(self, shape: Shape, width: int) -> float:
        """Bytes that it saves where a weight has `width`."""
        factors = 0.0 if self.bits == 8 else ((1 + 4 / 256) / 64 if self.nested else 4 / 64)
        return shape.body_parameters() * (width - self.bits / 8 - factors)


@dataclass(frozen=True, slots=True)
class Net:
    """A model as a pass sees it.

    Attributes:
        shape: Its dimensions.
        weights: Bytes of a weight of the base.
        compute: Bytes of a number in its linear layers; fewer than `weights` under autocast.
        adapter: LoRA that takes part; without one, all weights are trained where any are.
        cpu: Whether it runs on a CPU.
        quantized: Whether its linear layers are held in fewer bits than `weights` says.
    """

    shape: Shape
    weights: int
    compute: int
    adapter: Adapter | None = None
    cpu: bool = False
    quantized: bool = False

    @property
    def autocast(self) -> bool:
        """Whether linear layers compute in less than the weights are held in."""
        return self.compute < self.weights


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: its tokens, how many of its final states are read, and how many tokens the states predict."""

    tokens: int
    read: int
    predicted: int = 0


@dataclass(frozen=True, slots=True)
class PassBytes:
    """The most that a pass needs beside weights, gradients and optimizer, at one time."""

    activations: float
    head: float = 0.0
    holes: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.activations + self.head + self.holes


# ---- what is kept for the backward pass -----------------------------------------------------------------------------


def saved_in_attention(net: Net) -> int:
    """Bytes a token that the attention half of a layer keeps, its norm included.

    The input of the norm, x0; the normed h, where a layer with adapter or all weights are trained; what queries and
    keys were before and after norm and rotation; values; the result, which is also the output projection's input; the
    sines; x Aᵀ of every adapter; and in float32 the norms' factors and the log-sum-exps.
    """
    s, a = net.shape, net.compute
    before = s.queries + s.keys if s.head_norms else 0
    inputs = _kept_inputs(net, ("q_proj", "k_proj", "v_proj"), s.hidden)
    factors = 1 + (s.heads + s.kv_heads if s.head_norms else 0) + s.heads
    tensors = before + 2 * s.queries + 2 * s.keys + inputs + _low_ranks(net, ("q_proj", "k_proj", "v_proj", "o_proj"))
    return net.weights * (s.hidden + s.head_dim) + a * tensors + FLOAT32 * factors


def saved_in_network(net: Net) -> tuple[int, int]:
    """Bytes a token that the feed-forward half of a layer keeps: in its norm, and behind it (h; g, u; the gate).

    In the last layer the second is kept where a final state is read only.
    """
    s = net.shape
    behind = _kept_inputs(net, ("gate_proj", "up_proj"), s.hidden) + 2 * s.intermediate
    behind += _kept_inputs(net, ("down_proj",), s.intermediate)
    return net.weights * s.hidden + FLOAT32, net.compute * (
        behind + _low_ranks(net, ("gate_proj", "up_proj", "down_proj"))
    )


def saved_bytes(net: Net, row: Row, *, checkpointing: bool) -> int:
    """What the body keeps of a row for its backward pass, the final norm's input and the states that are read among it.

    With checkpointing that is each layer's input, and on a CPU what its attention results in.
    """
    s = net.shape
    end = row.tokens * (net.weights * s.hidden + FLOAT32)
    if checkpointing:
        return s.layers * row.tokens * (net.weights * s.hidden + kept_of_attention(net)) + end
    norm, behind = saved_in_network(net)
    every = row.tokens * (saved_in_attention(net) + norm)
    return s.layers * every + ((s.layers - 1) * row.tokens + row.read) * behind + end


def kept_of_attention(net: Net) -> int:
    """Bytes a token of the result and the log-sum-exps, which a CPU does not compute again under checkpointing."""
    return net.compute * net.shape.queries + FLOAT32 * net.shape.heads if net.cpu else 0


def saved_in_layer(net: Net, row: Row) -> int:
    """What one layer keeps that is computed again under checkpointing; it computes every token, the last one too."""
    norm, behind = saved_in_network(net)
    return row.tokens * (saved_in_attention(net) - kept_of_attention(net) + norm + behind)


def _kept_inputs(net: Net, names: Sequence[str], width: int) -> int:
    """Numbers a token of a tensor that these layers are given, as often as it is kept.

    Once for all of them; under autocast each casts it for itself.
    """
    trained = [name for name in names if net.adapter is None or is_target(name, net.adapter.targets)]
    return width * (len(trained) if net.autocast and len(names) > 1 else min(1, len(trained)))


def _low_ranks(net: Net, names: Sequence[str]) -> int:
    if net.adapter is None:
        return 0
    return net.adapter.rank * sum(is_target(name, net.adapter.targets) for name in names)


# ---- what exists for a moment ---------------------------------------------------------------------------------------


def attention_moment(net: Net) -> int:
    """Bytes a token that attention holds at its worst, forward without gradient.

    The embeddings, which the body's forward holds to its end, the residual stream and h; turned queries, keys and
    values; the result and the log-sum-exps. On a CPU besides: all of these in float32, and for about half of the tokens
    what is gathered of them, the queries once more, scaled, and the block's own result.
    """
    s = net.shape
    inputs, result = s.queries + 2 * s.keys, s.queries
    held = 2 * net.weights * s.hidden + net.compute * (s.hidden + inputs + result) + FLOAT32 * s.heads
    if not net.cpu:
        return held
    wide = FLOAT32 * (inputs + result) if net.compute < FLOAT32 else 0
    return held + wide + FLOAT32 * (inputs + 3 * result) // 2


def attention_backward_moment(net: Net) -> int:
    """Bytes a token that attention's backward adds to what was kept: the gradient it is given, those that it makes.

    On a CPU besides: what was kept in float32, and for about half of the tokens what is gathered, and its gradients.
    """
    s = net.shape
    inputs, result = s.queries + 2 * s.keys, s.queries
    given = net.weights * s.hidden + net.compute * result
    if not net.cpu:
        return given + net.compute * inputs + FLOAT32 * s.heads
    wide = FLOAT32 * (inputs + 2 * result) if net.compute < FLOAT32 else 0
    return given + wide + FLOAT32 * (2 * inputs + result)


def scores_bytes(net: Net, tokens: int) -> int:
    """On a CPU, what a large block of attention is computed with: twice an eighth of a row's scores, or two tiles."""
    if not net.cpu:
        return 0
    return 2 * FLOAT32 * min(MOST_SCORES, net.shape.heads // net.shape.kv_heads * tokens**2 // 8)


def network_moment(net: Net) -> int:
    """Bytes a token that a feed-forward network holds at its worst, forward without gradient.

    The embeddings, the layer's input, the residual stream and h; g, u and the gate.
    """
    s = net.shape
    return 3 * net.weights * s.hidden + net.compute * (s.hidden + 3 * s.intermediate)


def network_backward_moment(net: Net) -> int:
    """Bytes a token that its backward adds: gradients of the gate (in place of it), of g, and silu(g); of x and h."""
    s = net.shape
    return net.compute * 2 * s.intermediate + 2 * net.weights * s.hidden


def head_bytes(net: Net, predicted: int, *, trained: bool, gradient: bool) -> float:
    """The vocabulary head at its worst: chunks of logits, and the states that go through it.

    Frozen, a chunk has its logits and their exponentials, in float32, and in half precision one of them once more; its
    gradient, if one is asked for, is made along with the value. Trained, the head is run again in the backward pass,
    where four tensors of a chunk exist at one time; then, with the last of them, a gradient of all weights and the sum
    of those of earlier chunks.
    """
    if not predicted:
        return 0.0
    s, chunk = net.shape, min(CHUNK, predicted) * net.shape.vocabulary
    states = predicted * s.hidden * net.weights
    if not trained:
        once_more = net.compute if net.compute < FLOAT32 else 0
        return chunk * (2 * FLOAT32 + once_more) + states + (states if gradient else 0)
    several = predicted > CHUNK
    gradient_of_head = s.embedding_parameters() * net.weights
    logits = chunk * (4 * FLOAT32 + (net.compute if net.compute < FLOAT32 else 0)) + several * gradient_of_head
    return max(logits, chunk * net.compute + (1 + several) * gradient_of_head) + 2 * states


def drawing_bytes(net: Net, rows: int) -> int:
    """Drawing of one token in each of so many rows: logits, in half precision in float32 too, scores and weights."""
    wide = 2 * FLOAT32 + (FLOAT32 if net.weights < FLOAT32 else 0)
    return rows * net.shape.vocabulary * (net.weights + wide)


# ---- what the heap keeps --------------------------------------------------------------------------------------------


def heap_holes(net: Net, tokens: int, *, checkpointing: bool) -> float:
    """On a CPU, what freed tensors leave behind: holes in the heap between tensors that are kept.

    glibc takes tensors from its heap once such a one has been freed, unless they have 32 MiB or more, and a hole is too
    small for the next tensor that is aligned to huge pages. Without checkpointing that are the temporaries of every
    layer's attention, and in half precision its norms'; with it about one layer, forward and kept. An approximation
    found by measuring (docs/memory.md): with the threshold fixed by `MALLOC_MMAP_THRESHOLD_` there are none.
    """
    if not net.cpu:
        return 0.0
    s = net.shape
    within = min(tokens, HEAP_BYTES // (net.compute * max(s.hidden, s.queries)))
    if checkpointing:
        norm, behind = saved_in_network(net)
        forward = max(attention_moment(net), network_moment(net))
        return within * (forward + saved_in_attention(net) + norm + behind)
    temporaries = FLOAT32 * (2 * s.queries + 2 * s.keys)
    wide = temporaries + FLOAT32 * s.hidden if net.compute < FLOAT32 else 0
    return within * s.layers * (temporaries // 2 + wide)


def joined_linears(shape: Shape) -> dict[tuple[str, ...], int]:
    """Weights that sampling lays side by side as one, of one layer, and how many they are; others stand alone."""
    sizes = {name.rpartition(".")[2]: i * o for name, (i, o) in shape.linears().items()}
    together = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    return {names: sum(sizes[name] for name in names) for names in together}


def holes_of_copies(net: Net, tokens: int) -> float:
    """On a CPU, what is left of the heap that the copies of weights for sampling were in, in a pass that follows.

    Taken are holes that no hidden states fit into: those of copies that are smaller than hidden states and the
    alignment to huge pages. In larger ones the pass has its tensors; copies of `HEAP_BYTES` or more leave none.

    Args:
        net: As it samples.
        tokens: Of the row of the pass.
    """
    if not net.cpu:
        return 0.0
    needed = min(HEAP_BYTES, tokens * net.shape.hidden * net.weights + HUGE_PAGE)
    copies = (size * net.weights for size in joined_linears(net.shape).values())
    return float(net.shape.layers * sum(size for size in copies if size < needed))


# ---- whole passes ---------------------------------------------------------------------------------------------------


def inference_bytes(net: Net, row: Row) -> PassBytes:
    """A pass without gradient: one layer's worst moment, or the head."""
    s = net.shape
    final = row.tokens * s.hidden * net.weights
    attention = row.tokens * attention_moment(net) + scores_bytes(net, row.tokens)
    layer = max(attention, row.tokens * network_moment(net)) + row.tokens * 2 * s.head_dim * net.compute
    head = head_bytes(net, row.predicted, trained=False, gradient=False)
    return PassBytes(layer) if layer >= final + head else PassBytes(final, head)


def training_bytes(net: Net, row: Row, *, checkpointing: bool) -> PassBytes:
    """A pass and its backward: the worst of the head's moment, in between, and those of a layer's backward."""
    s = net.shape
    kept = saved_bytes(net, row, checkpointing=checkpointing)
    final = row.tokens * s.hidden * net.weights
    head = head_bytes(net, row.predicted, trained=net.adapter is None, gradient=True)
    tokens_behind = row.tokens if checkpointing else row.read
    # A layer computed again keeps its own input, which is counted; and by then the final norm's is gone.
    layer = saved_in_layer(net, row) - 2 * final if checkpointing else 0
    behind = saved_in_network(net)[1] * tokens_behind
    moments = (
        PassBytes(kept + final, head),
        PassBytes(kept + layer + network_backward_moment(net) * tokens_behind),
        PassBytes(kept + layer - behind + attention_backward_moment(net) * row.tokens + scores_bytes(net, row.tokens)),
    )
    worst = max(moments, key=lambda moment: moment.total)
    return replace(worst, holes=heap_holes(net, row.tokens, checkpointing=checkpointing))
