"""`helpsteer-rloo chat`: the answers of an evaluation, commands, what hostile answers come to, and a real terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from helpsteer_rloo import cli
from helpsteer_rloo.chat import partner as chat_partner
from helpsteer_rloo.chat import screen as chat_screen
from helpsteer_rloo.chat.screen import JsonScreen, TextScreen, converse
from helpsteer_rloo.chat.session import HELP, Answer, Draw, Session, Turn
from helpsteer_rloo.display.console import printable
from helpsteer_rloo.evaluation.policy import EvaluationKnobs, Judges, PolicyPair, evaluate_policy
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.model.loading import Base, load_policy
from helpsteer_rloo.model.merging import merged
from helpsteer_rloo.model.rollout import Sampling, sample_groups, stream
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.run_dir import POLICY_RECORD, read_json, write_json
from tests.broken.conftest import world
from tests.commands.test_export import policy

__all__ = ["policy", "world"]

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [f"Name {n} trees." for n in range(1, 5)]
TOKENS, SEED = 12, 3


def chat(monkeypatch, capfd, lines, *flags):
    """What the command prints for lines of standard input; of JSON if it prints that."""
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(lines if isinstance(lines, bytes) else lines.encode()))
    )
    capfd.readouterr()
    cli.chat([f"--seed={SEED}", f"--max_new_tokens={TOKENS}", *flags])
    output = capfd.readouterr().out
    return [json.loads(line) for line in output.splitlines()] if "--jsonl" in flags else output


def copy_of(policy, target, **changes):
    """The same policy with other entries in its record."""
    target.mkdir()
    for path in policy.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    write_json(target / POLICY_RECORD, {**(read_json(policy / POLICY_RECORD) or {}), **changes})
    return target


# ---- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", ["reward", "full_reward"])  # the one shares the policy's base, the other cannot
def test_answers_and_scores_are_those_of_an_evaluation(world, policy, tiny_base, tokenizer, monkeypatch, capfd, judge):
    directory = getattr(world, judge)
    renderer = Renderer(tokenizer)
    prompts = [(Message("user", question),) for question in QUESTIONS]
    groups = [TokenGroup(prompt, renderer.prompt_ids(prompt), ()) for prompt in prompts]
    pair, knobs = PolicyPair(Base(str(tiny_base)), policy, adapter=True), EvaluationKnobs(TOKENS, 1.0, 1.0, 0, 8, SEED)
    _, samples = evaluate_policy(pair, Judges(directory, world.reward), tokenizer, groups, knobs)
    expected = {row["prompt"][0]["content"]: row for row in samples}
    flags = (f"--policy_dir={policy}", f"--reward_model_dir={directory}", f"--guard_dir={world.reward}", "--jsonl")
    found = chat(monkeypatch, capfd, "\n/reset\n".join(QUESTIONS), *flags)
    assert [turn["prompt"][0]["content"] for turn in found] == QUESTIONS
    for turn in found:
        row = expected[turn["prompt"][0]["content"]]
        for side in ("before", "after"):
            assert {name: turn[side][name] for name in row[side]} == {
                **row[side],
                "reward": pytest.approx(row[side]["reward"], abs=1e-5),
                "guard": pytest.approx(row[side]["guard"], abs=1e-5),
            }
        difference = turn["after"]["reward"] - turn["before"]["reward"]
        assert turn["differences"]["reward"] == pytest.approx(difference)
    assert any(turn["after"]["text"] != turn["before"]["text"] for turn in found)


def test_a_policy_trained_in_full_stands_beside_its_base(world, policy, tiny_base, tmp_path, monkeypatch, capfd):
    full = copy_of(policy, tmp_path / "full", adapter=False)
    for path in full.glob("adapter_*"):
        path.unlink()
    merged(load_policy(Base(str(tiny_base)), adapter=policy)).save_pretrained(full)
    flags = (f"--reward_model_dir={world.reward}", "--jsonl")
    whole = chat(monkeypatch, capfd, QUESTIONS[0], f"--policy_dir={full}", *flags)
    adapter = chat(monkeypatch, capfd, QUESTIONS[0], f"--policy_dir={policy}", *flags)
    for one, other in zip(whole, adapter, strict=True):
        for side in ("before", "after"):
            assert one[side]["text"] == other[side]["text"]
            assert one[side]["reward"] == pytest.approx(other[side]["reward"], abs=1e-4)
    plain = chat(monkeypatch, capfd, QUESTIONS[0], f"--policy_dir={tiny_base}", *flags)
    assert plain[0]["after"]["text"] == adapter[0]["before"]["text"]
    assert "before" not in plain[0]
    alone = chat(monkeypatch, capfd, QUESTIONS[0], f"--policy_dir={policy}", "--before=false", *flags)
    assert "before" not in alone[0]
    after, with_another = alone[0]["after"], adapter[0]["after"]  # scored in a row with the answer before
    assert after | {"reward": 0} == with_another | {"reward": 0}
    assert after["reward"] == pytest.approx(with_another["reward"], abs=1e-5)


def test_the_reward_models_of_the_training_are_found(world, policy, tmp_path, monkeypatch, capfd):
    settings = {**(read_json(policy / POLICY_RECORD) or {})["settings"], "guard_reward_model": str(world.full_reward)}
    found = copy_of(policy, tmp_path / "found", reward_model=str(world.reward), settings=settings)
    (turn,) = chat(monkeypatch, capfd, QUESTIONS[0], f"--policy_dir={found}", "--jsonl")
    assert list(turn["differences"]) == ["reward", "guard"]
    shown = chat(monkeypatch, capfd, QUESTIONS[0], f"--policy_dir={policy}")  # whose record names one that is not there
    assert "Nothing is scored. The reward model of" in " ".join(shown.split())


def test_what_is_too_long_is_cut_or_refused(world, policy, monkeypatch, capfd):
    flags = (f"--policy_dir={policy}", f"--reward_model_dir={world.reward}")
    lines = "\n".join(["oak " * 20] * 6)
    turns = chat(monkeypatch, capfd, lines, *flags, "--jsonl")
    assert turns[0]["left_out"] == 0
    assert turns[-1]["left_out"] > 0
    assert len(turns[-1]["prompt"]) == 11  # as it was said, whole
    assert "were left out" in chat(monkeypatch, capfd, lines, *flags)
    with pytest.raises(SystemExit):
        chat(monkeypatch, capfd, "ok\n" + "oak " * 200, *flags)
    assert "line 2: That turn alone has more than the 84 tokens" in capfd.readouterr().err


def test_an_answer_is_told_token_by_token_and_stopped(tiny_base, tokenizer):
    model = load_policy(Base(str(tiny_base)))
    prompt, sampling = Renderer(tokenizer).prompt_ids([Message("user", "Name a tree.")]), Sampling(9, 1.0, 1.0, 0, ())
    ((whole,),) = sample_groups(model, [prompt], [[5]], sampling, rows=4)
    told = []
    assert stream(model, prompt, 5, sampling, lambda token: told.append(token) or True).ids == whole.ids
    assert tuple(told) == whole.ids[:-1]  # behind the last one nothing goes on
    cut = stream(model, prompt, 5, sampling, lambda token: token != whole.ids[3])
    assert (cut.ids, cut.ended) == (whole.ids[:4], False)


class Silent:
    """A listener that presses Ctrl-C when it has heard so many tokens of the trained policy."""

    def __init__(self, press_at):
        self.heard, self.press_at = 0, press_at

    def hear(self, side, text):
        self.heard += 1
        if self.heard == self.press_at:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_an_answer_between_two_tokens(world, policy):
    settings = cli_settings(f"--policy_dir={policy}", f"--reward_model_dir={world.reward}", "--max_new_tokens=30")
    from helpsteer_rloo.commands import chat as chat_command
    from helpsteer_rloo.model.voices import load_judge

    play = chat_command._play(settings)
    voices = chat_command._voices(settings, play, [])
    judges = {"reward": load_judge(play.judges["reward"], play.source, voices["after"], "reward")}
    before = signal.getsignal(signal.SIGINT)
    for press_at, sides in ((4, ["after"]), (32, ["after", "before"])):
        partner = chat_partner.ModelPartner(play, voices, judges, Silent(press_at))
        _, answers = partner.answer([Message("user", "Name a tree.")], Draw(0, 0, 1.0))
        assert list(answers) == sides
        assert answers[sides[-1]].finish_reason == "interrupted"
        assert answers["after"].tokens == (4 if press_at == 4 else 30)
        assert signal.getsignal(signal.SIGINT) is before
    whole = chat_partner.ModelPartner(play, voices, judges, Silent(0)).answer(
        [Message("user", "Name a tree.")], Draw(0, 0, 1.0)
    )[1]
    assert whole["after"].text.startswith(printable_start(answers["after"].text))
    assert {answer.finish_reason for answer in whole.values()} == {"length"}


def printable_start(text):
    """A text without the characters at its end whose bytes were cut in two."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def cli_settings(*argv):
    from helpsteer_rloo.commands.chat import parse_chat

    return parse_chat(list(argv)).own


