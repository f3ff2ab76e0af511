"""Learning on the way, in whole backfills without Ray: no image is lost, none is embedded twice, nothing half is seen.

Ray's tasks run here in this process, one after the other; the encoder gives known vectors, and the fit is a plain loop
of some epochs: what is tested is what is written, in which order, and what becomes of it after a kill. A whole run on
Ray, by the command, is in tests/e2e/test_relearn.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import backfill as driver
from pipeline import planner, quality, reference, replan, score, seal, snapshot, storage, vector_log
from pipeline.audit import audit
from pipeline.codebook import Codebook
from pipeline.collect import Rules, collect
from pipeline.config import Config, Gate, Relearn
from pipeline.errors import DataError
from pipeline.index import Segment, decode
from pipeline.local_store import LocalStore
from pipeline.plan import Plan, read_plan, read_transformed
from pipeline.probe_set import draw
from pipeline.published import published_points
from pipeline.reference import build_reference
from pipeline.run import Run, fix_settings, stage_settings
from pipeline.schema import Int64, UnitAck, vectors_from_arrow, vectors_to_arrow
from pipeline.search import Searcher
from pipeline.stream import Work
from pipeline.transformation import TransformationInfo, TransformationNetwork, apply, save_transformation
from pipeline.vector_log import EmbeddedUnit
from tests.pipeline.in_process import plan_in_process
from tests.pipeline.synthetic_run import Known, Options, known, make_run
from training import relearn as relearning
from training.learner import FitData, Job, Learner, make_arrays
from training.pairs import Pairs
from training.relearn import read_learnt, relearn

WAVES, AFTER = 5, (2, 3)
ON_RAY = [(planner, name, getattr(planner, name)) for name in ("count_parts", "lay_out", "cut_waves")]
ON_RAY += [(score, "score_parts", score.score_parts), (seal, "_run", seal._run)]
REJECTED = 23  # of the ids, one in so many


class Killed(BaseException):
    """The driver is gone: nothing may catch it."""


@dataclass
class Encoder:
    """The new encoder's answers, and how often each image was asked for."""

    images: Known
    asked: dict[int, int]

    def stream(self, work: list[Work], config: Config) -> Iterator[tuple[int, UnitAck]]:
        """As `embed_stream`, unit by unit."""
        order = np.argsort(self.images.ids)
        for unit in work[0].units:
            ids: Int64 = storage.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_numpy()
            rows = order[np.searchsorted(self.images.ids[order], ids)]
            stages = pa.array(["decode" if id % REJECTED == 0 else "" for id in ids.tolist()])
            embedded = EmbeddedUnit(ids, self.images.embedded[rows], pa.nulls(len(ids), pa.string()), stages, stages)
            size, rejected, digest = vector_log.write_unit(work[0].log, unit, embedded)
            for id in ids.tolist():
                self.asked[id] = self.asked.get(id, 0) + 1
            yield (
                0,
                UnitAck(unit.wave, unit.unit, len(ids) - rejected, rejected, size, 0.0, 0.0, 0.0, part_digest=digest),
            )


def plain_fit(config: Config, run: Run, data: FitData, on_epoch: object = None, classify: bool = False) -> None:
    """Some epochs, in this process."""
    job = Job(config.fit, data, config.seed, False, 2, min(64, data.num_train))
    pairs = make_arrays(pa.concat_tables(map(storage.read_parquet, data.train_parts)), job)
    learner = Learner(job, pairs, 0, torch.device("cpu"), lambda module: module)
    for _ in range(config.fit.epochs):
        learner.run_epoch()
    save(run, learner.network.eval(), data)


def biased(network: TransformationNetwork, bias: float) -> TransformationNetwork:
    """So that any fit is better."""
    with torch.no_grad():
        network.embedding.bias += bias
    return network.eval()


def save(run: Run, network: TransformationNetwork, data: FitData) -> None:
    held_out = pa.concat_tables(map(storage.read_parquet, data.held_out_parts)).sort_by("index")
    old, new = (vectors_from_arrow(held_out[name]) for name in ("old", "new"))
    z, s = apply(network, old, None, torch.device("cpu"), 8192)
    info = TransformationInfo(
        *(data.d_old, data.d_new, None, network.inner_width, False, "alignment+uncertainty", 0, 2),
        *(data.num_train, len(old), True),
        held_out={"transformed": {"top1": 41.2, "map": 22.1}, "old_old": {"top1": 28.3, "map": 12.9}},
    )
    known_pairs = build_reference(old, z, s, new, None, None, "l2", 0)
    save_transformation(run, network, info, {reference.PART: known_pairs.to_bytes()})


