"""What can be counted in the text of answers: markdown, repetition, variety, refusals."""

import re
from collections.abc import Sequence

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


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that it has had before; 0 for a text without any.

    >>> repetition("a b a b a b", n=2)
    0.6
    """
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams of words of all texts, over their number (Li et al. 2016, arXiv 1510.03055); 0 without any.

    >>> distinct(["a b c", "a b d"])
    0.75
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


_REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am) (?:very |so )?(?:sorry|afraid|unable|not able)|sorry\b|i (?:can(?:'t|not)|won't|must decline)|"
    r"i apologi[sz]e|as an ai\b|unfortunately, i)",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether an answer begins as English refusals do.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("oak, elm")
    (True, False)
    """
    return bool(_REFUSAL.search(text.replace("\u2019", "'")))
