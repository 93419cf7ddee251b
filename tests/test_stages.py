"""Stages: run once, again when something changed, gone on with after an interruption, never over foreign files."""

import os
import signal
import threading
import time

import pytest

from helpsteer_rloo.heartbeat import beating
from helpsteer_rloo.opening import Opening
from helpsteer_rloo.preemption import Stopped, listening
from helpsteer_rloo.run_dir import RunDir, read_json, write_json
from helpsteer_rloo.stages import Stage, run_stages, seconds_by_stage


class World:
    """A run of three stages, `data` → `model` → `report`, that writes down what ran and what was said."""

    def __init__(self, root):
        self.root, self.run = root, RunDir(root / "run")
        self.inputs = {"data": {"rows": 10}, "model": {"rate": 0.1, "epochs": 2}, "report": {}}
        self.model_dir = root / "model"
        self.ran, self.said = [], []
        self.fail_in, self.leftovers = None, ["checkpoint-5"]

    def stages(self):
        return [
            Stage("data", self.inputs["data"], lambda: self._work("data"), artefacts=(self.root / "data.json",)),
            Stage(
                "model",
                self.inputs["model"],
                lambda: self._work("model"),
                artefacts=(self.model_dir / "weights",),
                directory=self.model_dir,
            ),
            Stage("report", self.inputs["report"], lambda: self._work("report")),
        ]

    def _work(self, name):
        self.ran.append(name)
        if name == "model":
            self.model_dir.mkdir(exist_ok=True)
            for leftover in self.leftovers:
                (self.model_dir / leftover).mkdir(exist_ok=True)
        if name == self.fail_in:
            raise KeyboardInterrupt
        if name == "data":
            (self.root / "data.json").write_text(str(self.inputs["data"]["rows"]))
        elif name == "model":
            (self.model_dir / "weights").write_text(str(self.inputs["model"]["rate"]))
        return {"done": name, "number": len(self.ran)}

    def go(self):
        """Run the stages; return what ran and what was said this time."""
        self.ran, self.said = [], []
        outputs = run_stages(self.run, self.stages(), self.said.append)
        assert list(outputs) == ["data", "model", "report"]
        return self.ran

    def interrupt(self, name):
        self.fail_in = name
        with pytest.raises(KeyboardInterrupt):
            self.go()
        self.fail_in = None


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    return World(tmp_path)


def test_stages_run_in_order_and_leave_a_marker_each(world):
    assert world.go() == ["data", "model", "report"]
    assert world.said == ["Stage data.", "Stage model.", "Stage report."]
    record = read_json(world.run.stage("model"))
    assert record["inputs"] == {"rate": 0.1, "epochs": 2}
    assert record["outputs"] == {"done": "model", "number": 2}
    assert record["seconds"] >= 0
    assert sorted(path.name for path in (world.root / "run" / "stages").iterdir()) == [
        "data.json",
        "model.json",
        "report.json",
    ]


def test_the_runs_record_knows_which_stages_it_has_passed_since_it_was_started(world):
    def passed():
        return read_json(world.run.start)["passed"]

    write_json(world.run.start, {"passed": []})
    world.go()
    assert passed() == ["data", "model", "report"]
    before = world.run.start.stat().st_mtime_ns
    world.go()
    assert world.run.start.stat().st_mtime_ns == before
    world.inputs["model"]["rate"] = 0.2
    world.interrupt("model")
    assert passed() == ["data"]  # though the marker of the last stage is there
    assert world.run.stage("report").exists()
    world.go()
    assert passed() == ["data", "model", "report"]


