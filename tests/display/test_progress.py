"""What is shown of a run: its events through the real command, and each way of showing them."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from rich.console import Console

from helpsteer_rloo import cli, events
from helpsteer_rloo.data.demo import write_rows
from helpsteer_rloo.display import live
from helpsteer_rloo.display.console import best_of_table, conclude, predictions_table, say, speaking_to, warn
from helpsteer_rloo.display.progress import Pace, RunState, block, line, record
from helpsteer_rloo.events import (
    Measured,
    Progressed,
    RunFinished,
    RunPlanned,
    StageBegan,
    StageEnded,
    Task,
    counted,
    publish,
    subscribed,
)
from helpsteer_rloo.pipeline import stage_names
from helpsteer_rloo.preemption import Stopped
from helpsteer_rloo.settings.config import REWARD
from helpsteer_rloo.settings.parsing import parse_command, parse_pipeline
from helpsteer_rloo.steps import data_context, reward_stage

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["data", "reward_model", "verification", "rloo", "evaluation"]
SMALL = [
    "--validation_fraction=0.2",
    "--max_length=96",
    "--evaluation_prompts=8",
    "--reward_batch_size=32",
    "--reward_epochs=1",
    "--reward.gradient_accumulation_steps=1",
    "--reward.gradient_checkpointing=false",
    "--reward.save_steps=3",
    "--reward.logging_steps=2",
    "--rloo_batch_size=8",
    "--rloo.gradient_accumulation_steps=1",
    "--rloo.gradient_checkpointing=false",
    "--rloo.response_length=8",
    "--rloo.logging_steps=1",
    "--rloo.watch_steps=2",
    "--rloo.watch_prompts=4",
    "--total_episodes=16",
    "--allow_weak_reward_model",
]


# ---- through the command --------------------------------------------------------------------------------------------


def run(arguments):
    """What the pipeline's command prints: standard output, and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        cli.run_pipeline(arguments)
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def arguments(tiny_base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_rows(directory / "rows.jsonl", 0, 260)
    data = [f"--dataset_name={directory / 'rows.jsonl'}", f"--model_name_or_path={tiny_base}"]
    return [*data, *SMALL, f"--output_dir={directory / 'run'}"]


@pytest.fixture(scope="module")
def told(arguments):
    """The events of a run, as JSON, and its directory."""
    out, err = run([*arguments, "--progress=json", "--progress_seconds=0"])
    assert "> Stage rloo." in err
    return [json.loads(line) for line in out.splitlines()], Path(arguments[-1].partition("=")[2])


def test_a_run_tells_these_events(told):
    events, _ = told
    kinds = [(event["event"], event.get("stage")) for event in events if event["event"] != "progress"]
    assert [key for key, _ in groupby(kinds)] == [
        ("run", None),
        ("stage_begin", "data"), ("stage_end", "data"),
        ("stage_begin", "reward_model"), ("metrics", "reward_model"), ("stage_end", "reward_model"),
        ("stage_begin", "verification"), ("stage_end", "verification"),
        ("stage_begin", "rloo"), ("metrics", "rloo"), ("stage_end", "rloo"),
        ("stage_begin", "evaluation"), ("stage_end", "evaluation"),
        ("summary", None),
    ]  # fmt: skip
    assert events[0]["stages"] == STAGES
    assert [event["number"] for event in events if event["event"] == "stage_end"] == [1, 2, 3, 4, 5]
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(events))


def test_every_training_tells_its_first_and_its_last_step(told):
    events, _ = told
    for stage, steps in (("reward_model", 6), ("rloo", 2)):
        seen = [event for event in events if event["event"] == "progress" and event["stage"] == stage]
        training = [event for event in seen if event["task"] == "training"]
        assert (training[0]["step"], training[0]["ended"]) == (0, False)
        assert (training[-1]["step"], training[-1]["ended"]) == (steps, True)
        assert {event["steps"] for event in training} == {steps}
        assert training[-1]["memory_bytes"] > 50 << 20


