"""Command-line flags and YAML keys, described once and parsed without importing torch.

A command takes two kinds of flags: our own, declared as dataclasses in `helpsteer_rloo.settings.knobs`, and those of
TRL's configuration classes. The latter are read from the *source* of the installed TRL and transformers, because
importing them takes seconds and `--help` should not; their values are turned into TRL's objects later, by TRL's own
parser.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib.util
import itertools
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from helpsteer_rloo.run_dir import read_text

FlagValue = Any
"""What a flag can hold: a scalar, a list or a mapping, as YAML gives them."""

_LONGEST_SHOWN = 200

TRL_SOURCES = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "BaseConfig": ("trl", "trainer/base_config.py"),
    "RewardConfig": ("trl", "trainer/reward_config.py"),
    "RLOOConfig": ("trl", "trainer/rloo_config.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
}
"""Where each configuration class stands: distribution package and file inside it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name, its type as written in the source, its default as text, and its help.

    >>> Flag("lora_r", "int", "16", "LoRA rank.").from_text("8")
    8
    """

    name: str
    annotation: str
    default: str
    help: str

    def alternatives(self) -> list[str]:
        """The types the flag admits: `["float", "None"]` for `float | None`."""
        return [ast.unparse(part) for part in _union_parts(ast.parse(self.annotation, mode="eval").body)]

    def is_list(self) -> bool:
        """Whether the flag takes several values."""
        return any(_is_sequence(part) for part in self.alternatives())

    def is_bool(self) -> bool:
        """Whether the flag may stand alone, meaning true."""
        return "bool" in self.alternatives()

    def is_mapping(self) -> bool:
        """Whether the flag takes a mapping, written as YAML or JSON."""
        return any(part.startswith("dict") for part in self.alternatives())

    @property
    def takes(self) -> str:
        """What a value is, as the help has it.

        >>> Flag("report_to", "tuple[str, ...] | None", "", "").takes, Flag("seed", "int | None", "", "").takes
        ('str', 'int')
        """
        parts = [_element(part) or part for part in self.alternatives() if part != "None"]
        return "|".join(dict.fromkeys(parts))

    def from_text(self, text: str) -> FlagValue:
        """One value from the command line.

        Raises:
            ValueError: the text does not fit the flag's type.
        """
        if "\0" in text:
            raise ValueError("holds a NUL, which is not text")
        alternatives = self.alternatives()
        if "None" in alternatives and not self.is_list() and text.lower() in ("none", "null"):
            return None
        if self.is_mapping() and text.lstrip().startswith(("{", "[")):
            return self.from_yaml(_yaml_value(text))
        for name in [*alternatives, *map(_element, filter(_is_sequence, alternatives))]:
            if name in _CONVERTERS:
                try:
                    return _CONVERTERS[name](text)
                except ValueError:
                    continue
        if all(name in ("None", *_CONVERTERS) or _element(name) in _CONVERTERS for name in alternatives):
            raise ValueError(f"expected {self.annotation}, got {_shown(text)}")
        return text

    def from_yaml(self, value: FlagValue) -> FlagValue:
        """One value from a YAML file.

        Raises:
            ValueError: the value does not fit the flag's type.
        """
        fits = True
        if value is None:
            fits = "None" in self.alternatives()
        elif isinstance(value, dict):
            fits = self.is_mapping()
        elif isinstance(value, bool):
            fits = self.is_bool() or f"Literal[{value}]" in self.alternatives()
        elif isinstance(value, (list, tuple)):
            if self.is_list() and not any(isinstance(part, (list, dict)) for part in value):
                return [self.from_text(str(part)) for part in value]
            fits = False
        else:
            converted = self.from_text(str(value))
            return [converted] if self.is_list() and "str" not in self.alternatives() else converted
        if not fits:
            raise ValueError(f"expected {self.annotation}, got {_shown(value)}")
        return value


def _shown(value: FlagValue) -> str:
    """A value in a message: whole if it is short, since aliases of YAML can make it longer than the memory."""
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


def _union_parts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_union_parts(node.left), *_union_parts(node.right)]
    return [node]


def _is_sequence(annotation: str) -> bool:
    return annotation.startswith(("list", "tuple"))


def _element(annotation: str) -> str:
    """Type of a sequence's elements: `"float"` for `list[float]` and `tuple[float, float]`."""
    return annotation.partition("[")[2].rstrip("]").split(",")[0] if _is_sequence(annotation) else ""


def _yaml_value(text: str) -> FlagValue:
    try:
        return _load_yaml(text)
    except ValueError as error:
        raise ValueError(f"expected YAML or JSON, got {_shown(text)} ({error})") from None


def _to_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "yes", "1", "on"):
        return True
    if lowered in ("false", "no", "0", "off"):
        return False
    raise ValueError(f"expected true or false, got {text!r}")


def _to_int(text: str) -> int:
    try:
        return int(text)  # not by way of a float, which has no room for all of a large number's digits
    except ValueError:
        number = float(text)
    if not number.is_integer():
        raise ValueError(f"expected a whole number, got {text!r}")
    return int(number)


_CONVERTERS: dict[str, Callable[[str], FlagValue]] = {"bool": _to_bool, "int": _to_int, "float": float}


def own_flags(knobs: type) -> list[Flag]:
    """The flags that a dataclass of `helpsteer_rloo.settings.knobs` declares, in order."""
    return [
        Flag(field.name, _annotation(field.type), _default(field), str(field.metadata.get("help", "")))
        for field in dataclasses.fields(knobs)
    ]


