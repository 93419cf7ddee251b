import errno
import json
import os

import pytest
from safetensors import SafetensorError

from helpsteer_rloo.checkpoints import SEAL, damage, full_disk_explained, keep_newest, newest_whole, seal, step_of


def checkpoint(directory, step, sealed=True):
    path = directory / f"checkpoint-{step}"
    (path / "nested").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (path / "nested" / "state.json").write_text(json.dumps({"step": step}))
    if sealed:
        seal(path)
    return path


def names(directory):
    return sorted((path.name for path in directory.iterdir()), key=lambda name: int(name[11:]))


def test_a_sealed_checkpoint_is_whole(tmp_path):
    path = checkpoint(tmp_path, 7)
    assert damage(path) is None
    assert set(json.loads((path / SEAL).read_text())) == {"model.safetensors", "nested/state.json"}
    seal(path)  # again, as when a step is saved a second time
    assert damage(path) is None


def cut(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:100])


def without_weights(path):
    """As when another process took them away before it was sealed."""
    (path / "model.safetensors").unlink()
    seal(path)


def flip(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[1000] ^= 1
    (path / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (cut, "model.safetensors is not what was saved"),
        (flip, "model.safetensors is not what was saved"),
        (lambda path: (path / "nested" / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / SEAL).unlink(), "it was not finished"),
        (without_weights, "there are no weights in it"),
        (lambda path: (path / SEAL).write_text('{"weights'), "it cannot be read (JSONDecodeError"),
        (lambda path: (path / SEAL).write_text('["model.safetensors"]'), "it cannot be read (AttributeError"),
        (lambda path: (path / SEAL).write_text('{"model.safetensors": 3}'), "it cannot be read (TypeError"),
        (lambda path: (path / SEAL).write_text('{"model.safetensors": {}}'), "it cannot be read (KeyError"),
        (lambda path: (path / SEAL).write_bytes(b"\xff"), "it cannot be read (UnicodeDecodeError"),
    ],
)
def test_damage_is_found_and_the_checkpoint_before_it_used(tmp_path, break_it, problem):
    earlier, broken = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    break_it(broken)
    assert damage(broken).startswith(problem)
    path, problems = newest_whole(tmp_path)
    assert path == earlier
    assert len(problems) == 1
    assert problems[0].startswith(f"The checkpoint {broken} cannot be used: {problem}")


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    for step in (9, 100, 10):
        checkpoint(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-7-old", "other-8", "checkpoint-²"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    path, problems = newest_whole(tmp_path)
    assert (step_of(path), problems) == (100, [])
    assert newest_whole(tmp_path / "absent") == (None, [])


def test_the_newest_by_step_are_kept_though_the_clock_went_backwards(tmp_path):
    for age, step in enumerate((1, 2, 30, 4)):
        os.utime(checkpoint(tmp_path, step), (1e9 - age, 1e9 - age))
    keep_newest(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-30"]


def test_an_unfinished_checkpoint_counts_for_nothing_and_the_best_one_stays(tmp_path):
    for step, sealed in ((1, True), (2, True), (3, False), (4, True), (5, True), (6, False)):
        checkpoint(tmp_path, step, sealed)
    keep_newest(tmp_path, 2, best=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-5", "checkpoint-6"]
    keep_newest(tmp_path / "absent", 2)


def test_nothing_is_removed_before_anything_is_sealed(tmp_path):
    checkpoint(tmp_path, 1, sealed=False)
    keep_newest(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1"]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1141312 vs 1141204"),
]


@pytest.mark.parametrize("error", FULL, ids=[type(error).__name__ for error in FULL])
def test_a_full_disk_is_named_and_what_is_half_written_goes(tmp_path, error):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, sealed=False)
    with (
        pytest.raises(ValueError, match=r"The disk is full: .*checkpoint-1 is good\. Make room"),
        full_disk_explained(tmp_path),
    ):
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_other_errors_while_saving_pass(tmp_path):
    checkpoint(tmp_path, 2, sealed=False)
    with pytest.raises(RuntimeError, match="a bug"), full_disk_explained(tmp_path):
        raise RuntimeError("a bug")
    assert (tmp_path / "checkpoint-2").exists()
