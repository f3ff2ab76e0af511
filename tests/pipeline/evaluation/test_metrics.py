"""Retrieval metrics and simulated curves, against a naive ranking and against each other."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.arrays import Bools, Float32, Int64
from pipeline.errors import DataError
from pipeline.evaluation import ranks as ranking
from pipeline.evaluation.metrics import EvaluateOptions, by_group, evaluate, negative_flips, recall
from pipeline.evaluation.simulated_curve import (
    CurveInputs,
    CurveOptions,
    Simulation,
    oracle_order,
    order_by_priority,
    random_order,
    share_of_gap,
    simulate_curve,
)
from pipeline.hashing import splitmix64
from pipeline.models.calibration import Calibration

POINTS = 22


def integers(num: int, dim: int, seed: int, high: int = 4) -> Float32:
    """Small whole numbers: their distances are exact in float32, and many are equal."""
    return np.random.default_rng(seed).integers(0, high, (num, dim)).astype(np.float32)


# Knots on whole numbers and slopes that are powers of 2, so that mapped keys are exact, and some are equal.
MAP = Calibration((-64.0, -8.0, 0.0, 4.0, 16.0), (-176.0, -64.0, 0.0, 8.0, 14.0))


def labels_of(num: int, num_labels: int, seed: int) -> Int64:
    return np.random.default_rng(seed + 1000).integers(0, num_labels, num)


def naive(
    queries: Float32,
    gallery: Float32,
    query_labels: Int64,
    gallery_labels: Int64,
    own: Int64,
    metric: str = "l2",
    transformed: Bools | None = None,
) -> tuple[list[int], list[float]]:
    """First rank and average precision of each query by sorting its whole ranking, relevant ones last in a tie."""
    first_rank, precision = [], []
    for query, label, self_row in zip(queries.astype(np.float64), query_labels, own, strict=True):
        distance = -(gallery.astype(np.float64) @ query) if metric == "ip" else ((gallery - query) ** 2).sum(axis=1)
        if transformed is not None:
            distance = np.where(transformed, MAP.apply_exactly(distance.astype(np.float64)), distance)
        relevant = gallery_labels == label
        order = [row for row in np.lexsort((relevant, distance)) if row != self_row]
        ranks = np.flatnonzero(relevant[order]) + 1
        first_rank.append(int(ranks[0]) if len(ranks) else 0)
        precision.append(float(np.mean(np.arange(1, len(ranks) + 1) / ranks)) if len(ranks) else float("nan"))
    return first_rank, precision


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(3, 60),
    dim=st.integers(1, 6),
    num_labels=st.integers(1, 20),
    metric=st.sampled_from(["l2", "ip"]),
    self_match=st.booleans(),
    calibrated=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_evaluate_equals_a_naive_ranking_with_ties_and_unmatched_queries(
    num: int, dim: int, num_labels: int, metric: str, self_match: bool, calibrated: bool, seed: int
) -> None:
    gallery, labels = integers(num, dim, seed), labels_of(num, num_labels, seed)
    queries, asked = (gallery, labels) if self_match else (integers(9, dim, seed + 1), labels_of(9, 20, seed + 1))
    own = np.arange(num) if self_match else np.full(9, -1)
    transformed = np.random.default_rng(seed).random(num) < 0.5 if calibrated else None
    first_rank, precision = naive(queries, gallery, asked, labels, own, metric, transformed)
    if not any(first_rank):
        with pytest.raises(DataError, match="no query has a match"):
            evaluate(queries, gallery, asked, labels, EvaluateOptions(metric=metric, self_match=self_match))
        return
    found = evaluate(
        queries,
        gallery,
        asked,
        labels,
        EvaluateOptions(
            metric=metric, self_match=self_match, transformed=transformed, calibration=MAP if calibrated else None
        ),
    )
    assert found.first_rank.tolist() == first_rank
    np.testing.assert_allclose(found.average_precision, precision, rtol=1e-12)
    assert found.map == pytest.approx(100 * np.nanmean(precision))
    matched = np.array([rank for rank in first_rank if rank])
    assert (found.top1, found.top5) == pytest.approx((100 * np.mean(matched <= 1), 100 * np.mean(matched <= 5)))
    assert (found.num_queries, found.num_unmatched) == (len(matched), len(first_rank) - len(matched))


def test_average_precision_is_that_of_scikit_learn_where_there_are_no_ties() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    gallery, queries = rng.normal(size=(300, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    labels, asked = labels_of(300, 7, 0), labels_of(20, 7, 1)
    found = evaluate(queries, gallery, asked, labels)
    distances = ((queries[:, None].astype(np.float64) - gallery) ** 2).sum(axis=2)
    expected = [metrics.average_precision_score(labels == asked[i], -distances[i]) for i in range(20)]
    np.testing.assert_allclose(found.average_precision, expected, rtol=1e-9)


def test_evaluate_with_cosine_ignores_lengths() -> None:
    rng = np.random.default_rng(4)
    gallery, labels = rng.normal(size=(200, 8)).astype(np.float32), labels_of(200, 5, 0)
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    scaled = gallery * rng.uniform(0.1, 10, (200, 1)).astype(np.float32)
    expected = evaluate(unit, unit, labels, labels, EvaluateOptions(self_match=True))
    found = evaluate(scaled, scaled, labels, labels, EvaluateOptions(metric="cosine", self_match=True))
    np.testing.assert_allclose(found.average_precision, expected.average_precision, rtol=1e-6)


def test_evaluate_does_not_depend_on_blocks_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, labels = integers(500, 8, 5), labels_of(500, 6, 5)
    orders = {"random": [random_order(np.arange(500), 1)]}
    whole = evaluate(gallery, gallery, labels, labels, EvaluateOptions(self_match=True))
    curve = simulate_curve(
        CurveInputs(gallery[::-1], gallery, gallery, labels, labels),
        orders,
        CurveOptions(self_match=True, detail="random"),
    )
    monkeypatch.setattr(ranking, "_BLOCK", 500 * 7)
    monkeypatch.setattr(ranking, "_BATCH", 500 * 3)
    monkeypatch.setattr(ranking, "_THREADS", 5)
    small = evaluate(gallery, gallery, labels, labels, EvaluateOptions(self_match=True))
    assert np.array_equal(whole.average_precision, small.average_precision)
    assert np.array_equal(whole.first_rank, small.first_rank)
    again = simulate_curve(
        CurveInputs(gallery[::-1], gallery, gallery, labels, labels),
        orders,
        CurveOptions(self_match=True, detail="random"),
    )
    assert np.array_equal(curve.orders["random"].values, again.orders["random"].values)
    assert curve.detail is not None
    assert again.detail is not None
    np.testing.assert_array_equal(curve.detail.slot_share, again.detail.slot_share)


def test_a_query_never_finds_itself_but_finds_its_duplicate() -> None:
    gallery = np.array([[0, 0], [0, 0], [5, 5], [9, 9]], np.float32)
    labels = np.array(["a", "a", "b", "c"])
    found = evaluate(gallery, gallery, labels, labels, EvaluateOptions(self_match=True))
    assert found.first_rank.tolist() == [1, 1, 0, 0]
    assert found.num_unmatched == 2


def test_evaluate_with_ids_removes_the_self_match_as_with_row_numbers() -> None:
    gallery, labels = integers(100, 5, 6), labels_of(100, 5, 6)
    ids = np.random.default_rng(0).permutation(10_000)[:100]
    some = np.array([90, 3, 17])
    expected = evaluate(gallery, gallery, labels, labels, EvaluateOptions(self_match=True))
    found = evaluate(
        gallery[some], gallery, labels[some], labels, EvaluateOptions(query_ids=ids[some], gallery_ids=ids)
    )
    assert np.array_equal(found.average_precision, expected.average_precision[some])
    strangers = evaluate(
        gallery[some], gallery, labels[some], labels, EvaluateOptions(query_ids=some + 10_000, gallery_ids=ids)
    )
    plain = evaluate(gallery[some], gallery, labels[some], labels)
    assert np.array_equal(strangers.average_precision, plain.average_precision)


def test_evaluate_of_bad_input_is_refused_with_a_reason() -> None:
    gallery, labels = integers(10, 3, 0), labels_of(10, 2, 0)
    with pytest.raises(DataError, match="not finite"):
        evaluate(np.full((10, 3), np.nan, np.float32), gallery, labels, labels)
    with pytest.raises(DataError, match="unknown metric"):
        evaluate(gallery, gallery, labels, labels, EvaluateOptions(metric="hamming"))
    with pytest.raises(DataError, match="self_match"):
        evaluate(gallery[:5], gallery, labels[:5], labels, EvaluateOptions(self_match=True))
    with pytest.raises(DataError, match="give an id"):
        evaluate(gallery, gallery, labels, labels, EvaluateOptions(query_ids=np.arange(10)))
    with pytest.raises(DataError, match="labels differ in number"):
        evaluate(gallery, gallery, labels[:9], labels)
    with pytest.raises(DataError, match="does not fit labels and queries"):
        evaluate(gallery, gallery, labels, labels[:9])
    with pytest.raises(DataError, match="does not fit labels and queries"):
        evaluate(gallery, gallery[:, :2], labels, labels)
    with pytest.raises(DataError, match="not a permutation"):
        simulate_curve(CurveInputs(gallery, gallery, gallery, labels, labels), {"bad": [np.zeros(10, np.int64)]})


NUM = 400


@pytest.fixture(scope="module")
def space() -> tuple[Float32, Float32, Int64]:
    """Transformed and embedded vectors (NUM, 16) float32 and labels; the embedded ones are better."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 20, NUM)
    embedded = rng.normal(size=(20, 16))[labels] + rng.normal(size=(NUM, 16))
    transformed = embedded + rng.normal(size=(NUM, 16)) * rng.uniform(0, 2, (NUM, 1))
    return transformed.astype(np.float32), embedded.astype(np.float32), labels


