"""Output that nobody reads any more: a run goes on and ends as it would have, in every way of showing it."""

import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from helpsteer_rloo import cli
from helpsteer_rloo.data.demo import write_rows
from helpsteer_rloo.display import live
from helpsteer_rloo.settings.config import REWARD
from helpsteer_rloo.settings.parsing import parse_command, parse_pipeline
from tests.display.test_progress import SMALL

ROOT = Path(__file__).resolve().parents[2]
ACTED = """
import sys, warnings
from pathlib import Path
from rich.table import Table
from helpsteer_rloo import cli
from helpsteer_rloo.display.console import say, show
from helpsteer_rloo.display.live import shown
from helpsteer_rloo.events import Progressed, RunFinished, StageBegan, StageEnded, publish

def work():
    with shown(sys.argv[1], 0):
        publish(StageBegan("rloo"))
        say("first")
        input()  # until the reader is gone
        for step in range(50):
            publish(Progressed("training", step, 50))
            say(f"step {step} " + "x" * 1000)
            print("of a library", file=sys.stderr, flush=True)
            warnings.warn(f"of a library: {step}")
        show(Table("a table"))
        publish(StageEnded("rloo", 1.0))
        publish(RunFinished({}))
    Path(sys.argv[2]).write_text("done")
    print("after")

cli.guarded(work)
"""


def acted(mode, target, *, out=None, err=None, closed=""):
    """Run it with readers that go away when it has begun, or with closed descriptors; its exit status."""
    command = [sys.executable, "-c", ACTED, mode, str(target)]
    if closed:
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.communicate(b"\n", timeout=60)
    return process.returncode


@pytest.mark.parametrize("mode", ["json", "plain", "rich", "quiet"])
def test_a_run_goes_on_without_readers(mode, tmp_path):
    assert acted(mode, tmp_path / "both", out=subprocess.PIPE, err=subprocess.PIPE) == 0
    assert acted(mode, tmp_path / "closed", closed=">&- 2>&- ") == 0
    assert {path.read_text() for path in tmp_path.iterdir()} == {"done"}
    with (tmp_path / "log").open("w") as log:
        assert acted(mode, tmp_path / "out", out=subprocess.PIPE, err=log) == 0
    said = (tmp_path / "log").read_text()
    assert "of a library: 49" in said  # the stream that is read is written to the end
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    with (tmp_path / "log").open("w") as log:
        assert acted(mode, tmp_path / "err", out=log, err=subprocess.PIPE) == 0
    assert (tmp_path / "log").read_text().splitlines()[-1] == "after"
    assert (tmp_path / "err").read_text() == (tmp_path / "out").read_text() == "done"


@pytest.mark.parametrize("mode", ["json", "plain"])
def test_a_run_goes_on_where_the_disk_is_full_and_says_so_once(mode, tmp_path):
    with open("/dev/full", "wb") as full, (tmp_path / "log").open("w") as log:
        assert acted(mode, tmp_path / "out", out=full, err=log) == 0
        assert acted(mode, tmp_path / "both", out=full, err=full) == 0
    assert (tmp_path / "out").read_text() == (tmp_path / "both").read_text() == "done"
    said = (tmp_path / "log").read_text()
    assert said.count("left out from here on: No space left on device") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("mode", ["json", "plain"])
def test_a_pipe_that_does_not_block_is_waited_for(mode, tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [sys.executable, "-c", ACTED, mode, str(tmp_path / "target")]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=writer, stderr=log) as process,
        open(reader, "rb") as read,
    ):
        while True:  # until it is full; the run has written nothing or little yet
            try:
                os.write(writer, b"\n" * 4096)
            except BlockingIOError:
                break
        os.close(writer)
        process.stdin.write(b"\n")
        process.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        said = read.read().decode()
        assert process.wait(60) == 0
    assert ("step 49 xxx" if mode == "plain" else '"event": "summary"') in said
    assert said.splitlines()[-1] == "after"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_file_that_is_opened_is_never_a_closed_standard_stream(tmp_path):
    code = f"""
import os, sys
from helpsteer_rloo import cli

def work():
    with open({str(tmp_path / "file")!r}, "w") as file:
        os.write(1, b"of a library"); os.write(2, b"of a library"); print("said", file=sys.stderr)
        file.write("content")

cli.guarded(work)
"""
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(closed, cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.slow
def test_a_training_whose_first_line_alone_is_read_is_finished(tiny_base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 0, 260)
    flags = [f"--dataset_name={tmp_path / 'rows.jsonl'}", f"--model_name_or_path={tiny_base}", "--reward_model_only"]
    command = [sys.executable, "train_pipeline.py", *flags, *SMALL, f"--output_dir={tmp_path / 'run'}"]
    with subprocess.Popen(
        [*command, "--progress=json", "--progress_seconds=0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = json.loads(process.stdout.readline())
        process.stdout.close()
        process.stderr.close()
        assert process.wait(120) == 0
    assert first["event"] == "run"
    assert (tmp_path / "run" / "summary.json").exists()


def asked_of_libraries(prefix):
    """Whether libraries draw bars within a command whose standard error is no terminal, and within `shown`."""
    code = f"""
from helpsteer_rloo import cli
from helpsteer_rloo.display.live import chosen, shown

def work():
    {prefix}
    from huggingface_hub.utils import are_progress_bars_disabled
    print(not are_progress_bars_disabled())

cli.guarded(work)
"""
    environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    return done.stdout == b"True\n"


def test_libraries_draw_no_bars_where_there_is_no_terminal_whatever_the_command():
    assert not asked_of_libraries("")
    assert asked_of_libraries("import os; os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '0'")  # whoever asks has them


@pytest.mark.parametrize(
    ("flags", "mode", "quiet"),
    [
        ([], "rich", True),
        (["--disable_tqdm"], "plain", True),
        (["--disable_tqdm=false", "--progress=plain"], "plain", False),
    ],
)
def test_trls_flag_for_no_bars_leaves_none(monkeypatch, flags, mode, quiet):
    entered = []
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "draw_no_bars", lambda: entered.append("no bars"))
    for name in ("_in_a_block", "_as_lines"):
        monkeypatch.setattr(live, name, lambda *_, name=name: nullcontext(entered.append(name)))
    settings = parse_command(REWARD, flags)
    with cli._shown(settings.own, settings.trl):
        pass
    assert entered == [*(["no bars"] if quiet else []), {"rich": "_in_a_block", "plain": "_as_lines"}[mode]]
    pipeline = parse_pipeline([f"--rloo.{flag[2:]}" if "tqdm" in flag else flag for flag in flags])
    with cli._shown(pipeline.own, pipeline.reward.trl, pipeline.rloo.trl):
        pass
    assert entered[len(entered) // 2 :] == entered[: len(entered) // 2]


class Terminal(io.StringIO):
    """What is taken for one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", [["plan", "--json"], ["plan", "--gpu_name=h100"]])
def test_what_is_run_for_its_output_alone_ends_without_a_word(command):
    with subprocess.Popen(
        [sys.executable, "-m", "helpsteer_rloo.cli", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) in (1, 141)  # 1 is rich's
