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
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.serving.batching import Batcher, FullError, Score, running, tokens_of
from helpsteer_rloo.serving.metrics import Metrics
from helpsteer_rloo.serving.protocols import PoolingRequest, RewardRequest, ScoreRequest

OPEN_PATHS = ("/health",)
"""What needs no token."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes: lengths in tokens, sizes in bytes, times in seconds.

    `max_length` is that of a prompt with a response, the reward model's own; `request_tokens` all tokens of a request.
    """

    max_length: int
    request_tokens: int = 65_536
    batch_tokens: int = 16_384
    queue_tokens: int = 262_144
    body_bytes: int = 8 * 2**20
    timeout: float = 60.0


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
        seen=metrics.batch,
    )
    metrics.queue.set_function(lambda: batcher.waiting_tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with running(batcher.run()):
            yield
        executor.shutdown()

    app = FastAPI(title="helpsteer-rloo", lifespan=lifespan, docs_url=None, redoc_url=None)
    service = _Service(name, batcher, renderer, limits, metrics)
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
        begin = time.perf_counter()
        try:
            _check_token(request, token)
            await _check_size(request, limits.body_bytes)
            response = await call_next(request)
        except RequestError as error:
            response = _refused(error)
        known = request.url.path in {str(getattr(route, "path", "")) for route in app.routes}
        metrics.request(request.url.path if known else "other", response.status_code, time.perf_counter() - begin)
        return response

    app.exception_handler(RequestError)(_on_request_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http)
    app.exception_handler(Exception)(_on_failure)
    return app


class _Service:
    """What the endpoints do."""

    def __init__(self, name: str, batcher: Batcher, renderer: Renderer, limits: Limits, metrics: Metrics) -> None:
        self.name, self.batcher, self.renderer = name, batcher, renderer
        self.limits, self.metrics, self.created = limits, metrics, int(time.time())

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
        shown = [1 / (1 + math.exp(-score)) for score in flat] if request.activated else flat
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
        """Whether it serves."""
        return {"status": "ok", "model": self.name}

    async def _answered(
        self, request: ScoreRequest | RewardRequest | PoolingRequest
    ) -> tuple[list[TokenGroup], list[list[float]]]:
        model = getattr(request, "model", None)
        if model not in (None, self.name):
            raise RequestError(404, f"There is no model {model!r} here, but {self.name!r}.", param="model")
        try:
            groups = await asyncio.to_thread(request.groups, self.renderer)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        self._check_lengths(groups)
        try:
            scores = await asyncio.wait_for(self.batcher.score(groups), self.limits.timeout)
        except FullError:
            raise RequestError(429, "Too many requests wait already; try again.", code="queue_full") from None
        except TimeoutError:
            raise RequestError(504, f"No score within {self.limits.timeout:g} s.", code="timeout") from None
        if not all(math.isfinite(score) for own in scores for score in own):
            raise RequestError(500, "A score is not finite: the reward model is damaged.", code="not_finite")
        self.metrics.scored(sum(map(len, scores)))
        return groups, scores

    def _check_lengths(self, groups: Sequence[TokenGroup]) -> None:
        for place, group in enumerate(groups):
            if min(map(len, group.continuation_ids)) == 0:
                raise RequestError(400, f"Input {place} has a response without a token.")
            longest = len(group.prompt_ids) + max(map(len, group.continuation_ids))
            if longest > self.limits.max_length:
                raise RequestError(
                    400,
                    f"Input {place} has {longest} tokens with its longest response; the reward model was trained on at "
                    f"most {self.limits.max_length}.",
                    code="context_length_exceeded",
                )
        total = sum(map(tokens_of, groups))
        if total > self.limits.request_tokens:
            message = f"The request has {total} tokens; at most {self.limits.request_tokens} are taken at once."
            raise RequestError(400, message, code="request_too_large")

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }


def _usage(groups: Sequence[TokenGroup]) -> dict[str, int]:
    tokens = sum(map(tokens_of, groups))
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def _check_token(request: Request, token: str | None) -> None:
    if token is None or request.url.path in OPEN_PATHS:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise RequestError(401, "The bearer token is missing or wrong.", code="invalid_api_key")


async def _check_size(request: Request, most: int) -> None:
    """Read the body, if it is no larger than allowed; whoever asks for it later gets what was read."""
    told = request.headers.get("content-length", "0")
    if not told.isdecimal() or int(told) > most:
        raise RequestError(413, f"The body is over {most} bytes.", code="body_too_large")
    size, parts = 0, list[bytes]()
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise RequestError(413, f"The body is over {most} bytes.", code="body_too_large")
        parts.append(part)
    request._body = b"".join(parts)  # pyright: ignore[reportPrivateUsage] - as Request.body() keeps it


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
