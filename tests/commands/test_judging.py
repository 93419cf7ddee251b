"""The guard in the pipeline, and `helpsteer-rloo evaluate` on what came of it, by their commands."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpsteer_rloo import cli
from helpsteer_rloo.alarms import read_watched
from helpsteer_rloo.data.demo import write_rows
from helpsteer_rloo.model.forward import score_sequences
from helpsteer_rloo.model.loading import load_reward_model
from helpsteer_rloo.training.ledger import read_rollouts
from helpsteer_rloo.training.scorer import EnsembleScorer
from tests.test_pipeline import SMALL


def run_in(directory, tiny_base, *flags):
    """Run the pipeline in a directory on few rows; the run's directory and the arguments it was started with."""
    write_rows(directory / "rows.jsonl", 0, 260)
    data = [f"--dataset_name={directory / 'rows.jsonl'}", f"--model_name_or_path={tiny_base}"]
    run = [f"--output_dir={directory / 'run'}", "--allow_weak_reward_model", "--use_peft"]
    arguments = [*data, *SMALL, *run, *flags]
    cli.run_pipeline(arguments)
    return directory / "run", arguments


@pytest.fixture(scope="module")
def guarded(tiny_base, tmp_path_factory):
    """A finished run with a guard: its directory and the arguments it was started with."""
    flags = ["--guard", "--rloo.watch_steps=1", "--rloo.watch_prompts=5", "--best_of=4"]
    return run_in(tmp_path_factory.mktemp("guarded"), tiny_base, *flags)


def test_a_guard_has_the_other_half_of_the_prompts_and_another_seed(guarded):
    run, _ = guarded
    records = [json.loads((run / name / "reward_model.json").read_text()) for name in ("reward_model", "guard_model")]
    assert [record["settings"]["half"] for record in records] == ["first", "second"]
    assert [record["settings"]["seed"] for record in records] == [42, 43]
    summary = json.loads((run / "summary.json").read_text())
    pairs = [record["data"]["pairs"] for record in records]
    assert sum(pairs) == summary["data"]["splits"]["train"]["pairs"]
    assert min(pairs) > 0.3 * max(pairs)
    assert all("heldout" in record for record in records)


def test_the_policy_is_watched_and_judged_with_the_guard(guarded):
    run, _ = guarded
    summary = json.loads((run / "summary.json").read_text())
    watch, policy = summary["rloo"]["watch"], summary["policy"]
    assert [point["step"] for point in watch["curve"]] == [0, 1, 2]
    assert all(point["guard"] is not None for point in watch["curve"])
    assert summary["rloo"]["prompts"]["watched"] == 5
    seen = read_watched(run / "policy" / "watch")
    assert [len(one.reward) for one in seen] == [5, 5, 5]
    assert {"guard_before", "guard_after", "guard_win_rate", "length_controlled_win_rate"} <= set(policy)
    assert {"distinct_2_after", "repetition_before", "refusals_after"} <= set(policy)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    changes = [row["after"]["guard"] - row["before"]["guard"] for row in samples]
    assert changes == sorted(changes)  # the worst regressions first
    assert policy["guard_change"]["value"] == pytest.approx(sum(changes) / len(changes), abs=1e-6)


def test_the_policy_is_compared_with_best_of_n(guarded):
    run, _ = guarded
    best = json.loads((run / "summary.json").read_text())["policy"]["best_of_n"]
    assert [point["n"] for point in best["curve"]] == [1, 2, 4]
    assert [point["reward"] for point in best["curve"]] == sorted(point["reward"] for point in best["curve"])
    assert {"reward", "guard", "n", "kl", "reaches_the_kl"} == best["at_the_policys_kl"].keys()


@pytest.mark.slow
def test_nothing_runs_twice_and_another_action_runs_rloo_again(guarded, capsys):
    _, arguments = guarded
    cli.run_pipeline(arguments)
    assert "Stage" not in capsys.readouterr().out
    cli.run_pipeline([*arguments, "--rloo.on_alarm=stop"])
    out = " ".join(capsys.readouterr().out.split())
    assert "on_alarm 'rollback' -> 'stop'. These stages run again: rloo, evaluation." in out


