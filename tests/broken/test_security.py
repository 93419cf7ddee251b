"""What comes from outside runs no code and reaches no file outside of its directory."""

import json
import os
import pickle
import shutil

import pytest

from helpsteer_rloo import cli
from helpsteer_rloo.checkpoints import SEAL, damage, newest_whole, seal
from helpsteer_rloo.model.loading import Base, check_base, load_policy, load_reward_model, load_tokenizer
from helpsteer_rloo.records.reward_model import check_reward_model
from tests.broken.corpus import changed_json
from tests.broken.models import without_tensor

CODE = """
from pathlib import Path
Path("{mark}").write_text("ran")
from transformers import Qwen3Config as Own, Qwen3ForCausalLM as OwnModel
"""


class Planted:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant(path, mark):
    path.write_bytes(pickle.dumps(Planted(mark), protocol=2))


@pytest.mark.parametrize(
    ("source", "weights", "pickled"),
    [
        ("reward", "adapter_model.safetensors", "adapter_model.bin"),
        ("full_reward", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_weights_as_a_pickle_are_refused_and_never_opened(source, weights, pickled, place):
    directory = place.copy(getattr(place.world, source), "planted")
    (directory / weights).unlink()
    plant(directory / pickled, place.root / "mark")
    with pytest.raises(ValueError, match=f"only there as {pickled}"):
        load_reward_model(directory)
    assert not (place.root / "mark").exists()


def test_a_pickle_beside_a_bases_weights_is_passed_over_and_one_instead_of_them_is_refused(place, tokenizer):
    directory = place.copy(place.world.base, "planted")
    plant(directory / "pytorch_model.bin", place.root / "mark")
    check_base(str(directory), tokenizer)
    load_policy(Base(str(directory)))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only there as pytorch_model\.bin"):
        check_base(str(directory), tokenizer)
    with pytest.raises(ValueError, match="Could not load the model"):
        load_policy(Base(str(directory)))
    assert not (place.root / "mark").exists()


def test_code_beside_a_model_runs_only_if_asked_for(place):
    directory, mark = place.copy(place.world.base, "planted"), place.root / "mark"
    (directory / "own.py").write_text(CODE.format(mark=mark))
    config = json.loads((directory / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": own, "model_type": "own"}))
    for use in (
        lambda: check_base(str(directory), load_tokenizer(str(place.world.base))),
        lambda: load_policy(Base(str(directory))),
    ):
        with pytest.raises(ValueError, match="code of its own"):
            use()
    assert not mark.exists()


def test_a_record_cannot_trust_code_in_the_users_place(place):
    directory = place.copy(place.world.reward, "planted")
    record = json.loads((directory / "reward_model.json").read_text())
    record["base"]["trust_remote_code"] = True
    (directory / "reward_model.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="runs code of its own"):
        check_reward_model(directory, "--reward_model_path", trusted=False)
    assert check_reward_model(directory, "--reward_model_path", trusted=True) == record


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    (path / "optimizer.pt").write_bytes(b"state")
    seal(path)
    return path


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_seal_that_names_a_file_outside_of_its_checkpoint_is_broken(name, checkpoint):
    (checkpoint.parent / "outside").write_bytes(b"")
    sealed = json.loads((checkpoint / SEAL).read_text())
    (checkpoint / SEAL).write_text(json.dumps({**sealed, name: {"bytes": 0, "sha256": "x"}}))
    assert damage(checkpoint) == f"{name} is not in it"


@pytest.mark.parametrize("name", ["rng_state.pth", "scheduler.pt", "pytorch_model.bin", "nested/sealed.json"])
def test_a_file_that_was_put_into_a_sealed_checkpoint_is_noticed(name, checkpoint):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"planted")
    assert damage(checkpoint) == f"{name} was not saved with it"
    assert newest_whole(checkpoint.parent)[0] is None


def test_a_pickle_in_a_checkpoint_that_somebody_sealed_again_does_not_run(place):
    """The seal tells damage, not who sealed; behind it transformers opens tensors and plain values alone."""
    import torch

    plant(place.root / "rng_state.pth", place.root / "mark")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(place.root / "rng_state.pth", weights_only=True)
    assert not (place.root / "mark").exists()


def test_transformers_opens_what_is_pickled_in_a_checkpoint_with_weights_only():
    """What a trainer reads of a checkpoint; a version that drops the argument has to be looked at."""
    import ast
    import inspect

    from transformers import trainer

    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(trainer)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert len(calls) >= 5
    for call in calls:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only") == "True"


def test_a_damaged_marker_of_a_directory_moves_nothing(place, capsys):
    mine = place.root / "out"
    mine.mkdir()
    (mine / "stage.json").write_text("[")
    shutil.copy(place.world.data / "train.jsonl", mine)
    with pytest.raises(SystemExit):
        cli.train_reward_model(place.training())
    assert "stage.json is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in mine.iterdir()) == ["stage.json", "train.jsonl"]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(
    ("source", "file", "part"),
    [
        ("full_reward", "model.safetensors", "layers.0.self_attn.q_proj"),
        ("reward", "adapter_model.safetensors", "layers.0.self_attn.q_proj.lora_B"),
    ],
)
def test_weights_that_are_missing_are_not_made_up(source, file, part, place):
    directory = place.copy(getattr(place.world, source), "part")
    without_tensor(file, part)(directory)
    with pytest.raises(ValueError, match="lacks 1 of its weights"):
        load_reward_model(directory)


def test_a_base_lacks_no_weights(place, tokenizer):
    directory = place.copy(place.world.base, "part")
    without_tensor("model.safetensors", "layers.1.mlp.up_proj")(directory)
    with pytest.raises(ValueError, match=r"1 weights are missing \(model.layers.1.mlp.up_proj.weight"):
        check_base(str(directory), tokenizer)


def test_a_base_without_a_vocabulary_head_writes_no_text(place, tokenizer):
    directory = place.copy(place.world.base, "part")
    check_base(str(directory), tokenizer, samples=True)
    changed_json(directory / "config.json", lambda config: config.update(tie_word_embeddings=False))
    check_base(str(directory), tokenizer)
    with pytest.raises(ValueError, match=r"1 weights are missing \(lm_head.weight"):
        check_base(str(directory), tokenizer, samples=True)
