"""A hub that is away is found out in seconds, and what it does answer is left to others."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest

from helpsteer_rloo import events, hub
from helpsteer_rloo.events import Progressed, subscribed
from helpsteer_rloo.hub import absence

ROOT = Path(__file__).resolve().parents[1]
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
        assert "Timeout" in (absence(NAME) or "")
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize("status", [401, 404, 503])
def test_an_answer_is_no_absence_whatever_it_says(monkeypatch, status):
    with answering(status) as port:
        at(monkeypatch, port)
        assert absence(NAME) is None


@contextmanager
def sending(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """A server that answers anything by a function."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def do_HEAD(self):
            answer(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def content(sent: BaseHTTPRequestHandler, body: bytes, length: int | None = None) -> None:
    """Send a body, whose length may be said otherwise than it is."""
    sent.send_response(200)
    sent.send_header("Content-Length", str(len(body) if length is None else length))
    sent.end_headers()
    with suppress(OSError):
        sent.wfile.write(body if sent.command == "GET" else b"")


@pytest.mark.parametrize("body", [b"{}", b"[1]", b"<html>log in</html>", b'{"id": ', b"null"])
def test_what_answers_but_is_no_hub_is_an_absence(monkeypatch, body):
    with sending(lambda sent: content(sent, body)) as port:
        at(monkeypatch, port)
        assert "NoHubError: what answers there is no hub" in (absence(NAME) or "")


def test_an_answer_that_trickles_in_is_not_waited_for(monkeypatch):
    def trickle(sent: BaseHTTPRequestHandler) -> None:
        content(sent, b"", 60)
        with suppress(OSError):
            for _ in range(60):
                sent.wfile.write(b" ")
                time.sleep(0.1)

    monkeypatch.setattr(hub, "SECONDS", 0.5)
    with sending(trickle) as port:
        at(monkeypatch, port)
        begin = time.monotonic()
        assert absence(NAME) == "TimeoutError: no whole answer in 0.5 seconds"
        assert time.monotonic() - begin < 3


def test_a_tokenizer_that_is_nowhere_is_said_so_in_seconds(monkeypatch, free_port):
    from helpsteer_rloo.model.loading import load_tokenizer

    at(monkeypatch, free_port)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f"Could not fetch the tokenizer '{NAME}': .*\nCheck the name and the network"):
        load_tokenizer(NAME)
    assert time.monotonic() - begin < 10


# ---- downloads ------------------------------------------------------------------------------------------------------

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def holding(files: Mapping[str, bytes]) -> Iterator[int]:
    """A stand-in for the hub with one model or data set, which sends slowly; as far as its client asks it."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            name = path.partition(f"/resolve/{SHA}/")[2]
            if name in files:
                self._send(files[name], "application/octet-stream")
            elif "/tree/" in path:
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self._send(json.dumps(listed).encode(), "application/json")
            elif path.startswith("/api/") and NAME in path:
                siblings = [{"rfilename": name} for name in files]
                about = {"id": NAME, "sha": SHA, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                self._send(json.dumps(about).encode(), "application/json")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
            self.end_headers()
            for start in range(0, len(content) if self.command == "GET" else 0, 1 << 20):
                self.wfile.write(content[start : start + (1 << 20)])
                time.sleep(0.02)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_download_is_a_task_in_bytes(monkeypatch):
    monkeypatch.setattr(events, "EVERY", 0.01)
    files = {f"model-0000{n}-of-00003.safetensors": bytes([n]) * (n << 20) for n in (1, 2, 3)}
    total, heard = sum(map(len, files.values())), []
    with holding({**files, "other.pth": b"x"}) as port, subscribed(heard.append):
        at(monkeypatch, port)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        folder = hub.snapshot(NAME, ["model-*.safetensors"])
        told = len(heard)
        assert hub.snapshot(NAME, ["model-*.safetensors"]) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert len(heard) == told  # nothing was sent again
    assert {(event.task, event.steps, event.unit) for event in heard} == {(f"downloading {NAME}", total, "bytes")}
    assert [event.step for event in heard] == sorted(event.step for event in heard)
    assert len({event.step for event in heard}) > 3
    assert heard[-1] == Progressed(f"downloading {NAME}", total, total, "bytes", ended=True)


ASKED = """
import json, sys
from helpsteer_rloo import events, hub
from helpsteer_rloo.data.sources import locate
from helpsteer_rloo.events import Progressed, subscribed
from helpsteer_rloo.model.loading import Base, load_policy, load_tokenizer
from helpsteer_rloo.settings.knobs import DataKnobs

NAME, asked = "nobody/never-published", []
events.EVERY = 0.01
for ask in (
    lambda: hub.snapshot(NAME, ["big-*.safetensors"]),
    lambda: hub.snapshot(NAME, ["big-*.safetensors"]),
    lambda: len(load_tokenizer(NAME)),
    lambda: sum(p.sum().item() for p in load_policy(Base(NAME)).parameters()),
    lambda: locate(DataKnobs(dataset_name=NAME))[0].path,
):
    heard = []
    with subscribed(heard.append):
        found = ask()
    told = [(e.task, e.step, e.steps, e.ended) for e in heard if isinstance(e, Progressed) and e.unit == "bytes"]
    asked.append((str(found), told))
print(json.dumps(asked))
"""


@pytest.mark.slow
def test_what_is_fetched_from_a_hub_is_told_of_in_bytes_and_once(tiny_base, tmp_path):
    big = {f"big-0000{n}-of-00003.safetensors": bytes([n]) * (n << 20) for n in (1, 2, 3)}
    model = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    with holding({**big, **model, "other/weights.pth": b"x", "preference/train.jsonl": b"{}\n" * 9}) as port:
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        asked = [sys.executable, "-c", ASKED]
        options: Any = {"capture_output": True, "text": True, "cwd": ROOT, "env": {**os.environ, **where}}
        done = subprocess.run(asked, timeout=100, check=False, **options)
    assert done.returncode == 0, done.stderr
    (folder, told), (again, nothing), _, (weights, of_model), (rows, of_data) = json.loads(done.stdout)
    assert "Downloading" not in done.stderr
    assert {name: (Path(folder) / name).read_bytes() for name in big} == big
    assert (again, nothing) == (folder, [])
    total = sum(map(len, big.values()))
    assert {(task, steps) for task, _, steps, _ in told} == {(f"downloading {NAME}", total)}
    steps = [step for _, step, _, _ in told]
    assert steps[0] == 0
    assert len(set(steps)) > 3
    assert steps == sorted(steps)
    assert told[-1][1:] == [total, total, True]
    size = len(model["model.safetensors"])
    assert of_model[-1][1:] == [size, size, True]
    assert of_data[-1][1:] == [27, 27, True]
    assert Path(rows).read_bytes() == b"{}\n" * 9
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        options["env"]["HF_ENDPOINT"] = f"http://127.0.0.1:{closed.getsockname()[1]}"
        without = [asked[0], "-c", ASKED.replace('lambda: hub.snapshot(NAME, ["big-*.safetensors"]),', "")]
        later = json.loads(subprocess.run(without, timeout=100, check=True, **options).stdout)
    assert later == [[_[0], []] for _ in json.loads(done.stdout)[2:]]
    assert later[1][0] == weights
