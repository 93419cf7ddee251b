"""The browser that pages are looked at with: Chromium from the distribution's packages, driven by Playwright."""

import importlib.util
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRED = "HELPSTEER_RLOO_WEB"
"""Environment variable; with `required` in it a browser that is missing is an error, as for `make test-web`."""


def problem():
    """What is missing to look at a page; None if nothing is."""
    missing = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install -c constraints.txt -e '.[dev,web]'"
    if executable() is None:
        return (
            "there is no Chromium: install the distribution's package (apt-get install chromium), or say where one is "
            "with CHROMIUM=/path/to/chromium"
        )
    return None


def executable():
    """Where Chromium is, or None."""
    given = os.environ.get("CHROMIUM")
    if given:
        return given if Path(given).is_file() else None
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def running():
    """The browser, for as long as the context lasts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # a container has no user namespaces for the sandbox, and root may not use it
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=executable(), args=arguments)
        yield browser
        browser.close()
