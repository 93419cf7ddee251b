"""`helpsteer-rloo chat`: a conversation with a trained policy, beside what it was before, each answer scored."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer_rloo.chat.playing import Play, PlayKnobs, check_play, open_play, policy_of
from helpsteer_rloo.chat.session import Side
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import named_positions, parse_command

if TYPE_CHECKING:
    from helpsteer_rloo.chat.partner import ModelPartner
    from helpsteer_rloo.chat.screen import Screen
    from helpsteer_rloo.model.voices import Voice


@dataclass(frozen=True, kw_only=True)
class ChatKnobs(PlayKnobs):
    """Who answers and judges, and how it is shown."""

    guard_dir: str | None = field(
        default=None,
        metadata={"help": "Directory of a second reward model (default: the guard of the policy's training)."},
    )
    before: bool | None = field(
        default=None,
        metadata={"help": "Show the untrained policy's answers too (default: if it can be loaded)."},
    )
    system: str | None = field(default=None, metadata={"help": "System turn of the conversation."})
    jsonl: bool = field(default=False, metadata={"help": "Print one line of JSON a turn, for scripts."})


CHAT = CommandSpec(
    program="helpsteer-rloo chat",
    description="Talk with a trained policy. Where standard input is no terminal, every line of it is a turn.",
    knobs=ChatKnobs,
    usage="POLICY_DIR [FLAGS]",
)


def parse_chat(argv: Sequence[str] | None = None) -> Settings[ChatKnobs]:
    """Read the policy's directory and the flags of the command."""
    given = named_positions(sys.argv[1:] if argv is None else argv, ["policy_dir"])
    return parse_command(CHAT, given, checks=[lambda settings: check_play(settings.own)])


def run_chat(settings: Settings[ChatKnobs]) -> None:
    """Load the models and talk until the end of the input.

    Raises:
        ValueError: a model cannot be loaded, or the input, if it is no terminal, holds a mistake.
    """
    from rich.console import Console

    from helpsteer_rloo.chat.screen import JsonScreen, TextScreen, converse, read_lines, typed_lines
    from helpsteer_rloo.chat.session import Session
    from helpsteer_rloo.display.live import loading

    own = settings.own
    screen = JsonScreen() if own.jsonl else TextScreen(Console())
    notes: list[str] = []
    with loading("the models"):
        play, partner = _load(own, screen, notes)
    for note in notes:
        screen.say(note)
    session = Session(partner, own.system, play.seed, play.temperature)
    for name, directory in play.judges.items():
        screen.say(f"{name}: {directory}")
    if not play.judges:
        screen.say(f"Nothing is scored. {play.source.absence_of_judge('reward_model', '--reward_model_dir')}")
    typed = sys.stdin.isatty()
    if typed:
        screen.say("Type a turn and Enter; /help lists the commands, Ctrl-D ends.")
    converse(session, screen, typed_lines(screen) if typed else read_lines(), forgiving=typed)


def _load(own: ChatKnobs, screen: "Screen", notes: list[str]) -> "tuple[Play, ModelPartner]":
    """The policy as it is played, and who answers.

    What cannot be used is said before the models' libraries are imported, and what is to be known goes to `notes`.
    """
    play = _play(own)
    notes.extend(f"WARNING: {doubt}" for doubt in play.doubts)
    from helpsteer_rloo.chat.partner import ModelPartner
    from helpsteer_rloo.model.voices import load_judge

    voices = _voices(own, play, notes)
    judges = {
        name: load_judge(directory, play.source, voices["after"], name) for name, directory in play.judges.items()
    }
    return play, ModelPartner(play, voices, judges, screen)


def _play(own: ChatKnobs) -> Play:
    source = policy_of(own)
    given = {"reward": own.reward_model_dir, "guard": own.guard_dir}
    trained_with = {"reward": source.judge("reward_model"), "guard": source.judge("guard_reward_model")}
    flags = {"reward": "--reward_model_dir", "guard": "--guard_dir"}
    judges = {role: Path(name) if name else trained_with[role] for role, name in given.items()}
    return open_play(own, source, {role: (flags[role], directory) for role, directory in judges.items()})


def _voices(own: ChatKnobs, play: Play, notes: list[str]) -> "Mapping[Side, Voice]":
    """The policy, and what it was before if that is asked for, or can be had and nothing was said.

    Raises:
        ValueError: one cannot be loaded.
    """
    from helpsteer_rloo.model.voices import load_start, load_voice

    tokenizer = play.renderer.tokenizer
    voices: dict[Side, Voice] = {"after": load_voice(play.source, tokenizer)}
    if own.before is False or not (play.source.is_trained or own.before):
        return voices
    try:
        if not play.source.is_trained:
            raise ValueError(f"--policy_dir {own.policy_dir} has no record of what it was before: --before false.")
        voices["before"] = load_start(play.source, voices["after"], tokenizer)
    except ValueError as error:
        if own.before:
            raise
        notes.append(f"Without the untrained policy: {error}")
    return voices
