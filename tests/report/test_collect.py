"""A run's directory is read as far as it has come, and what is wrong with a file is said with its name and field."""

import gzip
import json
import math
import os
import re
from pathlib import Path

import pytest

from helpsteer_rloo.report.collect import MOST_SAMPLES, collect, distinct_names, find_run
from helpsteer_rloo.report.readings import LONGEST_TEXT
from helpsteer_rloo.report.records import Log
from helpsteer_rloo.report.verdict import verdict
from helpsteer_rloo.run_dir import RunDir, locked, write_json, write_text
from tests.report.runs import answers, data_report, finish, heldout, json_text, make_run, mark, policy_log, start


def read(root):
    return collect(find_run(str(root)), "now")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_a_finished_run_is_read_whole(run):
    found = read(run)
    assert (found.name, found.state, found.seed) == ("run", "finished", 7)
    assert found.command == "helpsteer-rloo demo --seed 7"
    assert [stage.name for stage in found.stages] == [
        "data", "reward_model", "verification", "guard", "guard_verification", "rloo", "evaluation",
    ]  # fmt: skip
    assert dict(found.data.left_out) == {"bad row: json": 2, "another language than was asked for": 5, "tie": 7}
    assert found.data.splits["train"].lengths["chosen"].counts == (1, 77, 2)
    model, guard = found.reward_models
    assert (model.name, guard.name) == ("reward model", "guard")
    assert model.judged.accuracy.value == 0.8
    assert guard.judged.parts["domain"]["stem"].high == pytest.approx(0.75)
    assert model.judged.biases.keys() == {"length"}
    assert model.judged.probes.keys() == {"repetition"}
    assert model.log.series("loss")[1] == (10.0, 0.35)
    assert model.log.series("machine/step_seconds")[0] == (5.0, 0.2)
    assert len(model.pairs) == 40
    assert model.pairs[1].second.scores == {"score": 1.01}
    policy = found.policy
    assert policy.log.last_step == 50
    assert [seen.step for seen in policy.watched] == [0, 10, 20]
    assert policy.judged.changes["gold"].after == pytest.approx(0.7)
    assert policy.judged.win_rates.keys() == {"reward", "guard"}
    assert policy.judged.best_of_n.policy_minus["reward"].low == 0.5
    assert policy.answers[5].first.scores == {"reward": 0.5, "gold": 0.5}
    assert policy.answers[5].second.note == "cut off by the length limit"
    assert policy.answers[5].number == 6
    assert not found.notes


def test_settings_that_differ_from_the_defaults_are_named_once(run):
    named = {(s.stage, s.name): (s.value, s.default) for s in read(run).settings}
    assert named[("rloo", "kl_coef")] == ("0.1", "0.05")
    assert named[("pipeline", "guard")] == ("True", "False")
    assert ("reward", "seed") not in named  # it is the pipeline's
    assert named[("reward", "learning_rate")] == ("0.001", "1e-05")


