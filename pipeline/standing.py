"""What became of the last commit: whether `prod` moved to it, or why not, and why the backfill stopped there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pipeline import storage
from pipeline.run import Run


@dataclass(frozen=True, slots=True)
class Standing:
    """`reports/standing.json`.

    Attributes:
        commit: the number of the last commit that was judged.
        refused: why it is not promoted.
        stopped: which condition of `--stop-when` ended the backfill here.
    """

    commit: int
    refused: tuple[str, ...] = ()
    stopped: str | None = None


def write_standing(run: Run, standing: Standing) -> None:
    """Keep what became of the last commit."""
    storage.put(_uri(run), json.dumps(asdict(standing), indent=1).encode())


def read_standing(run: Run) -> Standing | None:
    """What became of the last commit that was judged, or None."""
    found = storage.read_versioned(_uri(run))
    if found is None:
        return None
    tree = json.loads(found[0])
    return Standing(tree["commit"], tuple(tree["refused"]), tree["stopped"])


def _uri(run: Run) -> str:
    return run.path("reports", "standing.json")