def write_pairs(run: Run, images: Known) -> FitData:
    """A few images as pairs, under ids of their own."""
    uris = {
        "train": (run.part("pairs/train", 0), slice(0, 60)),
        "held_out": (run.part("pairs/held_out", 0), slice(60, 90)),
    }
    for uri, rows in uris.values():
        count = rows.stop - rows.start
        columns = {
            "index": pa.array(np.arange(rows.start, rows.stop)),
            "label": pa.nulls(count, pa.int32()),
            "group": pa.nulls(count, pa.string()),
            "old": vectors_to_arrow(images.old[rows]),
            "new": vectors_to_arrow(images.embedded[rows]),
        }
        table = pa.table(columns)
        storage.put(uri, storage.parquet_bytes(table.schema, [table]))
    pairs = Pairs(60, 30, images.old.shape[1], images.embedded.shape[1], None, None, 0)
    storage.put(run.path("pairs", "pairs.json"), json.dumps(asdict(pairs)).encode())
    return FitData([uris["train"][0]], [uris["held_out"][0]], 60, None, pairs.d_old, pairs.d_new)


def begin(folder: Path, after: tuple[int, ...] = AFTER, **changes: Any) -> tuple[Config, Run, Plan, Encoder]:
    """A planned run before its first commit."""
    images = known(420)
    options = Options(WAVES, embedded_waves=0, commits=False, transformation=False, new_in_manifest=True)
    config, run = make_run(folder, images, options)
    fit = config.fit.model_copy(
        update={"inner_width": 16, "epochs": 20, "warmup_epochs": 0, "lr": 0.01, "loss": "alignment+uncertainty"}
    )
    update = {
        "fit": fit,
        "relearn": Relearn(after_waves=after, **changes),
        "gate": Gate(min_slot_share=None, max_slot_share=None, max_fall=100),
    }
    index = config.index.model_copy(update={"factory": "Flat", "shards": options.shards})
    config = config.model_copy(update=update | {"index": index, "device": "cpu"})
    data = write_pairs(run, images)
    torch.manual_seed(0)
    fix_settings(run, "fit", stage_settings(config, "fit"))
    save(run, biased(TransformationNetwork(data.d_old, data.d_new, 16), 30), data)
    storage.delete(run.plan)
    plan = planner.make_plan(config, run)
    assert (plan.relearn_after, read_plan(run)) == (after, plan)
    assert draw(config, run) is not None
    return config, run, plan, Encoder(images, {})


def go_on(config: Config, run: Run, plan: Plan, encoder: Encoder, look: Callable[[], None] = lambda: None) -> None:
    """The driver, started or started again."""
    driver.embed_stream = encoder.stream
    progress = driver.backfill(
        config, run, plan, lambda _: look(), relearn=lambda wave: relearn(config, run, plan, wave) and None
    )
    assert progress.left == 0


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_in_process(monkeypatch)
    monkeypatch.setattr(seal, "_run", lambda function, tasks: [function(*arguments) for _, arguments in tasks])
    monkeypatch.setattr(relearning, "fit", plain_fit)
    monkeypatch.setattr(driver, "embed_stream", driver.embed_stream)


def vectors(run: Run, number: int) -> dict[int, bytes]:
    """What a commit serves, by id."""
    commit = snapshot.read_commit(run, number)
    codebook = Codebook.open(run, commit.codebook_path, commit.codebook_sha256)
    found: dict[int, bytes] = {}
    for ref in commit.segments:
        ids, values = decode(codebook, Segment.open(run, codebook, ref))
        assert not found.keys() & set(ids.tolist())
        found |= dict(zip(ids.tolist(), (value.tobytes() for value in values), strict=True))
    return found


def files(run: Run) -> dict[str, bytes]:
    """Everything that is derived, by its path in the run."""
    folders = ("relearnt", "embedded", "index/segments", "transformed", "probe-set")
    uris = [uri for folder in folders for uri, _ in storage.iter_stats(run.path(folder))]
    return {uri.removeprefix(run.uri): storage.read_bytes(uri) for uri in uris if not uri.endswith(".lock")}


