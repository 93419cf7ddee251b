"""Results of attention that checkpointing keeps, so that only the rest of a layer is computed again.

Under checkpointing a layer is computed a second time in the backward pass, from its input. On a CPU attention takes a
third of that time or more, and its result is about as large as the input, which is kept in any case (in small Qwen3
models, whose heads together are wider than the hidden states, up to twice as large).
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

Results = tuple[Tensor, ...]


class _Pass:
    """The context of a layer's pass, the first or, in the backward pass, another one.

    Args:
        results: What the first pass kept, in the order in which it was computed.
        recomputes: Whether this is another pass.
    """

    def __init__(self, results: deque[Results], *, recomputes: bool) -> None:
        self.results, self.recomputes = results, recomputes
        self._tokens: list[Token[_Pass | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_pass.set(self))

    def __exit__(self, *_: object) -> None:
        _pass.reset(self._tokens.pop())


_pass: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def keep_attention(layers: Iterable[nn.Module]) -> None:
    """Let layers that are checkpointed keep what `kept` computes in them, from their next forward pass on.

    Reentrant checkpointing tells nobody which of the two passes it is in, and one under `debug` or with a `context_fn`
    has other plans: these are left as they are.
    """
    for layer in layers:
        run = layer.__dict__.get("_gradient_checkpointing_func")
        if not isinstance(run, partial):
            continue
        if run.keywords.get("use_reentrant") is False and not run.keywords.keys() & {"context_fn", "debug"}:
            cast(Any, layer)._gradient_checkpointing_func = partial(run, context_fn=_contexts)


def kept(compute: Callable[[], Results]) -> Results:
    """What `compute` returns, or what it returned in the forward pass of the layer that is being computed again.

    It is computed again where the graph is kept and sent backward a second time.
    """
    current = _pass.get()
    if current is None:
        return compute()
    if current.recomputes and current.results:
        return current.results.popleft()
    results = compute()
    if not current.recomputes:
        # Without their history, which autograd gives to the tensors that are returned.
        current.results.append(tuple(result.detach() for result in results))
    return results


def _contexts() -> tuple[_Pass, _Pass]:
    """The contexts of a checkpointed call's two passes, as `torch.utils.checkpoint.checkpoint` asks for them."""
    results = deque[Results]()
    return _Pass(results, recomputes=False), _Pass(results, recomputes=True)
