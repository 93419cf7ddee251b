"""Every command of the documents is run in a small world, or parsed and marked with what it needs."""

import ast
import re
from collections import Counter
from functools import partial

import pytest
import torch

from tests.docs.commands import Command, check, commands, commands_of
from tests.docs.pages import ROOT, Block, all_pages, blocks
from tests.docs.world import make_world

SLOW = ("helpsteer-rloo export --model_dir models/rloo_helpsteer3 --output_dir exported", "accelerate launch")
"""Commands, by their beginnings, that take long even in the small world."""
EXACT = ("helpsteer-rloo data", "helpsteer-rloo --help")
"""Commands whose output depends on no weights, so that every number of it is compared."""
RUN = [command for command in commands() if command.kind == "run"]
MARKED = [command for command in commands() if command.needs]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    found = make_world(tmp_path_factory.mktemp("docs"))
    yield found
    found.close()


def named(command: Command) -> str:
    return command.place


def marks(command: Command):
    return pytest.param(command, marks=[pytest.mark.slow] * command.text.startswith(SLOW), id=command.place)


@pytest.mark.parametrize("command", commands(), ids=named)
def test_a_command_is_what_its_program_takes(command):
    check(command)


@pytest.mark.parametrize("command", list(map(marks, RUN)))
def test_a_command_runs(world, command):
    printed = world.run(command)
    compare = lines_of if command.text.startswith(EXACT) else partial(lines_of, numbers=False)
    found = iter(compare(printed.splitlines()))
    for line in compare(command.output):
        assert line in found, f"{command.place}: the document shows a line that the command does not print: {line}"


def lines_of(text, numbers=True):
    """Lines that are compared: without "…", which stands for lines left out, rules of tables, and maybe numbers."""
    bare = (" ".join(re.sub(r"[┃│]", " ", line).split()) for line in text)
    kept = [line for line in bare if line not in ("", "…") and not re.fullmatch(r"[━─┏┳┓┡╇┩└┴┘├┼┤ ]+", line)]
    return kept if numbers else [re.sub(r"[-+]?\d[\d.,e-]*", "#", line) for line in kept]


PACKAGES = {"load_in_4bit": "bitsandbytes"} | {name: name for name in ("tensorboard", "trackio", "wandb")}
"""What some commands need that is installed by who asks for it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", list(dict.fromkeys(c.text for c in MARKED if c.simple[0][0] == "python" and "-m" not in c.text))
)
def test_what_needs_a_gpu_runs_in_the_small_world_too(world, text):
    for sign, package in PACKAGES.items():
        if sign in text:
            pytest.importorskip(package)
    if "load_in_4bit" in text and not torch.cuda.is_available():
        pytest.skip("bitsandbytes does not take so small a model on CPUs")
    world.run(next(command for command in MARKED if command.text == text), smaller=True)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = [block for page in all_pages() for block in blocks(page) if block.language == "python"]
    assert snippets
    for block in snippets:
        exec(compile(block.text, f"{block.page.name}:{block.line}", "exec"), {})


def test_yaml_and_json_blocks_are_read():
    import json

    import yaml

    readers = {"json": json.loads, "yaml": yaml.safe_load}
    for page in all_pages():
        for block in blocks(page):
            if block.language in readers:
                readers[block.language](block.text)


def test_every_language_of_a_block_is_known():
    known = {"bash", "sh", "", "console", "text", "python", "yaml", "json"}
    assert {block.language for page in all_pages() for block in blocks(page)} <= known


def test_the_counts(capsys):
    kinds = Counter(command.kind for command in commands())
    slow = sum(command.text.startswith(SLOW) for command in RUN)
    with capsys.disabled():
        print(
            "\ncommands: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) + f" ({slow} slow)"
        )
    assert kinds["run"] >= 18
    assert all(command.needs or command.kind != "parsed, and marked with what it needs" for command in commands())


def of(text, language="bash"):
    return commands_of(Block(ROOT / "README.md", 1, language, text))


def test_commands_are_found_with_their_marks():
    block = "# first\nmake demo  # all\n\n# needs a GPU\npython a.py \\\n    --b 'c d'  # e\n"
    found = of(block + "ls # needs time\ncat > f <<'EOF'\n{} # x\nEOF\n")
    assert [(c.line, c.text, c.needs) for c in found] == [
        (2, "make demo", ""),
        (5, "python a.py  --b 'c d'", "needs a GPU"),
        (7, "ls", "needs time"),
        (8, "cat > f <<'EOF'\n{} # x\nEOF", "needs a GPU"),
    ]
    found = of("$ ls \\\n  -l\na\nb\n$ make demo  # needs minutes\n", "console")
    assert [(c.line, c.text, c.needs, c.output) for c in found] == [
        (1, "ls  -l", "", ("a", "b")),
        (5, "make demo", "needs minutes", ()),
    ]
    assert of("A=1 make install && source x | cat > y").pop().simple == [["make", "install"], ["source", "x"]]
    assert of("print(1)", "python") == []
    with pytest.raises(ValueError, match="begins with"):
        of("make demo", "text")


@pytest.mark.parametrize(
    "text",
    [
        "python train_pipeline.py --total_episode 5",
        "python train_pipeline.py --rloo.rloo_k 1",
        "python reward_model_training.py --max_length lots",
        "python other.py",
        "python -m benchmarks.nowhere",
        "python -m benchmarks.tables --loud",
        "helpsteer-rloo scores x",
        "helpsteer-rloo score x.jsonl --reward_model_dir D",
        "make domo",
        "make demo ARGS='--seeds 1'",
        "make bench ARGS='--pears 3'",
        "make demo SEEDS=1",
        "accelerate launch --config_file configs/accelerate/dpp.yaml train_pipeline.py",
        "accelerate launch --config_file configs/accelerate/ddp.yaml train_pipeline.py --no_flag",
        "trl vllm-serve --modell x",
        "pip install -c constraint.txt .",
        "source venv/bin/activate",
        "python train_pipeline.py --rloo.use_vllm true",
        "rm -rf models",
    ],
)
def test_a_wrong_command_is_found(text):
    with pytest.raises(ValueError, match=r"README\.md:1"):
        check(of(text).pop())


def test_a_message_that_the_documents_quote_is_in_the_source():
    pages = [ROOT / "docs" / "troubleshooting.md"]
    quoted = [cells[0].strip("` ") for page in pages for cells in rows_of_tables(page) if cells[0].startswith(" `")]
    sources = [
        node for path in (ROOT / "helpsteer_rloo").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    ]
    said = [text for node in sources if (text := constant(node))]
    for message in quoted:
        pattern = re.compile(".*?".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in said), message
    assert len(quoted) > 15


def rows_of_tables(page):
    return [line.strip("|\n").split("|") for line in page.read_text().splitlines() if line.startswith("|")]


def constant(node):
    """The text of a string of the source, `…` for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None
