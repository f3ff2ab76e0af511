"""docs/scaling.md says what the formulas give, and names code that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.scale import arithmetic
from pipeline.config import tree
from pipeline.index.seal import Sealer
from pipeline.planning import plan
from pipeline.run import Run
from pipeline.storage import retrying_store

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("title", list(arithmetic.TABLES))
def test_the_document_has_the_tables_as_they_are_computed(title: str) -> None:
    assert "\n".join(arithmetic.tables()[title]) in DOCUMENT


def test_the_constants_are_those_of_the_code() -> None:
    assert tree._UNIT_BYTES // (224 * 224 * 3) // 256 == 1  # so a unit has 256 images
    assert arithmetic.UNIT_IMAGES[1] == tree._MAX_UNIT_IMAGES
    sizes = plan.wave_sizes(100, 10**9)
    assert sizes[-1] / 1e9 == pytest.approx(arithmetic.CONSTANTS["last"], rel=1e-6)
    waves = tuple(plan.Wave(number + 1, size, 1) for number, size in enumerate(sizes))
    sealer = Sealer(Run(""), plan.Plan("random", 0, 10**9, 1, 64, 128, 256, waves, ""), "", "")
    tasks = [len(sealer.together(wave.wave)) for wave in waves]
    assert arithmetic.CONSTANTS["R"] == sum(tasks)
    mean = sum(number * size for number, size in zip(tasks, sizes, strict=True)) / 1e9
    assert arithmetic.CONSTANTS["R_log"] == pytest.approx(mean, abs=0.5)
    assert retrying_store._MOST_PUT_BYTES < 2 / 21 * 1e9 / 8 * 520  # the Flat segment that the document warns of


def test_a_formula_is_computed_as_it_is_shown() -> None:
    known = arithmetic.CONSTANTS | {"u": 2.0}
    assert arithmetic.evaluate("N / u", known) == 5e8
    assert arithmetic.text(5e8, "") == "500 million"
    assert arithmetic.text(3.35e6, "B") == "3.35 MB"
    assert arithmetic.text(123.4, "h") == "123 h"


def test_code_named_in_the_document_exists() -> None:
    named = re.findall(r"`([\w/]+)\.py` `(\w+)`", DOCUMENT)
    assert len(named) > 8
    for module, name in named:
        assert re.search(rf"def {name}\b", (ROOT / "pipeline" / f"{module}.py").read_text()), (module, name)


def test_links_lead_to_existing_files() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", DOCUMENT)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