def test_the_policys_directory_may_stand_first(policy):
    assert cli_settings(str(policy), "--jsonl").policy_dir == cli_settings(f"--policy_dir={policy}").policy_dir
    assert cli_settings(str(policy), "--jsonl").jsonl


def test_a_command_draws_nothing_before_its_answer():
    shown = io.StringIO()
    screen = TextScreen(Console(file=shown, force_terminal=True, width=120))
    session, _, _ = session_of()
    converse(session, screen, iter(["/seed 4"]), forgiving=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()) == "The seed is 4.\n"


def test_flags_that_cannot_be_are_said(policy, tiny_base, world, tmp_path, capfd, monkeypatch):
    gone = copy_of(policy, tmp_path / "gone", base={"name": "/nowhere/base", "dtype": "float32"})
    full = copy_of(policy, tmp_path / "full", base={"name": "/nowhere/base", "dtype": "float32"}, adapter=False)
    for argv, says in (
        ([], "--policy_dir is missing"),
        ([f"--policy_dir={policy}", "--temperature=nan"], "--temperature is nan"),
        ([f"--policy_dir={policy}", "--max_new_tokens=0"], "--max_new_tokens is 0"),
        ([f"--policy_dir={policy}", "--seed=-1"], "--seed is -1"),
        ([f"--policy_dir={gone}"], "stands on, /nowhere/base, is not there"),
        ([f"--policy_dir={tiny_base}", "--before"], "has no record of what it was before"),
        ([f"--policy_dir={full}", "--before"], "/nowhere/base"),
        ([f"--policy_dir={policy}", f"--guard_dir={tmp_path}"], "--guard_dir"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit):
            cli.chat(argv)
        assert says in " ".join(capfd.readouterr().err.split())


# ---- the conversation ---------------------------------------------------------------------------------------------


class Parrot:
    """Answers with what it was asked, and remembers that."""

    def __init__(self, texts=None):
        self.asked, self.draws, self.texts = [], [], texts

    def answer(self, messages, draw):
        self.asked.append([f"{m.role[0]}:{m.content}" for m in messages])
        self.draws.append((draw.seed, draw.number, draw.temperature))
        text = messages[-1].content
        if text == "too long":
            raise ValueError("too long")
        after, before = self.texts or (f"{text}+", f"{text}-")
        return 0, {
            "after": Answer(after, "stop", 1, {"reward": 2.0}),
            "before": Answer(before, "length", 1, {"reward": 0.5}),
        }


def session_of(*lines, system=None):
    partner = Parrot()
    session = Session(partner, system, 1, 1.0)
    return session, partner, [session.take(line) for line in lines]


def test_a_conversation_goes_on_with_the_answer_that_was_taken():
    session, partner, said = session_of("a", "b", "/before", "c", "/undo", "/undo", "d", "/after", "e", system="S")
    assert partner.asked == [
        ["s:S", "u:a"],
        ["s:S", "u:a", "a:a+", "u:b"],
        ["s:S", "u:a", "a:a+", "u:b", "a:b-", "u:c"],
        ["s:S", "u:a", "a:a+", "u:d"],
        ["s:S", "u:a", "a:a+", "u:d", "a:d+", "u:e"],
    ]
    assert said[0].differences == {"reward": 1.5}
    assert [turn.prompt[-1].content for turn in session.turns] == ["a", "d", "e"]


def test_every_answer_is_a_draw_of_its_own_until_a_seed_is_set():
    session, partner, _ = session_of(
        "a", "/retry", "/seed 7", "/temperature 0.5", "b", "/reset", "/system T", "c", "//d"
    )
    assert partner.draws == [(1, 0, 1.0), (1, 1, 1.0), (7, 0, 0.5), (7, 1, 0.5), (7, 2, 0.5)]
    assert partner.asked[1] == ["u:a"]
    assert partner.asked[3:] == [["s:T", "u:c"], ["s:T", "u:c", "a:c+", "u:/d"]]
    assert session.take("/help") == HELP
    session.take("/quit")
    assert session.ended


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nothing", "There is no command /nothing (see /help)"),
        ("/undo", "no turn yet"), ("/retry", "no turn yet"), ("/before", "no turn yet"),
        ("/seed x", "not 'x'"), ("/seed -1", "not '-1'"), ("/seed ²", "not '²'"), ("/seed", "not ''"),
        ("/temperature hot", "not 'hot'"), ("/temperature 0", "/temperature is 0"), ("/temperature inf", "is inf"),
        ("/save", "takes the name of a file"), ("/save /", "no file can be written"),
        ("/save nowhere/a.jsonl", "/save nowhere/a.jsonl: there is no directory nowhere"),
        ("a\x00b", "is not text"), ("\udcff", "is not text"), ("too long", "too long"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_and_changes_nothing(line, says):
    session, partner, _ = session_of()
    with pytest.raises(ValueError, match=re.escape(says)):
        session.take(line)
    session.take("a")
    assert partner.draws[-1] == (1, 0, 1.0)
    assert len(session.turns) == 1


def test_a_retry_that_fails_leaves_the_turn():
    session, partner, _ = session_of("a")
    partner.texts = ("x", "y")
    partner.answer = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        session.take("/retry")
    assert [turn.answers["after"].text for turn in session.turns] == ["a+"]


def test_a_conversation_is_saved_and_nothing_overwritten(tmp_path):
    session, *_ = session_of("a", "b", "/before", f"/save {tmp_path / 'c.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["taken"] for row in rows] == ["after", "before"]
    assert rows[0]["before"] == {"text": "a-", "ended": False, "finish_reason": "length", "tokens": 1, "reward": 0.5}
    assert rows[1]["prompt"][1] == {"role": "assistant", "content": "a+"}
    with pytest.raises(ValueError, match="is there already"):
        session.take(f"/save {tmp_path / 'c.jsonl'}")


# ---- what is shown ------------------------------------------------------------------------------------------------

HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07", "\x9b31mred", "\x1b]52;c;b3duZWQ=\x07", "[bold red]x[/] [link=file:///]y[/link] [/nope]",
    "a\rb\x08\x08c\x0bd", "\u202egnp.exe\u202c\u2066x", "\x1bP+q\x1b\\", ":skull: \x7f\x85\u2028", "\x00\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("width", [60, 160])
def test_what_a_model_wrote_is_not_obeyed(text, width, capfd):
    shown = io.StringIO()
    screen = TextScreen(Console(file=shown, force_terminal=True, color_system=None, width=width, emoji=False))
    session = Session(Parrot((text, text)), None, 0, 1.0)
    screen.show(session.take("a"))
    screen.say(text)
    assert not [c for c in shown.getvalue() if c in "\x1b\x9b\x07\r\x08\x0b\x7f\x85\u202e\u202c\u2066\u2028\x00\ud800"]
    assert printable(text).splitlines()[0][:8] in shown.getvalue()
    with screen.answering():
        screen.hear("after", text)
        screen.hear("before", text)
    for control in ("\x1b]", "\x1b[2J", "\x1bP", "\x9b", "\u202e", "\x07", "\x08"):
        assert control not in shown.getvalue()
    JsonScreen().show(session.turns[0])
    JsonScreen().say(text)
    output, errors = capfd.readouterr()
    assert output.isascii()
    assert output.rstrip("\n").isprintable()
    assert json.loads(output)["after"]["text"] == text
    assert "\x1b" not in errors


def test_answers_stand_side_by_side_where_there_is_room():
    for width, lines in ((160, 1), (60, 2)):
        shown = io.StringIO()
        TextScreen(Console(file=shown, width=width)).show(session_of("word")[2][0])
        assert sum("word" in line for line in shown.getvalue().splitlines()) == lines
        assert "reward +2.000, 1 tokens" in shown.getvalue()
        assert "reward +0.500, 1 tokens, cut off at the limit" in shown.getvalue()
        assert "trained less untrained: reward +1.500" in shown.getvalue()


def test_a_mistake_ends_a_script_and_not_a_conversation():
    shown = io.StringIO()
    screen = TextScreen(Console(file=shown, width=100))
    session = Session(Parrot(), None, 0, 1.0)
    converse(session, screen, iter(["a", "", "/nothing", "b", "/quit", "c"]), forgiving=True)
    assert [turn.prompt[-1].content for turn in session.turns] == ["a", "b"]
    assert "There is no command /nothing" in shown.getvalue()
    strict = Session(Parrot(), None, 0, 1.0)
    with pytest.raises(ValueError, match="Standard input, line 2: There is no command /nothing"):
        converse(strict, screen, iter(["a", "/nothing", "b"]), forgiving=False)
    assert len(strict.turns) == 1


def test_bytes_that_are_no_text_are_refused(policy, monkeypatch, capfd):
    with pytest.raises(SystemExit):
        chat(monkeypatch, capfd, b"\xff\xfe", f"--policy_dir={policy}")
    assert "Standard input, line 1: That holds a NUL, or bytes" in capfd.readouterr().err


# ---- a terminal ---------------------------------------------------------------------------------------------------

SLOWLY = """
import time, sys
from helpsteer_rloo import cli
from helpsteer_rloo.chat import partner as chat_partner
hear = chat_partner.ModelPartner._text
chat_partner.ModelPartner._text = lambda self, ids: (time.sleep(0.05), hear(self, ids))[1]
cli.chat(sys.argv[1:])
"""
"""The command, its answers slow enough to be stopped."""


class Terminal:
    """What a person sees and types."""

    def __init__(self, process, handle):
        self.process, self._handle, self.seen = process, handle, ""

    def type(self, text):
        os.write(self._handle, text.encode())

    def until(self, text, since=0):
        """Read until a text has come behind a place in what was seen; the place behind that text."""
        end = time.monotonic() + 90
        while text not in self.seen[since:]:
            assert time.monotonic() < end, self.seen
            assert self.process.poll() is None or select.select([self._handle], [], [], 0)[0], self.seen
            if select.select([self._handle], [], [], 0.1)[0]:
                self.seen += os.read(self._handle, 65536).decode(errors="replace")
        return self.seen.index(text, since) + len(text)


@contextmanager
def terminal(*flags):
    handle, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *flags], cwd=ROOT, stdin=end, stdout=end, stderr=subprocess.DEVNULL,
        start_new_session=True, env=environment, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(end)
    try:
        yield Terminal(process, handle)
    finally:
        process.kill()
        process.wait()
        os.close(handle)


def take_terminal():
    """Make standard input the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_a_conversation_at_a_terminal(policy, world):
    flags = (f"--policy_dir={policy}", f"--reward_model_dir={world.reward}", "--max_new_tokens=70", "--seed=1")
    with terminal(*flags) as shown:
        seen = shown.until("you> ")
        shown.type("Name a tree.\n")
        seen = shown.until("trained", seen)  # while it is drawn
        shown.type("\x03")
        seen = shown.until("stopped", seen)
        assert "untrained" not in shown.seen
        seen = shown.until("you> ", seen)
        shown.type("half a line\x03")
        seen = shown.until("Ctrl-D or /quit ends.", seen)
        shown.type("/seed 4\n")
        seen = shown.until("/seed 4\r\n\x1b[2mThe seed is 4.", seen)  # at once below, without an empty line
        shown.type("/nothing\n")
        seen = shown.until("There is no command /nothing", seen)
        shown.type("Name 2 trees.\n")
        seen = shown.until("trained less untrained: reward", seen)
        seen = shown.until("you> ", seen)
        shown.type("\x04")
        assert shown.process.wait(60) == 0


def test_lines_as_they_are_typed(monkeypatch):
    """Ctrl-C forgets a line, bytes that are no text are said, Ctrl-D ends."""
    given = iter(["a", KeyboardInterrupt, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "b", EOFError])
    said = []

    def read(prompt):
        found = next(given)
        if not isinstance(found, str):
            raise found
        return found

    monkeypatch.setattr("builtins.input", read)
    screen = JsonScreen()
    monkeypatch.setattr(screen, "say", said.append, raising=False)
    assert list(chat_screen.typed_lines(screen)) == ["a", "b"]
    assert said == ["Ctrl-D or /quit ends.", "That is not UTF-8."]


def test_a_turn_is_a_record():
    turn = Turn((Message("user", "a"),), 0, Draw(1, 2, 1.0), {"after": Answer("b", "stop", 1)})
    assert turn.differences == {}
    assert turn.to_json() == {
        "prompt": [{"role": "user", "content": "a"}], "left_out": 0, "seed": 1, "number": 2, "temperature": 1.0,
        "after": {"text": "b", "ended": True, "finish_reason": "stop", "tokens": 1}, "differences": {},
        "taken": "after",
    }  # fmt: skip
