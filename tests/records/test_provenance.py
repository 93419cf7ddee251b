"""The command that is written down can be given again, and holds no secret."""

import pytest

from helpsteer_rloo.records.provenance import command_line


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/a/b/train_pipeline.py", "--name", "a b"], "python train_pipeline.py --name 'a b'"),
        (
            ["helpsteer-rloo", "rloo", "--hub_token", "abc", "--seed", "1"],
            "helpsteer-rloo rloo --hub_token ... --seed 1",
        ),
        (["x", "--reward.push_to_hub_token=abc"], "x --reward.push_to_hub_token=..."),
        (["x", "--rloo.token", "--seed", "1"], "x --rloo.token --seed 1"),
        (["x", "--num_tokens", "5"], "x --num_tokens 5"),
        ([], "''"),
    ],
)
def test_it_is_the_command_without_its_secrets(argv, line):
    assert command_line(argv) == line


@pytest.mark.parametrize("given", ['{"token": "abc", "revision": "main"}', "{token: abc, revision: main}"])
def test_a_secret_in_a_mapping_is_left_out(given):
    line = command_line(["x", "--model_init_kwargs", given])
    assert "abc" not in line
    assert "main" in line
