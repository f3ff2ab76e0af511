"""What learning on the way is worth: refit with the gallery's own embedded images, or only order what is left anew.

CIFAR-100's test images are gallery and queries (2,500 of them), 22 points, l2. Three cases: `half`, where all pairs are
of the 50 classes that the old encoder was trained on, so that half of the gallery looks like no pair; `few`, 2,500 of
these pairs, so that the gallery has more images than there are pairs; and `all`, with the pairs of all classes. Once 10
and 25 % are embedded, these images are pairs as well:

- `nothing`: h, s and the order stay as they were fitted on the pairs.
- `order`: only the order of what is left is learnt anew (policy `learned`), of held-out pairs and embedded images.
- `transformation`: h and s are fitted anew on pairs and embedded images, what is left is transformed and ordered anew.
  The images of the gallery are repeated until they are as many as the pairs; a tenth of them is held out of it.

With `offset`, transformed vectors are served with the offset by uncertainty at 0.5 (`pipeline.offset`), which is fitted
anew with h.

`shift` is `pipeline.shift.same_side` of pairs and gallery, and `error` the mean |new - z|^2 of 1,000 images of the
gallery (a probe set), over that of held-out pairs: both are known before the first wave.

    python -m benchmarks.relearn [--json]              # one fit of each: six minutes on two cores
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
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.fit import CONFIG, configure
from benchmarks.fit_data import Embedded, cache_embeddings
from benchmarks.measure import header, table
from benchmarks.small_run import data_folder
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.evaluate import METRICS, simulate_curve
from pipeline.offset import fit_offset
from pipeline.policy import Scored, load_policy
from pipeline.ranking import Float64
from pipeline.schema import Float32, Int64, splitmix64, vectors_from_arrow
from pipeline.shift import same_side
from training.knowledge import reference_of
from training.learner import FitData, Job, PairArrays
from training.select import Fold, fit_alone, order_by

CASES = {"half": (50, None), "few": (50, 2500), "all": (100, None)}  # classes, and pairs where these are limited
FRACTIONS = (0.1, 0.25)
POINTS, QUERIES, PROBE = 22, 2500, 1000
SETTINGS: dict[str, object] = {"fit.loss": "alignment+uncertainty", "fit.inner_width": 512, "fit.epochs": 20}
_HELD_OUT = 10  # one of so many
_SALT = 0x2E1
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Variant:
    """What is learnt again, and the order's policy."""

    what: str
    policy: str
    offset: bool = False


