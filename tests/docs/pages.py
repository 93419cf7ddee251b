"""The project's Markdown, as CommonMark reads it: links, headings with their anchors, blocks and spans of code."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tools.flags_page import trl_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GENERATED = DOCS / "trl-flags.md"
"""Made before each build of the site; in no commit."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where its text begins, the language behind the fence, and its text."""

    page: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Link:
    """A link or picture: where its paragraph begins, and what it leads to."""

    page: Path
    line: int
    target: str


def site_pages() -> list[Path]:
    """The pages of the site."""
    return sorted({*DOCS.rglob("*.md"), GENERATED})


def all_pages() -> list[Path]:
    """Everything that people read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *site_pages()]


@cache
def text_of(page: Path) -> str:
    return trl_page() if page == GENERATED else page.read_text(encoding="utf-8")


@cache
def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text_of(page))


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, token.map[0] + 2, token.info.strip(), token.content)
        for token in tokens_of(page)
        if token.type == "fence" and token.map
    ]


def _inline(page: Path) -> Iterator[tuple[int, Token]]:
    line = 1
    for token in tokens_of(page):
        line = token.map[0] + 1 if token.map else line
        for child in token.children or ():
            yield line, child


def links(page: Path) -> list[Link]:
    named = {"link_open": "href", "image": "src"}
    return [
        Link(page, line, str(child.attrs[named[child.type]])) for line, child in _inline(page) if child.type in named
    ]


def spans(page: Path) -> list[tuple[int, str]]:
    """Code within text, with the line of its paragraph."""
    return [(line, child.content) for line, child in _inline(page) if child.type == "code_inline"]


def headings(page: Path) -> list[str]:
    """The text of every heading, without marks."""
    found = tokens_of(page)
    return [
        "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
        for token, inline in pairwise(found)
        if token.type == "heading_open"
    ]


def site_anchors(page: Path) -> set[str]:
    """Anchors of the headings on the site, as Python-Markdown's `toc` makes them."""
    return _numbered((_site_slug(text) for text in headings(page)), "_")


def repository_anchors(page: Path) -> set[str]:
    """Anchors of the headings where the repository is shown, as GitHub makes them."""
    return _numbered((re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings(page)), "-")


def _site_slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def _numbered(slugs: Iterator[str], separator: str) -> set[str]:
    counts: Counter[str] = Counter()
    found: set[str] = set()
    for slug in slugs:
        found.add(f"{slug}{separator}{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return found
