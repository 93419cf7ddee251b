"""Trackers: names and places of their own for every training, through the real packages where they are installed."""

import contextlib
import importlib.util
import json
import os
import sqlite3

import pytest

from helpsteer_rloo import cli
from helpsteer_rloo.data.demo import write_rows
from helpsteer_rloo.training.ledger import read_rollouts
from helpsteer_rloo.training.tracking import run_name, tracked
from tests.display.test_progress import SMALL

INSTALLED = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]


def test_a_training_keeps_its_name_and_another_in_its_place_has_another(tmp_path):
    first = run_name(tmp_path / "policy")
    assert run_name(tmp_path / "policy") == first
    assert first.startswith("policy-")
    (tmp_path / "policy").rename(tmp_path / "policy.previous")
    assert run_name(tmp_path / "policy") != first
    (tmp_path / "stages").mkdir()
    assert run_name(tmp_path / "reward_model").startswith(f"{tmp_path.name}-reward_model-")


def test_places_are_set_where_they_are_not_given_and_only_within(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    with tracked(["tensorboard", "wandb"], tmp_path):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "logs")
        assert os.environ["WANDB_DIR"] == "/elsewhere"
        first = os.environ["WANDB_RUN_ID"]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    with tracked(["wandb"], tmp_path):
        assert os.environ["WANDB_RUN_ID"] == first
    with tracked("none", tmp_path / "other"):
        assert "WANDB_RUN_ID" not in os.environ
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="no tracker is installed: pip install tensorboard trackio wandb")
@pytest.mark.filterwarnings("ignore")  # of the trackers' own packages
def test_both_trainings_report_their_metrics_and_completions(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    write_rows(tmp_path / "rows.jsonl", 0, 260)
    directory = tmp_path / "run"
    data = [f"--dataset_name={tmp_path / 'rows.jsonl'}", f"--model_name_or_path={tiny_base}"]
    shown = ["--report_to", *INSTALLED, "--rloo.log_completions", "--progress=quiet"]
    cli.run_pipeline([*data, *SMALL, f"--output_dir={directory}", *shown])
    ledger = read_rollouts(directory / "rollouts")
    if "tensorboard" in INSTALLED:
        check_tensorboard(directory)
    if "wandb" in INSTALLED:
        check_wandb(directory, ledger)
    if "trackio" in INSTALLED:
        check_trackio(tmp_path / "trackio", ledger)


def check_tensorboard(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder, tag in (("reward_model", "train/accuracy"), ("policy", "train/reward")):
        events = EventAccumulator(str(directory / folder / "logs"))
        events.Reload()
        state = json.loads(max((directory / folder).glob("checkpoint-*")).joinpath("trainer_state.json").read_text())
        logged = {row["step"]: row[tag.removeprefix("train/")] for row in state["log_history"]}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(logged, rel=1e-6)


def check_wandb(directory, ledger):
    runs = [list((directory / name / "logs" / "wandb").glob("offline-run-*")) for name in ("reward_model", "policy")]
    assert [len(found) for found in runs] == [1, 1]
    assert runs[0][0].name.rpartition("-")[2] != runs[1][0].name.rpartition("-")[2]
    tables = [json.loads(path.read_text()) for path in runs[1][0].glob("files/media/table/*.json")]
    rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    assert all(row["prompt"][-1]["role"] == "user" and row["completion"][0]["role"] == "assistant" for row in rows)
    assert completions_of(rows) == completions_in(ledger)


def check_trackio(directory, ledger):
    found = sqlite3.connect(next(directory.glob("*.db")))
    with contextlib.closing(found):
        logged = [(name, json.loads(text)) for name, text in found.execute("select run_name, metrics from metrics")]
    assert len({name.rpartition("-")[0] for name, _ in logged}) == 2
    rows = [row for _, metrics in logged for row in metrics.get("completions", {}).get("_value", [])]
    assert completions_of(rows) == completions_in(ledger)


def completions_of(rows):
    return {(round(row["reward_model"], 5), round(row["advantage"], 5)) for row in rows}


def completions_in(ledger):
    return {(round(entry.scores["reward_model"], 5), round(entry.advantage, 5)) for entry in ledger}