@pytest.fixture(scope="module")
def orders(space: tuple[Float32, Float32, Int64]) -> dict[str, list[Int64]]:
    random = [random_order(np.arange(NUM), seed) for seed in range(5)]
    return {"random": random, "oracle": [oracle_order(space[0], space[1])]}


@pytest.fixture(scope="module")
def simulation(space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]]) -> Simulation:
    return simulated(space, orders, detail="oracle", per_query=True)


def simulated(space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]], **options: Any) -> Simulation:
    """The curves of a space whose images are gallery and queries at once."""
    transformed, embedded, labels = space
    inputs = CurveInputs(transformed, embedded, embedded, labels, labels)
    return simulate_curve(inputs, orders, CurveOptions(points=POINTS, self_match=True, **options))


def test_every_order_ends_at_new_new_and_starts_at_the_transformed_gallery_to_the_last_bit(
    space: tuple[Float32, Float32, Int64], simulation: Simulation
) -> None:
    transformed, embedded, labels = space
    start = evaluate(embedded, transformed, labels, labels, EvaluateOptions(self_match=True))
    end = evaluate(embedded, embedded, labels, labels, EvaluateOptions(self_match=True))
    assert np.array_equal(simulation.start.average_precision, start.average_precision)
    assert np.array_equal(simulation.end.average_precision, end.average_precision)
    for curve in simulation.orders.values():
        assert curve.values[0].tolist() == [start.top1, start.top5, start.map]
        assert curve.values[-1].tolist() == [end.top1, end.top5, end.map]


