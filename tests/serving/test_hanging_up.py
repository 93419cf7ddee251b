"""A client that hangs up while its request waits: what it asked for is not scored, and others are answered."""

import http.client
import json
import socket
import threading
import time
from contextlib import closing, contextmanager

import pytest
import uvicorn

from helpsteer_rloo.groups import Message
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.serving.app import build_app
from helpsteer_rloo.serving.service import Limits


class Scorer:
    """Scores nothing before it is released, and remembers the prompts that it was given."""

    def __init__(self):
        self.seen, self.begun, self.release = [], threading.Event(), threading.Event()

    def __call__(self, groups):
        self.seen += [group.prompt_ids for group in groups]
        self.begun.set()
        assert self.release.wait(30)
        return [[0.5] * len(group.continuation_ids) for group in groups]


@contextmanager
def served(app):
    """The port of an application that serves on a socket of its own."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def until(holds):
    """Wait for something."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def body_of(question):
    return json.dumps({"messages": [{"role": "user", "content": question}], "responses": ["oak"]})


def ask(port, question):
    """A connection on which something was asked."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/score", body_of(question), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("abrupt", [False, True])
def test_what_a_client_left_is_not_scored(tokenizer, abrupt):
    scorer, renderer = Scorer(), Renderer(tokenizer)
    app = build_app("rm", scorer, renderer, Limits(max_length=96))
    with served(app) as port, closing(ask(port, "first")) as first:
        until(scorer.begun.is_set)
        gone = ask(port, "second")
        until(lambda: app.state.batcher.waiting_tokens > 0)
        if abrupt:  # a reset instead of an end
            gone.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        gone.close()
        until(lambda: app.state.batcher.waiting_tokens == 0)
        with closing(ask(port, "third")) as third:
            until(lambda: app.state.batcher.waiting_tokens > 0)
            scorer.release.set()
            assert [json.loads(c.getresponse().read())["scores"] for c in (first, third)] == [[0.5], [0.5]]
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            assert 'path="/v1/score",status="499"} 1.0' in connection.getresponse().read().decode()
    assert scorer.seen == [renderer.prompt_ids([Message("user", question)]) for question in ("first", "third")]
