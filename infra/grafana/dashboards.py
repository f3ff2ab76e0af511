"""Write the Grafana dashboards of `panels.py` with the typed SDK of Grafana 11.6, into dashboards/*.json.

    python infra/grafana/dashboards.py

The JSON is committed, and a test holds it to what this writes. Deployment only: nothing of the pipeline imports it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import barchart, bargauge, common, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that it runs as a script

from infra.grafana.panels import DASHBOARDS, Panel  # noqa: E402

FOLDER = HERE / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")

AnyPanel = stat.Panel | timeseries.Panel | barchart.Panel | bargauge.Panel


def build(name: str) -> str:
    """One dashboard as JSON text, as it is committed."""
    title, rows = DASHBOARDS[name]
    run = QueryVariable("run").label("Run").datasource(SOURCE).query("label_values(fastfill_gallery_images, run)")
    run = run.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).include_all(True).all_value(".*").multi(True)
    board = Dashboard(f"fastfill: {title}").uid(f"fastfill-{name}").tags(["fastfill"]).readonly()
    board = board.time("now-3h", "now").refresh("30s").tooltip(DashboardCursorSync.CROSSHAIR)
    board = board.with_variable(DatasourceVariable("source").label("Prometheus").type("prometheus")).with_variable(run)
    for row, panels in rows.items():
        board = board.with_row(Row(row))
        for panel in panels:
            board = board.with_panel(_panel(panel))
    return json.dumps(board.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _panel(panel: Panel) -> AnyPanel:
    made: AnyPanel = {"stat": _stat, "lines": _lines, "bars": _bars, "levels": _levels}[panel.kind]()
    made = made.title(panel.title).description(panel.text).unit(panel.unit).datasource(SOURCE)
    made = made.span(panel.span).height(4 if panel.kind == "stat" else 8)
    for number, (legend, expression) in enumerate(panel.queries):
        query = Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number)).datasource(SOURCE)
        if panel.kind == "bars":
            query = query.format(PromQueryFormat.TABLE)
        made = made.with_target(query.range() if panel.kind == "lines" else query.instant())
    return made


def _stat() -> stat.Panel:
    return stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _lines() -> timeseries.Panel:
    return timeseries.Panel().axis_soft_min(0).fill_opacity(5).line_width(1)


def _bars() -> barchart.Panel:
    numbers = {"conversions": [{"targetField": "wave", "destinationType": "number"}], "fields": {}}
    made = barchart.Panel().x_field("wave").min(0)
    made = made.with_transformation(DataTransformerConfig(id_val="convertFieldType", options=numbers))
    return made.with_transformation(DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": "wave"}]}))


def _levels() -> bargauge.Panel:
    return bargauge.Panel().min(0).max(1).reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard}.json").write_text(build(dashboard))
