"""What the endpoints do: requests become groups, groups scores, and scores answers."""

import asyncio
import math
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.packing import token_count
from helpsteer_rloo.serving.batching import Batcher, FullError
from helpsteer_rloo.serving.errors import RequestError
from helpsteer_rloo.serving.metrics import Metrics
from helpsteer_rloo.serving.protocols import PoolingRequest, Reader, RewardRequest, ScoreRequest

READERS = 2
"""Requests whose texts become ids at the same time."""
STUCK = 5
"""Timeouts after which a batch is taken for stuck."""
GONE = 499
"""Status that is counted for a client that hung up, as of nginx; nobody reads it."""

Asked = ScoreRequest | RewardRequest | PoolingRequest
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes: lengths in tokens, sizes in bytes, times in seconds.

    `max_length` is that of a prompt with a response, the reward model's own; `request_tokens` all tokens of a request;
    `batch_size` the responses that one forward pass scores.
    """

    max_length: int
    request_tokens: int = 65_536
    batch_tokens: int = 16_384
    queue_tokens: int = 262_144
    body_bytes: int = 2 * 2**20
    timeout: float = 60.0
    batch_size: int = 64

    def cost(self, group: TokenGroup) -> int:
        """Tokens that scoring a group takes: its prompt once for `batch_size` responses."""
        passes = -(-len(group.continuation_ids) // self.batch_size)
        return token_count(group) + (passes - 1) * len(group.prompt_ids)


class Service:
    """What the endpoints do. They take the connection too, since what its client does not wait for is not scored."""

    def __init__(self, name: str, batcher: Batcher, reader: Reader, limits: Limits, metrics: Metrics) -> None:
        self.name, self.batcher, self.reader = name, batcher, reader
        self.limits, self.metrics, self.created = limits, metrics, int(time.time())
        self._reading = asyncio.Semaphore(READERS)

    async def score(self, request: ScoreRequest, connection: Request) -> dict[str, Any]:
        """Scores of responses to one conversation."""
        groups, (scores,) = await self._answered(request, connection)
        return {**self._head("score"), "scores": scores, "usage": _usage(groups)}

    async def get_reward(self, request: RewardRequest, connection: Request) -> dict[str, Any]:
        """OpenRLHF's remote reward model."""
        _, scores = await self._answered(request, connection)
        rewards = [score for own in scores for score in own]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    async def classify(self, request: PoolingRequest, connection: Request) -> dict[str, Any]:
        """VLLM's classification: one class, whose probability is the score's sigmoid."""
        groups, scores = await self._answered(request, connection)
        flat = [score for own in scores for score in own]
        shown = [0.5 * (1 + math.tanh(score / 2)) for score in flat] if request.activated else flat
        data = [
            {"index": place, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for place, value in enumerate(shown)
        ]
        return {**self._head("classify"), "object": "list", "data": data, "usage": _usage(groups)}

    async def pooling(self, request: PoolingRequest, connection: Request) -> dict[str, Any]:
        """VLLM's pooling: the score itself."""
        groups, scores = await self._answered(request, connection)
        data = [{"index": place, "object": "pooling", "data": own} for place, own in enumerate(scores)]
        return {**self._head("pool"), "object": "list", "data": data, "usage": _usage(groups)}

    async def models(self) -> dict[str, Any]:
        """The one model there is, as OpenAI's clients ask for it."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "helpsteer-rloo"}
        return {"object": "list", "data": [{**model, "max_model_len": self.limits.max_length}]}

    async def health(self) -> dict[str, str]:
        """Whether it answers: 503 if scoring has ended or is stuck."""
        if not self.batcher.works(STUCK * self.limits.timeout):
            raise RequestError(503, "Scoring has ended, or is stuck; start the server again.", code="unhealthy")
        return {"status": "ok", "model": self.name}

    async def _answered(self, request: Asked, connection: Request) -> tuple[list[TokenGroup], list[list[float]]]:
        model = getattr(request, "model", None)
        if model not in (None, self.name):
            raise RequestError(404, f"There is no model {model!r} here, but {self.name!r}.", param="model")
        try:
            scored = unless_gone(self._scored(request), connection)
            groups, scores = await asyncio.wait_for(scored, self.limits.timeout)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        except FullError:
            raise RequestError(429, "Too many requests wait already; try again.", code="queue_full") from None
        except TimeoutError:
            raise RequestError(504, f"No score within {self.limits.timeout:g} s.", code="timeout") from None
        if not all(math.isfinite(score) for own in scores for score in own):
            raise RequestError(500, "A score is not finite: the reward model is damaged.", code="not_finite")
        self.metrics.scored(sum(map(len, scores)))
        return groups, scores

    async def _scored(self, request: Asked) -> tuple[list[TokenGroup], list[list[float]]]:
        async with self._reading:  # of texts no more at a time, since that keeps the loop from others
            groups = await asyncio.to_thread(request.groups, self.reader)
        self._check_lengths(groups)
        return groups, await self.batcher.score(groups)

    def _check_lengths(self, groups: Sequence[TokenGroup]) -> None:
        for place, group in enumerate(groups):
            longest = len(group.prompt_ids) + max(map(len, group.continuation_ids))
            if longest > self.limits.max_length:
                raise RequestError(
                    400,
                    f"Input {place} has {longest} tokens with its longest response; the reward model was trained on at "
                    f"most {self.limits.max_length}.",
                    code="context_length_exceeded",
                )
        total = sum(map(self.limits.cost, groups))
        if total > self.limits.request_tokens:
            message = f"The request takes {total} tokens; at most {self.limits.request_tokens} are taken at once."
            raise RequestError(400, message, code="request_too_large")

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }


def _usage(groups: Sequence[TokenGroup]) -> dict[str, int]:
    tokens = sum(map(token_count, groups))
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


async def unless_gone(work: Coroutine[Any, Any, Result], connection: Request) -> Result:
    """What some work comes to, which is ended where the client hangs up.

    Args:
        work: To be waited for.
        connection: Of a request that was read to its end, so that nothing but the client's leaving can come from it.

    Raises:
        RequestError: the client hung up.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(connection.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestError(GONE, "The client hung up.", code="client_closed_request")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