def test_scores_per_query_are_those_that_each_curve_is_the_mean_of(simulation: Simulation) -> None:
    assert simulation.detail is not None
    assert simulation.queries is not None
    ranks, precision = simulation.queries["oracle"]
    assert np.array_equal(ranks[0], simulation.detail.first_rank)
    assert np.array_equal(precision[0], simulation.detail.average_precision)
    ranks, precision = simulation.queries["random"]
    assert len(ranks) == simulation.orders["random"].num_permutations
    measured = ranks[0, 0] > 0
    top1 = 100 * (ranks[:, :, measured] == 1).mean(axis=(0, 2))
    np.testing.assert_allclose(top1, simulation.orders["random"].values[:, 0])
    np.testing.assert_allclose(
        100 * precision[..., measured].mean(axis=(0, 2)), simulation.orders["random"].values[:, 2]
    )


def test_every_point_is_the_evaluation_of_the_mixed_gallery(
    space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]], simulation: Simulation
) -> None:
    transformed, embedded, labels = space
    assert simulation.detail is not None
    for point in range(POINTS):
        gallery = transformed.copy()
        done = orders["oracle"][0][: point * NUM // (POINTS - 1)]
        gallery[done] = embedded[done]
        state = evaluate(embedded, gallery, labels, labels, EvaluateOptions(self_match=True))
        assert simulation.fractions[point] == len(done) / NUM
        assert np.array_equal(simulation.detail.first_rank[point], state.first_rank)
        assert np.array_equal(simulation.detail.average_precision[point], state.average_precision)
        assert simulation.orders["oracle"].values[point].tolist() == [state.top1, state.top5, state.map]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_every_point_of_a_calibrated_curve_is_the_calibrated_evaluation_of_the_mixed_gallery(
    space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]], metric: str
) -> None:
    transformed, embedded, labels = space
    good = np.random.default_rng(1).random(NUM) < 0.9
    map_ = Calibration((-1.0, 0.0, 2.0, 10.0), (-1.0, 0.3, 2.2, 9.0))
    result = simulate_curve(
        CurveInputs(transformed, embedded, embedded, labels, labels, embeddable=good),
        {"oracle": orders["oracle"]},
        CurveOptions(points=7, metric=metric, self_match=True, calibration=map_, detail="oracle"),
    )
    assert result.detail is not None
    plain = []
    for point in range(7):
        done = orders["oracle"][0][: point * NUM // 6]
        left = ~np.isin(np.arange(NUM), done) | ~good
        gallery = np.where(left[:, None], transformed, embedded)
        state = evaluate(
            embedded,
            gallery,
            labels,
            labels,
            EvaluateOptions(metric=metric, self_match=True, transformed=left, calibration=map_),
        )
        assert np.array_equal(result.detail.first_rank[point], state.first_rank)
        assert np.array_equal(result.detail.average_precision[point], state.average_precision)
        plain.append(evaluate(embedded, gallery, labels, labels, EvaluateOptions(metric=metric, self_match=True)).map)
    assert result.orders["oracle"].values[0, 2] == pytest.approx(plain[0])  # one kind alone keeps its ranks
    assert abs(result.orders["oracle"].values[3, 2] - plain[3]) > 0.01


def test_an_identity_map_gives_the_curve_without_a_map(
    space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]], simulation: Simulation
) -> None:
    found = simulated(space, orders, calibration=Calibration((0.0, 1.0), (0.0, 1.0)))
    for name in orders:
        np.testing.assert_allclose(found.orders[name].values, simulation.orders[name].values, atol=1e-9)


