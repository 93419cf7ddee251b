"""The commands in the documents: found in their blocks of code, and parsed as the real programs parse them.

A block of `bash`, `sh` or no language holds commands alone; in one of `console` or `text` the lines behind `$ ` are
commands, and what follows them is their output. A comment that begins with "needs" says, to readers and to the tests,
why a command is not run: alone on its line it holds for the rest of the block, behind a command for that one.

    # needs a GPU and the hub
    python train_pipeline.py --use_peft

`python -m tests.docs.commands` lists all of them by kind.
"""

import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from helpsteer_rloo import cli
from helpsteer_rloo.settings import checks
from tests.docs.pages import ROOT, Block, all_pages, blocks

SHELL, TRANSCRIPT = ("bash", "sh", ""), ("console", "text")
NEEDS = re.compile(r"(?:^|\s)# (needs .+)$")
TOOLS = ("cat", "curl", "head", "ls", "printf", "zcat")
"""Programs of every machine, which are run as they stand."""
_PROGRAMS = ("accelerate", "helpsteer-rloo", "make", "pip", "python", "source", "trl", *TOOLS)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_HEREDOC = re.compile(r"<<'(\w+)'$")


@dataclass(frozen=True)
class Command:
    """A command line of a block, which may be several simple commands.

    `needs` is the reason why it is not run, if there is one; `output` what the document shows below it.
    """

    block: Block
    line: int
    text: str
    needs: str = ""
    output: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.block.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_shells(self) -> bool:
        """Whether it is more than one simple command with its words."""
        return bool(set(self._tokens()) & {"&&", ";", "|", ">", "<", "<<"})

    def _tokens(self) -> list[str]:
        lexer = shlex.shlex(self.text.split("\n")[0], posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        return list(lexer)

    @property
    def simple(self) -> list[list[str]]:
        """The words of each simple command, without assignments, redirections and what stands behind a pipe."""
        found: list[list[str]] = [[]]
        skipping = False
        for word in self._tokens():
            if word in ("&&", ";"):
                found.append([])
                skipping = False
            elif set(word) <= set("|<>"):
                if found[-1][-1:] == ["2"] and ">" in word:  # the stream that is led elsewhere
                    found[-1].pop()
                skipping = True
            elif not skipping and (found[-1] or not _ASSIGNMENT.match(word)):
                found[-1].append(word)
        return [words for words in found if words]

    @property
    def kind(self) -> str:
        """How it is checked: run, parsed, target, or set-up."""
        programs = {words[0] for words in self.simple}
        if self.needs:
            return "parsed, and marked with what it needs"
        if "make" in programs:
            return "a target of the Makefile"
        return "set-up" if programs <= {"source", "pip"} else "run"


@cache
def commands() -> tuple[Command, ...]:
    """Every command of every document, in order."""
    return tuple(command for page in all_pages() for block in blocks(page) for command in commands_of(block))


def commands_of(block: Block) -> list[Command]:
    """The commands of a block.

    Raises:
        ValueError: a line looks like a command and stands where none is looked for.
    """
    if block.language in SHELL:
        return _of_shell(block)
    if block.language in TRANSCRIPT:
        return _of_transcript(block)
    return []


def _of_shell(block: Block) -> list[Command]:
    found: list[Command] = []
    of_block = ""
    for line, text in _logical(block.text.splitlines(), block.line):
        needs = NEEDS.search(text.split("\n")[0])
        bare = _without_comment(text)
        if not bare:
            of_block = needs[1] if needs else of_block
        else:
            found.append(Command(block, line, bare, needs[1] if needs else of_block))
    return found


def _of_transcript(block: Block) -> list[Command]:
    lines = block.text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for number, line in enumerate(lines):
        if line.split(" ")[0] in _PROGRAMS and number not in starts:
            raise ValueError(f"{block.page}:{block.line + number}: a command of a {block.language} block begins with $")
    found: list[Command] = []
    for start, end in pairwise([*starts, len(lines)]):
        last = next(number for number in range(start, end) if not lines[number].endswith("\\"))
        ((_, text),) = _logical([lines[start][2:], *lines[start + 1 : last + 1]], 0)
        needs = NEEDS.search(text)
        output = tuple(lines[last + 1 : end])
        found.append(Command(block, block.line + start, _without_comment(text), needs[1] if needs else "", output))
    return found


def _logical(lines: Sequence[str], first: int) -> Iterator[tuple[int, str]]:
    """Lines joined where a backslash or a document of the shell's goes on, with their numbers."""
    number = 0
    while number < len(lines):
        start, text = number, lines[number]
        while text.endswith("\\") and number + 1 < len(lines):
            number += 1
            text = text[:-1] + " " + lines[number].strip()
        if heredoc := _HEREDOC.search(text):
            end = lines.index(heredoc[1], number)
            text = "\n".join([text, *lines[number + 1 : end + 1]])
            number = end
        number += 1
        yield first + start, text.strip()


def _without_comment(text: str) -> str:
    head, *rest = text.split("\n")
    head = re.sub(r"(^|\s+)#\s.*$", "", head)
    return "\n".join([head, *rest]).strip()


def check(command: Command) -> None:
    """Parse a command as its program does.

    Raises:
        ValueError: a part of it is not what its program takes.
    """
    for words in command.simple:
        try:
            with _installed(command.needs):
                _check(words)
        except (OSError, ValueError, SystemExit) as error:
            raise ValueError(f"{command.place}: {shlex.join(words)}: {error}") from None


@contextmanager
def _installed(needs: str) -> Iterator[None]:
    """Within, what a mark says to be needed counts as installed."""

    def find_spec(name: str) -> object:
        return name if name in needs.lower() else importlib.util.find_spec(name)

    with patch.object(checks, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=find_spec))):
        yield


