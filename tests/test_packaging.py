"""What a fresh clone is set up with: tested versions for every direct dependency, and the targets that make names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_direct_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for group in project["optional-dependencies"].values() for item in group),
    ]
    names = {re.split(r"[^\w-]", item)[0].lower() for item in wanted} - {project["name"]}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert names - set(pinned) == set()


def test_the_makefile_has_the_targets_that_its_header_names() -> None:
    text = (ROOT / "Makefile").read_text()
    header = text.partition(":")[0].removeprefix("# make ").split()
    assert set(header) <= set(re.findall(r"^([\w-]+):", text, flags=re.MULTILINE))
