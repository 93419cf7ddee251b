"""Property tests of the parsers: whatever is typed or stands in a file gives settings, or one message and status 2."""

import contextlib
import io
import string
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo.commands.data import DATA
from helpsteer_rloo.commands.demo import demo_settings, parse_demo
from helpsteer_rloo.commands.plan import parse_plan
from helpsteer_rloo.settings.checks import check_rloo, check_training
from helpsteer_rloo.settings.config import PIPELINE, REWARD, RLOO
from helpsteer_rloo.settings.flags import read_yaml
from helpsteer_rloo.settings.parsing import parse_command, parse_pipeline, pipeline_settings

NAMES = sorted({*REWARD.flag_names(), *RLOO.flag_names(), *PIPELINE.flag_names(), *DATA.flag_names()} - {"config"})
PARSERS = {
    "reward_model_training.py": lambda argv: parse_command(REWARD, argv, checks=[check_training]),
    "rloo_helpsteer_training.py": lambda argv: parse_command(RLOO, argv, checks=[check_rloo]),
    "train_pipeline.py": parse_pipeline,
    "helpsteer-rloo plan": parse_plan,
    "helpsteer-rloo data": lambda argv: parse_command(DATA, argv),
    "helpsteer-rloo demo": parse_demo,
}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
words = st.text(string.printable, max_size=6) | st.sampled_from(
    ["1", "-1", "0", "1e400", "nan", "none", "true", "{", "[", ""]
)
flags = st.builds(
    lambda dashes, section, name, value: f"{dashes}{section}{name}{value}",
    st.sampled_from(["--", "--", "--", "-", "---", ""]),
    st.sampled_from(["", "", "reward.", "rloo.", "other."]),
    st.sampled_from(NAMES) | st.text(string.ascii_letters + "-_.=", max_size=6),
    st.just("") | words.map(lambda word: f"={word}"),
).filter(lambda flag: flag.partition("=")[0].lstrip("-") not in ("h", "help") and not flag.startswith("-h"))


@given(st.sampled_from(sorted(PARSERS)), st.lists(flags | words.filter(lambda word: word[:2] != "-h"), max_size=5))
def test_any_command_line_gives_settings_or_one_message(program, argv):
    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        try:
            PARSERS[program](argv)
        except SystemExit as ended:
            assert ended.code == 2  # noqa: PT017 - either outcome is right
            assert f"{program}: " in written.getvalue()


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | values.map(lambda v: yaml.safe_dump(v).encode()))
def test_any_file_is_a_mapping_or_refused_by_name(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_bytes(content)
        try:
            read = read_yaml(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 - either outcome is right
        else:
            assert all(isinstance(key, str) for key in read)


sections = st.dictionaries(st.sampled_from(NAMES), values, max_size=3)
contents = st.builds(
    lambda main, more: main | more,
    sections,
    st.dictionaries(st.sampled_from(["reward", "rloo"]), sections | values, max_size=2),
)


@pytest.mark.parametrize("resolve", [pipeline_settings, demo_settings], ids=["pipeline", "demo"])
@given(content=contents, demo=values | st.fixed_dictionaries({}, optional={"rows": values, "base": values}))
def test_any_mapping_gives_settings_or_a_message_with_the_source(resolve, content, demo):
    if resolve is demo_settings:
        content = {**content, "demo": demo}
    try:
        resolve(content, {}, source="settings.yaml")
    except ValueError as error:
        assert str(error).startswith(("settings.yaml: ", "--", "A batch of", "The re"))  # noqa: PT017


@given(st.sampled_from(NAMES), values)
def test_a_value_has_the_type_of_its_flag_or_is_refused(name, value):
    for command in (REWARD, RLOO, PIPELINE, DATA):
        known = {flag.name: flag for section in command.flags().values() for flag in section}
        if name in known:
            with contextlib.suppress(ValueError):
                taken = known[name].from_yaml(value)
                assert not isinstance(taken, dict) or known[name].is_mapping()
                assert not isinstance(taken, list) or known[name].is_list()
                assert taken is not None or "None" in known[name].alternatives() or "Any" in known[name].annotation
