"""What became of the last commit: whether `prod` moved to it, or why not, and why the backfill stopped there."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import documents, fenced, storage
from pipeline.fenced import Check
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


def write_standing(run: Run, standing: Standing, check: Check) -> None:
    """Keep what became of the last commit; raises as `fenced.replace`."""
    fenced.replace(_uri(run), documents.encode(standing), check)


def read_standing(run: Run) -> Standing | None:
    """What became of the last commit that was judged, or None.

    Raises:
        DataError: the file is damaged or of another format.
    """
    found = storage.read_versioned(_uri(run))
    return None if found is None else documents.parse(Standing, found[0], _uri(run), documents.REDO)


def _uri(run: Run) -> str:
    return run.path("reports", "standing.json")
