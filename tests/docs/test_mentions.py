"""What the text of the documents mentions in passing exists: flags, commands, targets, modules, files."""

import re

import pytest

from helpsteer_rloo.cli import COMMANDS
from helpsteer_rloo.commands.demo import demo_flags
from helpsteer_rloo.settings.config import PIPELINE, REWARD, RLOO
from tests.docs.commands import check, commands_of
from tests.docs.pages import DOCS, GENERATED, ROOT, Block, all_pages, spans
from tools import flags_page

PAGES = [page for page in all_pages() if page not in (ROOT / "CHANGELOG.md", GENERATED)]
"""Without the change log, which tells of what was, and what is made from the parsers."""
OF_OTHERS = {
    "docs/comparison.md": r"--(algo|train|reward)\..*",
    "docs/several-processes.md": r"--num_processes|--machine_rank",
    "docs/tutorials/eight-gpus.md": r"--num_processes",
    "docs/memory.md": r"--huge_pages|--pairs",
    "docs/watching-a-run.md": r"--logdir",
    "docs/performance.md": r"--steps|--huge_pages|--quick|--threads",
    "CONTRIBUTING.md": r"--check",
    "README.md": r"--config_file",
}
"""Flags of other programs, by the page that mentions them."""


def known_flags() -> set[str]:
    commands = [PIPELINE, REWARD, RLOO, *flags_page.commands().values()]
    own = {name for command in commands for name in command.flag_names()} | {flag.name for flag in demo_flags()}
    own |= {*RLOO.refused, *REWARD.refused, "config", "help", "FLAG", "name", "reward", "rloo"}
    staged = {f"{stage}.{name}" for stage, command in (("reward", REWARD), ("rloo", RLOO)) for name in own_of(command)}
    return own | staged


def own_of(command) -> set[str]:
    return {*command.flag_names(), *command.refused, "FLAG", ""}


def flags_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--([A-Za-z_][\w.]*)", text)


def unknown_flags(page, text, known) -> list[str]:
    others = OF_OTHERS.get(page.relative_to(ROOT).as_posix(), "$")
    return [flag for flag in flags_in(text) if flag.rstrip(".") not in known and not re.fullmatch(others, f"--{flag}")]


def test_every_flag_that_is_mentioned_exists(capsys):
    known = known_flags()
    mentioned = [(page, line, text) for page in PAGES for line, text in spans(page) if flags_in(text)]
    found = ((page.name, line, unknown_flags(page, text, known)) for page, line, text in mentioned)
    wrong = [f"{page}:{line}: {flags}" for page, line, flags in found if flags]
    with capsys.disabled():
        print(f"\nflags mentioned in text: {sum(len(flags_in(text)) for _, _, text in mentioned)}")
    assert not wrong, "\n".join(wrong)
    assert unknown_flags(DOCS / "data.md", "`--max_lengths`", known) == ["max_lengths"]


def commands_in_text():
    """Commands within text that are whole: nothing in capitals or brackets stands for what is to be put in."""
    for page in PAGES:
        for line, text in spans(page):
            whole = not re.search(r"[A-Z]{2,}|\[|…", text)
            if whole and re.match(r"(make|python -m|python \w+\.py|helpsteer-rloo) \w", text):
                yield pytest.param(page, line, text, id=f"{page.name}:{line}:{text[:40]}")


@pytest.mark.parametrize(("page", "line", "text"), list(commands_in_text()))
def test_a_command_that_is_mentioned_exists(page, line, text):
    words = text.split()
    if words[0] == "helpsteer-rloo" and len(words) < 4:  # a name and an argument, not a whole command
        assert words[1] in COMMANDS
    else:
        for command in commands_of(Block(page, line, "bash", text)):
            check(command)


def test_every_file_that_is_mentioned_exists():
    pattern = re.compile(r"(tests|docs|benchmarks|configs|helpsteer_rloo|tools|\.ci)/[\w/.-]*\w")
    for page in PAGES:
        for line, text in spans(page):
            if pattern.fullmatch(text) and page.name != "comparison.md":
                assert (ROOT / text).exists(), f"{page.name}:{line}: {text}"