def _check(words: Sequence[str]) -> None:
    program, rest = words[0], list(words[1:])
    if program in TOOLS:
        return
    programs: dict[str, Callable[[list[str]], None]] = {
        "accelerate": _check_accelerate,
        "helpsteer-rloo": _check_own,
        "make": _check_make,
        "pip": _check_pip,
        "python": _check_python,
        "source": _check_source,
        "trl": _check_trl,
    }
    if program not in programs:
        raise ValueError("the tests know no such program; add it to tests/docs/commands.py")
    programs[program](rest)


SCRIPTS = {
    "reward_model_training.py": "reward-model",
    "rloo_helpsteer_training.py": "rloo",
    "train_pipeline.py": "pipeline",
}


def _check_own(argv: list[str]) -> None:
    """A command of `helpsteer-rloo`, by its own parser and checks, without the work."""
    if argv[:1] == ["--help"]:
        return
    if not argv or argv[0] not in cli.COMMANDS:
        raise ValueError(f"helpsteer-rloo has no command {' '.join(argv[:1])}")
    if "--help" not in argv:
        with patch.object(cli, "guarded", lambda work, **_: None):
            cli._DISPATCH[argv[0]](argv[1:])


def _check_python(argv: list[str]) -> None:
    if argv[0] in SCRIPTS:
        _check_own([SCRIPTS[argv[0]], *argv[1:]])
    elif argv[0] == "-m":
        _check_module(argv[1], argv[2:])
    else:
        raise ValueError("is neither a script of this project nor a module")


def _check_module(name: str, argv: list[str]) -> None:
    """A module, and its flags: they stand in its source, or in that of the harness of benchmarks."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {name}")
    sources = [Path(spec.origin)]
    if name.startswith("benchmarks"):
        sources += [ROOT / "benchmarks" / "__main__.py", ROOT / "benchmarks" / "harness.py"]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    if unknown := [flag for flag in argv if flag.startswith("--") and f'"{flag}"' not in text]:
        raise ValueError(f"{name} has no {', '.join(unknown)}")


def _check_accelerate(argv: list[str]) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    if argv[0] != "launch":
        raise ValueError("only accelerate launch is known")
    given = launch_command_parser().parse_args(argv[1:])
    load_config_from_file(str(ROOT / given.config_file))
    _check_python([given.training_script, *given.training_script_args])


def _check_trl(argv: list[str]) -> None:
    from trl.scripts.vllm_serve import make_parser

    if argv[0] != "vllm-serve":
        raise ValueError("only trl vllm-serve is known")
    make_parser().parse_args_and_config(argv[1:])


def _check_make(argv: list[str]) -> None:
    known = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = dict(word.split("=", 1) for word in argv if "=" in word)
    targets = [word for word in argv if "=" not in word]
    if not targets or not set(targets) <= known:
        raise ValueError(f"the Makefile has no target {' '.join(targets)}")
    if unknown := set(variables) - {"ARGS", "PYTHON", "SEED", "VENV"}:
        raise ValueError(f"the Makefile reads no {', '.join(unknown)}")
    arguments = shlex.split(variables.get("ARGS", ""))
    if targets == ["demo"]:
        _check_own(["demo", f"--config={ROOT / 'configs' / 'demo.yaml'}", *arguments])
    elif arguments:
        _check_module({"bench": "benchmarks.harness", "chaos": "tests.chaos"}[targets[0]], arguments)


def _check_pip(argv: list[str]) -> None:
    from pip._internal.commands.install import InstallCommand

    if argv[0] != "install":
        raise ValueError("only pip install is known")
    options, _ = InstallCommand("install", "").parse_args(argv[1:])
    for file in options.constraints:
        if not (ROOT / file).is_file():
            raise ValueError(f"there is no {file}")


def _check_source(argv: list[str]) -> None:
    environment = re.search(r"^VENV \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if environment is None or argv != [f"{environment[1]}/bin/activate"]:
        raise ValueError("make install makes another environment")


def main() -> None:
    """List the commands by kind."""
    for kind, count in sorted(Counter(command.kind for command in commands()).items()):
        print(f"{count} {kind}")
        for command in commands():
            if command.kind == kind:
                print(
                    f"    {command.place}: {command.text.splitlines()[0]}"
                    + f"  # {command.needs}" * bool(command.needs)
                )


if __name__ == "__main__":
    main()
