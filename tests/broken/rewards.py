"""Reward functions of the user's own that cannot be found, or that do not give one number a completion."""

import sys
from pathlib import Path

from tests.broken.corpus import USAGE, Broken, Place


def found(name: str, asked: str, source: str, *says: str) -> Broken:
    """A function that is refused before any work; `M` stands for the module's name."""
    module = f"broken_{name}"

    def make(place: Place) -> list[str]:
        place.write(f"{module}.py", source)
        forget(place.root)
        return ["--reward_functions", asked.replace("M", module)]

    return Broken(name, "rloo", make, tuple(text.replace("M", module) for text in says), USAGE)


def called(name: str, body: str, *says: str) -> Broken:
    """A function that fails once it is called."""
    module = f"broken_{name}"

    def make(place: Place) -> list[str]:
        place.write(f"{module}.py", f"def own(completions, **_):\n    {body}\n")
        forget(place.root)
        return place.rloo(reward_functions=f"{module}:own")

    return Broken(name, "rloo", make, ("own", *says))


def forget(root: Path) -> None:
    """Let modules be found in the current directory; an earlier case may have been looked for there."""
    sys.path_importer_cache.pop(str(root), None)


CASES = [
    found("no_module", "no_such_module:f", "", "the module of no_such_module:f cannot be imported", "it is looked for"),
    found("no_function_named", "M", "", "'M' is not of the form package.module:function"),
    found("no_such_function", "M:g", "f = 1", "M has no function 'g'"),
    found("a_number", "M:f", "f = 1", "M has no function 'f'"),
    found("no_python", "M:f", "def f(:\n", "the module of M:f cannot be imported (SyntaxError"),
    found("fails_at_its_import", "M:f", "1 / 0", "the module of M:f cannot be imported (ZeroDivisionError"),
    found("exits_at_its_import", "M:f", "import sys\nsys.exit(0)", "the module of M:f cannot be imported (SystemExit"),
    found(
        "the_name_of_the_model", "M:reward_model", "def reward_model(**_): ...", "two rewards are called 'reward_model'"
    ),
    found("one_function_twice", "M:f,M:f", "def f(**_): ...", "two rewards are called 'f'"),
    found("a_relative_module", "..M:f", "", "the module of ..M:f cannot be imported"),
    called("one_number_too_few", "return [1.0] * (len(completions) - 1)", "returned 3 rewards", "4"),
    called("no_list", "return 1.0", "returned float", "a list"),
    called("nothing", "return None", "returned NoneType", "a list"),
    called("texts", "return ['good'] * len(completions)", "'good'", "expected a finite number or None"),
    called("lists", "return [[1.0]] * len(completions)", "[1.0]", "expected a finite number or None"),
    called("raises", "raise KeyError('lost')", "KeyError: 'lost'"),
    called("exits", "raise SystemExit(0)", "SystemExit"),
    called("infinity", "return [float('inf')] * len(completions)", "inf", "finite"),
]