def test_areas_are_the_plain_mean_and_the_trapezoid_and_random_has_a_spread(
    space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]], simulation: Simulation
) -> None:
    transformed, embedded, labels = space
    alone = [
        simulate_curve(
            CurveInputs(transformed, embedded, embedded, labels, labels),
            {"one": [order]},
            CurveOptions(self_match=True),
        ).orders["one"]
        for order in orders["random"]
    ]
    areas = np.stack([curve.values.mean(axis=0) for curve in alone])
    random = simulation.orders["random"]
    np.testing.assert_allclose(random.area, areas.mean(axis=0))
    np.testing.assert_allclose(random.area_std, areas.std(axis=0, ddof=1))
    trapezoid = [np.trapezoid(curve.values, simulation.fractions, axis=0) for curve in alone]
    np.testing.assert_allclose(random.area_trapezoid, np.mean(trapezoid, axis=0))
    assert simulation.orders["oracle"].area_std.tolist() == [0, 0, 0]


def test_rejected_images_stay_transformed(
    space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]]
) -> None:
    transformed, embedded, labels = space
    good = np.random.default_rng(1).random(NUM) < 0.9
    rows = np.flatnonzero(good)
    result = simulate_curve(
        CurveInputs(
            transformed,
            embedded,
            embedded[rows],
            labels[rows],
            labels,
            query_ids=rows,
            gallery_ids=np.arange(NUM),
            embeddable=good,
        ),
        orders,
        CurveOptions(detail="random"),
    )
    mixed = np.where(good[:, None], embedded, transformed)
    end = evaluate(
        embedded[rows], mixed, labels[rows], labels, EvaluateOptions(query_ids=rows, gallery_ids=np.arange(NUM))
    )
    assert np.array_equal(result.end.average_precision, end.average_precision)
    assert result.detail is not None
    assert 0.2 < result.detail.slot_share[-1] < 3


