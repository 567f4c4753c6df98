"""Write deploy/grafana/devmapper.json: Grafana's dashboard, one line here for each panel.

The unit tests compare the file with this, and every metric in it with a scrape.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

TARGET: Final = Path(__file__).parents[1] / "deploy" / "grafana" / "devmapper.json"
_SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
_HERE: Final = 'instance=~"$instance"'
_WIDTH: Final = 24  # columns of Grafana's grid


class Query(NamedTuple):
    expression: str  # %s stands for the selector of the instances
    legend: str = ""


class Panel(NamedTuple):
    title: str
    kind: str
    unit: str
    queries: tuple[Query, ...]
    width: int
    height: int = 8
    description: str = ""
    options: dict[str, Any] | None = None
    mappings: tuple[tuple[str, str, str], ...] = ()  # value, text, colour
    steps: tuple[tuple[float | None, str], ...] = ((None, "green"),)


_SHARES: Final = ((None, "green"), (0.8, "orange"), (0.9, "red"))
_YES_IS_BAD: Final = (("0", "no", "green"), ("1", "yes", "red"))
_NO_IS_BAD: Final = (("0", "no", "red"), ("1", "yes", "green"))
_OPERATION: Final = "{{front_end}} {{operation}}"


def _share(half: str) -> str:
    return f"devmapper_pool_{half}_used_bytes{{%s}} / devmapper_pool_{half}_size_bytes{{%s}}"


def _quantile(part: float) -> str:
    return (
        f"histogram_quantile({part}, sum by (front_end, operation, le)"
        " (rate(devmapper_operation_duration_seconds_bucket{%s}[$__rate_interval])))"
    )


PANELS: Final = (
    Panel("Data used", "gauge", "percentunit", (Query(_share("data")),), 4, 6, steps=_SHARES),
    Panel(
        "Metadata used",
        "gauge",
        "percentunit",
        (Query(_share("metadata")),),
        4,
        6,
        "A pool without free metadata turns read-only.",
        steps=_SHARES,
    ),
    Panel(
        "Mode",
        "stat",
        "none",
        (Query("devmapper_pool_mode{%s} == 1", "{{mode}}"),),
        4,
        6,
        options={"textMode": "name", "colorMode": "none"},
    ),
    Panel("Answers", "stat", "none", (Query("devmapper_pool_up{%s}"),), 3, 6, mappings=_NO_IS_BAD),
    Panel(
        "Needs a check",
        "stat",
        "none",
        (Query("devmapper_pool_needs_check{%s}"),),
        3,
        6,
        mappings=_YES_IS_BAD,
    ),
    Panel(
        "Layers",
        "stat",
        "none",
        (Query("devmapper_layers{%s}", "{{owner}}"),),
        6,
        6,
    ),
    Panel(
        "Data",
        "timeseries",
        "bytes",
        (
            Query("devmapper_pool_data_used_bytes{%s}", "used"),
            Query("devmapper_pool_data_size_bytes{%s}", "size"),
            Query("devmapper_pool_data_available_bytes{%s}", "available"),
            Query("devmapper_pool_reserve_bytes{%s}", "reserve"),
        ),
        12,
    ),
    Panel(
        "Metadata",
        "timeseries",
        "bytes",
        (
            Query("devmapper_pool_metadata_used_bytes{%s}", "used"),
            Query("devmapper_pool_metadata_size_bytes{%s}", "size"),
        ),
        12,
    ),
    Panel(
        "Layers that take most",
        "timeseries",
        "bytes",
        (Query("topk(10, devmapper_layer_exclusive_bytes{%s})", "{{layer}} {{snapshot}}"),),
        12,
        description="What removing the layer gives back.",
    ),
    Panel(
        "Data by owner",
        "timeseries",
        "bytes",
        (
            Query("sum by (owner) (devmapper_layer_exclusive_bytes{%s})", "{{owner}} exclusive"),
            Query("sum by (owner) (devmapper_layer_mapped_bytes{%s})", "{{owner}} mapped"),
        ),
        12,
    ),
    Panel(
        "Layers in use",
        "timeseries",
        "none",
        (
            Query("devmapper_layers_active{%s}", "active"),
            Query("devmapper_layers_mounted{%s}", "mounted"),
            Query("devmapper_layers_deletion_put_off{%s}", "deletion put off"),
        ),
        12,
    ),
    Panel(
        "Events",
        "timeseries",
        "none",
        (Query("increase(devmapper_pool_events_total{%s}[$__rate_interval])", "{{event}}"),),
        12,
        description="Changes of the pool's condition; the daemon's log has each with a hint.",
    ),
    Panel(
        "Operations",
        "timeseries",
        "ops",
        (
            Query(
                "sum by (front_end, operation)"
                " (rate(devmapper_operation_duration_seconds_count{%s}[$__rate_interval]))",
                _OPERATION,
            ),
        ),
        12,
    ),
    Panel(
        "Errors",
        "timeseries",
        "ops",
        (
            Query(
                "sum by (front_end, operation, error)"
                " (rate(devmapper_operation_errors_total{%s}[$__rate_interval]))",
                f"{_OPERATION} {{{{error}}}}",
            ),
        ),
        12,
    ),
    Panel("Latency, median", "timeseries", "s", (Query(_quantile(0.5), _OPERATION),), 12),
    Panel("Latency, 99th percentile", "timeseries", "s", (Query(_quantile(0.99), _OPERATION),), 12),
    Panel(
        "Under way",
        "timeseries",
        "none",
        (Query("devmapper_operations_under_way{%s}", _OPERATION),),
        8,
    ),
    Panel(
        "Memory of the daemon",
        "timeseries",
        "bytes",
        (Query('process_resident_memory_bytes{job=~"$job", %s}', "resident"),),
        8,
    ),
    Panel(
        "Age of what is shown",
        "timeseries",
        "s",
        (
            Query("devmapper_pool_status_age_seconds{%s}", "pool"),
            Query("devmapper_layers_scan_age_seconds{%s}", "layers"),
            Query("devmapper_layers_scan_duration_seconds{%s}", "measuring the layers"),
        ),
        8,
    ),
)


def dashboard() -> dict[str, Any]:
    return {
        "uid": "devmapper",
        "title": "devmapper",
        "description": "A thin pool, its layers and the daemon that serves them.",
        "tags": ["storage", "containers"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"},
                _variable("job", "Job", "label_values(devmapper_pool_up, job)"),
                _variable(
                    "instance", "Instance", 'label_values(devmapper_pool_up{job=~"$job"}, instance)'
                ),
            ]
        },
        "panels": _placed(),
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed() -> list[dict[str, Any]]:
    """From left to right, a new row where the last one is full."""
    found = []
    x = y = row = 0
    for number, panel in enumerate(PANELS, 1):
        if x + panel.width > _WIDTH:
            x, y, row = 0, y + row, 0
        place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
        found.append({"id": number, "gridPos": place, **_described(panel)})
        x, row = x + panel.width, max(row, panel.height)
    return found


def _described(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": color} for value, color in panel.steps],
        },
    }
    if panel.unit == "percentunit":
        defaults["max"] = 1
    if panel.mappings:
        options = {value: {"text": text, "color": color} for value, text, color in panel.mappings}
        defaults["mappings"] = [{"type": "value", "options": options}]
    return {
        "title": panel.title,
        "description": panel.description,
        "type": panel.kind,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": panel.options or {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": query.expression.replace("%s", _HERE),
                "legendFormat": query.legend,
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


def main() -> int:
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
