"""Files of a run: written whole or not at all, read back or called damaged, moved aside, and found again."""

import json
import math
import os
import re
import socket
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo import run_dir
from helpsteer_rloo.run_dir import (
    RunDir,
    fingerprint,
    is_locked,
    locked,
    open_file,
    read_json,
    read_lines,
    read_steps,
    set_aside,
    write_bytes,
    write_json,
    write_text,
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ---- what is no file ------------------------------------------------------------------------------------------------


def a_pipe(path):
    os.mkfifo(path)


def a_socket(path):
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(path))  # the whole path may be too long for one
    listening.close()


def a_device(path):
    path.symlink_to("/dev/null")


def a_directory(path):
    path.mkdir()


@pytest.mark.parametrize("make", [a_pipe, a_socket, a_device, a_directory])
def test_what_is_no_file_is_refused_at_once(make, tmp_path):
    path = tmp_path / "step-000001.jsonl.gz"
    make(path)
    said = rf"{path} is {make.__name__.replace('_', ' ')}, where a file is expected; move it away\."
    for read in (open_file, read_json, is_locked, lambda path: read_steps(path.parent)):
        with pytest.raises(ValueError, match=said):
            read(path)
    with pytest.raises(ValueError, match=said), locked(path, tmp_path):
        pass
    rows, problem = read_lines(path)
    assert rows == []
    assert re.fullmatch(said, problem)


def test_a_pipe_that_the_user_named_is_read_as_a_file_is(tmp_path):
    path = tmp_path / "given"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text('{"rows": 3}'))
    writer.start()
    assert read_json(path, pipe=True) == {"rows": 3}
    writer.join()
    with pytest.raises(ValueError, match="is a device"):
        read_json(Path("/dev/null"), pipe=True)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_text_is_written_as_utf8_and_directories_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(path.parent) == ["note.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(step, error, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    path = tmp_path / "note.txt"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(run_dir.os, step, fail)
        with pytest.raises(type(error)):
            write_text(path, "new and longer")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


def test_a_first_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no")

    monkeypatch.setattr(run_dir.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_bytes(tmp_path / "note.bin", b"x")
    assert names(tmp_path) == []


def test_the_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(run_dir.os, "fsync", lambda handle: (events.append("fsync"), sync(handle)))
    monkeypatch.setattr(run_dir.os, "replace", lambda *args: (events.append("replace"), replace(*args)))
    write_text(tmp_path / "note.txt", "x")
    assert events == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_umask_asks_for(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "note.txt", "x")
        assert os.umask(umask) == umask, "the umask is left as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "note.txt").stat().st_mode) == mode


def test_json_keeps_the_order_of_keys_and_any_text(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"b": 1, "a": ["Größe", None, 0.1]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": [\n    "Größe",\n    null,\n    0.1\n  ]\n}\n'
    assert read_json(path) == {"b": 1, "a": ["Größe", None, 0.1]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_cannot_hold_is_refused_and_the_old_record_stays(value, tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": value})
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["record.json"]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_record_that_is_not_there_is_none(tmp_path):
    assert read_json(tmp_path / "record.json") is None


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"[1, 2]", b'"text"', b"null"])
def test_a_damaged_record_is_named_with_what_to_do(content, tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} is damaged")
    assert str(caught.value).endswith("delete it and run the command again.")


# ---- fingerprints ----------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_a_fingerprint_survives_json_and_does_not_depend_on_the_order_of_keys(value):
    def reversed_keys(item):
        if isinstance(item, dict):
            return {key: reversed_keys(item[key]) for key in reversed(item)}
        return [reversed_keys(i) for i in item] if isinstance(item, list) else item

    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value) == fingerprint(reversed_keys(value))


@given(values, values)
def test_different_values_have_different_fingerprints(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint(one) == fingerprint(other)) is same


def test_a_fingerprint_is_the_same_in_every_process_and_version():
    assert fingerprint({"b": [1, 2.5, None], "a": "ö"}) == "ce873ba086ec4732"
    assert fingerprint({"path": Path("a/b")}) == fingerprint({"path": "a/b"})


# ---- directories -----------------------------------------------------------------------------------------------------


def test_the_record_of_a_run_has_its_places(tmp_path):
    run = RunDir(tmp_path)
    places = [run.stage("data"), run.stage_started("data"), run.data_report, run.samples, run.summary]
    assert [path.relative_to(tmp_path).as_posix() for path in places] == [
        "stages/data.json",
        "stages/data.started.json",
        "data.json",
        "samples.jsonl",
        "summary.json",
    ]


def test_setting_aside_never_replaces_an_earlier_result(tmp_path):
    directory = tmp_path / "model"
    for content, name in (("first", "model.previous"), ("second", "model.previous-2"), ("third", "model.previous-3")):
        directory.mkdir()
        (directory / "weights").write_text(content)
        assert set_aside(directory) == tmp_path / name
        assert not directory.exists()
    assert [(tmp_path / f"model.previous{n}" / "weights").read_text() for n in ("", "-2", "-3")] == [
        "first",
        "second",
        "third",
    ]


def test_a_second_holder_of_a_lock_is_refused_until_the_first_lets_go(tmp_path):
    lock = tmp_path / "run" / ".lock"
    message = rf"Another process \(pid {os.getpid()}\) is working on"
    with locked(lock, lock.parent), pytest.raises(ValueError, match=message), locked(lock, lock.parent):
        pass
    with locked(lock, lock.parent):
        pass
