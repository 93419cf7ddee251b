"""Tests marked `web` are left out where there is no browser, unless they were asked for."""

import os

import pytest

from tests.report.runs import HOSTILE, answers, json_text, make_run
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
