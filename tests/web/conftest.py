"""Tests marked `web` are left out where there is no browser, unless they were asked for."""

import os

import pytest

from helpsteer_rloo.run_dir import write_json
from tests.report.runs import HOSTILE, answers, estimate, heldout, json_text, make_run, policy_log
from tests.web import browser as browsers


def pytest_collection_modifyitems(config, items):
    web = [item for item in items if item.get_closest_marker("web")]
    found = browsers.problem() if web else None
    if found is None:
        return
    if os.environ.get(browsers.REQUIRED) == "required":
        raise pytest.UsageError(f"the tests in a browser cannot be run: {found}")
    config.hook.pytest_deselected(items=web)
    items[:] = [item for item in items if item not in web]


@pytest.fixture(scope="session")
def browser():
    with browsers.running() as found:
        yield found


def written(directory, runs):
    """A page in a directory, of the runs in others."""
    from helpsteer_rloo.commands.report import collected
    from helpsteer_rloo.report.collect import find_run
    from helpsteer_rloo.report.page import render

    path = directory / "report.html"
    path.write_text(render(collected([find_run(str(run)) for run in runs])), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def page_file(tmp_path_factory):
    """The page of an ordinary run."""
    directory = tmp_path_factory.mktemp("ordinary")
    return written(directory, [make_run(directory / "demo", concern=True)])


@pytest.fixture(scope="session")
def hostile_file(tmp_path_factory):
    """The page of a run all of whose texts want to be something else."""
    directory = tmp_path_factory.mktemp("hostile")
    return written(directory, [make_run(directory / "<img src=x>", domain=HOSTILE[1], texts=HOSTILE)])


@pytest.fixture(scope="session")
def two_runs_file(tmp_path_factory):
    """The page of two runs side by side."""
    directory = tmp_path_factory.mktemp("two")
    return written(directory, [make_run(directory / "first"), make_run(directory / "second", accuracy=0.7, gold=-0.1)])


@pytest.fixture(scope="session")
def strange_file(tmp_path_factory):
    """The page of two runs with long names, large and small numbers, and scores that are all the same."""
    directory = tmp_path_factory.mktemp("strange")
    run = make_run(directory / "a-run-with-a-name-that-is-rather-long", domain="a domain of more words than others")
    log = [
        {**row, "step": row["step"] * 247, "reward": row["reward"] * 1e9, "kl_per_completion": row["step"] * 1e-7}
        for row in policy_log()
    ]
    (run / "policy" / "metrics.jsonl").write_text(json_text(log))
    rows = answers()
    for side in (side for row in rows for side in (row["before"], row["after"])):
        side |= {"gold": 1.0, "reward": 123456 + side["reward"]}
    (run / "samples.jsonl").write_text(json_text(rows))
    record = heldout()
    record["by_length"] = {"from 1 to 1000 tokens of both": estimate(0.8000005, 0.8000001, 0.8000009)}
    record["probes"] = {"repetition": {"change": estimate(-123456.0, -123459.0, 5.0)}}
    write_json(run / "reward_model" / "reward_model.json", {"heldout": record})
    return written(directory, [run, make_run(directory / "another-run-with-a-name-that-is-rather-long")])


@pytest.fixture(scope="session")
def zero_file(tmp_path_factory):
    """The page of a run whose only sample has scores a little below zero."""
    directory = tmp_path_factory.mktemp("zero")
    run = make_run(directory / "zero")
    (row,) = answers(1)
    row["before"], row["after"] = ({"text": "a", "ended": True, "reward": score} for score in (-1e-5, -2e-5))
    (run / "samples.jsonl").write_text(json_text([row]))
    return written(directory, [run])


@pytest.fixture(scope="session")
def large_file(tmp_path_factory):
    """The page of a run with as many samples as a page takes."""
    directory = tmp_path_factory.mktemp("large")
    run = make_run(directory / "large")
    rows = answers(5000)
    for number, row in enumerate(rows):
        row["after"]["text"] += " and so on" * 100 + (" needle" if number % 1000 == 999 else "")
    (run / "samples.jsonl").write_text(json_text(rows))
    return written(directory, [run])


@pytest.fixture
def open_page(browser):
    """Opens a page as a test wants it, and sees afterwards that nothing was asked for and nothing went wrong."""
    contexts, problems, asked, allowed = [], [], [], set()

    def opened(path, fragment="", *, width=1280, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        context.route("**/*", lambda route: route.continue_() if route.request.url in allowed else route.abort())
        page = context.new_page()
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        address = path.as_uri()
        allowed.add(address)
        page.goto(address + fragment)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert {url.partition("#")[0] for url in asked} <= allowed
