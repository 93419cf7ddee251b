"""The record of a reward model, whatever somebody made of it, is taken as a whole or refused by name."""

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from helpsteer_rloo.records.reward_model import check_reward_model
from helpsteer_rloo.run_dir import HELDOUT_PROMPTS, REWARD_MODEL_RECORD

SOUND = {
    "base_model": "owner/name",
    "base": {"name": "owner/name", "dtype": "float32", "revision": None, "trust_remote_code": False},
    "adapter": True,
    "thinking": False,
    "rendering": {
        "chat_template": "a",
        "tokenizer": "b",
        "template_kwargs": "{}",
        "end_of_turn_id": 1,
        "max_length": 96,
    },
    "heldout": {
        "heldout_accuracy": 0.9,
        "heldout_pairs": 9,
        "interval": [0.5, 1.0],
        "better_than_chance": True,
    },
}
PARTS = [(name,) for name in SOUND]
PARTS += [(name, key) for name in ("base", "rendering", "heldout") for key in SOUND[name]]
values = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)


def checked(record, keys):
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / REWARD_MODEL_RECORD).write_text(json.dumps(record))
        (directory / HELDOUT_PROMPTS).write_bytes(keys)
        for name in ("adapter_model", "model"):
            save_file({"score.weight": np.zeros((1, 4))}, directory / f"{name}.safetensors")
        try:
            return check_reward_model(directory, "--reward_model_path", trusted=False)
        except ValueError as error:
            assert str(directory) in str(error)  # noqa: PT017 - either outcome is right
            return None


KEY = b"0123456789abcdef0123456789abcdef\n"


@given(st.sampled_from(PARTS), values, st.booleans())
def test_a_record_with_another_value_keeps_its_types_or_is_refused_by_name(part, value, remove):
    record = json.loads(json.dumps(SOUND))
    place = record[part[0]] if len(part) == 2 else record
    if remove:
        del place[part[-1]]
    else:
        place[part[-1]] = value
    taken = checked(record, KEY)
    if taken is not None and not remove:
        sound = SOUND[part[0]][part[1]] if len(part) == 2 else SOUND[part[0]]
        numbers = isinstance(sound, float) and type(value) is int
        assert type(value) is type(sound) or numbers or value is None or part == ("base", "revision")


@given(st.binary(max_size=40) | st.lists(st.just(KEY), max_size=3).map(b"".join))
def test_heldout_prompts_are_keys_or_refused_by_name(content):
    taken = checked(SOUND, content)
    assert (taken is not None) == (content != b"" and content == KEY * (len(content) // len(KEY)))
