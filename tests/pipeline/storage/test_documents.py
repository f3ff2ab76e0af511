from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from pipeline.config.identity import STAGES, check_settings_of, read_settings
from pipeline.errors import DataError
from pipeline.evaluation import quality
from pipeline.evaluation.quality import PromotionStatus, read_promotion_status
from pipeline.manifest import normalised
from pipeline.models.transformation import read_info, read_part
from pipeline.planning.plan import Plan, Wave, read_plan
from pipeline.run import Run
from pipeline.storage import documents, objects
from tests.support.synthetic_run import known, make_run


@dataclass(frozen=True)
class Item:
    number: int
    names: tuple[str, ...]
    share: float = 0.5


ITEM = Item(3, ("a", "b"))


def changed(data: bytes, seed: int) -> bytes:
    """The same bytes with one of them replaced by another character."""
    rng = np.random.default_rng(seed)
    place = int(rng.integers(len(data)))
    others = [byte for byte in range(32, 127) if byte != data[place]]
    return data[:place] + bytes([others[rng.integers(len(others))]]) + data[place + 1 :]


def test_parse_gives_what_encode_was_given() -> None:
    assert documents.parse(Item, documents.encode(ITEM), "file") == ITEM


def test_encode_of_equal_content_gives_equal_bytes() -> None:
    assert documents.encode(ITEM) == documents.encode({"number": 3, "names": ["a", "b"], "share": 0.5})


@pytest.mark.parametrize("seed", range(100))
def test_parse_of_a_file_with_one_other_byte_is_an_error_or_the_same_item(seed: int) -> None:
    data = documents.encode(ITEM)
    try:
        found = documents.parse(Item, changed(data, seed), "file")
    except DataError as error:
        found, where = ITEM, error.details["where"]
    else:
        where = "file"  # white space between the fields
    assert (found, where) == (ITEM, "file")


@pytest.mark.parametrize("key", ["sha256", "checked_by"])
def test_parse_of_a_file_that_lost_its_digest_is_an_error(key: str) -> None:
    tree = json.loads(documents.encode(ITEM))
    del tree[key]
    with pytest.raises(DataError, match="the file was changed"):
        documents.parse(Item, json.dumps(tree).encode(), "file")


@pytest.mark.parametrize(("data", "found"), [(b"{}", "no format_version"), (b'{"format_version": 99}', "99")])
def test_parse_of_a_checked_file_of_another_format_says_which_and_what_to_do(data: bytes, found: str) -> None:
    with pytest.raises(DataError, match="another format") as caught:
        documents.parse(Item, data, "file", "restore it", must_be_checked=True)
    assert found in str(caught.value.details["found"])
    assert "restore it" in str(caught.value.details["remedy"])


def test_parse_of_a_file_that_an_earlier_version_wrote_without_a_digest_gives_the_item() -> None:
    assert documents.parse(Item, b'{"number": 3, "names": ["a", "b"]}', "file") == ITEM


NO_ITEMS = [
    *(b"", b"\x00", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b"{}"),
    b'{"number": "x", "names": []}',
    b'{"number": 3, "names": [1]}',
    b'{"format_version": 2, "number": 3, "names": []}',
]


@pytest.mark.parametrize("data", NO_ITEMS, ids=range(len(NO_ITEMS)))
def test_parse_of_a_file_of_another_kind_is_an_error_with_its_name(data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        documents.parse(Item, data, "the/file.json")
    assert caught.value.details["where"] == "the/file.json"


def _settings_of_plan(run: Run) -> object:
    return check_settings_of(run, "plan", {})


def _write_plan(run: Run) -> None:
    plan = Plan("uncertainty", 0, 10, 1, 2, 4, 5, (Wave(1, 10, 2),), "print")
    objects.put(run.plan, documents.encode(plan))


READERS: dict[str, Callable[[Run], object]] = {
    "run.json": read_settings,
    "plan/plan.json": read_plan,
    "gallery/manifest.json": lambda run: normalised.read_manifest(run, "gallery"),
    "transformation/transformation.json": read_info,
    "reports/standing.json": read_promotion_status,
    "reports/best.json": lambda run: quality.read_best(run, 9),
    **{stage.settings: _settings_of_plan for name, stage in STAGES.items() if name == "plan"},
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "a flipped bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a list": lambda data: b"[1, 2]",
    "another object": lambda data: b'{"format_version": 1, "sha256": "x"}',
    "not text": lambda data: b"\xff\x00" + data,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_json_file_of_a_run_is_one_error_with_its_name(name: str, damage: str, tmp_path: Path) -> None:
    _, run = make_run(tmp_path / "run", known(40), None)
    _write_plan(run)
    quality.write_promotion_status(run, PromotionStatus(3, ("why",)), lambda: None)
    where = run.path(*name.split("/"))
    data = objects.read_bytes(where) if objects.exists(where) else documents.encode({"commit": 3})
    objects.put(where, DAMAGES[damage](data))
    with pytest.raises(DataError) as caught:
        READERS[name](run)
    assert caught.value.details["where"] == where
    assert caught.value.details["remedy"]


def test_status_of_a_run_with_a_damaged_plan_is_one_line_with_its_name(tmp_path: Path) -> None:
    from click.testing import CliRunner

    config, run = make_run(tmp_path / "run", known(40), None)
    objects.put(run.plan, b"{")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    result = CliRunner().invoke(main, ["status", "--config", str(path)])
    assert result.exit_code == 2
    assert run.plan in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output


def test_read_part_of_a_marker_whose_parts_are_no_mapping_is_an_error(tmp_path: Path) -> None:
    _, run = make_run(tmp_path / "run", known(40), None)
    objects.put(run.path("transformation", "transformation.json"), b'{"format_version": 1, "parts": 3}')
    with pytest.raises(DataError, match="parts"):
        read_part(run, "offset.safetensors")
