"""The layer rule, held by reading the source: imports go down only, whether they stand in a function or not.

A new module belongs into `LAYERS` below; until it stands there, the test fails and says so.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "helpsteer_rloo"
SOURCE = Path(__file__).resolve().parents[1] / PACKAGE

# Lowest first. A name stands for a module of the package or for a sub-package with all that is in it; "" is the
# package's own __init__, which is run before any module and so may import next to nothing.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "",
            "alarms",
            "checkpoints",
            "events",
            "groups",
            "heartbeat",
            "hub",
            "identity",
            "objectives",
            "preemption",
            "processes",
            "records",
            "reward_functions",
            "run_dir",
            "settings",
            "sizes",
            "statistics",
        }
    ),
    frozenset({"data", "rendering", "packing", "planning"}),
    frozenset({"model"}),
    frozenset({"training", "evaluation", "serving", "report"}),
    frozenset(
        {"chat", "cli", "commands", "display", "fitting", "given_models", "opening", "pipeline", "stages", "steps"}
    ),
)
# The parts of this layer meet through the run directory and never import each other.
SEPARATE = LAYERS[3]
# Only these import TRL.
TRL_IMPORTERS = frozenset({"training"})
# Only the standard library.
STDLIB_ONLY = frozenset({"groups"})
# Importing one of these loads nothing heavy, not even by way of another module, so that `--help` answers at once.
LIGHT = frozenset(
    {
        "cli",
        "commands.best_of",
        "commands.chat",
        "commands.data",
        "commands.demo",
        "commands.evaluate",
        "commands.export",
        "commands.judge",
        "commands.plan",
        "commands.plan_tables",
        "commands.report",
        "commands.score",
        "commands.serve",
        "data.demo",
        "display.live",
        "display.live_report",
        "display.streams",
        "fitting",
        "pipeline",
        "planning.gpus",
        "planning.lengths",
        "planning.machine",
        "planning.margin",
        "planning.memory",
        "planning.needs",
        "planning.request",
        "planning.requesting",
        "planning.search",
        "planning.shapes",
        "planning.time",
        "planning.verdict",
        "records.reward_model",
        "reward_functions",
        "run_dir",
        "settings.checks",
        "settings.config",
        "settings.flags",
        "settings.knobs",
        "settings.parsing",
    }
)
HEAVY = frozenset({"torch", "transformers", "trl", "peft", "datasets", "accelerate", "altair", "vl_convert"})


@dataclass(frozen=True, slots=True)
class Import:
    """An import of `target` ("torch.nn", "helpsteer_rloo.groups.PromptGroup") on a line of a module.

    `eager` is false where importing the module does not run it: in a function, or for the type checker only.
    """

    target: str
    line: int
    eager: bool


class Collector(ast.NodeVisitor):
    """Gathers the imports of one module; `package` is what its relative imports start from."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.eager = True
        self.found: list[Import] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.package.split(".")[: 1 - node.level or None] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            self._add(f"{base}.{alias.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        """`importlib.import_module("…")` is an import as well."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self._add(str(node.args[0].value), node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_lazily(node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_lazily(node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_lazily([node.body])

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        self._visit_lazily(node.body)
        for statement in node.orelse:
            self.visit(statement)

    def _visit_lazily(self, nodes: list[ast.stmt] | list[ast.expr]) -> None:
        outer, self.eager = self.eager, False
        for node in nodes:
            self.visit(node)
        self.eager = outer

    def _add(self, target: str, node: ast.stmt | ast.expr) -> None:
        self.found.append(Import(target, node.lineno, self.eager))


def read_imports(source: Path) -> dict[str, list[Import]]:
    """The imports of every module below `source`, by the module's name without the package's ("data.demo")."""
    modules: dict[str, list[Import]] = {}
    for path in sorted(source.rglob("*.py")):
        *parents, name = path.relative_to(source).with_suffix("").parts
        collector = Collector(".".join([PACKAGE, *parents]))
        collector.visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        modules[".".join(parents if name == "__init__" else [*parents, name])] = collector.found
    return modules


def own_module(target: str, modules: Mapping[str, object]) -> str | None:
    """The module of the package that an import leads to, or None if it leads out of the package."""
    first, _, name = target.partition(".")
    if first != PACKAGE:
        return None
    while name not in modules and name:
        name = name.rpartition(".")[0]
    return name


def layer_of(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if part_of(module) in names)


def part_of(module: str) -> str:
    """What stands in `LAYERS`: the module itself, or the sub-package that it is in."""
    return module.partition(".")[0]


def unplaced(modules: Mapping[str, list[Import]]) -> Iterator[str]:
    for module in modules:
        if not any(part_of(module) in names for names in LAYERS):
            yield f"{module}: belongs to no layer; add {part_of(module)!r} to LAYERS in tests/test_layers.py"


def broken_rules(module: str, found: Import, modules: Mapping[str, list[Import]]) -> Iterator[str]:
    """What one import breaks."""
    part, where = part_of(module), f"{module}:{found.line}"
    target = own_module(found.target, modules)
    if target is None:
        library = found.target.partition(".")[0]
        if library == "trl" and part not in TRL_IMPORTERS:
            yield f"{where}: imports trl; only {', '.join(sorted(TRL_IMPORTERS))} may"
        if part in STDLIB_ONLY and library not in sys.stdlib_module_names:
            yield f"{where}: imports {library}; only the standard library is allowed here"
        return
    if layer_of(target) > layer_of(module):
        yield f"{where}: L{layer_of(module)} imports {target} of L{layer_of(target)}; imports go down only"
    if part in SEPARATE and part_of(target) in SEPARATE - {part}:
        yield f"{where}: imports {target}; {part} and {part_of(target)} meet through the run directory only"


def loaded_by(module: str, modules: Mapping[str, list[Import]]) -> dict[str, str]:
    """Every library that importing `module` loads, with the chain of modules that leads to it."""
    libraries: dict[str, str] = {}
    chains, pending = {module: module}, [module]
    while pending:
        current = pending.pop()
        parents = [current.rsplit(".", depth)[0] for depth in range(1, current.count(".") + 1)]
        imports = [found.target for found in modules[current] if found.eager]
        for target in [*imports, *(f"{PACKAGE}.{parent}" for parent in parents), PACKAGE]:
            own = own_module(target, modules)
            if own is None:
                libraries.setdefault(target.partition(".")[0], chains[current])
            elif own not in chains:
                chains[own] = f"{chains[current]} → {own or PACKAGE}"
                if own in modules:
                    pending.append(own)
    return libraries


def violations(modules: Mapping[str, list[Import]]) -> list[str]:
    """Every way in which the package breaks the rule, one line each."""
    if nowhere := list(unplaced(modules)):
        return nowhere
    broken: list[str] = []
    for module, imports in modules.items():
        for found in imports:
            broken += broken_rules(module, found, modules)
    for module in sorted(LIGHT & modules.keys()):
        broken += [
            f"{module}: importing it loads {library} ({chain}); import that in the function that needs it"
            for library, chain in sorted(loaded_by(module, modules).items())
            if library in HEAVY
        ]
    return broken


def plant(root: Path, files: Mapping[str, str]) -> list[str]:
    """Write a small package, path by path, and say what is wrong with it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return violations(read_imports(root))


def test_imports_go_down_only() -> None:
    modules = read_imports(SOURCE)
    assert "groups" in modules, f"no package at {SOURCE}"
    broken = violations(modules)
    assert not broken, "\n".join(broken)


UP = "L1 imports model.forward of L2; imports go down only"


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("data/rows.py", "from helpsteer_rloo.model import forward", f"data.rows:1: {UP}"),
        ("data/rows.py", "from helpsteer_rloo.model.forward import scores", f"data.rows:1: {UP}"),
        ("data/rows.py", "from ..model import forward", f"data.rows:1: {UP}"),
        ("data/rows.py", "def f():\n    import helpsteer_rloo.model.forward", f"data.rows:2: {UP}"),
        ("rendering.py", "import_module('helpsteer_rloo.model.forward')", f"rendering:1: {UP}"),
        ("training/a.py", "from helpsteer_rloo.evaluation import b", "training.a:1: imports evaluation.b; training"),
        ("model/roles.py", "def f():\n    import trl.trainer", "model.roles:2: imports trl; only training may"),
        ("groups.py", "import numpy as np", "groups:1: imports numpy; only the standard library"),
        ("settings/config.py", "import torch.nn", "settings.config: importing it loads torch (settings.config)"),
        ("cli.py", "from helpsteer_rloo import objectives", "cli: importing it loads torch (cli → objectives)"),
        ("data/__init__.py", "import datasets", "data.demo: importing it loads datasets (data.demo → data)"),
        ("new.py", "", "new: belongs to no layer; add 'new' to LAYERS in tests/test_layers.py"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, source: str, message: str) -> None:
    sound = {"objectives.py": "import torch", "model/forward.py": "", "evaluation/b.py": "", "data/demo.py": ""}
    assert plant(tmp_path, sound) == []
    broken = plant(tmp_path, {path: source})
    assert len(broken) == 1
    assert broken[0].startswith(message)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", "def main():\n    import torch\n    from helpsteer_rloo.training import ledger"),
        ("settings/config.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("training/reward.py", "from trl import RewardTrainer\nfrom helpsteer_rloo.training.ledger import Ledger"),
        ("groups.py", "import dataclasses\nimport collections.abc"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    assert plant(tmp_path, {"training/ledger.py": "import torch", path: source}) == []