def test_a_start_records_the_stages_that_no_change_has_touched(world):
    def opened():
        opening = Opening(world.run, {"rate": world.inputs["model"]["rate"]}, lambda finished: None)
        opening.stages(["data", "model", "report"], world.stages)
        record = read_json(world.run.start)
        return record["passed"], record["settings"]

    assert opened() == ([], {"rate": 0.1})
    world.go()
    assert opened() == (["data", "model", "report"], {"rate": 0.1})
    world.inputs["model"]["rate"] = 0.2
    assert opened() == (["data"], {"rate": 0.2})  # killed here, it is not finished, though every marker is there
    assert all(world.run.stage(name).exists() for name in ("data", "model", "report"))
    world.inputs["model"]["rate"] = 0.1
    write_json(world.run.summary, {"provenance": {"commit": "of the first start"}})
    assert opened() == (["data", "model", "report"], {"rate": 0.1})  # changed back: what is there is of these settings
    assert read_json(world.run.start)["provenance"] == {"commit": "of the first start"}


def test_finished_stages_are_not_run_again_and_their_outputs_are_returned(world):
    first = run_stages(world.run, world.stages(), world.said.append)
    world.said.clear()
    world.ran.clear()
    assert run_stages(world.run, world.stages(), world.said.append) == first
    assert (world.ran, world.said) == ([], [])


def test_a_changed_input_reruns_its_stage_and_those_after_it_and_says_what_changed(world):
    world.go()
    world.inputs["model"] = {"rate": 0.2, "epochs": 2}
    assert world.go() == ["model", "report"]
    assert world.said[0] == "Changed since the last run: rate 0.1 -> 0.2. These stages run again: model, report."
    assert read_json(world.run.stage("model"))["inputs"]["rate"] == 0.2
    assert world.go() == []


def test_a_change_in_the_first_stage_reruns_everything_and_is_said_once(world):
    world.go()
    world.inputs["data"] = {"rows": 11, "split": "hash"}
    assert world.go() == ["data", "model", "report"]
    changes = [line for line in world.said if line.startswith("Changed")]
    assert changes == [
        "Changed since the last run: rows 10 -> 11, split None -> 'hash'. These stages run again: data, model, report."
    ]


def test_a_setting_changed_back_reruns_what_the_change_had_replaced(world):
    world.go()
    world.inputs["model"]["rate"] = 0.2
    world.go()
    world.inputs["model"]["rate"] = 0.1
    assert world.go() == ["model", "report"]
    assert (world.model_dir / "weights").read_text() == "0.1"


def test_a_path_and_a_tuple_among_the_inputs_are_the_same_next_time(world):
    world.inputs["data"] = {"rows": 3, "file": world.root / "rows.jsonl", "sizes": (1, 2)}
    world.go()
    world.inputs["model"]["rate"] = 0.2
    assert world.go() == ["model", "report"]
    assert [line for line in world.said if line.startswith("Changed")] == [
        "Changed since the last run: rate 0.1 -> 0.2. These stages run again: model, report."
    ]
    world.inputs["data"]["rows"] = 4
    world.go()
    assert "Changed since the last run: rows 3 -> 4. These stages" in world.said[0]


def test_an_interrupted_stage_goes_on_in_its_directory_as_it_was_left(world):
    world.interrupt("model")
    (world.model_dir / "checkpoint-5" / "state").write_text("half way")
    assert world.go() == ["model", "report"]
    assert world.said == ["Stage model goes on.", "Stage report."]
    assert (world.model_dir / "checkpoint-5" / "state").read_text() == "half way"
    assert not (world.root / "model.previous").exists()
    assert not world.run.stage_started("model").exists()


def test_a_stage_that_was_interrupted_again_and_again_still_goes_on(world):
    for _ in range(3):
        world.interrupt("model")
    assert world.go() == ["model", "report"]
    assert world.said[0] == "Stage model goes on."


def test_an_interrupted_stage_with_changed_inputs_starts_anew_and_says_so(world):
    world.interrupt("model")
    (world.model_dir / "checkpoint-5" / "state").write_text("half way")
    world.inputs["model"]["rate"] = 0.2
    assert world.go() == ["model", "report"]
    assert world.said == [
        "Changed since the last run: rate 0.1 -> 0.2. These stages run again: model, report.",
        f"The earlier result in {world.model_dir} is kept as {world.root / 'model.previous'}.",
        "Stage model.",
        "Stage report.",
    ]
    assert not (world.model_dir / "checkpoint-5" / "state").exists()
    assert (world.root / "model.previous" / "checkpoint-5" / "state").read_text() == "half way"


