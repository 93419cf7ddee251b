"""Every internal link and anchor of the documents leads somewhere, on the site and in the repository."""

from urllib.parse import urlsplit

import pytest
import yaml

from tests.docs.pages import (
    DOCS,
    ROOT,
    Link,
    all_pages,
    links,
    repository_anchors,
    site_anchors,
    site_pages,
    tokens_of,
)

EXTERNAL = ("http", "https", "mailto")


def broken(link: Link) -> str | None:
    """What is wrong with a link, if anything is."""
    parts = urlsplit(link.target)
    if parts.scheme:
        sound = parts.scheme in EXTERNAL and " " not in link.target and (parts.netloc or parts.scheme == "mailto")
        return None if sound else "no address"
    target = (link.page.parent / parts.path).resolve() if parts.path else link.page
    if target not in all_pages() and not target.is_file():
        return "there is no such file"
    if DOCS in link.page.parents and DOCS not in target.parents:
        return "leads out of docs/, which the site does not have"
    if parts.fragment and target.suffix == ".md":
        anchors = repository_anchors(target) & (site_anchors(target) if DOCS in target.parents else {parts.fragment})
        return None if parts.fragment in anchors else "there is no such anchor"
    return None


def test_every_link_leads_somewhere(record_property, capsys):
    found = [link for page in all_pages() for link in links(page)]
    wrong = [
        f"{link.page.relative_to(ROOT)}:{link.line}: {link.target}: {why}" for link in found if (why := broken(link))
    ]
    external = sum(bool(urlsplit(link.target).scheme) for link in found)
    record_property("links", f"{len(found) - external} internal, {external} external")
    with capsys.disabled():
        print(f"\nlinks: {len(found) - external} internal, {external} external (of these the form alone)")
    assert not wrong, "\n".join(wrong)
    assert len(found) - external > 50


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("nowhere.md", "there is no such file"),
        ("data.md#nowhere", "there is no such anchor"),
        ("#nowhere", "there is no such anchor"),
        ("../README.md", "leads out of docs/, which the site does not have"),
        ("https://", "no address"),
        ("design.md#the-rendering", None),
        ("https://example.org/x#y", None),
    ],
)
def test_a_broken_link_is_found(target, why):
    assert broken(Link(DOCS / "data.md", 1, target)) == why


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = [
        page
        for section in config["nav"]
        for entries in section.values()
        for entry in entries
        for page in entry.values()
    ]
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in site_pages())


def test_every_page_begins_with_its_only_title():
    for page in site_pages():
        tags = [token.tag for token in tokens_of(page) if token.type == "heading_open"]
        assert tags[0] == "h1", page
        assert tags.count("h1") == 1, page
