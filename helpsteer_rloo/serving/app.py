"""The HTTP application: scores of a reward model in this project's, OpenRLHF's and vLLM's formats."""

import asyncio
import hmac
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.packing import token_count
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.serving.batching import Batcher, FullError, Score, running
from helpsteer_rloo.serving.metrics import Metrics
from helpsteer_rloo.serving.protocols import PoolingRequest, Reader, RewardRequest, ScoreRequest

OPEN_PATHS = ("/health",)
"""What needs no token."""
READERS = 2
"""Requests whose texts become ids at the same time."""
STUCK = 5
"""Timeouts after which a batch is taken for stuck."""


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


class RequestError(Exception):
    """A request that is not answered: HTTP status, message, the parameter it is about, and a code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def build_app(name: str, score: Score, renderer: Renderer, limits: Limits, token: str | None = None) -> FastAPI:
    """The application that serves one reward model.

    Args:
        name: Of the model, in answers.
        score: From groups to scores; it blocks, and is called in one thread of its own.
        renderer: Of the model.
        limits: What is taken.
        token: That requests must bear, if any.
    """
    metrics = Metrics(CollectorRegistry())
    executor = ThreadPoolExecutor(1, "scoring")
    batcher = Batcher(
        score,
        executor,
        batch_tokens=limits.batch_tokens,
        queue_tokens=limits.queue_tokens,
        cost=limits.cost,
        seen=metrics.batch,
    )
    metrics.queue.set_function(lambda: batcher.waiting_tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with running(batcher.run()):
            yield
        executor.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="helpsteer-rloo", lifespan=lifespan, docs_url=None, redoc_url=None, max_body_size=limits.body_bytes
    )
    app.state.batcher = batcher
    service = _Service(name, batcher, Reader(renderer, limits.max_length), limits, metrics)
    app.post("/v1/score")(service.score)
    app.post("/get_reward")(service.get_reward)
    app.post("/classify")(service.classify)
    app.post("/pooling")(service.pooling)
    app.get("/v1/models")(service.models)
    app.get("/health")(service.health)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.middleware("http")
    async def watched(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begin, status = time.perf_counter(), 500
        try:
            _check_token(request, token)
            response = await call_next(request)
            status = response.status_code
        except RequestError as error:
            response = _refused(error)
            status = error.status
        finally:
            path = request.scope["path"] if request.scope["path"] in paths else "other"
            metrics.request(path, status, time.perf_counter() - begin)
        return response

    paths = {str(getattr(route, "path", "")) for route in app.routes}
    app.exception_handler(RequestError)(_on_request_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http)
    app.exception_handler(Exception)(_on_failure)
    return app


class _Service:
    """What the endpoints do."""

    def __init__(self, name: str, batcher: Batcher, reader: Reader, limits: Limits, metrics: Metrics) -> None:
        self.name, self.batcher, self.reader = name, batcher, reader
        self.limits, self.metrics, self.created = limits, metrics, int(time.time())
        self._reading = asyncio.Semaphore(READERS)

    async def score(self, request: ScoreRequest) -> dict[str, Any]:
        """Scores of responses to one conversation."""
        groups, (scores,) = await self._answered(request)
        return {**self._head("score"), "scores": scores, "usage": _usage(groups)}

    async def get_reward(self, request: RewardRequest) -> dict[str, Any]:
        """OpenRLHF's remote reward model."""
        _, scores = await self._answered(request)
        rewards = [score for own in scores for score in own]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    async def classify(self, request: PoolingRequest) -> dict[str, Any]:
        """VLLM's classification: one class, whose probability is the score's sigmoid."""
        groups, scores = await self._answered(request)
        flat = [score for own in scores for score in own]
        shown = [0.5 * (1 + math.tanh(score / 2)) for score in flat] if request.activated else flat
        data = [
            {"index": place, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for place, value in enumerate(shown)
        ]
        return {**self._head("classify"), "object": "list", "data": data, "usage": _usage(groups)}

    async def pooling(self, request: PoolingRequest) -> dict[str, Any]:
        """VLLM's pooling: the score itself."""
        groups, scores = await self._answered(request)
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

    async def _answered(
        self, request: ScoreRequest | RewardRequest | PoolingRequest
    ) -> tuple[list[TokenGroup], list[list[float]]]:
        model = getattr(request, "model", None)
        if model not in (None, self.name):
            raise RequestError(404, f"There is no model {model!r} here, but {self.name!r}.", param="model")
        try:
            groups, scores = await asyncio.wait_for(self._scored(request), self.limits.timeout)
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

    async def _scored(
        self, request: ScoreRequest | RewardRequest | PoolingRequest
    ) -> tuple[list[TokenGroup], list[list[float]]]:
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


def _check_token(request: Request, token: str | None) -> None:
    if token is None or request.scope["path"] in OPEN_PATHS:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise RequestError(401, "The bearer token is missing or wrong.", code="invalid_api_key")


def _refused(error: RequestError) -> JSONResponse:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    content = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": content}, error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _refused(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    return _refused(RequestError(400, message, param=place or None))


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refused(RequestError(error.status_code, str(error.detail)))


async def _on_failure(_: Request, error: Exception) -> Response:
    return _refused(RequestError(500, f"Scoring failed ({type(error).__name__}); the server's log says more."))
