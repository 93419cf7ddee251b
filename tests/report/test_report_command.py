"""`helpsteer-rloo report`, and the report that a run keeps up to date."""

import os
import re
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from helpsteer_rloo import cli
from helpsteer_rloo.commands.report import collected
from helpsteer_rloo.display import live_report as reporting
from helpsteer_rloo.display.console import speaking_to
from helpsteer_rloo.display.live_report import reported
from helpsteer_rloo.preemption import Stopped
from helpsteer_rloo.report.page import render
from helpsteer_rloo.run_dir import RunDir, is_locked, locked, write_json
from tests.report.runs import finish, make_run, make_small_run


@pytest.fixture
def run(tmp_path):
    return make_small_run(tmp_path / "run")


def test_the_page_goes_into_the_runs_directory(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    cli.report([str(run)])
    page = (run / "report.html").read_text()
    assert "The reward model orders 80.0\xa0%" in page
    assert "report.html" in capsys.readouterr().out
    assert len(page) < 2_000_000


def test_several_runs_go_into_one_page_here_or_where_it_is_asked_for(run, tmp_path, monkeypatch):
    other = make_small_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    cli.report([str(run), "other"])
    assert "run and other" in (tmp_path / "report.html").read_text()
    cli.report(["other", str(run), "--output", "pages/both.html"])
    assert "other and run" in (tmp_path / "pages" / "both.html").read_text()
    assert not (other / "report.html").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give the directory of a run"),
        (["run", "run/"], "a run is given twice"),
        (["run", "--outptu", "x"], "unknown flag 'outptu'"),
    ],
)
def test_mistakes_are_refused(run, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit) as stopped:
        cli.report(argv)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nothing"], "nothing: there is no run here"),
        (["run", "--output", "run"], "--output run: no file can be written there"),
    ],
)
def test_what_cannot_be_done_is_said(run, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit) as stopped:
        cli.report(argv)
    assert stopped.value.code == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_report_that_another_process_writes_is_left_to_it(run, capsys):
    with locked(run / ".report.lock", run), pytest.raises(SystemExit):
        cli.report([str(run)])
    assert "is working on" in " ".join(capsys.readouterr().err.split())


