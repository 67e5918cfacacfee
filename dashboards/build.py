"""Draws what ``panels`` declares as a Grafana dashboard: ``python dashboards/build.py`` writes it into the package.

``--check`` writes nothing and exits with 1 when the file differs from what would be written. The same declarations
always give the same bytes. Knows ``panels`` and Grafana's foundation SDK.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common as make
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode

from panels import MARKS, PHASES, ROWS, Band, Mark, Panel, Query

PATH = Path(__file__).resolve().parents[1] / "async_rl" / "observe" / "assets" / "grafana" / "async_rl.json"
UID = "async-rl"
SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN_FILTER = 'run=~"$run"'
WINDOWS = "1m,5m,15m,1h"

_WIDTH = 24
_LINE_WIDTH = 2
_ROW_HEIGHT = 1
_LARGE = 9


def render() -> str:
    """Return the dashboard's JSON."""
    return json.dumps(_dashboard(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def expression(text: str) -> str:
    """Return a declared query with the filter by run in each of its selectors."""
    return text.replace("{", "{" + RUN_FILTER + ", ").replace(", }", "}")


def main(arguments: Sequence[str]) -> int:
    if list(arguments) not in ([], ["--check"]):
        sys.stderr.write("usage: python dashboards/build.py [--check]\n")
        return 2
    wanted = render()
    if not arguments:
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(wanted, encoding="utf-8")
        sys.stdout.write(f"wrote {PATH}\n")
        return 0
    if PATH.exists() and PATH.read_text(encoding="utf-8") == wanted:
        return 0
    sys.stderr.write(f"{PATH} differs from what dashboards/panels declares; run python dashboards/build.py\n")
    return 1


# -- the whole ------------------------------------------------------------------------------------------------------


def _dashboard() -> dashboard.Dashboard:
    drawn = (
        board.Dashboard("async-rl")
        .uid(UID)
        .description("Asynchronous RL post-training: is it learning, is it still the same policy, and who waits.")
        .tags(["async-rl"])
        .refresh("15s")
        .time("now-15m", "now")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .variables(_variables())
        .annotations([_mark(mark) for mark in MARKS])
    )
    number, top = 0, 0
    for row in ROWS:
        number += 1
        drawn.with_row(board.Row(row.title).id(number).grid_pos(_place(0, top, _WIDTH, _ROW_HEIGHT)))
        top += _ROW_HEIGHT
        for band in row.bands:
            bottom = top
            for panel, left, upper in _laid_out(band, top):
                number += 1
                place = _place(left, upper, panel.width, panel.height)
                drawn.with_panel(_DRAW[panel.kind](panel).id(number).grid_pos(place))
                bottom = max(bottom, upper + panel.height)
            top = bottom
    return drawn.build()


def _laid_out(band: Band, top: int) -> Iterator[tuple[Panel, int, int]]:
    """Each panel of a band with its left and upper edge."""
    left = 0
    for entry in band:
        column = (entry,) if isinstance(entry, Panel) else entry
        upper = top
        for panel in column:
            yield panel, left, upper
            upper += panel.height
        left += column[0].width


def _place(left: int, top: int, width: int, height: int) -> dashboard.GridPos:
    return dashboard.GridPos(x=left, y=top, w=width, h=height)


def _variables() -> list[Any]:
    everything = dashboard.VariableOption(text=["All"], value=["$__all"])
    return [
        board.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        (
            board.QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query(_label_values("async_rl_policy_version", "run"))
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .current(everything)
        ),
        (
            board.QueryVariable("replica")
            .label("Replica")
            .datasource(SOURCE)
            .query(_label_values(f'async_rl_policy_version{{{RUN_FILTER}, role="rollout"}}', "replica"))
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.NUMERICAL_ASC)
            .multi(True)
            .include_all(True)
            # Trainer ranks go by this label too, and there may be more of them than of replicas.
            .all_value(".*")
            .current(everything)
        ),
        (
            board.IntervalVariable("window")
            .label("Rates over")
            .values(WINDOWS)
            .options([dashboard.VariableOption(text=span, value=span) for span in WINDOWS.split(",")])
            .current(dashboard.VariableOption(text="1m", value="1m"))
        ),
    ]


def _label_values(series: str, label: str) -> dict[str, object]:
    return {"qryType": 1, "query": f"label_values({series}, {label})", "refId": "PrometheusVariableQueryEditor"}


def _mark(mark: Mark) -> board.AnnotationQuery:
    return (
        board.AnnotationQuery()
        .name(mark.name)
        .datasource(SOURCE)
        .enable(True)
        .icon_color(mark.colour)
        .target(prometheus.Dataquery().datasource(SOURCE).ref_id("Anno").expr(expression(mark.expr)).range())
        .title_format(mark.text)
    )


# -- panels ---------------------------------------------------------------------------------------------------------


def _queries(panel: Panel, form: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> list[Any]:
    return [
        prometheus.Dataquery()
        .datasource(SOURCE)
        .ref_id(_letter(place))
        .editor_mode(QueryEditorMode.CODE)
        .expr(expression(query.expr))
        .legend_format(query.legend)
        .format(form)
        .range()
        for place, query in enumerate(panel.queries)
    ]


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _common(drawn: Any, panel: Panel) -> Any:
    """Set the properties that panels of every kind have."""
    drawn.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    if panel.low is not None and not panel.centred:
        drawn.min(panel.low)
    if panel.high is not None:
        drawn.max(panel.high)
    return drawn


def _thresholds(panel: Panel, base: str = "green") -> board.ThresholdsConfig:
    steps = [dashboard.Threshold(value=None, color=base)]
    steps += [dashboard.Threshold(value=value, color=colour) for value, colour in panel.steps]
    return board.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _time_series(panel: Panel) -> Any:
    # A table needs room; in a small panel the names and the last values have to do.
    large = panel.height >= _LARGE
    drawn = (
        _common(timeseries.Panel(), panel)
        .targets(_queries(panel))
        .draw_style(common.GraphDrawStyle.LINE)
        .line_width(_LINE_WIDTH)
        .show_points(common.VisibilityMode.AUTO)
        # Gauges of a step stay until the next; a gap is a process that is gone.
        .line_interpolation(common.LineInterpolation.LINEAR)
        .axis_placement(common.AxisPlacement.AUTO)
        .color_scheme(board.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .tooltip(make.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
        .legend(_legend(["lastNotNull", "max"] if large else ["lastNotNull"], table=large))
        # The line's own colour says nothing about good and bad here, so the base is transparent.
        .thresholds(_thresholds(panel, base="transparent"))
    )
    if panel.steps:
        drawn.thresholds_style(make.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    if panel.centred:
        drawn.axis_centered_zero(True)
    for place, query in enumerate(panel.queries):
        looks = list(_looks(query))
        if looks:
            drawn.override_by_query(_letter(place), looks)
    return drawn


def _legend(calcs: list[str], *, table: bool = False) -> make.VizLegendOptions:
    return (
        make.VizLegendOptions()
        .show_legend(True)
        .display_mode(common.LegendDisplayMode.TABLE if table else common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .calcs(calcs)
    )


def _looks(query: Query) -> Iterator[dashboard.DynamicConfigValue]:
    """Colour and dashes of one query's series. Shades distinguish two runs."""
    if query.hue is not None:
        colour = dashboard.FieldColor(mode=dashboard.FieldColorModeId.SHADES, fixed_color=query.hue)
        yield dashboard.DynamicConfigValue(id_val="color", value=colour)
    if query.dashed:
        style = common.LineStyle(fill="dash", dash=[8, 6])
        yield dashboard.DynamicConfigValue(id_val="custom.lineStyle", value=style)


def _stat(panel: Panel) -> Any:
    return (
        _common(stat.Panel(), panel)
        .targets(_queries(panel))
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .justify_mode(common.BigValueJustifyMode.AUTO)
        .text_mode(common.BigValueTextMode.AUTO)
        .orientation(common.VizOrientation.AUTO)
        .wide_layout(True)
        .show_percent_change(False)
        .percent_change_color_mode(common.PercentChangeColorMode.STANDARD)
        .reduce_options(make.ReduceDataOptions().values(False).calcs(["lastNotNull"]).fields(""))
        .color_scheme(board.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .thresholds(_thresholds(panel))
    )


def _heat_map(panel: Panel) -> Any:
    """One map for each run that is chosen: maps cannot be laid over each other."""
    return (
        _common(heatmap.Panel(), panel)
        .targets(_queries(panel, PromQueryFormat.HEATMAP))
        .repeat("run")
        .repeat_direction("h")
        .max_per_row(4)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .fill("dark-orange")
            .exponent(0.5)
            .steps(64)
            .reverse(False)
        )
        .cell_gap(1)
        .show_value(common.VisibilityMode.NEVER)
        .y_axis(heatmap.YAxisConfig().unit("short").decimals(0).axis_placement(common.AxisPlacement.LEFT))
        .tooltip(heatmap.HeatmapTooltip().mode(common.TooltipDisplayMode.SINGLE).y_histogram(True))
        .show_legend()
        .exemplars_color("rgba(255,0,255,0.7)")
    )


def _timeline(panel: Panel) -> Any:
    return (
        _common(statetimeline.Panel(), panel)
        .targets(_queries(panel))
        .merge_values(True)
        .align_value(common.TimelineValueAlignment.LEFT)
        .row_height(0.9)
        .fill_opacity(80)
        .line_width(0)
        .legend(_legend([]))
        .tooltip(make.VizTooltipOptions().mode(common.TooltipDisplayMode.SINGLE).sort(common.SortOrder.NONE))
    )


def _phases(panel: Panel) -> Any:
    """One line per run, in which each phase has its colour."""
    texts = {
        str(place): dashboard.ValueMappingResult(text=text, color=colour, index=place)
        for place, (_, text, colour) in enumerate(PHASES, start=1)
    }
    texts["0"] = dashboard.ValueMappingResult(text="other", color="text", index=0)
    return (
        _timeline(panel)
        .show_value(common.VisibilityMode.NEVER)
        .mappings([dashboard.ValueMap(options=texts)])
        .color_scheme(board.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .thresholds(_thresholds(panel, base="text"))
    )


def _versions(panel: Panel) -> Any:
    return (
        _timeline(panel)
        .show_value(common.VisibilityMode.AUTO)
        .color_scheme(board.FieldColor().mode(dashboard.FieldColorModeId.CONTINUOUS_BL_PU))
        .legend(make.VizLegendOptions().show_legend(False).display_mode(common.LegendDisplayMode.LIST).calcs([]))
    )


_DRAW: dict[str, Callable[[Panel], Any]] = {
    "timeseries": _time_series,
    "stat": _stat,
    "heatmap": _heat_map,
    "phases": _phases,
    "versions": _versions,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
