"""Where a step of the fit spends its time: the reference's step, and what each change does to it.

One step on a batch of 1,024 random pairs of CIFAR-100's widths: forward, loss, backward, optimiser. The variants take
turns, and ratios are those of one repeat.

    python -m benchmarks.fit_steps             # half a minute
    python -m benchmarks.fit_steps --profile   # the reference's and the fast step by operator instead
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import profile

from benchmarks.measure import Spread, header, interleave, ratio, table
from pipeline.models.networks import TransformationNetwork
from training.fitting.losses import FittedClassifier, Loss, combined

D_OLD, D_NEW, CLASSES = 64, 128, 100
PROFILED_STEPS = 6


@dataclass(frozen=True, slots=True)
class Variant:
    """What a step is made of; the defaults are the reference's."""

    inner_width: int = 2048
    bfloat16: bool = False
    fused: bool = False
    batch: int = 1024
    threads: int | None = None


VARIANTS = {
    "reference: 2048, float32": Variant(),
    "fused Adam": Variant(fused=True),
    "fused Adam, bfloat16": Variant(fused=True, bfloat16=True),
    "the same, 1 thread": Variant(fused=True, bfloat16=True, threads=1),
    "the same, batch 2048": Variant(fused=True, bfloat16=True, batch=2048),
    "the same, width 1024": Variant(1024, fused=True, bfloat16=True),
    "the same, width 512": Variant(512, fused=True, bfloat16=True),
}
FAST = "fused Adam, bfloat16"


def stepper(variant: Variant) -> Callable[[], None]:
    """A network, its optimiser and one batch; what is returned takes a step."""
    torch.manual_seed(0)
    network = TransformationNetwork(D_OLD, D_NEW, variant.inner_width)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4, weight_decay=2.0**-15, fused=variant.fused)
    old, new = torch.randn(variant.batch, D_OLD), torch.randn(variant.batch, D_NEW)
    label = torch.randint(CLASSES, (variant.batch,))
    loss = Loss("fastfill", classifier=FittedClassifier(torch.randn(CLASSES, D_NEW), None))
    threads = variant.threads or torch.get_num_threads()

    def step() -> None:
        torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.bfloat16):
            z, s = network(old)
        objective, _ = combined(loss, z.float(), s.float(), new, label)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()

    return step


def show_profile() -> None:
    """Self time by operator."""
    for name in (next(iter(VARIANTS)), FAST):
        step = stepper(VARIANTS[name])
        step()
        with profile() as found:
            for _ in range(PROFILED_STEPS):
                step()
        print(name, found.key_averages().table("self_cpu_time_total", row_limit=12, max_name_column_width=40), sep="\n")


def main() -> None:
    """Print a table in Markdown, or the profiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.profile:
        return show_profile()
    times = interleave({name: stepper(item) for name, item in VARIANTS.items()}, arguments.repeats, warm_up=3)
    base = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        per_pair = 1024 / VARIANTS[name].batch
        milliseconds = Spread.of(1000 * item * per_pair for item in seconds)
        rows.append((name, milliseconds.text(".1f"), ratio(base, [item * per_pair for item in seconds]).text()))
    print(header(), table(["step", "ms per 1,024 pairs", "times faster"], rows), sep="\n\n")


if __name__ == "__main__":
    main()
