"""Images that are embedded for the fit: served so from the first snapshot on, and never embedded again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.plan import show as show_plan
from jobs.status import show as show_status
from pipeline.arrays import Float32, vectors_from_arrow
from pipeline.backfill.repair import repair
from pipeline.embedding import vector_log
from pipeline.errors import DataError
from pipeline.evaluation.curve import curve
from pipeline.index import commits, tags
from pipeline.manifest import normalised
from pipeline.planning import log_pairs
from pipeline.planning.plan import FROM_PAIRS, read_plan
from pipeline.reporting.audit import audit
from pipeline.reporting.status import read_status
from pipeline.run import GALLERY_PAIRS, Run
from pipeline.sampling.pair_sample import embedded_ids
from pipeline.storage import objects, parquet
from tests.support.planned_backfill import REJECTED, WAVES, Scene, backfill_in_process, begin, served_vectors

SAMPLED = 90  # three units
GIVEN = pytest.mark.parametrize("given", [True, False], ids=["given", "computed"])


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    backfill_in_process(monkeypatch)


def no_training() -> bytes:
    raise AssertionError("the codebook is whole")


def sample(scene: Scene) -> set[int]:
    return set(embedded_ids(scene.run).tolist())


def parts(run: Run) -> dict[str, bytes]:
    return {uri: objects.read_bytes(uri) for uri in objects.list_files(run.path("embedded"), ".parquet")}


def embedding_of(scene: Scene) -> dict[int, Float32]:
    images = scene.encoder.images
    return dict(zip(images.ids.tolist(), images.embedded, strict=True))


@GIVEN
def test_backfill_embeds_every_image_once_and_ends_with_all_embeddings(given: bool, tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED, given)
    known, ids = sample(scene), set(scene.encoder.images.ids.tolist())
    assert len(known) == SAMPLED if given else 0 < len(known) < SAMPLED
    assert scene.plan.num_from_pairs == len(known)
    progress = scene.go_on()
    assert (progress.left, progress.from_pairs, progress.waves) == (0, len(known), WAVES)
    twice = {id for id in normalised.ids_of(scene.run, GALLERY_PAIRS).tolist() if id % REJECTED == 0}
    once = ids - known if given else ids - twice
    assert {id: asked for id, asked in scene.encoder.asked.items() if id in once} == dict.fromkeys(once, 1)
    if not given:
        assert twice, "some image of the sample is rejected, and again in its wave"
        assert {scene.encoder.asked[id] for id in twice} == {2}
    served, expected = served_vectors(scene.run, WAVES), embedding_of(scene)
    assert served.keys() == ids
    good = {id for id in ids if id % REJECTED} | known
    assert all(np.array_equal(served[id], expected[id]) for id in good)
    report = audit(scene.run.uri)
    assert report.problems == []
    assert report.checked["log_digests"] > WAVES


@GIVEN
def test_every_commit_from_the_first_on_holds_the_pairs_embedded(given: bool, tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED, given)
    scene.go_on()
    known, expected = sample(scene), embedding_of(scene)
    assert tags.list_commits(scene.run) == list(range(WAVES + 1))
    for number in range(WAVES + 1):
        commit = commits.read_commit(scene.run, number)
        done = sum(wave.images for wave in scene.plan.waves if wave.wave <= number)
        assert commit.counts.embedded + commit.counts.rejected == done
        served = served_vectors(scene.run, number)
        assert all(np.array_equal(served[id], expected[id]) for id in known)
    assert commits.read_commit(scene.run, 0).counts.embedded == len(known)


def test_the_plan_gives_the_pairs_a_wave_of_their_own_and_cuts_the_rest_as_before(tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED)
    assert read_plan(scene.run) == scene.plan
    assert [wave.wave for wave in scene.plan.waves] == list(range(WAVES + 1))
    assert [wave.images for wave in scene.plan.waves] == [90, 22, 44, 66, 88, 110]
    units = list(scene.plan.units_of(scene.run, FROM_PAIRS))
    assert [unit.images for unit in units] == [40, 40, 10]
    ids = [
        id for unit in units for id in parquet.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_pylist()
    ]
    assert set(ids) == sample(scene)


@pytest.mark.parametrize("units", range(4))
def test_a_driver_that_dies_between_units_of_the_pairs_is_followed_to_the_same_bytes(
    units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begin(tmp_path / "whole", SAMPLED, given=False)
    whole.go_on()
    scene = begin(tmp_path / "killed", SAMPLED, given=False)
    write, written = vector_log.write_unit, list[int]()

    def dying(*arguments: object) -> object:
        if len(written) == units:
            raise KeyboardInterrupt
        written.append(0)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(log_pairs.vector_log, "write_unit", dying)
        with pytest.raises(KeyboardInterrupt):
            scene.go_on()
    assert len(parts(scene.run)) == units
    scene.go_on()
    same = {uri.removeprefix(whole.run.uri): data for uri, data in parts(whole.run).items()}
    assert {uri.removeprefix(scene.run.uri): data for uri, data in parts(scene.run).items()} == same
    found = [[commits.read_commit(item.run, n).content() for n in range(WAVES + 1)] for item in (whole, scene)]
    assert found[0] == found[1]


def test_audit_finds_an_embedding_of_the_pairs_that_is_another_and_repair_copies_it_again(tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED, given=False)
    scene.go_on()
    before, part = parts(scene.run), scene.plan.log(scene.run).part(FROM_PAIRS, 0)
    rows = vector_log.read_unit(scene.plan.log(scene.run), FROM_PAIRS, 0)
    objects.delete_files([part])
    other = vectors_from_arrow(rows["vector"]).copy()
    other[3] += 1
    good = pa.nulls(len(rows), pa.string()).fill_null("")
    unit = next(iter(scene.plan.units_of(scene.run, FROM_PAIRS)))
    embedded = vector_log.EmbeddedUnit(rows["id"].to_numpy(), other, rows["source_etag"].combine_chunks(), good, good)
    vector_log.write_unit(scene.plan.log(scene.run), unit, embedded)
    report = audit(scene.run.uri)
    assert report.checked["images_from_pairs"] == scene.plan.num_from_pairs
    assert ("log_part", part, "1 others") in [(item.kind, item.where, item.found) for item in report.problems]
    assert repair(scene.run, scene.plan, report.problems, no_training).embed_again == [(FROM_PAIRS, 0)]
    log_pairs.write(scene.run, scene.plan)
    assert parts(scene.run) == before
    assert audit(scene.run.uri).problems == []


def test_a_second_driver_writes_no_unit_again(tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED, given=False)
    first = log_pairs.write(scene.run, scene.plan)
    written = parts(scene.run)
    assert [ack.embedded for ack in first] == [unit.images for unit in scene.plan.units_of(scene.run, FROM_PAIRS)]
    assert all(ack.part_digest and not ack.rejected for ack in first)
    assert log_pairs.write(scene.run, scene.plan) == []
    assert parts(scene.run) == written


def test_a_lost_unit_of_the_pairs_is_found_and_copied_again(tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED, given=False)
    scene.go_on()
    before, asked = parts(scene.run), dict(scene.encoder.asked)
    lost = scene.plan.log(scene.run).part(FROM_PAIRS, 1)
    objects.delete_files([lost])
    problems = audit(scene.run.uri).problems
    assert {problem.kind for problem in problems} >= {"log"}
    done = repair(scene.run, scene.plan, problems, no_training)
    assert done.embed_again == [(FROM_PAIRS, 1)]
    log_pairs.write(scene.run, scene.plan)
    assert parts(scene.run) == before
    assert audit(scene.run.uri).problems == []
    assert scene.encoder.asked == asked


def test_pairs_whose_embeddings_are_lost_stop_the_backfill_until_they_are_repaired(tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED, given=False)
    lost = scene.run.path(GALLERY_PAIRS, "new", "wave-000", "unit-00001.parquet")
    objects.delete_files([lost])
    with pytest.raises(DataError, match=r"a part of the vector log is missing(.|\n)*`fastfill repair`"):
        scene.go_on()
    assert tags.list_commits(scene.run) == []
    problems = audit(scene.run.uri).problems
    assert [(problem.kind, problem.where) for problem in problems] == [("log_part", lost)]
    assert repair(scene.run, scene.plan, problems, no_training).folders == [GALLERY_PAIRS]


def test_status_counts_the_pairs_as_durable_before_the_first_commit_and_as_published_with_it(tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED)
    log_pairs.write(scene.run, scene.plan)
    status = read_status(scene.run.uri)
    assert (status["from_pairs"], status["durable"], status["published"], status["wave"]) == (90, 90, 0, 0)
    scene.go_on()
    status = read_status(scene.run.uri)
    assert (status["wave"], status["waves"], status["fraction"]) == (WAVES, WAVES, status["published"] / 420)
    assert status["from_pairs"] == 90


def test_plan_and_status_say_how_many_images_are_embedded_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = begin(tmp_path, SAMPLED)
    show_plan(scene.plan)
    assert "90 of 420 images are embedded already: the pairs of the fit." in capsys.readouterr().err
    show_status(read_status(scene.run.uri), scene.run)
    assert "90 of 420 images are embedded already: the pairs of the fit." in capsys.readouterr().err


def test_the_curve_starts_with_the_pairs_in_every_order_and_meets_what_was_published(tmp_path: Path) -> None:
    scene = begin(tmp_path, SAMPLED)
    scene.go_on()
    found = curve(scene.config, scene.run)
    published = found["published"]["points"]  # type: ignore[index, call-overload]
    assert published[0]["fraction"] == pytest.approx(90 / 420)
    own = found["orders"]["uncertainty"]["points"]  # type: ignore[index, call-overload]
    x = [point["fraction"] for point in own]
    for point in published:
        near = np.interp(point["fraction"], x, [item["map"] for item in own])
        assert abs(near - point["map"]) < 2.0