@pytest.fixture(scope="module")
def ensemble(tiny_base, tmp_path_factory):
    """A finished run with two reward models by the worst, and its arguments for their mean."""
    by_worst = "--rloo.score_of_ensemble=worst"
    flags = ["--reward.ensemble=2", "--rloo.logging_steps=1", by_worst]
    run, arguments = run_in(tmp_path_factory.mktemp("ensemble"), tiny_base, *flags)
    return run, [flag for flag in arguments if flag != by_worst]


@pytest.mark.slow
def test_an_ensemble_has_seeds_of_its_own_and_scores_on_the_policys_base(ensemble):
    run, _ = ensemble
    names = ("reward_model", "reward_model_2")
    records = [json.loads((run / name / "reward_model.json").read_text()) for name in names]
    assert [record["settings"]["seed"] for record in records] == [42, 43]
    assert all("heldout" in record for record in records)
    weights = [load_file(run / name / "adapter_model.safetensors") for name in names]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rloo"]["shared_base"]
    assert {"reward_model_2", "reward_model_2_verification"} <= summary["seconds"].keys()
    assert not [name for name in load_file(run / "policy" / "adapter_model.safetensors") if "reward" in name]


@pytest.mark.slow
def test_the_worst_score_of_an_ensemble_is_what_is_trained_on(ensemble):
    run, _ = ensemble
    models = [load_reward_model(run / name)[0] for name in ("reward_model", "reward_model_2")]
    for entry in read_rollouts(run / "rollouts"):
        ids = [(*entry.prompt_ids, *entry.completion_ids)]
        own = [score_sequences(model, ids, 1)[0] for model in models]
        assert entry.scores["reward_model"] == pytest.approx(min(own), abs=1e-5)
        assert own[0] != own[1]


@pytest.mark.slow
def test_changes_of_an_ensemble_run_again_what_depends_on_them(ensemble, capsys):
    _, arguments = ensemble
    cli.run_pipeline(arguments)  # by the mean now
    out = capsys.readouterr().out
    assert "Stage rloo." in out
    assert "Stage reward_model" not in out


