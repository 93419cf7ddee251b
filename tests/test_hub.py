"""A hub that is away is found out in seconds, and what it does answer is left to others."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest

from helpsteer_rloo import hub
from helpsteer_rloo.hub import absence

NAME = "nobody/never-published"


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch, tmp_path):
    absence.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    yield
    absence.cache_clear()


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def at(monkeypatch, port):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@contextmanager
def answering(status: int, code: str = "") -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_closed_port_is_an_absence_and_a_directory_is_none(monkeypatch, free_port, tmp_path):
    at(monkeypatch, free_port)
    assert "ConnectError" in (absence(NAME) or "")
    assert absence(str(tmp_path)) is None


def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at(monkeypatch, silent.getsockname()[1])
        begin = time.monotonic()
        assert "ReadTimeout" in (absence(NAME) or "")
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize("status", [401, 404, 503])
def test_an_answer_is_no_absence_whatever_it_says(monkeypatch, status):
    with answering(status) as port:
        at(monkeypatch, port)
        assert absence(NAME) is None


def test_a_tokenizer_that_is_nowhere_is_said_so_in_seconds(monkeypatch, free_port):
    from helpsteer_rloo.model.loading import load_tokenizer

    at(monkeypatch, free_port)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f"Could not fetch the tokenizer '{NAME}': .*\nCheck the name and the network"):
        load_tokenizer(NAME)
    assert time.monotonic() - begin < 10
