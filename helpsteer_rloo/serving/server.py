"""Running the application under uvicorn."""

import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

GRACE = 30
"""Seconds that requests being answered are given when the server is stopped."""


def serve(app: FastAPI, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serve until a signal; `started` is called with the address once connections are taken.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends an answer's parts as they come: else the second of them waits 40 ms for the
    # client's acknowledgement of the first.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        started(f"http://{shown}:{listening.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False)
        with _stopping_quietly():
            uvicorn.Server(config).run(sockets=[listening])


@contextmanager
def _stopping_quietly() -> Generator[None]:
    """Let signals that uvicorn stopped on, which it raises again when it has, end nothing more."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
