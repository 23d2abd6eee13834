"""What the pages say exists: links lead somewhere, and commands are commands."""

import re
from pathlib import Path

import pytest

from zoo.cli import ELSEWHERE

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS = {"list", "info", "new", *ELSEWHERE}


def anchors(page):
    """Where a page can be pointed into, as GitHub names its headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_commands(page):
    text = page.read_text("utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    named = [match[1] for line in lines if (match := re.match(r"(?:.*/)?zoo ([\w-]+)", line))]
    named += re.findall(r"`zoo ([a-z][\w-]*)", text)
    assert set(named) <= COMMANDS, set(named) - COMMANDS


def test_every_page_is_reached_from_the_first():
    """By the README, or by the catalogue for the pages of systems."""
    seen, front = set(), [ROOT / "README.md"]
    while front:
        page = front.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text("utf-8"))
        front += [(page.parent / link).resolve() for link in links if not re.match(r"\w+:", link)]
    assert set(PAGES) <= seen, set(PAGES) - seen