def test_slot_share_counts_transformed_vectors_among_the_nearest(
    space: tuple[Float32, Float32, Int64], orders: dict[str, list[Int64]], simulation: Simulation
) -> None:
    transformed, embedded, _ = space
    assert simulation.detail is not None
    shares = simulation.detail.slot_share
    assert shares[0] == 1
    assert np.isnan(shares[-1])
    done = orders["oracle"][0][: 10 * NUM // (POINTS - 1)]
    gallery, is_transformed = transformed.copy(), np.ones(NUM, bool)
    gallery[done], is_transformed[done] = embedded[done], False
    distances = ((embedded[:, None] - gallery) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :10]
    assert shares[10] == pytest.approx(is_transformed[nearest].mean() / is_transformed.mean())


def test_identical_spaces_give_a_flat_curve() -> None:
    gallery, labels = integers(90, 6, 8, high=50), labels_of(90, 9, 8)
    curve = simulate_curve(
        CurveInputs(gallery, gallery, gallery, labels, labels),
        {"r": [random_order(np.arange(90), 0)]},
        CurveOptions(self_match=True),
    ).orders["r"]
    assert (curve.values == curve.values[0]).all()
    np.testing.assert_allclose(curve.area_trapezoid, curve.area)


def test_a_curve_of_fewer_images_than_points_has_every_point() -> None:
    gallery, labels = integers(8, 3, 9), np.arange(8) % 2
    result = simulate_curve(
        CurveInputs(gallery[::-1], gallery, gallery, labels, labels),
        {"r": [np.arange(8)]},
        CurveOptions(self_match=True, detail="r"),
    )
    assert result.orders["r"].values.shape == (22, 3)
    assert np.isfinite(result.orders["r"].values).all()


def test_groups_split_the_queries_and_their_weighted_mean_is_the_whole(simulation: Simulation) -> None:
    assert simulation.detail is not None
    groups = np.arange(NUM) % 3
    values = by_group(simulation.detail.first_rank, simulation.detail.average_precision, groups, 4)
    assert values.shape == (4, POINTS, 3)
    assert np.isnan(values[3]).all()
    weights = np.bincount(groups) / NUM
    np.testing.assert_allclose(np.tensordot(weights, values[:3], 1), simulation.orders["oracle"].values)


def test_negative_flips_are_the_answers_that_were_lost() -> None:
    before = np.array([1, 1, 4, 0, 1], np.int32)
    after = np.array([[1, 1, 1, 0, 1], [2, 1, 1, 0, 9]], np.int32)
    assert negative_flips(before, after).tolist() == [0, 50]


def test_share_of_gap_and_recall() -> None:
    assert share_of_gap(53.6, 34.2, 56.5) == pytest.approx(0.87, abs=0.005)
    assert np.isnan(share_of_gap(1, 2, 2))
    assert recall(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]])) == 75


