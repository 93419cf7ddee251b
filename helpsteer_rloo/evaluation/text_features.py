"""What can be counted in the text of an answer: its markdown, and how often it repeats itself."""

import re

_MARKDOWN = re.compile(
    r"(?P<heading>^[ ]{0,3}\#{1,6}\s)|(?P<item>^\s*(?:[-*+]|\d+[.)])\s)|(?P<bold>\*\*[^*\n]+\*\*)|(?P<fence>^\s*```)",
    re.MULTILINE,
)


def markdown_marks(text: str) -> int:
    r"""Headings, list items, bold phrases and code fences in a text.

    >>> markdown_marks("# Trees\n- **oak**\n- elm")
    4
    """
    return sum(1 for _ in _MARKDOWN.finditer(text))


def with_markdown(text: str) -> str:
    r"""The same text in markdown: a heading above it, and every line an item of a list that begins in bold.

    >>> with_markdown("oak and elm")
    '## Answer\n\n- **oak** and elm'
    """
    items = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return "## Answer\n\n" + "\n".join(f"- **{first}**{space}{rest}" for first, space, rest in items)