VARIANTS = (
    Variant("nothing", "uncertainty"),
    Variant("transformation", "uncertainty"),
    Variant("nothing", "uncertainty", offset=True),
    Variant("transformation", "uncertainty", offset=True),
    Variant("nothing", "learned"),
    Variant("order", "learned"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """Pairs to fit on and pairs held out; the gallery, all of whose new embeddings are known to us alone."""

    config: Config
    train: PairArrays
    held_out: PairArrays
    gallery: Embedded
    seed: int
    num_queries: int
    fits: dict[tuple[int, bytes], Fitted] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit makes of the gallery, and of pairs that it has not seen: the policy knows of these alone."""

    z: Float32
    s: Float32
    known: Fold


def fit(case: Case, rows: Int64) -> Fitted:
    """Fit on the pairs and embedded images of the gallery (E,), of which some are held out; not twice on the same."""
    key = (case.seed, rows.tobytes())
    if key not in case.fits:
        case.fits[key] = _fit(case, rows)
    return case.fits[key]


def _fit(case: Case, rows: Int64) -> Fitted:
    gallery, new = case.gallery, case.gallery.new
    held = splitmix64(rows, _SALT) % np.uint64(_HELD_OUT) == 0
    mine, other = rows[~held], rows[held]
    mine = np.tile(mine, max(1, len(case.train.old) // max(1, len(mine))))
    train = _joined(case.train, gallery.old[mine], new[mine])
    known = _joined(case.held_out, gallery.old[other], new[other])
    both = _joined(known, gallery.old, new)
    data = FitData([], [], len(train.old), None, gallery.old.shape[1], new.shape[1])
    found = fit_alone(Job(case.config.fit, data, case.seed, False, 0, 0), train, both, case.seed, torch.device("cpu"))
    count = len(known.old)
    return Fitted(found.z[count:], found.s[count:], Fold(known, found.z[:count], found.s[:count], None))


def priorities(case: Case, fitted: Fitted, policy: str) -> Float32:
    """Of all images of the gallery, (N,) float32."""
    gallery, fold = case.gallery, fitted.known
    none = np.full(len(fitted.s), None, dtype=object)
    scored = Scored(np.arange(len(fitted.s)), fitted.s, fitted.z, gallery.old, none, none)
    reference = None
    if policy == "learned":
        rows = pa.table({"index": np.arange(len(fold.s))})
        reference = reference_of(case.config, rows, fold.pairs, fold.z, fold.s, fold.z, None, None)
    return load_policy(policy, case.seed, reference)(scored)


def simulate(case: Case, variant: Variant, first: Fitted) -> Float64:
    """The curve, (P, 3): METRICS in per cent. At a fraction where something is learnt it is learnt already."""
    num, steps = len(first.s), np.arange(POINTS) / (POINTS - 1)
    done, fitted = np.empty(0, np.int64), first
    order = order_by(priorities(case, first, variant.policy), case.seed)
    curve = np.empty((POINTS, len(METRICS)))
    stages = [0.0, *FRACTIONS] if variant.what != "nothing" else [0.0]
    for start, end in zip(stages, [*stages[1:], 2.0], strict=True):
        if start:
            done = order[: int(start * num)]
            if variant.what == "transformation":
                fitted = fit(case, done)
            knowing = fitted if variant.what == "transformation" else _with_images(case, fitted, done)
            order = _after(done, order_by(priorities(case, knowing, variant.policy), case.seed))
        here = (steps >= start) & (steps < end)
        served = fitted.z
        if variant.offset:
            known, new = fitted.known, fitted.known.pairs.new
            served = fit_offset("uncertainty", 0.5, known.z, known.s, new, None, "l2").apply(served, fitted.s)
        curve[here] = _points(case, served, order)[here]
    return curve


def _points(case: Case, z: Float32, order: Int64) -> Float64:
    labels, new = case.gallery.labels, case.gallery.new
    rows = np.arange(len(new))[:: -(-len(new) // case.num_queries)]
    found = simulate_curve(
        z,
        new,
        new[rows],
        labels[rows],
        labels,
        {"order": [order]},
        points=POINTS,
        query_ids=rows,
        gallery_ids=np.arange(len(new)),
    )
    return found.orders["order"].values


def _with_images(case: Case, fitted: Fitted, rows: Int64) -> Fitted:
    """What the policy may know once some images are embedded: none of them has trained the transformation."""
    fold, gallery = fitted.known, case.gallery
    pairs = _joined(fold.pairs, gallery.old[rows], gallery.new[rows])
    z, s = np.concatenate([fold.z, fitted.z[rows]]), np.concatenate([fold.s, fitted.s[rows]])
    return replace(fitted, known=Fold(pairs, z, s, None))


def _after(done: Int64, order: Int64) -> Int64:
    return np.concatenate([done, order[~np.isin(order, done)]])


def _joined(pairs: PairArrays, old: Float32, new: Float32) -> PairArrays:
    return PairArrays(np.concatenate([pairs.old, old]), np.concatenate([pairs.new, new]), None, None)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Those that are asked for."""
    pairs, gallery = cache_embeddings(load_config(CONFIG, (f"data_root={arguments.data}",)), arguments.folder)
    arguments.data_root = arguments.data
    few: dict[str, object] = {"fit.epochs": 3, "fit.warmup_epochs": 1} if arguments.short else {}
    config = configure(arguments, pairs, "none", SETTINGS | few)
    rows = pq.read_table(pairs)
    for name in arguments.cases:
        classes, most = CASES[name]
        some = rows.filter(pc.less(rows["label"], classes))
        chance = splitmix64(np.arange(len(some)), _SALT + 1)
        some = some.take(pa.array(np.sort(np.argsort(chance)[:most])))
        old, new = (vectors_from_arrow(some[f"{side}_embedding"]) for side in ("old", "new"))
        held = splitmix64(np.arange(len(old)), _SALT) % np.uint64(_HELD_OUT) == 0
        sides = [PairArrays(old[part], new[part], None, None) for part in (~held, held)]
        yield name, Case(config, sides[0], sides[1], gallery, 0, QUERIES // (5 if arguments.short else 1))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    found: list[Row] = []
    for name, case in cases(arguments):
        curves: dict[Variant, list[Float64]] = {variant: [] for variant in VARIANTS}
        errors = []
        for seed in range(arguments.fits):
            started = time.monotonic()
            seeded = replace(case, seed=seed)
            first = fit(seeded, np.empty(0, np.int64))
            errors.append(_error_ratio(seeded, first))
            for variant in VARIANTS:
                curves[variant].append(simulate(seeded, variant, first))
            print(f"{name}, fit {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        shift = same_side(case.held_out.old, case.gallery.old, 0)
        for variant, some in curves.items():
            found.append(_row(name, variant, np.stack(some)) | {"shift": shift, "error": float(np.mean(errors))})
    return found


def _error_ratio(case: Case, first: Fitted) -> float:
    probe = np.argsort(splitmix64(np.arange(len(first.s)), _SALT))[:PROBE]
    mine = np.square(first.z[probe] - case.gallery.new[probe]).sum(axis=1).mean()
    return float(mine / np.square(first.known.z - case.held_out.new).sum(axis=1).mean())


def _row(name: str, variant: Variant, curves: Float64) -> Row:
    def figures(values: Float64) -> dict[str, float]:
        return dict(zip(METRICS, values.tolist(), strict=True))

    areas = curves.mean(axis=1)
    deviation = areas.std(axis=0, ddof=1) if len(areas) > 1 else np.zeros(len(METRICS))
    what = f"{variant.what}, with offset" if variant.offset else variant.what
    row: Row = {"case": name, "learnt again": what, "policy": variant.policy, "fits": len(areas)}
    row |= {"area": figures(areas.mean(axis=0)), "std": figures(deviation)}
    at = [int(np.ceil(fraction * (POINTS - 1))) for fraction in (*FRACTIONS, 0.5)]
    return row | {"points": [figures(curves.mean(axis=0)[point]) for point in (0, *at)]}


def _text(row: Row) -> list[str]:
    def figures(values: object, form: str) -> str:
        assert isinstance(values, dict)
        return " / ".join(form.format(values[metric]) for metric in METRICS)

    points = row["points"]
    assert isinstance(points, list)
    cells = [f"{row['case']} (shift {row['shift']:.2f}, error {row['error']:.2f})", row["learnt again"], row["policy"]]
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
    titles = ["case", "learnt again", "policy", "area, top-1 / top-5 / mAP", "deviation", "fraction 0"]
    titles += [f"at {np.ceil(fraction * (POINTS - 1)) / (POINTS - 1):.0%}" for fraction in (*FRACTIONS, 0.5)]
    print(table(titles, [_text(row) for row in rows]))


if __name__ == "__main__":
    main()