def test_whether_a_run_goes_on_can_be_asked_without_taking_its_lock(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    with locked(path, tmp_path):
        assert is_locked(path)
    assert not is_locked(path)


@pytest.fixture
def reporting_on(monkeypatch):
    monkeypatch.delenv(reporting.SWITCH)
    monkeypatch.setattr(reporting, "LOOK", 0.05)


def wait_for(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_writes_its_report_at_the_end_of_a_stage_and_at_its_own(run, reporting_on, capsys):
    directory, page = RunDir(run), run / "report.html"
    with reported(directory):
        with locked(directory.lock, run):
            finish(run, "another", {})
            wait_for(page.exists)
            assert b'data-state="running"' in page.read_bytes()[:1000]
        assert not is_locked(directory.lock)
    assert b'data-state="running"' not in page.read_bytes()
    assert "finished" in page.read_text()
    assert "WARNING" not in capsys.readouterr().out
    before = page.stat().st_mtime_ns
    with reported(directory):
        pass
    assert page.stat().st_mtime_ns == before  # nothing has changed


def test_a_report_that_fails_is_a_warning_said_once(run, reporting_on, capsys):
    (run / "report.html").mkdir()
    with reported(RunDir(run)):
        finish(run, "another", {})
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("WARNING: the report: --output") == 1
    assert "report.html is a directory" in out


def test_a_pipe_in_the_reports_place_is_a_warning_in_a_quiet_run_too_and_no_report(run, reporting_on, capsys):
    os.mkfifo(run / "report.html")
    with speaking_to(Console(), quiet=True), reported(RunDir(run)):
        pass
    assert "WARNING: the report: " in capsys.readouterr().out
    with reported(RunDir(run)):
        pass
    out = capsys.readouterr().out
    assert "report.html is a pipe" in " ".join(out.split())
    assert "The report: " not in out


def test_a_file_that_the_last_report_lacks_is_a_warning(run, reporting_on, capsys):
    (run / "data.json").write_text("{")
    with reported(RunDir(run)):
        finish(run, "another", {})
    out = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the report: " in out
    assert "report.html is written without what cannot be read. run: data.json is damaged" in out
    assert "finished" not in re.findall(r'class="state[^>]*>(\w+)', (run / "report.html").read_text())


def test_a_broken_run_stands_beside_the_whole_ones_and_is_named(tmp_path, monkeypatch, capsys):
    whole, broken = make_run(tmp_path / "whole", count=8), make_run(tmp_path / "broken", count=8)
    (broken / "data.json").write_text("{")
    (broken / "policy" / "policy.json").unlink()
    os.mkfifo(broken / "policy" / "policy.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.report([str(whole), "broken"])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "report.html: whole, broken." in said.out
    error = " ".join(said.err.split())
    assert "report.html is written without what cannot be read. broken: " in error
    assert "data.json is damaged (Expecting property name" in error
    assert "policy/policy.json is a pipe, where a file is expected" in error
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'class="state[^>]*>(\w+)', page) == ["finished", "broken"]
    assert "This cannot be read, and is left out: data.json is damaged" in page
    assert page.count("The reward model orders 80.0") == 2  # the rest of the broken one is shown


def test_the_message_names_the_run_by_its_directory(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    cli.report(["."])
    assert capsys.readouterr().out.strip().endswith("/run/report.html: run.")


def test_a_page_that_is_a_pipe_is_refused(run, monkeypatch, capsys):
    os.mkfifo(run / "report.html")
    with pytest.raises(SystemExit):
        cli.report([str(run)])
    assert "report.html is a pipe, where a file is expected" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_run_that_fails_leaves_a_page_that_says_so(run, reporting_on):
    def fail():
        write_json(run / "stages" / "reward_model.started.json", {"key": "k", "inputs": {}})
        raise ValueError("out of data")

    with pytest.raises(ValueError, match="out of data"), reported(RunDir(run)):
        fail()
    page = (run / "report.html").read_text()
    assert "It is not finished: it was left in the stage reward model." in page


def test_only_one_report_at_a_time_is_written_and_none_outlives_its_run(run, reporting_on, monkeypatch):
    started = []
    popen = subprocess.Popen

    def slow(command, **more):
        assert all(process.poll() is not None for process in started)
        process = popen([sys.executable, "-c", "import time; time.sleep(60)"], **more)
        started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", slow)

    def interrupted():
        finish(run, "another", {})
        wait_for(lambda: started)
        finish(run, "one more", {})
        time.sleep(0.3)
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), reported(RunDir(run)):
        interrupted()
    assert len(started) == 1
    assert started[0].poll() is not None
    assert time.monotonic() - begin < 30


def test_the_process_that_writes_a_report_ends_soon_after_a_run_that_was_killed(tmp_path):
    """A run that is killed cannot end it."""
    child = "import sys, time; from helpsteer_rloo.display.live_report import end_with; "
    child += "end_with(int(sys.argv[1])); print('begun', flush=True); time.sleep(120)"
    parent = (
        f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())]); "
    )
    parent += "time.sleep(120)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "begun\n"
        assert not select.select([run.stdout], [], [], 1.5)[0]  # while the run lives, so does it
        run.kill()
        begin = time.monotonic()
        assert run.stdout.read() == ""  # the end of the pipe, which it held
        assert time.monotonic() - begin < 30


def test_reports_can_be_switched_off(run, monkeypatch):
    assert os.environ[reporting.SWITCH] == "off"  # in all tests but these
    with reported(RunDir(run)):
        finish(run, "another", {})
    assert not (run / "report.html").exists()


def test_runs_of_one_name_are_two_in_the_page_and_no_id_is_there_twice(tmp_path):
    roots = [make_run(tmp_path / name / "warn", count=8) for name in ("a", "a_", "a-")]
    page = render(collected([RunDir(root) for root in roots]))
    assert "a/warn and a_/warn and a-/warn" in page
    assert "a/warn: reward" in page
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))


def test_a_run_by_two_names_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", count=8)
    with pytest.raises(SystemExit):
        cli.report([str(run), str(run / "policy"), "--output", str(tmp_path / "both.html")])
    assert "a run is given twice" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("error", "capped"), [(Stopped("asked to"), True), (ValueError("out of data"), False)])
def test_the_last_report_of_a_run_that_was_stopped_is_given_up_soon(run, reporting_on, monkeypatch, error, capped):
    monkeypatch.setattr(reporting, "LONGEST_WHEN_STOPPED", 0.1)
    monkeypatch.setattr(reporting, "LONGEST", 0.4)
    monkeypatch.setattr(reporting, "LOOK", 60.0)
    popen, told = subprocess.Popen, []
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: popen(sleep, **more))
    monkeypatch.setattr(reporting, "warn", told.append)

    def end():
        finish(run, "another", {})
        raise error

    with pytest.raises(type(error)), reported(RunDir(run)):
        end()
    limit = "0.1" if capped else "0.4"
    assert told == [f"the report: it was given up after {limit} seconds."]
