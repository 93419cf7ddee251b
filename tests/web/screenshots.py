"""The README's pictures of the report: `make screenshots`, from the runs that `make demo` leaves.

`python -m tests.web.screenshots RUN RUN`: the first run in dark on a desktop and in light on a phone, and both runs
side by side.
"""

import sys
import tempfile
from pathlib import Path

from helpsteer_rloo.commands.report import collected
from helpsteer_rloo.report.collect import find_run
from helpsteer_rloo.report.page import render
from tests.web import browser

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
LARGEST = 200_000
"""Bytes of a picture."""
_TO_THE_POLICY = "document.getElementById('policy').scrollIntoView()"


def main(first, second):
    """Take the pictures; exit with a message if one is too large, or there is no browser."""
    if problem := browser.problem():
        sys.exit(f"error: no picture can be taken: {problem}")
    PICTURES.mkdir(parents=True, exist_ok=True)
    runs = [find_run(first), find_run(second)]
    with tempfile.TemporaryDirectory() as scratch, browser.running() as chromium:
        one, both = Path(scratch) / "one.html", Path(scratch) / "both.html"
        one.write_text(render(collected(runs[:1])), encoding="utf-8")
        both.write_text(render(collected(runs)), encoding="utf-8")
        take(chromium, one, "report-desktop-dark", scheme="dark", size=(1180, 1000))
        take(chromium, one, "report-phone-light", scheme="light", size=(390, 844), fragment="#sample-1")
        take(chromium, both, "report-two-runs", scheme="light", size=(1180, 1000), script=_TO_THE_POLICY)


def take(chromium, page_file, name, *, scheme, size, fragment="", script=None):
    """One picture of what a visitor sees."""
    page = chromium.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.goto(page_file.as_uri() + fragment)
    if script:
        page.evaluate(script)
    path = PICTURES / f"{name}.png"
    page.screenshot(path=path)
    page.close()
    if path.stat().st_size > LARGEST:
        sys.exit(
            f"error: {path} has {path.stat().st_size} bytes, more than {LARGEST}; take a smaller part of the page."
        )
    print(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.web.screenshots RUN RUN")
    main(*sys.argv[1:])
