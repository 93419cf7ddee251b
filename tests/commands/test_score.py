"""`helpsteer-rloo score`: scores line by line, bad rows, cuts, and going on where it was interrupted."""

import gzip
import json
import os

import pytest

from helpsteer_rloo import cli
from helpsteer_rloo.commands import score as score_command
from helpsteer_rloo.groups import Message
from helpsteer_rloo.model.forward import score_sequences
from helpsteer_rloo.model.loading import load_reward_model
from helpsteer_rloo.rendering import Renderer
from tests.broken.conftest import world
from tests.data.rows import make_row, write_jsonl

__all__ = ["world"]


def chat(question, *responses, **more):
    return {"messages": [{"role": "user", "content": question}], "responses": list(responses), **more}


ROWS = [
    chat("Name 2 trees.", "oak, elm", "oak", id="a"),
    chat("Name 1 fish.", "cod", "cod, car", ended=[True, False]),
    {"messages": [{"role": "user", "content": "Name 3 birds."}], "response": "owl"},
    make_row("Name a tree.", response1="elm", response2="ash"),
]


def run(world, tmp_path, rows, *flags):
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    cli.score([str(source), f"--reward_model_dir={world.reward}", f"--output={tmp_path / 'out.jsonl'}", *flags])
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def expected(world, tokenizer, question, response, ended=True):
    renderer, model = Renderer(tokenizer), load_reward_model(world.reward)[0]
    prompt = renderer.prompt_ids([Message("user", question)])
    return score_sequences(model, [(*prompt, *renderer.continuation_ids(response, ended=ended))], 1)[0]


def test_every_response_has_its_score(world, tokenizer, tmp_path, capsys):
    found = run(world, tmp_path, ROWS)
    assert [{k: v for k, v in row.items() if k != "scores"} for row in found] == ROWS
    asked = [
        ("Name 2 trees.", "oak, elm"), ("Name 2 trees.", "oak"), ("Name 1 fish.", "cod"),
        ("Name 1 fish.", "cod, car", False), ("Name 3 birds.", "owl"), ("Name a tree.", "elm"), ("Name a tree.", "ash"),
    ]  # fmt: skip
    scores = [score for row in found for score in row["scores"]]
    assert scores == pytest.approx([expected(world, tokenizer, *one) for one in asked], abs=1e-5)
    assert "4 rows" in capsys.readouterr().out


@pytest.mark.parametrize("left", [0, 1, 700, 100_000])
def test_an_interrupted_file_is_gone_on_with(world, tmp_path, monkeypatch, capsys, left):
    monkeypatch.setattr(score_command, "ROWS_AT_ONCE", 3)
    rows = [chat(f"Name {n} trees.", *["oak"] * (1 + n % 2)) for n in range(10)]
    whole = run(world, tmp_path, rows)
    content = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(content[:left])  # in the middle of a line
    assert run(world, tmp_path, rows) == [{**row, "scores": pytest.approx(row["scores"], abs=1e-6)} for row in whole]
    assert ("Going on behind" in capsys.readouterr().out) == (left > 100)


def test_the_output_of_another_input_is_left_alone(world, tmp_path, capsys):
    run(world, tmp_path, ROWS)
    before = (tmp_path / "out.jsonl").read_bytes()
    for other in (ROWS[::-1], ROWS[:2]):
        with pytest.raises(SystemExit):
            run(world, tmp_path, other)
        assert "is not of this input" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


BAD = [
    ({"responses": ["x"]}, "field 'messages': missing"),
    ({"messages": [], "responses": ["x"]}, "field 'messages': expected a list of turns"),
    (chat("x", "y", response="z"), "field 'responses': stands beside response"),
    (chat("x", "", ended=False), "one is empty and did not end"),
    (chat("x", "\ud800"), "holds a NUL or an unpaired surrogate"),
    ({"messages": [{"role": "king", "content": "x"}], "responses": ["x"]}, "field 'messages[0].role': expected one of"),
    ({"messages": [{"role": "user"}], "responses": ["x"]}, "field 'messages[0].content': missing"),
    (chat("x"), "field 'responses': is empty"),
    (chat("x", 7), "field 'responses[0]': expected a string"),
    (chat("x", "y", ended=[True, True]), "field 'ended': expected true, false"),
    ({"messages": [{"role": "assistant", "content": "x"}], "responses": ["x"]}, "must end with the user turn"),
]