@pytest.mark.parametrize("worst", [False, True])
def test_an_ensemble_scores_by_mean_or_worst_and_says_how_far_it_is_apart(worst):
    told = {}
    scorer = EnsembleScorer([lambda **_: [1.0, 5.0], lambda **_: [3.0, 5.0]], worst=worst)
    scores = scorer(prompt_ids=[[1]] * 2, completion_ids=[[2]] * 2, log_metric=told.__setitem__)
    assert scores == ([1.0, 5.0] if worst else [2.0, 5.0])
    assert told == {"ensemble/disagreement": 0.5}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--reward.ensemble=0"], "--reward.ensemble is 0; expected at least 1."),
        (["--reward.ensemble=2", "--rloo.reward_ensemble=x"], "--rloo.reward_ensemble cannot be set with"),
        (["--rloo.score_of_ensemble=best"], "--rloo.score_of_ensemble is 'best'; expected mean or worst."),
        (["--guard", "--rloo_only"], "--rloo_only trains no guard; give the directory of one"),
        (["--guard", "--reward.half=first"], "--reward.half cannot be set with --guard"),
        (["--guard", "--rloo.guard_reward_model=x"], "--rloo.guard_reward_model cannot be set with --guard"),
        (["--rloo.on_alarm=stop"], "--rloo.on_alarm has no effect without"),
        (["--rloo.score_of_ensemble=worst"], "--rloo.score_of_ensemble has no effect without"),
        (["--guard_dir=x"], "--guard_dir has no effect without --guard."),
        (["--guard", "--guard_dir=models/rloo_helpsteer3/g"], "need directories apart from each other"),
        (["--guard", "--output_dir=out", "--guard_dir=out"], "need directories apart from each other"),
        (["--guard", "--rloo.kl_coef=0"], "--rloo.kl_coef 0 without --use_peft leaves no reference"),
        (["--guard", "--engine=trl"], "leaves passes to TRL, which cannot watch the policy"),
        (["--guard", "--rloo.watch_prompts=1"], "--rloo.watch_prompts is 1; expected at least 2"),
        (["--guard", "--seed=4294967295"], "--seed is 4294967296; expected at most"),
        (
            ["--reward.early_stopping_patience=2", "--reward.eval_steps=50"],
            "--reward.eval_steps as --reward.save_steps",
        ),
        (["--rloo.on_alarm=panic"], "--rloo.on_alarm is 'panic'; expected rollback, stop, warn."),
        (["--rloo.max_kl=0"], "--rloo.max_kl is 0.0; expected more than 0 nats, and finite."),
        (["--rloo.max_kl=inf"], "--rloo.max_kl is inf; expected more than 0 nats, and finite."),
        (["--rloo.importance_cap=inf"], "--rloo.importance_cap is inf; expected a finite number."),
        (["--reward.center_rewards_coefficient=nan"], "--reward.center_rewards_coefficient is nan; expected a finite"),
        (["--rloo.watch_prompts=3"], "--rloo.watch_prompts has no effect without"),
        (["--reward.early_stopping_patience=2", "--reward.save_strategy=no"], "leave out --reward.save_strategy"),
        (["--rloo.watch_steps=0"], "--rloo.watch_steps is 0; expected at least 1."),
        (["--reward.half=third"], "--reward.half is 'third'; expected all, first or second."),
        (["--reward.loss=hinge"], "--reward.loss is 'hinge'; expected bt, margin, scaled."),
        (["--reward.label_smoothing=0.5"], "--reward.label_smoothing is 0.5; expected from 0 to below 0.5."),
        (["--reward.loss=scaled", "--reward.engine=trl"], "--reward.loss is 'scaled'; expected bt or margin with"),
        (["--reward.label_smoothing_factor=0.1"], "--label_smoothing is that of preferences"),
    ],
)
def test_flags_that_cannot_be(flags, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run_pipeline(flags)
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_guard_that_is_none_is_refused_before_any_work(guarded, tmp_path, capsys):
    _, arguments = guarded
    flags = [flag for flag in arguments if flag != "--guard" and not flag.startswith("--output_dir")]
    with pytest.raises(SystemExit):
        cli.run_pipeline([*flags, f"--output_dir={tmp_path / 'run'}", f"--rloo.guard_reward_model={tmp_path / 'none'}"])
    captured = capsys.readouterr()
    assert "no finished reward model there" in " ".join(captured.err.split())
    assert "Stage reward_model" not in captured.out


def test_a_reward_model_is_judged_on_its_own_held_out_prompts(guarded, tmp_path, capsys):
    run, _ = guarded
    output = tmp_path / "result.json"
    cli.evaluate([f"--reward_model_dir={run / 'reward_model'}", f"--output={output}"])
    result = json.loads(output.read_text())
    record = json.loads((run / "reward_model" / "reward_model.json").read_text())
    assert result["heldout_accuracy"] == record["heldout"]["heldout_accuracy"]
    assert result["heldout_pairs"] == record["heldout"]["heldout_pairs"]
    assert result["findings"] == record["heldout"]["findings"]
    assert result["counts"]["heldout_prompts"] == record["heldout"]["heldout_prompts"]
    out = capsys.readouterr().out
    assert "What this means" in out
    assert "calibration: ece" in out


def test_two_reward_models_are_compared(guarded, tmp_path, capsys):
    run, _ = guarded
    output = tmp_path / "result.json"
    names = [str(run / "reward_model"), str(run / "guard_model")]
    cli.evaluate([f"--reward_model_dir={names[0]}", f"--compare_with={names[1]}", f"--output={output}"])
    result = json.loads(output.read_text())
    (pair,) = result["comparison"]["compared"]
    assert [pair["first"], pair["second"]] == names
    accuracies = [result["heldout_accuracy"], result["others"][names[1]]["heldout_accuracy"]]
    assert pair["difference"]["value"] == pytest.approx(accuracies[1] - accuracies[0])
    assert "Compared on" in capsys.readouterr().out


def test_pairs_of_another_data_set_are_all_judged_with_a_warning(guarded, tmp_path, capsys):
    run, _ = guarded
    rows = [json.loads(line) for line in (run.parent / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["context"][-1]["content"] += " Please."
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "result.json"
    cli.evaluate(
        [
            f"--reward_model_dir={run / 'reward_model'}",
            f"--dataset_name={tmp_path / 'other.jsonl'}",
            f"--output={output}",
        ]
    )
    result = json.loads(output.read_text())
    assert result["counts"]["heldout_prompts"] == 0
    assert result["heldout_pairs"] > 150
    assert "no prompt of this data set was held out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--compare_with=REWARD"], "names a reward model twice"),
        (["--compare_with=nowhere"], "--compare_with nowhere: no finished reward model there"),
        (["--language=klingon"], "no usable preference pair"),
    ],
)
def test_what_cannot_be_judged_is_said(guarded, flags, says, capsys):
    run, _ = guarded
    with pytest.raises(SystemExit) as ended:
        cli.evaluate(
            [
                f"--reward_model_dir={run / 'reward_model'}",
                *(f.replace("REWARD", str(run / "reward_model")) for f in flags),
            ]
        )
    assert ended.value.code == 1
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("x", "settings is no mapping"),
        ({"validation_fraction": "many"}, "settings.validation_fraction: "),
        ({"html_entities": "some"}, "--html_entities is 'some'"),
    ],
)
def test_a_record_with_strange_settings_is_refused(guarded, tmp_path, settings, says, capsys):
    shutil.copytree(guarded[0] / "reward_model", tmp_path / "model")
    record = json.loads((tmp_path / "model" / "reward_model.json").read_text())
    (tmp_path / "model" / "reward_model.json").write_text(json.dumps({**record, "settings": settings}))
    with pytest.raises(SystemExit) as ended:
        cli.evaluate([f"--reward_model_dir={tmp_path / 'model'}"])
    assert ended.value.code == 1
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("copied", [False, True])
def test_a_reward_model_cannot_be_its_own_guard(guarded, tmp_path, capsys, copied):
    run, _ = guarded
    reward = run / "reward_model"
    guard = shutil.copytree(reward, tmp_path / "copy") if copied else reward
    flags = ["--model_name_or_path=x", f"--reward_model_path={reward}", f"--guard_reward_model={guard}"]
    with pytest.raises(SystemExit):
        cli.train_policy([*flags, "--response_length=16", f"--output_dir={tmp_path / 'policy'}"])
    assert "is a reward model that this run has already" in " ".join(capsys.readouterr().err.split())


def test_what_is_left_out_of_a_judgement_is_counted(guarded, tmp_path, capsys):
    run, _ = guarded
    rows = [json.loads(line) for line in (run.parent / "rows.jsonl").read_text().splitlines()]
    rows[3]["response1"] = 7
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--reward_model_dir={run / 'reward_model'}", f"--dataset_name={tmp_path / 'rows.jsonl'}"]
    cli.evaluate([*flags, "--skip_bad_rows", f"--output={tmp_path / 'r.json'}"])
    counts = json.loads((tmp_path / "r.json").read_text())["counts"]
    assert counts["rows"] == 260
    assert counts["response1: expected a string, got int"] == 1
    assert counts["tie"] > 0
    assert "response1: expected a string, got int 1" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["", "file/x.json"])
def test_a_place_that_no_result_can_be_written_to_is_refused_at_once(guarded, tmp_path, capsys, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        cli.evaluate([f"--reward_model_dir={guarded[0] / 'reward_model'}", f"--output={tmp_path / name}"])
    said = capsys.readouterr()
    assert "no file can be written there" in said.err
    assert "pairs on" not in said.out
