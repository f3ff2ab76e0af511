"""The report page: whole for a finished run, honest for an unfinished one, and without a single outside resource."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.embedding import vector_log
from pipeline.evaluation import gallery_arrays
from pipeline.evaluation.curve import curve
from pipeline.index import tags
from pipeline.planning.expected_curve import CurveEnds, expect
from pipeline.planning.plan import read_plan
from pipeline.reporting import plots
from pipeline.reporting.report import ReportData, gather_report, headline, is_current, render, write_report
from pipeline.reporting.status import read_status
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.synthetic_run import Known, Options, known, make_run

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Page(HTMLParser):
    """The tags of a page, checked for balance, and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def images() -> Known:
    return known()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, images: Known) -> ReportData:
    config, run = make_run(tmp_path_factory.mktemp("finished"), images, Options(rejects=5))
    return gather_report(config, run)


def test_a_finished_run_shows_every_figure_of_its_headline_table(finished: ReportData) -> None:
    page = Page(render(finished))
    assert page.open == []
    assert "finished" in page.words
    rows = headline(finished)
    orders = [f"average, {name} order" for name in ("random", "uncertainty", "oracle")]
    titles = ["old / old", "start: all transformed", *orders, "new / new"]
    assert [row["title"] for row in rows] == titles
    for row in rows:
        assert row["title"] in page.words
        assert all(f"{row['figures'][name]:.1f}" in page.words for name in ("top1", "top5", "map"))
    assert "not measured yet" not in page.words


def test_a_finished_run_has_every_chart_and_each_chart_its_series(finished: ReportData) -> None:
    html = render(finished)
    assert html.count("<svg") == 9
    for text in ("published", "old model", "new model", "best group", "wave 1", "images per second"):
        assert text in html
    assert finished.curve is not None
    assert f"uncertainty  {finished.curve['orders']['uncertainty']['area']['top1']:.1f}" in html.replace("\xa0", " ")


def test_report_page_loads_no_other_file(finished: ReportData) -> None:
    html = render(finished)
    page = Page(html)
    assert [load for load in page.loads if "=#" not in load] == []
    assert not re.search(r"@import|url\((?!#)|<script|<link", html)


def test_charts_take_their_colours_from_the_page(finished: ReportData) -> None:
    html = render(finished)
    assert not set(re.findall(r"#0[1-8]0[1-8]0[1-8]", html))
    used = set(re.findall(r"var\(--([a-z]+)\)", html))
    defined = set(re.findall(r"--([a-z]+):", html))
    assert used <= defined


def test_an_unfinished_run_says_what_is_missing_instead_of_leaving_it_out(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(embedded_waves=2))
    data = gather_report(config, run)
    page = Page(render(data))
    assert page.open == []
    assert data.curve is None
    for sentence in (
        "in progress, wave 2 of 4 published",
        "It needs the new embedding of every image; 30.0 % are embedded so far.",
        "The curves need the quality, which is not measured yet.",
        "Subgroups are measured with the curve, which is not measured yet.",
        "No image has been rejected.",
    ):
        assert sentence in page.words


def test_a_run_that_has_only_started_still_has_a_page(tmp_path: Path, images: Known) -> None:
    config, _ = make_run(tmp_path / "other", images, Options(commits=False))
    page = Page(render(gather_report(config, Run(str(tmp_path / "empty")))))
    for sentence in (
        "not planned yet",
        "The gallery is not planned yet.",
        "There is no plan yet, so no image is embedded.",
        "The vector log has fewer than two files",
        "The gallery is not scored yet.",
        "The transformation is not fitted yet.",
        "Nothing is published yet.",
    ):
        assert sentence in page.words


def test_a_gallery_without_labels_says_so(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, replace(images, labels=None))
    assert "no labels" in Page(render(gather_report(config, run))).words


