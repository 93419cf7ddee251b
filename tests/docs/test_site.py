"""The site is built without a warning, from every page, and asks no other host for anything."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, GENERATED, ROOT, site_pages, text_of


def build(root: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "zensical"
    return subprocess.run(
        [program, "build", "--strict"], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def sources(tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / GENERATED.name).write_text(text_of(GENERATED))
    return tmp_path


def test_the_site_is_built_of_every_page_and_stands_alone(sources):
    done = build(sources)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    site = sources / "site"
    for page in site_pages():
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()
    loaded = re.compile(r"""(?:src|data-src)=["']?(?:https?:)?//[^"' >]+|<link[^>]+href=["']?(?:https?:)?//[^"' >]+""")
    for html in site.rglob("*.html"):
        assert [found for found in loaded.findall(html.read_text()) if 'rel="canonical"' not in found] == [], html
    for css in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s+)[\"']?(https?:)?//", css.read_text()), css


def test_a_broken_link_ends_the_build(sources):
    page = sources / "docs" / "status.md"
    page.write_text(page.read_text() + "\n[nowhere](nowhere.md)\n")
    done = build(sources)
    assert done.returncode != 0
    assert "page does not exist" in done.stdout + done.stderr