def contents(run: Run) -> list[dict[str, object]]:
    return [snapshot.read_commit(run, number).content() for number in snapshot.list_commits(run)]


def members(run: Run, plan: Plan, wave: int, commit: int | None = None) -> set[int]:
    return set(read_transformed(run, plan, wave, ["id"], commit=commit)["id"].to_pylist())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def whole(kept: dict[str, Any], in_this_process: None) -> tuple[Config, Run, Plan, Encoder]:
    """A run that learnt twice and that nobody has stopped."""
    if "run" not in kept:
        kept["run"] = begin(kept["folder"])
        go_on(*kept["run"])
    found: tuple[Config, Run, Plan, Encoder] = kept["run"]
    return found


def test_each_image_is_embedded_once_and_every_commit_holds_the_gallery_once(
    whole: tuple[Config, Run, Plan, Encoder],
) -> None:
    _, run, plan, encoder = whole
    ids = set(encoder.images.ids.tolist())
    assert encoder.asked == dict.fromkeys(ids, 1)
    assert snapshot.list_commits(run) == list(range(WAVES + 1))
    for number in range(WAVES + 1):
        assert vectors(run, number).keys() == ids
        commit = snapshot.read_commit(run, number)
        done = sum(wave.images for wave in plan.waves[:number])
        assert commit.counts.embedded + commit.counts.rejected == done
    report = audit(run.uri)
    assert report.problems == []
    assert report.checked["vectors"] > 0


def test_what_is_left_is_other_images_by_another_transformation_and_what_is_done_stays(
    whole: tuple[Config, Run, Plan, Encoder],
) -> None:
    _, run, plan, _ = whole
    assert read_learnt(run, AFTER[0]).taken
    for learnt in AFTER:
        before, after = (
            [members(run, plan, wave, commit) for wave in range(1, WAVES + 1)] for commit in (learnt - 1, learnt)
        )
        assert before[:learnt] == after[:learnt]
        assert before[learnt:] != after[learnt:] or not read_learnt(run, learnt).taken
        assert set.union(*before[learnt:]) == set.union(*after[learnt:])
        assert [len(wave) for wave in after] == [wave.images for wave in plan.waves]
        left = set.union(*after[learnt:])
        then, now = vectors(run, learnt - 1), vectors(run, learnt)
        assert all(then[id] != now[id] for id in left) or not read_learnt(run, learnt).taken
        assert all(then[id] == now[id] for id in set.union(*after[: learnt - 1]))


