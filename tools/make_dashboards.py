"""Write the dashboards that tools/panels.py describes: Grafana's, and a page that needs no Grafana;
and the tables of series and alerts in docs/telemetry.md.

examples:
  python tools/make_dashboards.py            # all of it
  python tools/make_dashboards.py --check    # status 1 where these are not what it would write

tools/dashboards/ is a provisioning folder: grafana/provisioning/{datasources,dashboards} are what
Grafana reads at its start, grafana/*.json what they point at.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from panels import DASHBOARDS, Dashboard, Panel

from elip_ds.metrics import CATALOG

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("page_template.html")
PAGE = Path("elip_ds/metrics/page.html")
DOCS, RULES = Path("docs/telemetry.md"), Path("elip_ds/metrics/rules.yml")
GRAFANA = Path("tools/dashboards")
SCHEMA = 39
"Of Grafana 10.4 and 11; newer ones take it and bring it up to their own."
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTHS = {"stat": (4, 4), "timeseries": (12, 8)}
"Columns of 24, and rows."

DATASOURCES = """\
# Where Prometheus is: set PROMETHEUS_URL in Grafana's environment.
apiVersion: 1
datasources:
  - {name: Prometheus, type: prometheus, access: proxy, url: $PROMETHEUS_URL, isDefault: true}
"""
PROVIDERS = """\
# The dashboards: mount or copy tools/dashboards to /etc/grafana/elip.
apiVersion: 1
providers:
  - {name: elip_ds, folder: ELIP, type: file, options: {path: /etc/grafana/elip/grafana}}
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="make_dashboards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(argv).check
    wrong = []
    for path, text in made().items():
        there = ROOT / path
        if check and (not there.exists() or there.read_text() != text):
            wrong.append(path)
        if not check:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_text(text)
    for path in wrong:
        sys.stderr.write(f"{path} is not what python {Path(__file__).name} writes\n")
    if wrong:
        raise SystemExit(1)


def made() -> dict[Path, str]:
    """Path in the repository -> text."""
    files = {
        GRAFANA / "grafana" / f"{board.uid}.json": json.dumps(grafana(board), indent=1) + "\n"
        for board in DASHBOARDS
    }
    provisioning = GRAFANA / "grafana" / "provisioning"
    files[provisioning / "datasources" / "prometheus.yml"] = DATASOURCES
    files[provisioning / "dashboards" / "elip.yml"] = PROVIDERS
    files[PAGE] = page()
    files[DOCS] = with_tables((ROOT / DOCS).read_text())
    return files


def with_tables(text: str) -> str:
    """The page of docs with its tables written anew."""
    tables = {"catalog": series_table(), "alerts": alert_table()}
    for name, table in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def series_table() -> str:
    lines = ["| series | kind | unit | labels | scope | what it is, and how to read it |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for entry in CATALOG:
        labels = ", ".join(entry.labels)
        lines.append(
            f"| `{entry.name}` | {entry.kind} | {entry.unit} | {labels} | {entry.scope} "
            f"| {entry.help} {entry.meaning} |"
        )
    return "\n".join(lines) + "\n"


def alert_table() -> str:
    lines = ["| alert | severity | when | what to do |", "| --- | --- | --- | --- |"]
    groups = yaml.safe_load((ROOT / RULES).read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"] if "alert" in rule):
        when = " ".join(rule["expr"].split()).replace("|", "\\|")
        after = f", for {rule['for']}" if "for" in rule else ""
        severity, what = rule["labels"]["severity"], rule["annotations"]["runbook"]
        lines.append(f"| {rule['alert']} | {severity} | `{when}`{after} | {what} |")
    return "\n".join(lines) + "\n"


def grafana(board: Dashboard) -> dict[str, Any]:
    """The classic dashboard JSON."""
    panels, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(board.panels, start=1):
        width, height = WIDTHS[panel.kind]
        if x + width > 24 or (row and height != row):
            x, y = 0, y + row
        panels.append(grafana_panel(number, panel, {"x": x, "y": y, "w": width, "h": height}))
        x, row = x + width, height
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": ["elip_ds"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables(board)},
        "panels": panels,
    }


def variables(board: Dashboard) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    ]
    for name in ("run", "other") if board.compares else ("run",):
        query = "label_values(elip_step, run)"
        listed.append(
            {
                "name": name,
                "type": "query",
                "datasource": DATASOURCE,
                "query": {"query": query, "refId": name},
                "definition": query,
                "refresh": 2,
                "sort": 1,
            }
        )
    return listed


def grafana_panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom: dict[str, Any] = {"fillOpacity": 20 if panel.stacked else 0, "showPoints": "never"}
        if panel.stacked:
            custom["stacking"] = {"mode": "normal", "group": "A"}
        if panel.log:
            custom["scaleDistribution"] = {"type": "log", "log": 10}
        defaults["custom"] = custom
        options = {"legend": {"displayMode": "list", "placement": "bottom"}}
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none"}
    return {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "type": panel.kind,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(65 + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(panel.shown.items())
        ],
    }


def page() -> str:
    """One file without any other: it asks Prometheus over its HTTP interface."""
    boards = [
        {
            "title": board.title.removeprefix("ELIP: "),
            "compares": board.compares,
            "panels": [vars(panel) for panel in board.panels],
        }
        for board in DASHBOARDS
    ]
    help_of = {entry.name: f"{entry.help} {entry.meaning}" for entry in CATALOG}
    # Prometheus may serve it as one of its console templates, to which two braces mean something.
    parts = {"BOARDS": boards, "HELP": help_of}
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in parts.items():
        told = json.dumps(value, indent=0).replace("{{", "{\\u007b").replace("</", "<\\/")
        text = text.replace(f'"@{name}@"', told)
    assert "{{" not in text
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
