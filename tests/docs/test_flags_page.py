"""The pages of flags are those of the parsers."""

import argparse

from helpsteer_rloo.cli import COMMANDS
from helpsteer_rloo.commands.demo import demo_flags
from helpsteer_rloo.settings.config import PIPELINE, REWARD, RLOO
from tools import flags_page


def test_the_committed_page_is_that_of_the_parsers():
    assert (flags_page.DOCS / "flags.md").read_text() == flags_page.own_page(), "make docs writes it anew"


def test_every_flag_of_every_command_is_there():
    own, trl = flags_page.own_page(), flags_page.trl_page()
    commands = [PIPELINE, REWARD, RLOO, *flags_page.commands().values()]
    assert {command.program.split()[-1] for command in commands[3:]} == set(COMMANDS) - {*flags_page.SCRIPTS, "demo"}
    names = {name for command in commands for name in command.flag_names()} | {flag.name for flag in demo_flags()}
    assert len(names) > 200
    assert [name for name in names if f"| `--{name}` |" not in own + trl] == []


def test_every_own_flag_has_a_meaning():
    rows = [line.split(" | ") for line in flags_page.own_page().splitlines() if line.startswith("| `--")]
    assert [row[0] for row in rows if len(row[-1].strip(" |")) < 3] == []


def test_what_a_cell_holds_is_shown_as_it_is():
    assert flags_page._text("a `b|c` <d> e_f* &lt;") == "a `b\\|c` &lt;d> e\\_f\\* &amp;lt;"


def test_the_demos_flags_are_those_of_its_parser():
    assert {flag.name for flag in demo_flags()} >= {"config", "seed", "output_dir", "engine", "guard"}
    assert all(flag.help and flag.default != argparse.SUPPRESS for flag in demo_flags())