def test_the_curve_is_not_computed_again_after_evaluate(
    tmp_path: Path, images: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_run(tmp_path, images)
    expected = curve(config, run)
    monkeypatch.setattr(gallery_arrays, "load_gallery", None)  # computing again would call it
    assert gather_report(config, run).curve == json.loads(json.dumps(expected))


def test_write_report_puts_the_page_and_the_same_figures_as_json(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images)
    uri = write_report(config, run)
    assert uri == run.path("reports", "report.html")
    assert b"Backfill report" in objects.read_bytes(uri)
    stored = json.loads(objects.read_bytes(run.path("reports", "report.json")))
    expected = json.loads(json.dumps(asdict(gather_report(config, run))))
    assert stored | {"created": ""} == expected | {"created": ""}


def test_counts_add_up_to_the_gallery(finished: ReportData, images: Known) -> None:
    assert finished.uncertainty is not None
    assert finished.progress is not None
    counts = np.array(finished.uncertainty["counts"])
    assert counts.sum(axis=1).tolist() == [30, 60, 90, 120]
    assert counts.sum() == finished.progress["gallery"] == len(images.ids)
    assert finished.progress["durable"] + finished.progress["rejected"] == len(images.ids)
    example = {"uri": "/data/images.parquet#image", "reason": "truncated: 812 of 2,048 bytes"}
    assert finished.rejects == [{"stage": "decode", "reason": "truncated", "images": 5, "example": example}]
    assert [commit["embedded"] + commit["transformed"] for commit in finished.commits] == [300] * 5


def test_throughput_is_the_images_between_the_first_and_the_last_part(finished: ReportData) -> None:
    assert finished.throughput is not None
    edges, rates = np.array(finished.throughput["edges_seconds"]), np.array(finished.throughput["rates"])
    assert (rates * np.diff(edges)).sum() == pytest.approx(finished.throughput["images"])
    assert finished.throughput["images"] == 300 - 30  # all but those of the first part, a wave of 30
    assert finished.throughput["seconds"] == edges[-1] == 2.0 * 8  # nine parts, two seconds apart


def test_the_mean_rate_leaves_out_the_time_in_which_the_run_was_interrupted(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(commits=False))
    plan = read_plan(run)
    assert plan is not None
    parts = vector_log.part_times(plan.log(run))
    for unit, seconds in parts.items():
        if unit[0] >= 3:  # as if the driver had been killed after the second wave, for an hour
            os.utime(plan.log(run).part(*unit), (seconds + 3600, seconds + 3600))
    data = gather_report(config, run)
    assert data.throughput is not None
    assert data.throughput["seconds"] == 2.0 * (len(parts) - 1) + 3600
    assert data.throughput["idle_seconds"] == 3600
    assert "1 h 0 min in which the run was interrupted" in Page(render(data)).words


def test_report_and_status_of_a_short_run_show_one_rate(finished: ReportData) -> None:
    assert finished.throughput is not None
    assert finished.throughput["images_per_second"] == read_status(finished.run)["images_per_second"]
    assert "270 images in the 16 s after the first file" in Page(render(finished)).words


def test_report_shows_what_plan_measured_and_when(finished: ReportData) -> None:
    estimate = {"images_per_second": 1096.0, "seconds": 3.0, "made_unix_seconds": 0.0}
    words = Page(render(replace(finished, estimate=estimate))).words
    assert "measured 1,096 images per second on 1970-01-01 00:00:00 UTC" in words


def test_report_says_that_prod_is_pinned(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images)
    tags.auto_promote(run, 4)
    assert "pinned" not in Page(render(gather_report(config, run))).words
    tags.rollback(run, 2)
    assert "2 commit that prod serves, pinned by a rollback" in Page(render(gather_report(config, run))).words


def test_the_progress_chart_shows_stored_and_published_images(finished: ReportData) -> None:
    words = Page(render(finished)).words
    for stage in ("embedded and stored 295", "published 295", "rejected 5"):
        assert stage in words


def test_rejects_are_grouped_by_kind_with_an_example(finished: ReportData) -> None:
    assert (
        "truncated such as /data/images.parquet#image (truncated: 812 of 2,048 bytes) 5" in Page(render(finished)).words
    )


def test_report_page_is_current_if_it_has_the_latest_commit(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images)
    assert not is_current(run)
    write_report(config, run)
    assert is_current(run)
    figures = json.loads(objects.read_bytes(run.path("reports", "report.json")))
    older = figures | {"commits": figures["commits"][:-1]}
    for damaged in (json.dumps(older).encode(), b"{", b"[]"):
        objects.put(run.path("reports", "report.json"), damaged)
        assert not is_current(run)
    write_report(config, run)
    objects.delete_files([run.path("reports", "report.html")])
    assert not is_current(run)


def test_above_max_images_no_curve_is_computed_and_the_page_says_why(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images)
    small = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_images": 299})})
    data = gather_report(small, run)
    assert data.curve is None
    assert "The gallery has 300 images, and evaluate.max_images is 299." in Page(render(data)).words


@pytest.mark.parametrize("sample", [0, 400])
def test_report_shows_the_expected_curve_and_its_number_of_images(finished: ReportData, sample: int) -> None:
    curve, fractions = np.array([[40.0, 51.0, 52.0]]), np.array([0.0, 0.5, 1.0])
    expected = expect(curve, fractions, CurveEnds(41.5, 52.0, 0.0, 0.0), sample).to_json()
    words = Page(render(replace(finished, expected={"top1": expected}))).words
    assert "top1 41.5" in words
    assert ("those of a sample of 400" in words) == bool(sample)


def test_names_of_the_gallery_cannot_inject_markup(tmp_path: Path, images: Known) -> None:
    groups = [f"<script>{group}" for group in images.groups or []]
    config, run = make_run(tmp_path, replace(images, groups=groups), Options(commits=False))
    html = render(gather_report(config, run))
    assert "&lt;script&gt;" in html
    assert "<script" not in html


def test_a_transformation_that_is_worse_than_the_old_model_is_called_so(tmp_path: Path, images: Known) -> None:
    noise = np.random.default_rng(0).normal(size=images.transformed.shape).astype(np.float32)
    config, run = make_run(tmp_path, replace(images, transformed=noise), Options(commits=False))
    assert "worse than doing nothing" in Page(render(gather_report(config, run))).words


def test_the_same_figures_give_the_same_chart(finished: ReportData) -> None:
    assert finished.curve is not None
    charts = [plots.curve_plot(finished.curve, "top1", "uncertainty") for _ in range(2)]
    assert charts[0] == charts[1]


def test_a_policy_of_the_users_own_is_the_line_that_stands_out(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(policy="my:policy"))
    rows = headline(gather_report(config, run))
    chosen = [row for row in rows if row.get("chosen")]
    assert [row["title"] for row in chosen] == ["average, my:policy order"]
    assert chosen[0]["colour"] == "var(--chosen)"
