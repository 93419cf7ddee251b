"""The HTTP application: scores of a reward model in this project's, OpenRLHF's and vLLM's formats."""

import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.serving.batching import Batcher, Score, running
from helpsteer_rloo.serving.errors import RequestError, add_error_handlers, refused
from helpsteer_rloo.serving.metrics import Metrics
from helpsteer_rloo.serving.protocols import Reader
from helpsteer_rloo.serving.service import Limits, Service
from helpsteer_rloo.serving.waiting import BodyDeadline, EndedByServer

OPEN_PATHS = ("/health",)
"""What needs no token."""


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
    _add_routes(app, Service(name, batcher, Reader(renderer, limits.max_length), limits, metrics), metrics)
    app.add_middleware(BodyDeadline, seconds=limits.timeout)  # the first is the innermost
    _watch_requests(app, metrics, token)
    app.add_middleware(EndedByServer)
    add_error_handlers(app)
    return app


def _add_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """What is answered where."""
    app.post("/v1/score")(service.score)
    app.post("/get_reward")(service.get_reward)
    app.post("/classify")(service.classify)
    app.post("/pooling")(service.pooling)
    app.get("/v1/models")(service.models)
    app.get("/health")(service.health)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _watch_requests(app: FastAPI, metrics: Metrics, token: str | None) -> None:
    """Ask every request for the token, and count its answer."""
    paths = {str(getattr(route, "path", "")) for route in app.routes}

    @app.middleware("http")
    async def watched(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begin, status = time.perf_counter(), 500
        try:
            _check_token(request, token)
            response = await call_next(request)
            status = response.status_code
        except RequestError as error:
            response = refused(error)
            status = error.status
        finally:
            path = request.scope["path"] if request.scope["path"] in paths else "other"
            metrics.request(path, status, time.perf_counter() - begin)
        return response


def _check_token(request: Request, token: str | None) -> None:
    if token is None or request.scope["path"] in OPEN_PATHS:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise RequestError(401, "The bearer token is missing or wrong.", code="invalid_api_key")