def _default(field: "dataclasses.Field[Any]") -> str:
    needed = field.default is dataclasses.MISSING or field.metadata.get("needed", False)
    return "" if needed else str(field.default)


def _annotation(annotation: object) -> str:
    return (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )


@functools.cache
def trl_flags(*class_names: str) -> tuple[Flag, ...]:
    """The flags of TRL's configuration classes, read from the installed sources; later classes override earlier ones.

    Raises:
        ValueError: TRL or transformers is not installed.
    """
    flags: dict[str, Flag] = {}
    for class_name in class_names:
        package, file = TRL_SOURCES[class_name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"The package {package} is not installed; install the project with its dependencies.")
        source = Path(spec.submodule_search_locations[0]) / file
        flags |= {flag.name: flag for flag in _fields_of_source(source.read_text(encoding="utf-8"))}
    return tuple(flags.values())


def _fields_of_source(source: str) -> Iterable[Flag]:
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    for node in classes:
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
                name, annotation = item.target.id, ast.unparse(item.annotation)
                if not name.startswith("_") and "ClassVar" not in annotation:
                    yield _flag_of_field(name, annotation, item.value)


def _flag_of_field(name: str, annotation: str, value: ast.expr) -> Flag:
    keywords = {k.arg: k.value for k in value.keywords} if isinstance(value, ast.Call) else {"default": value}
    default = keywords.get("default")
    help_text = ""
    if "metadata" in keywords:
        try:
            help_text = str(ast.literal_eval(keywords["metadata"]).get("help", ""))
        except ValueError:
            help_text = ""
    return Flag(name, annotation, ast.unparse(default) if default is not None else "", help_text.replace("%%", "%"))


class FlagParser(argparse.ArgumentParser):
    """A parser over `Flag`s that returns only what the user gave, and names the nearest flag for an unknown one."""

    def __init__(
        self,
        program: str,
        description: str,
        groups: Mapping[str, Sequence[Flag]],
        explain_unknown: Callable[[str, str], str],
        usage: str = "[FLAGS]",
    ) -> None:
        """Build the parser; `groups` maps a title in the help to the flags under it.

        `usage` is what stands behind the program's name. `explain_unknown` turns a name that is no flag, and what it
        was written as, into a message.
        """
        super().__init__(
            prog=program,
            usage=f"{program} {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.explain_unknown = explain_unknown
        for title, flags in groups.items():
            section = self.add_argument_group(title)
            for flag in flags:
                _add_flag(section, flag)

    def parse_given(self, argv: Sequence[str]) -> dict[str, FlagValue]:
        """The flags present in `argv`, converted; an unknown flag ends the program with the nearest known name."""
        argv = [_underscored(token) for token in argv]
        known, rest = self.parse_known_args(argv)
        if rest:
            unknown = rest[0]
            if not unknown.startswith("--") or not unknown.strip("-").partition("=")[0]:
                self.error(f"unexpected argument {unknown!r}; flags are written --name value")
            self.error(self.explain_unknown(unknown[2:].split("=")[0], "flag"))
        return vars(known)

    def error(self, message: str) -> NoReturn:
        """Print the message alone, without pages of usage, and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help for all flags.\n")


def _underscored(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _add_flag(section: Any, flag: Flag) -> None:
    def convert(text: str) -> FlagValue:
        try:
            return flag.from_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    options: dict[str, Any] = {"type": convert, "default": argparse.SUPPRESS, "metavar": flag.takes}
    if flag.is_list():
        options["nargs"] = "+"
    elif flag.is_bool():
        options["nargs"] = "?"
        options["const"] = True
    default = f" (default: {flag.default})" if flag.default not in ("", "None") else ""
    section.add_argument(f"--{flag.name}", help=(flag.help + default).replace("%", "%%"), **options)


def _shared_beginning(one: str, other: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


_WORDS = 10
"""Letters from which a name that another one holds is taken for a part of it."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one was probably meant to be, if there is one like it.

    >>> nearest_name("forward_batch_size", ["reward_batch_size", "local_rollout_forward_batch_size"])
    'local_rollout_forward_batch_size'
    """
    names = list(known)
    longer = [candidate for candidate in names if len(name) >= _WORDS and name in candidate]
    if longer:
        return difflib.get_close_matches(name, longer, n=1, cutoff=0.0)[0]
    candidates = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    return max(candidates, key=lambda candidate: _shared_beginning(name, candidate), default=None)


def unknown_name(name: str, known: Iterable[str], what: str) -> str:
    """The message for an unknown name, with the nearest known one.

    >>> unknown_name("lora_rank", ["lora_r", "lora_alpha"], "key")
    "unknown key 'lora_rank'; did you mean 'lora_r'?"
    """
    nearest = nearest_name(name, known)
    return f"unknown {what} {name!r}" + (f"; did you mean {nearest!r}?" if nearest else "")


def read_yaml(path: Path) -> dict[str, FlagValue]:
    """Read a configuration file: a mapping from flag names to values.

    Raises:
        ValueError: the file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        content = _load_yaml(read_text(path, pipe=True))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the configuration file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping from flag names to values, got {type(content).__name__}.")
    return {str(key): value for key, value in content.items()}


class _Loader(yaml.SafeLoader):
    """YAML's plain types alone, and no key twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, once its keys are found to differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _load_yaml(text: str) -> FlagValue:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date that is none, a number of thousands of digits
        raise ValueError(f"not valid YAML: {error}") from None