def test_the_last_snapshot_is_that_of_a_run_that_learns_nothing(
    whole: tuple[Config, Run, Plan, Encoder], tmp_path: Path
) -> None:
    _, run, _, encoder = whole
    plain = begin(tmp_path, after=())
    go_on(*plain)
    ids = encoder.images.ids[encoder.images.ids % REJECTED != 0].tolist()
    found, expected = vectors(run, WAVES), vectors(plain[1], WAVES)
    assert all(found[id] == expected[id] for id in ids)
    assert found.keys() == expected.keys()
    assert not storage.list_files(plain[1].path("relearnt"))
    points, others = published_points(run), published_points(plain[1])
    assert [point["fraction"] for point in points] == [point["fraction"] for point in others]
    assert points[0] == others[0]
    assert points[2] != others[2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_driver_that_is_killed_anywhere_goes_on_to_the_same_bytes(
    whole: tuple[Config, Run, Plan, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Before or after a write, again and again; each life gets a little further."""
    config, run, plan, encoder = begin(tmp_path)
    rng, lives, left = np.random.default_rng(seed), 0, [0]
    for name in ("put", "put_if_absent", "compare_and_swap"):
        write = getattr(LocalStore, name)

        def dying(self: LocalStore, *arguments: Any, write: Any = write) -> Any:
            left[0] -= 1
            if left[0] == 0 and rng.random() < 0.5:
                raise Killed
            if left[0] < 0:
                raise Killed
            found = write(self, *arguments)
            if left[0] == 0:
                raise Killed
            return found

        monkeypatch.setattr(LocalStore, name, dying)
    while True:
        left[0], lives = int(rng.integers(12, 40)) + 2 * lives, lives + 1
        try:
            go_on(config, run, plan, encoder)
            break
        except Killed:
            continue
    assert lives > 4
    monkeypatch.undo()
    assert audit(run.uri).problems == []
    mine, theirs = files(run), files(whole[1])
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert contents(run) == contents(whole[1])


def test_of_two_drivers_that_learn_at_the_same_time_both_come_to_the_same(
    whole: tuple[Config, Run, Plan, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one does all of it while this one is between two steps."""
    config, run, plan, encoder = begin(tmp_path)
    for name in ("count_parts", "lay_out", "cut_waves"):
        step, waves = getattr(planner, name), []

        def meanwhile(*arguments: Any, step: Any = step, waves: list[int] = waves) -> Any:
            wave = next((wave for wave in AFTER if not replan.is_replanned(run, wave)), None)
            if wave is not None and wave not in waves:
                waves.append(wave)
                relearn(config, run, plan, wave)
            return step(*arguments)

        monkeypatch.setattr(planner, name, meanwhile)
    go_on(config, run, plan, encoder)
    assert audit(run.uri).problems == []
    assert files(run) == files(whole[1])
    assert contents(run) == contents(whole[1])


def test_a_driver_that_was_taken_over_and_comes_late_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen nothing of what the other one made, and its scores are others."""
    config, run, plan, encoder = begin(tmp_path)
    go_on(config, run, plan, encoder)
    before, commits = files(run), contents(run)
    prioritise = score.policy.prioritise
    monkeypatch.setattr(replan, "is_replanned", lambda run, wave: False)
    monkeypatch.setattr(score.policy, "prioritise", lambda *arguments, where: -prioritise(*arguments, where=where))
    for wave in AFTER:
        relearn(config, run, plan, wave)
    assert files(run) == before
    assert contents(run) == commits


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_by_tasks_of_ray_it_comes_to_the_same(
    whole: tuple[Config, Run, Plan, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the round-off of the transformation, which depends on threads."""
    config, run, plan, encoder = begin(tmp_path)
    for module, name, function in ON_RAY:
        monkeypatch.setattr(module, name, function)
    go_on(config, run, plan, encoder)
    assert audit(run.uri).problems == []
    for wave in range(1, WAVES + 1):
        assert members(run, plan, wave) == members(whole[1], plan, wave)
    assert encoder.asked == whole[3].asked


def test_a_reader_that_follows_sees_whole_snapshots_only(tmp_path: Path) -> None:
    config, run, plan, encoder = begin(tmp_path)
    seen: set[int] = set()

    def look() -> None:
        with Searcher(run.uri, tag=snapshot.CANDIDATE) as searcher:
            found = searcher.search(encoder.images.embedded[:3], len(encoder.images.ids))
            seen.add(searcher.commit.number)
            assert all(sorted(row) == sorted(encoder.images.ids.tolist()) for row in found.ids.tolist())

    go_on(config, run, plan, encoder, look)
    assert len(seen) > 2


def test_the_probe_set_is_measured_where_its_images_lie(whole: tuple[Config, Run, Plan, Encoder]) -> None:
    """Each embedded probe image is found under its id, in its wave; and top-1 is that of exact search in the commit."""
    _, run, plan, encoder = whole
    images, probe = encoder.images, set(storage.read_parquet(run.path("probe-set", "set.parquet"))["id"].to_pylist())
    done = {id for id in probe if id % REJECTED}
    for measured in quality.read_all(run):
        waves = range(1, measured.commit + 1)
        expected = [(wave, len(members(run, plan, wave) & done)) for wave in waves]
        assert [(wave, images) for wave, _, images in measured.own] == [item for item in expected if item[1]]
        assert measured.figures.get("own", 100) == 100
        held = vectors(run, measured.commit)
        gallery = np.stack([np.frombuffer(held[id], np.float32) for id in images.ids.tolist()])
        rows = np.flatnonzero(np.isin(images.ids, list(probe)))
        distances = np.square(images.embedded[rows][:, None] - gallery[None]).sum(axis=2)
        distances[np.arange(len(rows)), rows] = np.inf
        labels = np.array(images.labels)
        assert measured.figures["top1"] == pytest.approx(
            100 * (labels[distances.argmin(axis=1)] == labels[rows]).mean()
        )


def test_gc_removes_what_the_first_plan_had_and_keeps_what_a_commit_names(
    whole: tuple[Config, Run, Plan, Encoder], tmp_path: Path
) -> None:
    config, run, plan, encoder = begin(tmp_path)
    go_on(config, run, plan, encoder)
    snapshot.promote(run, WAVES, blockers=(), force=True)
    gone = {ref.path for ref in snapshot.read_commit(run, 1).segments if ref.wave > AFTER[0]}
    assert collect(run.uri, Rules(keep=2, grace_seconds=0)).commits == list(range(WAVES - 1))
    assert not any(storage.exists(run.path(path)) for path in gone)
    assert audit(run.uri).problems == []
    assert vectors(run, WAVES) == vectors(whole[1], WAVES)


def test_only_the_order_is_learnt_where_that_is_asked_for(tmp_path: Path) -> None:
    config, run, plan, encoder = begin(tmp_path, after=(2,), what="order")
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"policy": "neighbour_residual"})})
    go_on(config, run, plan, encoder)
    assert read_learnt(run, 2).what == "order"
    then, now = vectors(run, 1), vectors(run, 2)
    assert audit(run.uri).problems == []
    left = set.union(*(members(run, plan, wave) for wave in (3, 4, 5)))
    for id in left:
        np.testing.assert_allclose(np.frombuffer(now[id], np.float32), np.frombuffer(then[id], np.float32), atol=1e-5)


