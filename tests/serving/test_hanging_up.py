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
def served(app, **config):
    """The port of an application that serves on a socket of its own."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", **config))
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


def stalled(port):
    """A connection on which a body was begun, and is not gone on with."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    connection.sendall(head.encode())
    return connection


def whole(connection):
    """What is answered until the connection is closed."""
    return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_does_not_come_is_given_up(tokenizer, drips):
    app = build_app("rm", Scorer(), Renderer(tokenizer), Limits(max_length=96, timeout=0.5))
    with served(app) as port, closing(stalled(port)) as connection:
        begin = time.monotonic()
        while drips and time.monotonic() < begin + 0.4:
            connection.sendall(b" ")
            time.sleep(0.1)
        answer = whole(connection)
        assert time.monotonic() - begin < 3
        assert answer.startswith("HTTP/1.1 408")
        assert "The body did not come within 0.5 s." in answer
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as asked:
            asked.request("GET", "/metrics")
            assert 'path="/v1/score",status="408"} 1.0' in asked.getresponse().read().decode()


def test_a_body_that_came_in_time_may_be_scored_as_long_as_that_again(tokenizer):
    scorer = Scorer()
    app = build_app("rm", scorer, Renderer(tokenizer), Limits(max_length=96, timeout=0.5))
    with served(app) as port, closing(ask(port, "first")) as first:
        assert first.getresponse().status == 504
        scorer.release.set()


def test_what_is_asked_when_the_servers_grace_is_over_is_answered_without_a_traceback(tokenizer, caplog):
    scorer = Scorer()
    app = build_app("rm", scorer, Renderer(tokenizer), Limits(max_length=96))
    with served(app, timeout_graceful_shutdown=1, log_config=None) as port:
        begun, connection = ask(port, "first"), stalled(port)
        until(scorer.begun.is_set)
    scorer.release.set()
    with closing(begun), closing(connection):
        assert begun.getresponse().status == 503
        assert whole(connection).startswith("HTTP/1.1 503")
    assert [record.exc_info for record in caplog.records] == [None]  # that they were ended


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