def test_priority_order_is_descending_with_ties_by_hash_and_does_not_depend_on_the_row_order() -> None:
    ids = np.arange(100, 200)
    priority = (np.arange(100) % 3).astype(np.float32)
    order = order_by_priority(priority, ids, seed=5)
    assert (np.diff(priority[order]) <= 0).all()
    best = ids[order][priority[order] == 2]
    assert (np.diff(splitmix64(best, 5).astype(np.float64)) > 0).all()
    shuffle = np.random.default_rng(0).permutation(100)
    again = order_by_priority(priority[shuffle], ids[shuffle], seed=5)
    assert ids[shuffle][again].tolist() == ids[order].tolist()


def test_random_order_is_pinned_by_its_seed() -> None:
    assert random_order(np.arange(8), seed=0).tolist() == [3, 5, 7, 4, 1, 2, 6, 0]
    assert random_order(np.arange(8), seed=1).tolist() != random_order(np.arange(8), seed=0).tolist()


def test_progress_ends_at_all_measured_queries() -> None:
    seen: list[tuple[int, int]] = []
    gallery, labels = integers(50, 4, 2), labels_of(50, 3, 2)
    evaluate(
        gallery,
        gallery,
        labels,
        labels,
        EvaluateOptions(self_match=True),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (50, 50)


def embed(encoder: Path, images: list[bytes]) -> Float32:
    """(N, d) float32 by an exported CIFAR encoder; preprocess as in the data's README."""
    module = torch.export.load(encoder).module()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images])
    inputs = (pixels.astype(np.float32) - [125.3, 123.0, 113.9]) / [63.0, 62.1, 66.7]
    batches = torch.from_numpy(inputs.astype(np.float32)).permute(0, 3, 1, 2).split(500)
    with torch.no_grad():
        found: Float32 = torch.cat([module(batch) for batch in batches]).numpy()
    return found


@pytest.mark.slow
def test_the_reference_figures_of_cifar100_are_hit_to_the_printed_decimal(cifar100: Path) -> None:
    table = pq.read_table(cifar100 / "test.parquet", columns=["image", "label"])
    images, labels = table["image"].to_pylist(), table["label"].to_numpy()
    for encoder, expected in (("old.pt2", [28.1, 56.5, 12.7]), ("new.pt2", [52.0, 76.4, 30.4])):
        embeddings = embed(cifar100 / encoder, images)
        found = evaluate(embeddings, embeddings, labels, labels, EvaluateOptions(self_match=True))
        assert [round(value, 1) for value in found.as_dict().values()] == expected


_MEASURE_MEMORY = """
import pathlib, sys
import numpy as np
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.evaluation.simulated_curve import CurveInputs, CurveOptions, random_order, simulate_curve

rng = np.random.default_rng(0)
gallery, labels = rng.normal(size=(50_000, 128)).astype(np.float32), rng.integers(0, 1000, 50_000)
if sys.argv[1] == "evaluate":
    evaluate(gallery, gallery, labels, labels, EvaluateOptions(self_match=True))
else:
    orders = {"random": [random_order(np.arange(50_000), 0)]}
    inputs = CurveInputs(gallery[::-1].copy(), gallery, gallery, labels, labels)
    simulate_curve(inputs, orders, CurveOptions(self_match=True))
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].removesuffix("kB")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("function", ["evaluate", "simulate_curve"])
def test_memory_stays_below_a_gigabyte_at_50_000_by_50_000(function: str) -> None:
    # A process of its own: the peak of this one is that of every test before. And VmHWM: ru_maxrss outlives exec.
    command = [sys.executable, "-c", _MEASURE_MEMORY, function]
    peak_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak_kib < 2**20, "the whole process, imports and embeddings included"