def test_an_interrupted_stage_with_changed_inputs_starts_anew_even_before_its_first_checkpoint(world):
    world.leftovers = ["logs"]
    world.interrupt("model")
    world.inputs["model"]["rate"] = 0.2
    assert world.go() == ["model", "report"]
    assert (world.root / "model.previous" / "logs").exists()


def test_of_a_stage_that_made_nothing_nothing_is_kept(world):
    world.leftovers = []
    world.interrupt("model")
    world.inputs["model"]["rate"] = 0.2
    assert world.go() == ["model", "report"]
    assert not any("is kept as" in line for line in world.said)
    assert not (world.root / "model.previous").exists()


def test_an_earlier_result_is_kept_beside_the_new_one(world):
    world.go()
    world.inputs["model"]["rate"] = 0.2
    world.go()
    previous = world.root / "model.previous"
    assert (previous / "weights").read_text() == "0.1"
    assert (world.model_dir / "weights").read_text() == "0.2"
    assert f"The earlier result in {world.model_dir} is kept as {previous}." in world.said


def test_a_result_without_its_marker_is_kept_aside_and_made_anew(world):
    world.go()
    world.run.stage("model").unlink()
    assert world.go() == ["model", "report"]
    assert (world.root / "model.previous" / "weights").exists()


def test_a_foreign_directory_is_refused_and_left_as_it_is(world):
    world.model_dir.mkdir()
    (world.model_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is left alone") as caught:
        world.go()
    assert str(caught.value) == (
        f"{world.model_dir} is not empty and does not hold a result of this tool; it is left alone. "
        "Give another --output_dir, or empty the directory yourself."
    )
    assert world.ran == ["data"]
    assert [(path.name, path.read_text()) for path in world.model_dir.iterdir()] == [("thesis.tex", "years of work")]
    assert not (world.root / "model.previous").exists()


def test_a_refused_directory_is_refused_again(world):
    world.model_dir.mkdir()
    (world.model_dir / "thesis.tex").write_text("years of work")
    for _ in range(2):
        with pytest.raises(ValueError, match="is left alone"):
            world.go()


def test_an_interrupted_stage_does_not_go_on_in_a_foreign_directory(world):
    world.interrupt("model")
    world.model_dir = world.root / "elsewhere"
    world.model_dir.mkdir()
    (world.model_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is left alone"):
        world.go()
    assert [path.name for path in world.model_dir.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_is_used(world):
    world.model_dir.mkdir()
    assert world.go() == ["data", "model", "report"]
    assert not (world.root / "model.previous").exists()


def test_a_missing_artefact_reruns_its_stage_and_those_after_it_though_nothing_changed(world):
    world.go()
    (world.root / "data.json").unlink()
    assert world.go() == ["data", "model", "report"]
    assert (world.root / "data.json").exists()
    assert not any(line.startswith("Changed") for line in world.said)
    assert world.go() == []


def test_a_result_made_anew_reruns_the_stages_that_were_built_on_the_lost_one(world):
    world.go()
    (world.model_dir / "weights").unlink()
    assert world.go() == ["model", "report"]
    assert world.go() == []


def test_a_stage_put_in_front_of_the_others_reruns_them(world):
    world.go()
    extra = Stage("world", {"seed": 1}, lambda: {"made": True})
    run_stages(world.run, [extra, *world.stages()], world.said.append)
    assert world.ran == ["data", "model", "report", "data", "model", "report"]


def test_a_failed_stage_leaves_no_marker_and_the_stages_before_it_stay_finished(world):
    world.interrupt("report")
    assert read_json(world.run.stage("report")) is None
    assert world.run.stage_started("report").exists()
    assert world.go() == ["report"]


def test_a_result_lost_to_an_interrupted_change_is_made_anew_with_all_that_was_built_on_it(world):
    world.go()
    world.inputs["model"]["rate"] = 0.2
    world.interrupt("model")
    world.inputs["model"]["rate"] = 0.1
    assert world.go() == ["model", "report"]


def test_a_damaged_marker_is_named(world):
    world.go()
    world.run.stage("data").write_text("{")
    with pytest.raises(ValueError, match="damaged") as caught:
        world.go()
    assert str(world.run.stage("data")) in str(caught.value)


def test_seconds_are_those_of_the_stages_that_finished(world):
    world.interrupt("report")
    seconds = seconds_by_stage(world.run, ["data", "model", "report"])
    assert list(seconds) == ["data", "model"]
    assert all(0 <= value < 60 for value in seconds.values())


def test_a_change_leaves_a_stage_alone_that_does_not_need_the_changed_one(world):
    def stages(rate):
        work = {name: lambda name=name: world.ran.append(name) or {} for name in ("data", "model", "sizes", "table")}
        return [
            Stage("data", {}, work["data"]),
            Stage("model", {"rate": rate}, work["model"]),
            Stage("sizes", {}, work["sizes"], needs=("data",)),
            Stage("table", {}, work["table"], needs=("model", "sizes")),
        ]

    run_stages(world.run, stages(0.1), world.said.append)
    world.ran, world.said = [], []
    run_stages(world.run, stages(0.2), world.said.append)
    assert world.ran == ["model", "table"]
    assert world.said[0] == "Changed since the last run: rate 0.1 -> 0.2. These stages run again: model, table."


def test_another_process_waits_for_the_main_one_and_runs_only_what_is_distributed(world, monkeypatch):
    ranks = []

    def stage(name, **options):
        return Stage(
            name, {}, lambda: ranks.append((name, os.environ["RANK"])) or {"by": os.environ["RANK"]}, **options
        )

    stages = [stage("alone"), stage("shared", distributed=True)]
    ahead = iter([1, 2])

    def main_process_finishes_one_more(seconds):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "0")
            run_stages(world.run, stages[: next(ahead)], world.said.append)

    monkeypatch.setattr("helpsteer_rloo.stages.time.sleep", main_process_finishes_one_more)
    monkeypatch.setenv("RANK", "1")
    outputs = run_stages(world.run, stages, world.said.append)
    assert ranks == [("alone", "0"), ("shared", "1"), ("shared", "0")]
    assert outputs == {"alone": {"by": "0"}, "shared": {"by": "0"}}
    assert world.said == ["Stage alone.", "Stage shared."]


@pytest.mark.parametrize("seconds", [0, 2.5])
def test_a_process_whose_main_one_is_gone_stops_and_says_so(world, monkeypatch, seconds):
    """Gone from the start, or after a few beats."""
    monkeypatch.setattr("helpsteer_rloo.heartbeat.EVERY", 0.2)
    monkeypatch.setattr("helpsteer_rloo.heartbeat.LIMIT", 1.5)
    monkeypatch.setenv("RANK", "1")
    world.root.joinpath("run").mkdir()

    def live():
        with beating(world.run.heartbeat):
            time.sleep(seconds)

    main_process = threading.Thread(target=live)
    begin = time.monotonic()
    if seconds:
        main_process.start()
    with pytest.raises(ValueError, match=r"The main process has given no sign of life in .*stage data is not finished"):
        run_stages(world.run, world.stages(), world.said.append)
    assert seconds + 1 < time.monotonic() - begin < seconds + 10
    assert world.ran == world.said == []
    if seconds:
        main_process.join()


def test_a_request_to_stop_that_comes_too_late_for_a_stage_stops_before_the_next(tmp_path):
    ran = []

    def asked_in_its_last_step():
        ran.append("model")
        with listening():
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    stages = [Stage("model", {}, asked_in_its_last_step), Stage("report", {}, lambda: ran.append("report") or {})]
    run = RunDir(tmp_path)
    with pytest.raises(Stopped, match="before stage report"):
        run_stages(run, stages, print)
    assert ran == ["model"]
    run_stages(run, stages, print)
    assert ran == ["model", "report"]