def test_a_run_that_goes_on_is_read_so_far(run):
    (run / "stages" / "evaluation.json").unlink()
    (run / "samples.jsonl").unlink()
    rloo = json.loads((run / "stages" / "rloo.json").read_text())
    (run / "stages" / "rloo.json").unlink()
    write_json(run / "stages" / "rloo.started.json", {"key": rloo["key"], "inputs": {}})
    (run / "policy" / "policy.json").unlink()
    with (run / "policy" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 55, "rew')  # half of a line
    with locked(run / ".lock", run):
        found = read(run)
    assert found.state == "running"
    assert found.stages[-1].seconds is None
    assert found.policy.log.last_step == 50
    assert found.policy.judged is None
    assert not found.notes
    found = read(run)
    assert found.state == "unfinished"
    assert "metrics.jsonl, line 11" in found.notes[0]


def test_damage_is_a_problem_of_a_run_that_ended_and_a_note_of_one_that_goes_on(run):
    (run / "data.json").write_text(json.dumps({**data_report(), "rows": "many"}))
    said = "data.json: field 'rows': expected a whole number."
    found = read(run)
    assert (found.data, found.problems, found.notes, found.state) == (None, (said,), (), "finished")
    with locked(run / ".lock", run):
        found = read(run)
    assert (found.data, found.problems, found.notes) == (None, (), (said,))
    assert found.reward_models[0].judged is not None


BROKEN = [
    ("stages/rloo.json", {"outputs": {}, "seconds": 1.5}, "outputs.steps"),
    ("reward_model/reward_model.json", {"heldout": {**heldout(), "interval": [0.1]}}, "heldout.interval"),
    ("reward_model/reward_model.json", {"heldout": {**heldout(), "findings": [1]}}, r"heldout.findings\[0\]"),
    ("reward_model/reward_model.json", {"heldout": {**heldout(), "heldout_accuracy": math.inf}}, "heldout_accuracy"),
    ("policy/policy.json", {"training": 3}, "training"),
    ("samples.jsonl", {"prompt": [], "before": {"text": 3}, "after": {}}, "line 1: field 'before.text'"),
    ("pairs.jsonl", {"prompt": [{"role": "user"}]}, "field 'rejected'"),
    ("run.json", "text", "expected a JSON object"),
]


@pytest.mark.parametrize(("name", "content", "field"), BROKEN, ids=[f"{name}-{field}" for name, _, field in BROKEN])
def test_a_broken_file_is_named_with_its_field(run, name, content, field):
    (run / name).write_text(json.dumps(content) + "\n")
    found = read(run)
    assert len(found.problems) == 1
    assert re.search(rf"{name.split('/')[-1].replace('.', '[.]')}.*{field}", found.problems[0])
    assert found.reward_models[0].log.last_step == 30  # the rest is there
    assert sum("This cannot be read, and is left out: " in sentence.text for sentence in verdict(found)) == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"not json"])
@pytest.mark.parametrize("name", ["samples.jsonl", "data.json", "policy/watch/step-000000.jsonl.gz"])
def test_what_is_no_json_is_named(run, name, content):
    (run / name).write_bytes(content)
    found = read(run)
    assert len(found.problems) == 1
    assert found.problems[0].startswith(name)
    assert found.reward_models[0].judged is not None


def test_an_archive_that_is_damaged_in_its_middle_is_named(run):
    path = run / "policy" / "watch" / "step-000000.jsonl.gz"
    content = bytearray(path.read_bytes())
    content[15] = 0xFF  # behind the header: no block of this kind exists
    path.write_bytes(content)
    (problem,) = read(run).problems
    assert problem.startswith("policy/watch/step-000000.jsonl.gz is damaged")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"guard": "x"}, "line 4: field 'guard': expected a finite number"),
        ({"guard": 10**400}, "line 4: field 'guard': expected a finite number"),
        ({"kl": None}, "line 4: field 'kl': expected a finite number"),
        ({"length": 2.5}, "line 4: field 'length': expected a whole number"),
        ({"ended": 1}, "line 4: field 'ended': expected true or false"),
        (None, "3 lines, where step 0 has 4"),
    ],
)
def test_a_damaged_measurement_of_the_policy_is_named_with_its_line(run, change, says):
    path = run / "policy" / "watch" / "step-000010.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows[3:] = [] if change is None else [{**rows[3], **change}]
    path.write_bytes(gzip.compress(json_text(rows).encode()))
    found = read(run)
    assert found.problems == (f"policy/watch/step-000010.jsonl.gz is damaged ({says}).",)
    assert found.policy.log.last_step == 50


def test_the_whole_lines_of_a_damaged_file_of_samples_are_shown(run):
    rows = answers(60)
    rows[3]["after"] = {"text": 3}
    rows[7]["prompt"] = "Hello"
    write_text(run / "samples.jsonl", json_text(rows))
    found = read(run)
    assert [sample.number for sample in found.policy.answers][:7] == [1, 2, 3, 5, 6, 7, 9]
    assert found.problems == (
        "samples.jsonl, line 4: field 'after.text': expected a text. (And 1 more lines cannot be read.)",
    )


def test_lines_of_a_log_that_cannot_be_read_are_a_problem_of_a_finished_run(run):
    (run / "policy" / "metrics.jsonl").write_text('{"step": 5, "reward": 1.0}\nno line\n{"step": 10}\n')
    found = read(run)
    assert found.policy.log.last_step == 5
    assert found.problems[0].startswith("policy/metrics.jsonl, line 2: ")


