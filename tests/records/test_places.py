"""What a record names is found from any working directory, also where the whole run was moved."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from helpsteer_rloo import cli
from helpsteer_rloo.identity import model_identity, reward_model_identity
from helpsteer_rloo.model.loading import Base, load_reward_model
from helpsteer_rloo.records.places import BASE_IDENTITY
from helpsteer_rloo.records.policy import read_policy
from helpsteer_rloo.records.reward_model import read_reward_record
from helpsteer_rloo.run_dir import POLICY_RECORD, REWARD_MODEL_RECORD, read_json, write_json
from tests.broken.conftest import world
from tests.commands.test_export import policy

__all__ = ["policy", "world"]


@pytest.fixture
def run(world, policy, tmp_path):
    """A run with everything in one directory, as records name it: the base by its absolute path."""
    root = tmp_path / "runs" / "mine"
    for source, name in ((world.base, "base"), (world.reward, "reward_model"), (world.full_reward, "guard_model")):
        shutil.copytree(source, root / name)
    shutil.copytree(policy, root / "policy")
    base = {"base": dataclasses.asdict(Base(str(root / "base")))}
    for path in (root / "reward_model" / REWARD_MODEL_RECORD, root / "policy" / POLICY_RECORD):
        write_json(path, {**(read_json(path) or {}), **base})
    return root


def named(run, **changes):
    path = run / "policy" / POLICY_RECORD
    write_json(path, {**(read_json(path) or {}), **changes})


OLD = {"reward_model": "runs/mine/reward_model", "settings": {"guard_reward_model": "runs/mine/guard_model"}}
"""What was written by a command that was given in the directory above `runs`."""


def found(run, monkeypatch, cwd):
    monkeypatch.chdir(cwd)
    source = read_policy(run / "policy", "--policy_dir", trusted=False)
    return source.judge("reward_model"), source.judge("guard_reward_model")


def test_relative_paths_of_a_record_are_found_from_anywhere(run, tmp_path, monkeypatch):
    named(run, **OLD)
    both = (run / "reward_model", run / "guard_model")
    assert found(run, monkeypatch, "/") == both
    assert found(run, monkeypatch, tmp_path) == both
    other = tmp_path / "other" / "runs" / "mine" / "reward_model"  # of another run of the same name
    shutil.copytree(run / "reward_model", other)
    assert found(run, monkeypatch, tmp_path / "other") == both
    shutil.move(run / "policy", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    source = read_policy(Path("alone"), "--policy_dir", trusted=False)
    assert source.judge("reward_model") == Path("runs/mine/reward_model")
    monkeypatch.chdir("/")
    assert read_policy(tmp_path / "alone", "--policy_dir", trusted=False).judge("reward_model") is None


def test_absolute_paths_are_kept_and_what_was_moved_is_found_beside(run, tmp_path, monkeypatch):
    judges = {"reward_model": str(run / "reward_model"), "guard_reward_model": None}
    named(run, **{**OLD, "judges": judges})
    shutil.copytree(run, tmp_path / "copy")
    assert found(tmp_path / "copy", monkeypatch, "/")[0] == run / "reward_model"  # what it was trained with
    moved = Path(shutil.move(run, tmp_path / "moved"))
    assert found(moved, monkeypatch, "/") == (moved / "reward_model", moved / "guard_model")


def test_a_copy_is_played_on_what_it_was_trained_with(run, tmp_path, monkeypatch, capsys):
    judges = {"reward_model": str(run / "reward_model"), "guard_reward_model": str(run / "guard_model")}
    identities = {name: reward_model_identity(Path(directory)) for name, directory in judges.items()}
    base = {BASE_IDENTITY: model_identity(str(run / "base"))}
    named(run, judges=judges, judge_identities=identities, **base)
    record = run / "reward_model" / REWARD_MODEL_RECORD
    write_json(record, {**(read_json(record) or {}), **base})
    keep = Path(shutil.copytree(run, tmp_path / "keep"))

    def read(directory):
        return read_policy(directory / "policy", "--policy_dir", trusted=False)

    assert read(keep).base["name"] == str(run / "base")  # both are the same
    (run / "base" / "generation_config.json").write_text('{"top_k": 1}')
    write_json(record, {**(read_json(record) or {}), "training": {"steps": 2}})
    copied = read(keep)
    assert copied.base["name"] == str(keep / "base")
    assert found(keep, monkeypatch, "/") == (keep / "reward_model", run / "guard_model")
    assert read_reward_record(keep / "reward_model")["base"]["name"] == str(keep / "base")
    assert copied.doubts([keep / "reward_model"]) == []
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "Name a tree."}]}\n')
    flags = ["2", str(tmp_path / "in.jsonl"), "--max_new_tokens=4"]
    cli.best_of([*flags, f"--policy_dir={keep / 'policy'}", f"--output={tmp_path / 'kept.jsonl'}"])
    assert "WARNING" not in capsys.readouterr().out
    cli.best_of([*flags, f"--policy_dir={run / 'policy'}", f"--output={tmp_path / 'changed.jsonl'}"])
    said = " ".join(capsys.readouterr().out.split())
    for directory in ("policy", "reward_model"):
        assert f"WARNING: {run / directory} was trained on another base than {run / 'base'} holds now" in said
    assert f"{run / 'reward_model'} is not the reward model any more that {run / 'policy'} was trained with." in said


def test_a_base_that_was_moved_with_its_adapters_is_found(run, tmp_path, monkeypatch, capsys):
    moved = Path(shutil.move(run, tmp_path / "moved"))
    assert read_policy(moved / "policy", "--policy_dir", trusted=False).base["name"] == str(moved / "base")
    assert read_reward_record(moved / "reward_model")["base"]["name"] == str(moved / "base")
    assert load_reward_model(moved / "reward_model")[1]["adapter"]
    shutil.rmtree(moved / "base")
    assert read_policy(moved / "policy", "--policy_dir", trusted=False).base["name"] == str(run / "base")
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "Name a tree."}]}\n')
    flags = [f"--policy_dir={moved / 'policy'}", f"--output={tmp_path / 'out.jsonl'}"]
    with pytest.raises(SystemExit):
        cli.best_of(["2", str(tmp_path / "in.jsonl"), *flags])
    assert f"stands on, {run / 'base'}, is not there, nor beside it." in " ".join(capsys.readouterr().err.split())


def test_a_moved_run_answers_and_scores_from_another_directory(run, tmp_path, monkeypatch, capsys):
    named(run, **OLD)
    moved = Path(shutil.move(run, tmp_path / "moved"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("in.jsonl").write_text('{"messages": [{"role": "user", "content": "Name a tree."}]}\n')
    flags = ["--policy_dir=../moved/policy", "--max_new_tokens=4", "--output=out.jsonl"]
    cli.best_of(["2", "in.jsonl", *flags])
    row = json.loads(Path("out.jsonl").read_text())
    assert row["score"] >= row["best_of"]["mean_score"]
    shutil.rmtree(moved / "reward_model")
    with pytest.raises(SystemExit):
        cli.best_of(["2", "in.jsonl", *flags, "--output=other.jsonl"])
    said = " ".join(capsys.readouterr().err.split())
    assert "runs/mine/reward_model, is not there, nor beside the policy: say by --reward_model_dir where it is" in said