def test_metrics_are_those_of_the_trainers_log(told):
    events, directory = told
    for stage, folder, last in (("reward_model", "reward_model", 6), ("rloo", "policy", 2)):
        state = json.loads((directory / folder / f"checkpoint-{last}" / "trainer_state.json").read_text())
        metrics = [event for event in events if event.get("source") == "training" and event["stage"] == stage]
        logged = [event for event in metrics if "train_runtime" not in event["metrics"]]
        assert [{**event["metrics"], "step": event["step"]} for event in logged] == state["log_history"]
        assert len(logged) == {"reward_model": 3, "rloo": 2}[stage]


def test_what_watches_the_policy_is_told_with_the_numbers_it_keeps(told):
    events, directory = told
    curve = json.loads((directory / "summary.json").read_text())["rloo"]["watch"]["curve"]
    watched = [event for event in events if event.get("source") == "watch"]
    assert [event["step"] for event in watched] == [row["step"] for row in curve] == [0, 2]
    for event, row in zip(watched, curve, strict=True):
        assert event["metrics"]["kl"] == pytest.approx(row["kl"]["value"] if isinstance(row["kl"], dict) else row["kl"])


def test_the_summary_is_the_last_event_and_holds_the_results(told):
    events, directory = told
    summary = json.loads((directory / "summary.json").read_text())
    assert events[-1]["status"] == "finished"
    assert events[-1]["results"] == {name: summary[name] for name in ("reward_model", "policy", "rloo", "seconds")}


def test_what_is_finished_is_told_once_and_quiet_says_results_alone(told, arguments):
    out, _ = run([*arguments, "--progress=json"])
    again = [json.loads(line) for line in out.splitlines()]
    assert [event.get("stage") for event in again if event["event"] == "stage_end"] == STAGES
    assert all(event["before"] for event in again if event["event"] == "stage_end")
    out, err = run([*arguments, "--progress=quiet", "--rloo.kl_coef=0.3"])  # RLOO and the evaluation run again
    warning, last = re.findall("^> (.*)$", out, re.MULTILINE)
    assert warning.startswith("WARNING: The reward model is not significantly better than chance")
    assert last == f"All results: {told[1] / 'summary.json'}"
    assert out.count("Results") == 1
    assert "Stage" not in out + err
    assert "RLOO" not in err


def test_a_failure_is_the_last_event_with_its_message(arguments, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "precious.txt").touch()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit):
        cli.run_pipeline([*arguments, f"--output_dir={tmp_path}", "--progress=json"])
    last = json.loads(out.getvalue().splitlines()[-1])
    assert (last["event"], last["status"]) == ("summary", "failed")
    assert "is not empty and does not hold a result of this tool" in last["message"]
    assert "error: " + last["message"] in err.getvalue()


@pytest.mark.parametrize("flags", [[], ["--reward_model_only"], ["--guard", "--reward.ensemble=2"], ["--rloo_only"]])
def test_the_stages_are_known_before_they_are_made(flags):
    names = stage_names(parse_pipeline([*SMALL, *flags]))
    assert len(names) == {0: 5, 2: 9}.get(len(flags), 3)
    assert [name for name in names if "verification" in name] == {
        0: ["verification"], 2: ["verification", "reward_model_2_verification", "guard_verification"]
    }.get(len(flags), ["verification"] if flags == ["--reward_model_only"] else [])  # fmt: skip


def test_what_is_shown_is_in_no_key(arguments):
    def inputs(*flags):
        settings = parse_command(REWARD, [arguments[0], *flags])
        return reward_stage(settings, data_context(settings)).inputs

    shown = ["--progress=json", "--progress_seconds=3", "--report_to=tensorboard", "--run_name=x"]
    assert inputs(*shown) == inputs()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--progress=loud", "--progress is 'loud'; expected auto, rich, plain, json, quiet."),
        ("--progress_seconds=-1", "--progress_seconds is -1.0; expected 0 or more, and finite."),
        ("--reward.progress=json", "--reward.progress cannot be set: the stages share it; give --progress instead."),
        ("--report_to=tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
    ],
)
def test_mistakes_are_refused_before_any_work(flag, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_pipeline([*SMALL, flag])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named_with_what_to_install(monkeypatch, capsys):
    found = live.__spec__
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else found)
    with pytest.raises(SystemExit):
        cli.run_pipeline([*SMALL, "--report_to", "tensorboard", "wandb"])
    assert "--report_to wandb needs the package wandb, which is not installed here: pip install wandb." in (
        " ".join(capsys.readouterr().err.split())
    )


