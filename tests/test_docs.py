"""The documents: links lead somewhere, and every module that they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")})
PACKAGES = "pipeline|training|jobs|benchmarks|tests|infra|docs"
NAMES = "|".join(path.name for path in (ROOT / "pipeline").iterdir() if path.is_dir())


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        there = page if not path else (page.parent / path).resolve()
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("page", [page for page in PAGES if "results" not in page.parts], ids=name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    found = re.findall(rf"`((?:{PACKAGES})/[\w/.-]+\.\w+)`", page.read_text())
    assert [path for path in found if not (ROOT / path).exists()] == []


def test_modules_of_the_walks_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = re.findall(rf"`((?:{NAMES})\.\w+|(?:jobs|training)(?:\.\w+)+)[^`]*`", text)
    places = [
        ROOT / ("" if item.startswith(("jobs", "training")) else "pipeline") / item.replace(".", "/") for item in found
    ]
    assert len(found) > 30
    missing = [str(place) for place in places if not place.is_dir() and not place.with_suffix(".py").exists()]
    assert missing == []
