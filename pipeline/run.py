"""The paths of the files of a run. `config.identity` decides whether a config may continue a run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import DataError

PROBE_SET = "probe-set"
GALLERY_PAIRS = "gallery-pairs"
"""The folders of the probe set and of the pairs that are drawn from the gallery."""

_TAG = re.compile(r"[\w-]+")  # it becomes a file's name


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run.

    Attributes:
        uri: the folder of the run.
        layout: the folder inside `transformed/` and `plan/` that holds the parts of the plan; see `Plan.laid_out`.
    """

    uri: str
    layout: str = ""

    def path(self, *parts: str) -> str:
        """A file of the run, by its path inside the run."""
        return _join(self.uri, *parts)

    @property
    def settings(self) -> str:
        """run.json"""
        return self.path("run.json")

    @property
    def transformation(self) -> str:
        """The folder of the transformation."""
        return self.path("transformation")

    @property
    def plan(self) -> str:
        """plan.json, which is written last."""
        return self.path("plan", "plan.json")

    def wave_units(self, wave: int, first: int) -> str:
        """The units file of a wave that starts with unit `first`: one row group per unit, in locality order."""
        return _join(self.units, f"wave-{wave:03d}", f"units-{first:05d}.parquet")

    @property
    def units(self) -> str:
        """The folder of the units, by wave."""
        return self._laid_out("plan")

    @property
    def transformed(self) -> str:
        """The folder of the transformed gallery's parts."""
        return self._laid_out("transformed")

    def transformed_part(self, number: int) -> str:
        """Part `number` of the transformed gallery."""
        return _join(self.transformed, f"part-{number:05d}.parquet")

    def _laid_out(self, folder: str) -> str:
        return self.path(folder, self.layout) if self.layout else self.path(folder)

    def part(self, folder: str, number: int) -> str:
        """Part `number` of a folder of Parquet files."""
        return self.path(folder, f"part-{number:05d}.parquet")

    def commit(self, number: int) -> str:
        """The commit file of snapshot `number`."""
        return self.path("index", "commits", f"{number:020d}.json")

    def tag(self, name: str) -> str:
        """The file of a tag, such as prod or candidate.

        Raises:
            DataError: the name is not valid.
        """
        if not _TAG.fullmatch(name):
            raise DataError(
                "not a valid name of a tag",
                expected="letters, digits, _ and -",
                found=name,
                remedy="use prod, or name a commit",
            )
        return self.path("index", "tags", f"{name}.json")

    @property
    def collected(self) -> str:
        """The commits that gc has removed."""
        return self.path("index", "collected.json")

    @property
    def estimate(self) -> str:
        """The estimated duration and cost of the backfill."""
        return self.path("plan", "estimate.json")

    @property
    def reports(self) -> str:
        """The folder of the report."""
        return self.path("reports")


def _join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])