@pytest.mark.parametrize(("row", "says"), BAD)
def test_a_bad_row_stops_by_name_and_is_mended(world, tmp_path, capsys, row, says):
    with pytest.raises(SystemExit):
        run(world, tmp_path, [ROWS[0], row])
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert "line 2" in error
    assert len(run(world, tmp_path, ROWS)) == 4


def test_bad_rows_are_written_and_counted_if_asked_for(world, tmp_path, capsys):
    found = run(world, tmp_path, [row for row, _ in BAD] + ROWS, "--skip_bad_rows")
    for row, (given, says) in zip(found, BAD, strict=False):
        assert row["scores"] is None
        assert says in row["error"]
        assert {k: v for k, v in row.items() if k not in ("scores", "error")} == given
    assert all(row["scores"] for row in found[len(BAD) :])
    assert f"{len(BAD)} without scores" in " ".join(capsys.readouterr().out.split())


def test_what_is_too_long_is_cut_and_said(world, tmp_path, capsys):
    history = [{"role": role, "content": "oak " * 30} for role in ("user", "assistant") * 2]
    long = {"messages": [*history, {"role": "user", "content": "?"}], "responses": ["elm"]}
    found = run(world, tmp_path, [long, chat("?", "oak " * 200, "elm"), chat("oak " * 200, "elm")])
    assert [row.get("cut") for row in found] == [["context"], ["response"], None]
    assert found[2]["scores"] is None
    assert "1 context cut, 1 response cut, 1 without scores" in " ".join(capsys.readouterr().out.split())


def test_a_compressed_file_and_flags_that_cannot_be(world, tmp_path, capsys):
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    reward = f"--reward_model_dir={world.reward}"
    cli.score([str(tmp_path / "in.jsonl.gz"), reward, f"--output={tmp_path / 'out.jsonl'}"])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    os.mkfifo(tmp_path / "pipe.jsonl")
    for argv, says in (
        ([], "--input is missing"),
        ([str(tmp_path / "in.jsonl.gz"), reward, f"--output={tmp_path / 'pipe.jsonl'}"], "pipe.jsonl is a pipe"),
        ([str(tmp_path / "none.jsonl"), reward, f"--output={tmp_path / 'o.jsonl'}"], "no such file"),
        (["x.jsonl", reward, "--output=x.jsonl"], "is the file that is read"),
        (["x.jsonl", reward, "--output=x.txt"], "expected a name that ends in .jsonl"),
        (["x.jsonl", reward, "--output=y.jsonl", "--batch_size=0"], "--batch_size is 0"),
    ):
        with pytest.raises(SystemExit):
            cli.score(argv)
        assert says in capsys.readouterr().err


def test_the_output_of_another_model_or_of_nobody_is_left_alone(world, tmp_path, capsys):
    run(world, tmp_path, ROWS)
    before = (tmp_path / "out.jsonl").read_bytes()
    other = [str(tmp_path / "in.jsonl"), f"--reward_model_dir={world.full_reward}"]
    with pytest.raises(SystemExit):
        cli.score([*other, f"--output={tmp_path / 'out.jsonl'}"])
    assert "was begun with another reward model (" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "mine.jsonl").write_text('{"mine": 1}')
    with pytest.raises(SystemExit):
        cli.score([*other, f"--output={tmp_path / 'mine.jsonl'}"])
    assert "this command did not begin it" in capsys.readouterr().err
    assert (tmp_path / "mine.jsonl").read_text() == '{"mine": 1}'


def test_entities_are_decoded_as_in_training_and_old_results_dropped(world, tokenizer, tmp_path):
    row = make_row("Is 1 &lt; 2?", response1="yes", response2="no")
    found = run(world, tmp_path, [{**row, "scores": [9.0], "cut": ["context"], "error": "old"}])
    assert found[0]["scores"][0] == pytest.approx(expected(world, tokenizer, "Is 1 < 2?", "yes"), abs=1e-5)
    assert not {"cut", "error"} & found[0].keys()


def test_the_counts_of_a_row_that_was_done_before_are_kept(world, tmp_path, capsys):
    rows = [chat("oak " * 200, "elm"), chat("?", "oak " * 200)]
    run(world, tmp_path, rows)
    first = capsys.readouterr().out.splitlines()[-1]
    run(world, tmp_path, rows)
    assert capsys.readouterr().out.splitlines()[-1] == first
    assert "1 without scores" in first
    assert "1 response cut" in first