# ---- events ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clocked(monkeypatch):
    """A clock that stands still unless it is moved, and the events that are told."""
    now = [100.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    heard = []
    with subscribed(heard.append):
        yield now, heard


def test_quick_steps_are_told_of_four_times_a_second(clocked):
    now, heard = clocked
    task = Task("training", 1000)
    for step in range(1, 1001):
        now[0] += 0.01
        task.reach(step)
    task.end()
    assert 38 <= len(heard) <= 42
    assert heard[0] == Progressed("training", 0, 1000)
    assert heard[-1] == Progressed("training", 1000, 1000, ended=True)


def test_what_is_done_within_a_second_is_not_told_of(clocked):
    now, heard = clocked
    assert list(counted(range(5), "scoring")) == [0, 1, 2, 3, 4]
    assert heard == []
    for _ in counted(range(3), "scoring"):
        now[0] += 0.6
    assert [(event.step, event.ended) for event in heard] == [(2, False), (3, False), (3, True)]


def test_a_task_that_is_left_early_is_over(clocked):
    now, heard = clocked
    items = counted(range(9), "scoring")
    next(items)
    now[0] += 2
    next(items)
    items.close()
    assert heard == [Progressed("scoring", 1, 9, "batches"), Progressed("scoring", 1, 9, "batches", ended=True)]


# ---- what is made of them -------------------------------------------------------------------------------------------


def test_the_pace_is_that_of_the_last_minutes():
    pace = Pace()
    assert pace.rate is None
    for second in range(200):
        pace.add(second, second if second < 100 else 100 + (second - 100) * 3)
    assert pace.rate == pytest.approx(3.0)
    assert pace.seconds_until(pace._last[1] + 30, now=204) == pytest.approx(5.0)


def halfway():
    """RLOO at half of its steps, after 50 seconds of it."""
    state = RunState(0.0)
    state.take(RunPlanned(("data", "reward_model", "guard", "rloo", "evaluation"), {"evaluation": 7.0}), 0.0)
    for name, seconds in (("data", 2.0), ("reward_model", 40.0), ("guard", 41.0)):
        state.take(StageBegan(name), 0.0)
        state.take(StageEnded(name, seconds), 0.0)
    state.take(StageBegan("rloo"), 100.0)
    for step in range(26):
        state.take(Progressed("training", step, 50), 100.0 + 2 * step)
        log = {"reward": 1.234, "kl_per_completion": 2.5, "entropy": 1.1, "completions/mean_length": 24.25}
        state.take(Measured("training", step, 50, {**log, "num_tokens": 4000.0 * step, "loss": None}), 100.0 + 2 * step)
    state.take(Measured("watch", 25, 50, {"guard": 0.875, "kl": 2.0}), 150.0)
    return state


def test_time_left_counts_stages_that_are_known_from_earlier_or_from_their_like():
    state = halfway()
    assert state.seconds_left(150.0) == pytest.approx(50.0)
    assert state.run_seconds_left(150.0) == (pytest.approx(57.0), True)
    state.earlier = {}
    assert state.run_seconds_left(150.0) == (pytest.approx(50.0), False)
    fresh = RunState(0.0)
    fresh.take(RunPlanned(("reward_model", "guard")), 0.0)
    fresh.take(StageBegan("reward_model"), 0.0)
    fresh.take(StageEnded("reward_model", 30.0), 30.0)
    fresh.take(StageBegan("guard"), 30.0)
    assert fresh.seconds_left(40.0) == pytest.approx(20.0)


def test_a_line_has_everything():
    text = re.sub(r"[\d.]+ GiB", "GiB", line(halfway(), 150.0))
    assert text == (
        "Stage 4/5 rloo, training 25/50 steps, 50%, reward 1.23, KL 2.5, entropy 1.1, length 24.2, guard 0.875, "
        "0.5 steps/s, 2k tokens/s, 0:50 left, run 0:57 left, GiB"
    )


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_a_block_fits_its_terminal(width):
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    state = halfway()
    state.take(Progressed("sampling", 3, 8, "batches"), 150.0)
    console.print(block(state, 150.0, width))
    lines = console.export_text().splitlines()
    assert all(len(text.rstrip()) <= width for text in lines)
    assert lines[0].startswith("Stage 4/5 rloo ")
    assert ("25/50 steps, 50%" in lines[0]) is (width > 20)
    assert ("━" in lines[0]) is (width >= 80 or width == 40)
    assert lines[1].rstrip() == ("  sampling 3/8 batches, 38%" if width > 20 else "  sampling 3/8 batc…")
    shown = " ".join(text.strip() for text in lines[2:])
    for part in ("reward 1.23", "KL 2.5", "guard 0.875", "0.5 steps/s", "2k tokens/s", "0:50 left", "run 0:57 left"):
        assert part in shown
    assert len(lines) <= {20: 12, 40: 7, 80: 4, 120: 4}[width]


def test_a_download_is_told_of_in_units_of_its_size():
    state = RunState(0.0)
    for second in range(4):
        state.take(Progressed("downloading Qwen/Qwen3-8B", second * 400_000_000, 16_400_000_000, "bytes"), second)
    text = re.sub(r"[\d.]+ GiB", "GiB", line(state, 3.0))
    assert text == "downloading Qwen/Qwen3-8B 1.2 of 16.4 GB, 7%, 400 MB/s, 0:38 left, GiB"
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(block(state, 3.0, 80))
    first = console.export_text().splitlines()[0]
    assert first.startswith("downloading Qwen/Qwen3-8B ━")
    assert first.endswith("1.2 of 16.4 GB, 7%")
    assert record(Progressed("x", 1, 2, "bytes"), state, 3.0)["unit"] == "bytes"


def shown_at(width, table):
    console = Console(record=True, width=width, file=io.StringIO())
    with speaking_to(console):
        console.print(table())
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_predictions_take_a_line_each_and_no_score_is_cut(width):
    prompt = "Name 3 colours,\nseparated by commas, in upper case, ending with an exclamation mark."
    row = {"prompt": prompt, "chosen_score": -12.3456, "rejected_score": 1.0, "margin": -13.3456, "right": False}
    lines = shown_at(width, lambda: predictions_table([row] * 3))
    assert [len(lines), *map(len, map(str.rstrip, lines[1:]))] == [8, *[len(lines[1].rstrip())] * 7]
    assert all("Name 3 colo" in text and "-12.346 │   +1.000 │ -13.346 │ wrong" in text for text in lines[4:7])
    assert len(lines[1].rstrip()) <= width


def test_nothing_is_less_than_zero_by_nothing():
    found = {"n": 4, "gain": {"value": -0.0, "interval": [-0.0001, 0.0001], "count": 3}, "kl": 0.0}
    text = " ".join(shown_at(80, lambda: best_of_table(found)))
    assert "0.000 (3) │ 0.000 … 0.000" in text
    assert "-0.000" not in text


def test_what_is_loaded_is_said_by_its_name():
    state = RunState(0.0)
    state.take(StageBegan("Loading the models"), 0.0)
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(block(state, 7.0, 80))
    assert console.export_text().splitlines()[0].rstrip() == "Loading the models 0:07"


def test_between_stages_there_is_no_block():
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(block(RunState(0.0), 1.0, 80))
    assert console.export_text().strip() == ""


def test_metrics_that_are_no_numbers_are_null_in_json():
    state = halfway()
    made = record(Measured("training", 1, 2, {"loss": float("nan"), "reward": 1.0, "x": float("inf")}), state, 1.0)
    assert made["metrics"] == {"loss": None, "reward": 1.0, "x": None}
    json.dumps(made, allow_nan=False)


# ---- the ways of showing them ---------------------------------------------------------------------------------------


def acted():
    publish(RunPlanned(("data", "rloo")))
    publish(StageBegan("rloo"))
    publish(Progressed("training", 1, 4))
    say("a line")
    warn("a danger")
    conclude("a result")
    publish(StageEnded("rloo", 61.0))
    publish(RunFinished({"policy": None}))


def test_quiet_prints_warnings_and_results(capsys):
    with live.shown("quiet"):
        acted()
    assert capsys.readouterr().out == "> WARNING: a danger\n> a result\n"


def test_plain_lines_have_no_escape_codes_and_are_not_too_many(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with live.shown("plain", seconds=1000):
        for _ in range(3):
            acted()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("is finished after 1:01") == 1
    assert "training 1/4" not in out
    with live.shown("plain", seconds=0):
        acted()
    assert "> Stage 2/2 rloo, training 1/4 steps, 25%, " in capsys.readouterr().out


def test_auto_is_plain_without_a_terminal_and_other_commands_stay_as_they_are(capsys):
    assert live.chosen("auto") == "plain"
    with live.shown("auto", otherwise="none"):
        acted()
    assert capsys.readouterr().out.splitlines() == ["> a line", "> WARNING: a danger", "> a result"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Stopped("after step 3"), "stopped"), (KeyboardInterrupt(), "interrupted"), (RuntimeError("x"), "failed")],
)
def test_json_ends_with_what_ended_the_run(capsys, error, status):
    with pytest.raises(type(error)), live.shown("json"):
        raise error
    (text,) = capsys.readouterr().out.splitlines()
    assert {name: value for name, value in json.loads(text).items() if name != "seconds"} == {
        "event": "summary", "status": status, "message": str(error) or "KeyboardInterrupt"
    }  # fmt: skip


