"""`helpsteer-rloo best-of`: answers of the sampler, scores of `score`, and the same bytes however it came to them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpsteer_rloo import cli, events
from helpsteer_rloo.commands import best_of as best_of_command
from helpsteer_rloo.commands.best_of import AT_ONCE
from helpsteer_rloo.evaluation.best_of_n import best_of_n_kl
from helpsteer_rloo.events import Progressed, subscribed
from helpsteer_rloo.groups import Message
from helpsteer_rloo.model.forward import score_sequences
from helpsteer_rloo.model.loading import Base, end_ids, load_policy, load_reward_model
from helpsteer_rloo.model.rollout import Sampling, sample_groups, sequence_seed
from helpsteer_rloo.model.voices import Voice
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.run_dir import POLICY_RECORD, read_json, write_json
from tests.broken.conftest import world
from tests.commands.test_export import policy
from tests.data.rows import make_row, write_jsonl

__all__ = ["policy", "world"]

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [f"Name {n} trees." for n in range(1, 6)]
ROWS = [{"messages": [{"role": "user", "content": question}], "id": n} for n, question in enumerate(QUESTIONS)]
N, SEED, TOKENS = 5, 7, 6


def flags_of(world, policy, tmp_path, *more):
    return [
        f"--policy_dir={policy}", f"--reward_model_dir={world.reward}", f"--output={tmp_path / 'out.jsonl'}",
        f"--seed={SEED}", f"--max_new_tokens={TOKENS}", *more,
    ]  # fmt: skip


def run(world, policy, tmp_path, rows, *more, n=N):
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    cli.best_of([str(n), str(source), *flags_of(world, policy, tmp_path, *more)])
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def drawn(tokenizer, policy, base, n=N):
    """What the sampler draws for the questions, all at once."""
    renderer, model = Renderer(tokenizer), load_policy(Base(str(base)), adapter=policy)
    prompts = [renderer.prompt_ids([Message("user", question)]) for question in QUESTIONS]
    seeds = [[sequence_seed(SEED, line, number) for number in range(n)] for line in range(1, len(prompts) + 1)]
    sampling = Sampling(TOKENS, 1.0, 1.0, 0, tuple(end_ids(model, tokenizer)))
    return prompts, sample_groups(model, prompts, seeds, sampling, rows=64)


def test_answers_are_the_samplers_and_scores_the_reward_models(world, policy, tiny_base, tokenizer, tmp_path, capsys):
    found = run(world, policy, tmp_path, ROWS, "--keep_all")
    prompts, answers = drawn(tokenizer, policy, tiny_base)
    judge, renderer = load_reward_model(world.reward)[0], Renderer(tokenizer)
    for row, given, prompt, own in zip(found, ROWS, prompts, answers, strict=True):
        assert {name: row[name] for name in given} == given
        samples, about = row["best_of"]["samples"], row["best_of"]
        assert [one["response"] for one in samples] == tokenizer.batch_decode([list(a.body) for a in own])
        assert [one["ended"] for one in samples] == [answer.ended for answer in own]
        scores = [one["score"] for one in samples]
        assert scores == pytest.approx(score_sequences(judge, [(*prompt, *a.ids) for a in own], 1), abs=1e-5)
        assert row["score"] == max(scores) == scores[about["sample"]]
        assert {name: row[name] for name in samples[0]} == samples[about["sample"]]
        assert about["mean_score"] == pytest.approx(sum(scores) / N)
        assert about["kl"] == best_of_n_kl(N)
        assert row["finish_reason"] == ("stop" if row["ended"] else "length")
    assert len({row["response"] for row in found}) > 1
    shown = " ".join(capsys.readouterr().out.split())
    best = sum(row["score"] for row in found) / len(found)
    one = sum(row["best_of"]["mean_score"] for row in found) / len(found)
    assert f"score of the best (prompts) │ {best:.3f} ({len(found)})" in shown
    assert f"gain (prompts) │ {best - one:.3f} ({len(found)})" in shown
    assert f"nats) │ {best_of_n_kl(N):.3f}" in shown
    assert renderer.prompt_ids([Message("user", QUESTIONS[0])]) == prompts[0]


def test_score_gives_the_same_answers_the_same_scores(world, policy, tiny_base, tokenizer, tmp_path):
    found = run(world, policy, tmp_path, ROWS, "--keep_all", n=16)
    renderer, (_, answers) = Renderer(tokenizer), drawn(tokenizer, policy, tiny_base, n=16)
    rows, expected = [], []
    for row, own in zip(found, answers, strict=True):
        for one, answer in zip(row["best_of"]["samples"], own, strict=True):
            # a random model draws ids that its tokenizer would not make of their text
            if renderer.continuation_ids(one["response"], ended=one["ended"]) == answer.ids:
                rows.append({"messages": row["messages"], "response": one["response"], "ended": one["ended"]})
                expected.append(one["score"])
    assert len(rows) >= 5
    source = write_jsonl(tmp_path / "answers.jsonl", rows)
    cli.score([str(source), f"--reward_model_dir={world.reward}", f"--output={tmp_path / 'scored.jsonl'}"])
    scored = [json.loads(line)["scores"][0] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert scored == pytest.approx(expected, abs=1e-5)


def test_the_best_answers_are_a_file_that_score_takes(world, policy, tmp_path):
    given = [{**row, "responses": ["old", "older"], "ended": [True, False]} for row in ROWS]
    found = run(world, policy, tmp_path, given)
    assert all("responses" not in row and "samples" not in row["best_of"] for row in found)
    flags = [f"--reward_model_dir={world.reward}", f"--output={tmp_path / 'scored.jsonl'}"]
    cli.score([str(tmp_path / "out.jsonl"), *flags])
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == len(ROWS)


@pytest.mark.parametrize("left", [0, 1, 400, 1500, 100_000])
def test_the_bytes_are_the_same_whatever_is_done_together_and_when_gone_on_with(world, policy, tmp_path, left, capsys):
    run(world, policy, tmp_path, ROWS, "--batch_size=16")
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[:left])
    run(world, policy, tmp_path, ROWS, f"--batch_size={1 + left % 3}")
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert ("Going on behind" in capsys.readouterr().out) == (left > 300)


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(world, policy, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Name {n} trees."}]} for n in range(150)]
    whole = tmp_path / "whole"
    whole.mkdir()
    run(world, policy, whole, rows)
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = flags_of(world, policy, tmp_path, "--batch_size=2")
    command = [sys.executable, "-m", "helpsteer_rloo.cli", "best-of", str(N), str(source), *flags]
    output = tmp_path / "out.jsonl"
    for lines in (1, 70):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < lines):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert 0 < len(output.read_bytes()) < len((whole / "out.jsonl").read_bytes())
    run(world, policy, tmp_path, rows)
    assert output.read_bytes() == (whole / "out.jsonl").read_bytes()


@pytest.mark.parametrize("more", [[], ["--keep_all"]])
def test_many_answers_are_drawn_in_blocks_to_the_same_bytes(world, policy, tmp_path, monkeypatch, more):
    drawn, draw = [], Voice.draw

    def drawing(self, prompt, seeds, *rest, **options):
        drawn.append(len(seeds))
        return draw(self, prompt, seeds, *rest, **options)

    monkeypatch.setattr(Voice, "draw", drawing)
    for name, size, counts in (("whole", 1024, [210]), ("parts", 64, [64, 64, 82])):
        monkeypatch.setattr(best_of_command, "BLOCK", size)
        drawn.clear()
        (tmp_path / name).mkdir()
        run(world, policy, tmp_path / name, ROWS[:2], *more, n=210)
        assert drawn == counts * 2
    whole, parts = ((tmp_path / name / "out.jsonl").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert json.loads(whole.splitlines()[0])["best_of"]["n"] == 210


@pytest.mark.parametrize("n", [1, 63, 64, 127, 128, 129, 1000, 4096])
def test_blocks_are_all_answers_in_order_and_none_too_small_to_be_drawn_alike(n):
    found = list(best_of_command.blocks(n, 256))
    assert [number for one in found for number in one] == list(range(n))
    assert max(map(len, found)) < 256 + AT_ONCE
    assert min(map(len, found)) >= min(n, AT_ONCE)
    assert all(one.start % AT_ONCE == 0 for one in found)


def test_rows_and_answers_that_are_done_are_told(world, policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(best_of_command, "BLOCK", 64)
    monkeypatch.setattr(best_of_command, "PATIENCE", 0.0)
    monkeypatch.setattr(events, "EVERY", 0.0)
    monkeypatch.setattr("helpsteer_rloo.display.live._SECONDS", {"plain": 0.0})
    heard = []
    with subscribed(heard.append):
        run(world, policy, tmp_path, ROWS, n=130)
    told = [event for event in heard if isinstance(event, Progressed) and not event.ended]
    rows = [(event.step, event.steps, event.unit) for event in told if event.task == "answering"]
    assert rows == [(number, 5, "rows") for number in range(6)]
    answers = [(event.step, event.steps) for event in told if event.task == "row 2"]
    assert answers == [(0, 130), (64, 130), (130, 130)]
    lines = capsys.readouterr().out.splitlines()
    assert any(text.startswith("> answering 1/5 rows, 20%, row 2 64/130 answers, 49%, ") for text in lines)
    heard.clear()
    content = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(content[:3]))
    with subscribed(heard.append):
        run(world, policy, tmp_path, ROWS, n=130)
    assert heard[0] == Progressed("answering", 3, 5, "rows")


def test_rows_of_helpsteer3_bad_rows_and_prompts_that_are_too_long(world, policy, tmp_path, capsys):
    whole = make_row("Name &lt;a&gt; tree.", response1="elm", response2="ash")
    alone = {"context": whole["context"]}
    history = [{"role": role, "content": "oak " * 30} for role in ("user", "assistant") * 2]
    long = {"messages": [*history, {"role": "user", "content": "?"}]}
    rows = [whole, alone, {"messages": []}, long, {"messages": [{"role": "user", "content": "oak " * 200}]}]
    with pytest.raises(SystemExit):
        run(world, policy, tmp_path, rows)
    assert "line 3, field 'messages': expected a list of turns" in " ".join(capsys.readouterr().err.split())
    first, second, bad, cut, too_long = run(world, policy, tmp_path, rows, "--skip_bad_rows", "--temperature=0.01")
    assert first["response"] == second["response"]  # at no temperature draws do not matter
    assert first["response1"] == "elm"
    assert bad["response"] is None
    assert "expected a list of turns" in bad["error"]
    assert cut["cut"] == ["context"]
    assert too_long["response"] is None
    assert "5 rows, 2 without answers, 1 context cut" in " ".join(capsys.readouterr().out.split())


def test_a_plain_model_answers_too(world, policy, tiny_base, tmp_path):
    found = run(world, tiny_base, tmp_path, ROWS)
    other = tmp_path / "trained"
    other.mkdir()
    assert [row["response"] for row in found] != [row["response"] for row in run(world, policy, other, ROWS)]


def test_an_output_of_other_settings_is_left_alone(world, policy, tmp_path, capsys):
    run(world, policy, tmp_path, ROWS)
    before = (tmp_path / "out.jsonl").read_bytes()
    for more, says in (("--seed=8", "seed"), ("--temperature=0.5", "temperature"), ("--keep_all", "keep all")):
        with pytest.raises(SystemExit):
            run(world, policy, tmp_path, ROWS, more)
        assert f"was begun with another {says} (" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_what_is_said_of_a_damaged_companion_of_the_output_helps(world, policy, tmp_path, capsys):
    run(world, policy, tmp_path, ROWS)
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl.of.json").write_text("{")
    with pytest.raises(SystemExit):
        run(world, policy, tmp_path, ROWS)
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith(f"; delete it and {tmp_path / 'out.jsonl'}, or give another --output.")
    for name in ("out.jsonl", "out.jsonl.of.json"):
        (tmp_path / name).unlink()
    run(world, policy, tmp_path, ROWS)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_what_cannot_be_is_said(world, policy, tmp_path, capsys):
    source = str(write_jsonl(tmp_path / "in.jsonl", ROWS))
    flags, moved = flags_of(world, policy, tmp_path), tmp_path / "moved"
    moved.mkdir()
    for path in policy.iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    record = read_json(policy / POLICY_RECORD) or {}
    write_json(moved / POLICY_RECORD, {**record, "base": {**record["base"], "name": str(tmp_path / "gone")}})
    for argv, says in (
        ([], "--input is missing"),
        (["few", source, *flags], "--n: expected int"),
        (["0", source, *flags], "--n is 0; expected at least 1"),
        (["2000000", source, *flags], "--n is 2000000; expected at most 1000000: time grows with n, and what choosing"),
        (["10001", source, *flags, "--keep_all"], "expected --n 10000 at most with it, not 10001"),
        (["2", source, *flags, "--batch_size=0"], "--batch_size is 0"),
        (["2", source, *flags, "--temperature=0"], "--temperature is 0; expected more than 0"),
        (["2", source, *flags, "--top_p=2"], "--top_p is 2.0"),
        (["2", source, *flags, "--output=x.txt"], "expected a name that ends in .jsonl"),
        (["2", source, *flags, "--max_new_tokens=95"], "--max_new_tokens 95 leaves 1 tokens for the prompt"),
        (["2", source, *flags, f"--policy_dir={tmp_path}"], "neither a policy of this project"),
        (
            ["2", source, *flags, f"--policy_dir={moved}"],
            f"stands on, {tmp_path / 'gone'}, is not there, nor beside it. Put",
        ),
        (
            ["2", source, f"--policy_dir={policy}", f"--output={tmp_path / 'o.jsonl'}"],
            "models/rm, is not there, nor beside the policy: say by --reward_model_dir where it is now",
        ),
        (["2", str(tmp_path / "none"), *flags], "no such file"),
        (["2", source, *flags, "--reward_model_dir=none"], "models/rm, is not there, nor beside the policy"),
    ):
        with pytest.raises(SystemExit):
            cli.best_of(argv)
        assert says in " ".join(capsys.readouterr().err.split())