def test_numbers_that_are_none_are_left_out_of_a_log():
    rows = [{"step": n, "a": value} for n, value in enumerate([1, math.nan, math.inf, 10**400, "x", None, 2.5])]
    assert Log((*rows, {"step": 10**400, "a": 1.0})).series("a") == ((0.0, 1.0), (6.0, 2.5))


@pytest.mark.parametrize("change", [{"stages": ["x" * 500, 3, "../data"]}, {"stages": {"a": 1}}, {"passed": [{}]}])
def test_a_record_of_nonsense_is_no_more_than_an_unfinished_run(run, change):
    start(run, stages=PLANNED, passed=PLANNED)
    write_json(run / "run.json", {**json.loads((run / "run.json").read_text()), **change})
    write_json(run / "policy" / "stage.json", {"stage": "rloo", "key": {}})
    assert read(run).problems == ()


FILES_OF_A_RUN = [
    ".lock", "run.json", "data.json", "stages/rloo.json", "samples.jsonl", "pairs.jsonl", "reward_model/stage.json",
    "reward_model/reward_model.json", "policy/metrics.jsonl", "policy/policy.json", "policy/watch/step-000010.jsonl.gz",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES_OF_A_RUN)
def test_a_pipe_among_the_files_of_a_run_is_named_and_not_waited_for(run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    found = read(run)
    assert found.problems == (f"{name} is a pipe, where a file is expected; move it away.",)


def test_the_directory_of_another_run_is_not_taken_for_this_ones(run, tmp_path, monkeypatch):
    """Runs record relative paths, which lead elsewhere from another working directory."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "elsewhere" / "policy"
    mark(tmp_path / "elsewhere", "rloo", other)
    write_text(other / "metrics.jsonl", json_text(policy_log(2)))
    assert read(run).policy.log.last_step == 50
    (run / "policy").rename(run / "moved")
    assert read(run).policy.log.rows == ()


@pytest.mark.parametrize("given", ["rm", "rm.run"])
def test_the_scripts_keep_their_record_beside_their_result(tmp_path, given):
    root, model = tmp_path / "rm.run", tmp_path / "rm"
    start(root, {"reward": {"output_dir": str(model), "seed": 3}})
    write_json(root / "data.json", data_report())
    finish(root, "data", {})
    finish(root, "reward_model", {"directory": str(model), "steps": 30, "bad_steps": 2}, model)
    write_json(model / "reward_model.json", {"heldout": heldout()})
    finish(root, "verification", {})
    found = read(tmp_path / given)
    assert (found.seed, found.policy, found.state) == (3, None, "finished")
    assert found.reward_models[0].judged.accuracy.count == 200
    assert found.reward_models[0].bad_steps == 2


def test_a_policy_alone_shows_the_reward_model_that_it_was_given(run, tmp_path):
    root, policy = tmp_path / "p.run", tmp_path / "p"
    start(root, {"rloo": {"output_dir": str(policy), "reward_model_path": str(run / "reward_model")}})
    finish(root, "rloo", {"directory": str(policy), "steps": 4, "bad_steps": 0, "episodes": 16.0}, policy)
    found = read(policy)
    assert found.reward_models[0].judged.accuracy.value == 0.8
    assert found.reward_models[0].steps is None
    assert found.policy.episodes == 16


def test_a_run_without_its_own_log_has_that_of_its_newest_checkpoint(run):
    (run / "policy" / "metrics.jsonl").unlink()
    for step in (5, 10):
        history = [{"step": n, "reward": 1.0} for n in range(1, step + 1)]
        write_json(run / "policy" / f"checkpoint-{step}" / "trainer_state.json", {"log_history": history})
    assert read(run).policy.log.last_step == 10


def test_long_texts_and_long_files_are_shortened_and_it_is_said(run):
    rows = answers(MOST_SAMPLES + 1)
    rows[0]["after"]["text"] = "x" * (LONGEST_TEXT + 1234)
    write_text(run / "samples.jsonl", json_text(rows))
    found = read(run)
    assert len(found.policy.answers) == MOST_SAMPLES
    assert found.policy.answers[0].second.text.endswith("[… 1,234 more characters in the run's files]")
    assert found.notes == ("samples.jsonl has 5001 lines, of which the first 5000 are here.",)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no run here.*Give the directory that a run writes its record to"):
        find_run(str(tmp_path / "nothing"))
    assert find_run(str(make_run(tmp_path / "run") / "policy")) == RunDir(tmp_path / "run")


def test_a_run_is_called_by_the_name_of_its_directory_wherever_it_is_named_from(run, monkeypatch):
    monkeypatch.chdir(run / "policy")
    assert read(".").name == read("..").name == "run"
    (run.parent / "newest").symlink_to(run)
    assert read(run.parent / "newest").name == "run"


PLANNED = ["data", "reward_model", "verification", "guard", "guard_verification", "rloo", "evaluation"]


def test_a_run_that_was_left_between_two_stages_is_not_finished(run):
    start(run, stages=PLANNED)
    assert (read(run).state, read(run).next_stage) == ("finished", "")
    (run / "stages" / "evaluation.json").unlink()
    (run / "stages" / "rloo.json").unlink()
    found = read(run)
    assert (found.state, found.next_stage, found.policy) == ("unfinished", "rloo", None)
    assert "It is not finished: it was left before the stage rloo." in verdict(found)[0].text
    start(run)  # of an older run nothing more is known than what began
    assert read(run).state == "finished"


def test_stages_of_an_earlier_start_with_other_ones_are_not_shown(run):
    finish(run, "reward_model_2", {"directory": "elsewhere/reward_model_2", "steps": 30, "bad_steps": 0})
    start(run, stages=["data", "reward_model", "verification", "rloo", "evaluation"])
    found = read(run)
    assert [model.name for model in found.reward_models] == ["reward model"]
    assert [stage.name for stage in found.stages] == ["data", "reward_model", "verification", "rloo", "evaluation"]
    assert found.state == "finished"


def test_what_an_earlier_start_with_other_settings_left_is_not_taken_for_this_ones(run):
    """The markers of all stages stand there; the start that they are of is known by the run's record alone."""
    start(run, stages=PLANNED, passed=PLANNED)
    assert (read(run).state, len(read(run).policy.answers), len(read(run).reward_models)) == ("finished", 60, 2)
    start(run, stages=PLANNED, passed=["data", "reward_model"])
    found = read(run)
    assert (found.state, found.next_stage) == ("unfinished", "verification")
    assert [stage.name for stage in found.stages] == ["data", "reward_model"]
    assert (found.policy, len(found.reward_models), found.reward_models[0].pairs) == (None, 1, ())
    assert "It is not finished: it was left before the stage verification." in verdict(found)[0].text
    write_json(run / "stages" / "rloo.started.json", {"key": "k", "inputs": {}})  # of the earlier start as well
    assert read(run).next_stage == "verification"
    start(run, stages=PLANNED, passed=PLANNED[:-1])
    found = read(run)
    assert (found.policy.judged, found.policy.answers, found.policy.steps) == (None, (), 50)
    write_json(run / "stages" / "evaluation.started.json", {"key": "k", "inputs": {}})
    found = read(run)
    assert (found.state, found.stages[-1].name, found.stages[-1].seconds) == ("unfinished", "evaluation", None)
    assert "it was left in the stage evaluation." in verdict(found)[0].text


@pytest.mark.parametrize(
    ("action", "back", "said"),
    [
        ("warn", None, "An alarm was raised (the run went on): The guard fell."),
        ("stop", None, "The run was ended by an alarm: The guard fell."),
        ("rollback", 10, "The run was ended by an alarm: The guard fell. The policy is that of step 10."),
    ],
)
def test_what_followed_an_alarm_is_said(run, action, back, said):
    alarm = {"name": "overoptimization", "step": 20, "sentence": "The guard fell."}
    watch = {"curve": [], "best_step": 10, "verdict": alarm, "action": action, "rolled_back_to": back}
    write_json(run / "policy" / "policy.json", {"training": {"watch": watch}})
    assert said in [sentence.text for sentence in verdict(read(run))]


def test_runs_of_one_name_are_told_apart_by_their_paths():
    paths = ["/x/a/warn", "/x/b/warn", "/y/b/warn", "/x/stop"]
    assert distinct_names([Path(path) for path in paths]) == ["a/warn", "x/b/warn", "y/b/warn", "stop"]