def test_only_the_main_process_shows_anything(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for mode in ("rich", "plain", "json", "quiet"):
        with live.shown(mode, seconds=0):
            acted()
            print("of a library", file=sys.stdout if mode == "json" else sys.stderr)
    assert capsys.readouterr().out == ""


def test_in_json_mode_nothing_else_gets_to_standard_output():
    code = """
import os, subprocess, sys
from helpsteer_rloo.display.console import say
from helpsteer_rloo.events import RunFinished, publish
from helpsteer_rloo.display.live import shown
with shown("json"):
    print("printed"); os.write(1, b"written\\n"); subprocess.run(["echo", "of a child"]); say("said")
    publish(RunFinished({"of": "ä"}))
print("after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    first, second = done.stdout.splitlines()
    assert json.loads(first)["results"] == {"of": "ä"}
    assert second == "after"
    assert sorted(done.stderr.splitlines()) == ["> said", "of a child", "printed", "written"]


LIVE = """
import sys, time, warnings
from helpsteer_rloo.display.console import say
from helpsteer_rloo.events import *
from helpsteer_rloo.display.live import shown
with shown("auto"):
    publish(RunPlanned(("data", "rloo")))
    publish(StageBegan("rloo"))
    say("Stage rloo.")
    task = Task("training", 100)
    for step in range(1, 100 if sys.argv[1] == "wait" else 11):
        task.reach(step)
        time.sleep(0.1)
        if step == 5:
            print("printed by a library")
            warnings.warn("of a library")
    if sys.argv[1] == "fail":
        raise ValueError("broken")
say("The end.")
"""


def in_a_terminal(how, number=None):
    """What a process shows in a terminal, and its status; a signal is sent in the midst of it."""
    child, descriptor = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24")
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell lets its background jobs ignore
        os.execv(sys.executable, [sys.executable, "-c", LIVE, how])
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                shown += os.read(descriptor, 65536)
            except OSError:  # the other end is closed
                break
        if number is not None and re.search(rb"\b(9|\d\d)/100 steps", shown):
            os.kill(child, number)
            number = None
    os.close(descriptor)
    return shown.decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("how", "number", "status"),
    [("end", None, 0), ("fail", None, 1), ("wait", signal.SIGTERM, -15), ("wait", signal.SIGINT, -2)],
)
def test_a_terminal_is_left_as_it_was(how, number, status):
    shown, found = in_a_terminal(how, number)
    assert found == status
    assert "Stage 2/2 rloo" in shown
    assert re.search(r"\d+/100 steps, \d+%", shown)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    assert shown.count("printed by a library\r\n") == 1
    assert shown.count("UserWarning: of a library") == 1
    assert ("> The end." in re.sub(r"\x1b\[[\d;]*m", "", shown)) is (how == "end")