def test_a_transformation_that_is_worse_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(config: Config, run: Run, data: FitData, on_epoch: object = None, classify: bool = False) -> None:
        save(run, biased(TransformationNetwork(data.d_old, data.d_new, 16), 300), data)

    monkeypatch.setattr(relearning, "fit", worse)
    config, run, plan, encoder = begin(tmp_path, after=(2,))
    go_on(config, run, plan, encoder)
    learnt = read_learnt(run, 2)
    assert not learnt.taken
    assert "not taken" in str(learnt)
    assert audit(run.uri).problems == []


def test_a_fit_that_fails_is_reported_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(config: Config, run: Run, data: FitData, on_epoch: object = None, classify: bool = False) -> None:
        raise DataError("the loss is not finite")

    monkeypatch.setattr(relearning, "fit", failing)
    config, run, plan, encoder = begin(tmp_path, after=(2,))
    go_on(config, run, plan, encoder)
    assert read_learnt(run, 2).what == "nothing"
    assert "nothing is learnt after wave 2" in caplog.text
    assert audit(run.uri).problems == []


def test_nothing_is_learnt_from_a_handful_of_images(tmp_path: Path) -> None:
    config, run, plan, encoder = begin(tmp_path, after=(1,))
    go_on(config, run, plan, encoder)
    assert plan.waves[0].images < 32
    assert read_learnt(run, 1).what == "nothing"
    assert [members(run, plan, wave, 0) for wave in range(1, 6)] == [members(run, plan, wave) for wave in range(1, 6)]
    assert audit(run.uri).problems == []


def test_no_more_images_are_taken_than_are_asked_for(tmp_path: Path) -> None:
    config, run, plan, encoder = begin(tmp_path, after=(3,), images=100)
    go_on(config, run, plan, encoder)
    embedded = sum(wave.images for wave in plan.waves[:3])
    assert 60 < read_learnt(run, 3).images < 140 < embedded


@pytest.mark.parametrize("what", ["lost", "moved"])
def test_an_audit_sees_what_is_planned_anew(tmp_path: Path, what: str) -> None:
    config, run, plan, encoder = begin(tmp_path, after=(2,))
    go_on(config, run, plan, encoder)
    uri = run.relearnt(2).part("transformed", 0)
    with storage.open_parquet(uri) as file:
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    full = next(number for number, group in enumerate(groups) if group.num_rows)
    if what == "lost":
        groups[full] = groups[full].slice(1)
    else:
        groups[full] = groups[full].set_column(1, "wave", pa.array([1] * groups[full].num_rows, pa.int32()))
    storage.put(uri, storage.parquet_bytes(groups[full].schema, groups))
    kinds = {problem.kind for problem in audit(run.uri).problems}
    assert kinds & {"plan", "segment", "sidecar"}
