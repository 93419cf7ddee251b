"""`helpsteer-rloo serve` as a user starts it: what it says, how it stops, and flags that cannot be."""

import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from helpsteer_rloo import cli
from helpsteer_rloo.model.forward import score_groups, score_sequences
from helpsteer_rloo.model.loading import load_reward_model, load_tokenizer
from helpsteer_rloo.rendering import Message, Renderer
from helpsteer_rloo.serving.self_test import check_scores
from tests.broken.conftest import world

__all__ = ["world"]

ROOT = Path(__file__).resolve().parents[2]
BODY = json.dumps({"messages": [{"role": "user", "content": "Name 2 trees."}], "responses": ["oak, elm", "oak"]})


@contextmanager
def serving(*flags):
    """The command in a process of its own, and the port it serves at."""
    command = [sys.executable, "-m", "helpsteer_rloo.cli", "serve", "--port=0", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        line = next((line for line in process.stdout if "Serving" in line), None)
        assert line is not None, process.stderr.read()
        yield process, int(line.partition("127.0.0.1:")[2].partition(";")[0])
    finally:
        process.kill()
        process.communicate()


def ask(port, body=BODY):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_it_serves_until_it_is_told_to_stop(world):
    model, record = load_reward_model(world.reward)
    renderer = Renderer(load_tokenizer(str(world.reward)), thinking=record["thinking"])
    prompt = renderer.prompt_ids([Message("user", "Name 2 trees.")])
    texts = [(*prompt, *renderer.continuation_ids(text, ended=True)) for text in ("oak, elm", "oak")]
    with serving(f"--reward_model_dir={world.reward}") as (process, port):
        status, answer = ask(port)
        assert status == 200
        assert answer["scores"] == pytest.approx(score_sequences(model, texts, 1), abs=1e-5)
        assert answer["model"] == world.reward.name
        large = json.dumps({**json.loads(BODY), "responses": ["oak, elm"] * 1500})
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(port, large)))
        asking.start()
        while b"batch_requests_count 2.0" not in _metrics(port):
            pass
        process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    assert [status for status, _ in answers] == [200]  # begun before the signal, and answered


@pytest.mark.parametrize("wrong", [3.6e-4, float("nan")])
def test_scores_that_depend_on_what_is_scored_together_are_not_served(world, wrong):
    model, record = load_reward_model(world.reward)
    renderer = Renderer(load_tokenizer(str(world.reward)), thinking=record["thinking"])
    assert check_scores(lambda groups: score_groups(model, groups, 64), model, renderer) < 1e-5

    def disturbed(groups):
        first, *others = score_groups(model, groups, 64)
        return [first, *others[:-1], [score + wrong for score in others[-1]]]

    with pytest.raises(ValueError, match="scored together"):
        check_scores(disturbed, model, renderer)


def test_an_answer_waits_for_no_acknowledgement(world):
    seconds = []
    with (
        serving(f"--reward_model_dir={world.reward}") as (_, port),
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection,
    ):
        for _ in range(41):
            start = time.perf_counter()
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.03  # an acknowledgement that is held back takes 40 ms


def _metrics(port):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--reward_model_dir is missing"),
        (["--reward_model_dir=x", "--host=0.0.0.0"], "set a token in $HELPSTEER_RLOO_API_KEY"),
        (["--reward_model_dir=x", "--port=70000"], "--port is 70000; expected 0 to 65535"),
        (["--reward_model_dir=x", "--timeout=0"], "--timeout is 0.0; expected more than 0"),
        (["--reward_model_dir=x", "--batch_tokns=1"], "did you mean 'batch_tokens'?"),
    ],
)
def test_flags_that_cannot_be(flags, says, capsys, monkeypatch):
    monkeypatch.delenv("HELPSTEER_RLOO_API_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.serve(flags)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_model_that_is_none_are_said(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.serve([f"--reward_model_dir={tmp_path}"])
    assert "no finished reward model there" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit):
            cli.serve([f"--reward_model_dir={world.reward}", f"--port={taken.getsockname()[1]}"])
    assert "Address already in use" in capsys.readouterr().err
