"""The corpus of broken inputs: each ends its command with one message that names the place and what to do."""

from collections import Counter

import pytest

from helpsteer_rloo import cli
from tests.broken import configs, files, flags, models, rewards, rows, runs
from tests.broken.corpus import USAGE

KINDS = {
    "rows": rows.CASES,
    "files": files.CASES,
    "flags": flags.CASES,
    "configs": configs.CASES,
    "models": models.CASES,
    "runs": runs.CASES,
    "rewards": rewards.CASES,
}
COMMANDS = {
    "reward-model": (cli.train_reward_model, "reward_model_training.py: "),
    "rloo": (cli.train_policy, "rloo_helpsteer_training.py: "),
    "pipeline": (cli.run_pipeline, "train_pipeline.py: "),
    "demo": (cli.run_demo, "helpsteer-rloo demo: "),
    "data": (cli.show_data, "helpsteer-rloo data: "),
}
ALL = [pytest.param(case, id=f"{kind}-{case.name}") for kind, cases in KINDS.items() for case in cases]


@pytest.mark.parametrize("case", ALL)
def test_a_broken_input_ends_with_one_message_that_names_the_place(case, place, capsys):
    run, program = COMMANDS[case.command]
    argv = list(case.make(place))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(argv)
    written = capsys.readouterr().err
    assert ended.value.code == case.status, written
    assert "Traceback" not in written
    begin = program if case.status == USAGE else "error: "
    assert sum(line.startswith(begin) for line in written.splitlines()) == 1, written
    message = written[written.index(begin) :]
    for fragment in case.says:
        assert fragment.replace("{root}", str(place.root)) in message
    assert len(message) < 4000, "nobody reads a page"


def test_the_corpus_is_large_and_no_case_stands_in_it_twice():
    names = Counter(param.id for param in ALL)
    assert max(names.values()) == 1
    assert len(names) >= 70
    assert all(case.says for cases in KINDS.values() for case in cases)
