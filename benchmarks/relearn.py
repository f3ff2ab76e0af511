"""What learning on the way is worth, and whether the selection would know.

CIFAR-100's test images are gallery and queries (2,500 of them), 22 points, l2; the selected recipe (fastfill with
lambda_disc 0.1, width 512, offset by confidence, order `learned`). Three cases: `half`, where all pairs are of the 50
classes that the old encoder was trained on, so that half of the gallery looks like no pair; `few`, 2,500 of these
pairs, so that the gallery has more images than there are pairs; and `all`, with the pairs of all classes. Once 10 and
25 % are embedded, these images are pairs as well, in each of the ways of `training.relearn_worth`:

- `nothing`: h, s and the order stay as they were fitted on the pairs.
- `order`: only the order of what is left is learnt anew, of held-out pairs and embedded images.
- `transformation`: h and s are fitted anew on pairs and embedded images, what is left is transformed and ordered anew.

`foreseen` is what the selection (`relearn.what: selected`) sees in place of the gallery: with `measured_on: probe`
2,000 of its images, by three fits on two thirds of the pairs each; with `pairs` the third of the pairs that is left
out, 5,000 out, 5,000 at most, by 1,000 queries. It says

`shift` and `error` are `pipeline.shift`'s: of 1,000 images of the gallery beside held-out pairs. Both are known before
the first wave.

    python -m benchmarks.relearn [--json]              # one fit of each: half an hour on two cores
    python -m benchmarks.relearn --cases few --fits 3
    python -m benchmarks.relearn --short               # three epochs, fewer queries: whether it runs
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from benchmarks.fit import CONFIG, configure
from benchmarks.fit_data import Embedded, cache_embeddings
from benchmarks.measure import header, table
from benchmarks.small_run import data_folder
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.evaluate import METRICS
from pipeline.ranking import Float64
from pipeline.schema import Float32, splitmix64, vectors_from_arrow
from pipeline.selection import Learning, Learnt
from pipeline.shift import likeness
from training.candidates import Serving
from training.folds import taken
from training.learner import FitData, Job, PairArrays
from training.relearn_worth import WAYS, Scene, State, curves
from training.simulate import Detail

CASES = {"half": (50, None), "few": (50, 2500), "all": (100, None)}  # classes, and pairs where these are limited
FRACTIONS = (0.1, 0.25)
POINTS, QUERIES, PROBE = 22, 2500, 1000
SAMPLE, FOLDS, MEASURED = 2000, 3, 5000
COUNTS = [METRICS.index("top1"), METRICS.index("map")]
SETTINGS: dict[str, object] = {"fit.loss": "fastfill", "fit.lambda_disc": 0.1, "fit.inner_width": 512, "fit.epochs": 40}
SERVING, POLICY = Serving("confidence", 0.5), "learned"
_SALT = 0x2E1
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Case:
    """The pairs, and the gallery, all of whose new embeddings are known to us alone."""

    config: Config
    data: FitData
    pairs: PairArrays
    gallery: PairArrays
    detail: Detail

    def scene(self, train: PairArrays, gallery: PairArrays, detail: Detail, seed: int) -> Scene:
        """To fit on some of the pairs, and backfill some images."""
        job = Job(self.config.fit, self.data, seed, False, 0, 0, classify=True)
        device = torch.device("cpu")
        return Scene(self.config, job, train, gallery, SERVING, POLICY, FRACTIONS, detail, device)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Those that are asked for."""
    pairs, gallery = cache_embeddings(load_config(CONFIG, (f"data_root={arguments.data}",)), arguments.folder)
    arguments.data_root = arguments.data
    few: dict[str, object] = {"fit.epochs": 3, "fit.warmup_epochs": 1} if arguments.short else {}
    config = configure(arguments, pairs, "none", SETTINGS | few)
    rows = pq.read_table(pairs)
    detail = Detail(POINTS, QUERIES // (5 if arguments.short else 1))
    for name in arguments.cases:
        classes, most = CASES[name]
        some = rows.filter(pc.less(rows["label"], classes))
        chance = splitmix64(np.arange(len(some)), _SALT)
        some = some.take(pa.array(np.sort(np.argsort(chance)[:most])))
        old, new = (vectors_from_arrow(some[f"{side}_embedding"]) for side in ("old", "new"))
        mine = PairArrays(old, new, None, some["label"].to_numpy())
        data = FitData([], [], len(old), 100, old.shape[1], new.shape[1], classifier=_classifier(config))
        yield name, Case(config, data, mine, _images(gallery), detail)


def _classifier(config: Config) -> tuple[Float32, Float32 | None]:
    assert config.fit.classifier is not None, "the example names one"
    tensors = load_file(config.fit.classifier.path)
    return tensors["weight"], tensors.get("bias")


def _images(gallery: Embedded) -> PairArrays:
    return PairArrays(gallery.old, gallery.new, None, gallery.labels)


def foreseen(case: Case, on: str) -> Learning:
    """What a selection would find; each of three fits leaves out a third of the pairs."""
    chance = splitmix64(np.arange(len(case.pairs.old)), _SALT + 1)
    images = np.sort(np.argsort(splitmix64(np.arange(len(case.gallery.old)), _SALT + 2))[:SAMPLE])
    found: dict[Learnt, list[Float64]] = {way: [] for way in WAYS}
    for fold in range(FOLDS):
        mine = chance % np.uint64(FOLDS) == fold
        held = taken(case.pairs, np.flatnonzero(mine)[:MEASURED])
        gallery = taken(case.gallery, images) if on == "probe" else held
        scene = case.scene(taken(case.pairs, np.flatnonzero(~mine)), gallery, replace(case.detail, queries=1000), fold)
        for way, curve in curves(scene).items():
            found[way].append(curve.mean(axis=0)[:, COUNTS].mean(axis=1))
    return Learning.decide(FRACTIONS, found)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    found: list[Row] = []
    for name, case in cases(arguments):
        some: dict[Learnt, list[Float64]] = {way: [] for way in WAYS}
        started = time.monotonic()
        for seed in range(arguments.fits):
            scene = case.scene(case.pairs, case.gallery, case.detail, seed)
            for way, curve in curves(scene).items():
                some[way].append(curve.mean(axis=1))
        said = {on: str(foreseen(case, on)) for on in ("probe", "pairs")}
        known = _known(case, scene.first())
        for way in WAYS:
            found.append(_row(name, way, np.stack(some[way])) | known | said)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def _known(case: Case, first: State) -> dict[str, object]:
    """What a user can know before the first wave."""
    rows = np.argsort(splitmix64(np.arange(len(case.gallery.old)), _SALT))[:PROBE]
    held, mine = first.known, first.gallery.take(rows)
    errors = [np.square(side.pairs.new - side.z).sum(axis=1, dtype=np.float64) for side in (held, mine)]
    alike = likeness(held.pairs.old, mine.pairs.old, 0, (errors[0], errors[1]))
    return {"shift": alike.same_side, "error": alike.error_ratio, "warned": bool(alike.warnings())}


def _row(name: str, way: str, stack: Float64) -> Row:
    def figures(values: Float64) -> dict[str, float]:
        return dict(zip(METRICS, values.tolist(), strict=True))

    areas = stack.mean(axis=1)
    deviation = areas.std(axis=0, ddof=1) if len(areas) > 1 else np.zeros(len(METRICS))
    row: Row = {"case": name, "learnt again": way, "fits": len(areas)}
    row |= {"area": figures(areas.mean(axis=0)), "std": figures(deviation)}
    at = [int(np.ceil(fraction * (POINTS - 1))) for fraction in (*FRACTIONS, 0.5)]
    return row | {"points": [figures(stack.mean(axis=0)[point]) for point in (0, *at)]}


def _text(row: Row) -> list[str]:
    def figures(values: object, form: str) -> str:
        assert isinstance(values, dict)
        return " / ".join(form.format(values[metric]) for metric in METRICS)

    points = row["points"]
    assert isinstance(points, list)
    cells = [f"{row['case']} (shift {row['shift']:.2f}, error {row['error']:.2f})", row["learnt again"]]
    cells += [figures(row["area"], "{:.2f}"), figures(row["std"], "{:.2f}")]
    return [*map(str, cells), *(figures(point, "{:.1f}") for point in points)]


def main() -> None:
    """Print the table in Markdown, or as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of CIFAR-100")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastfill-quality")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--fits", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="one fit of three epochs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.data = str(data_folder(arguments.data))
    arguments.fits = 1 if arguments.short else arguments.fits
    head = header(["torch"])
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps({"head": head, "rows": rows}))
        return
    print(head, end="\n\n")
    titles = ["case", "learnt again", "area, top-1 / top-5 / mAP", "deviation", "fraction 0"]
    titles += [f"at {np.ceil(fraction * (POINTS - 1)) / (POINTS - 1):.0%}" for fraction in (*FRACTIONS, 0.5)]
    print(table(titles, [_text(row) for row in rows]))
    for row in rows[:: len(WAYS)]:
        foreseen = f"foreseen on the probe set: {row['probe']}; on pairs: {row['pairs']}"
        print(f"\n{row['case']}: warned {row['warned']}; {foreseen}")


if __name__ == "__main__":
    main()
