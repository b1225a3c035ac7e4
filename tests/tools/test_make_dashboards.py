"""The dashboards: as their description says, of series that there are, in PromQL that parses."""

import itertools
import json
import re

import make_dashboards
import pytest
from metrics.prom_tools import promtool
from panels import DASHBOARDS

from elip_ds.metrics import CATALOG

KINDS = {entry.name: entry.kind for entry in CATALOG}
ENDINGS = {"histogram": ("_sum", "_count", "_bucket"), "info": ("_info",)}
SERIES = {
    entry.name + ending: entry.name
    for entry in CATALOG
    for ending in ENDINGS.get(entry.kind, ("",))
}
EXPRESSIONS = [
    expression for board in DASHBOARDS for panel in board.panels for expression in panel.shown
]
BOARDS = {board.uid: make_dashboards.grafana(board) for board in DASHBOARDS}


def named(expression: str) -> set[str]:
    return set(re.findall(r"\belip_\w+", expression))


def test_what_is_committed_is_what_would_be_written():
    for path, text in make_dashboards.made().items():
        assert (make_dashboards.ROOT / path).read_text() == text, path


def test_panels_name_series_of_the_catalog():
    assert set().union(*map(named, EXPRESSIONS)) <= set(SERIES)


def test_every_series_of_the_catalog_is_on_some_panel():
    shown = {SERIES[name] for name in set().union(*map(named, EXPRESSIONS))}
    assert shown == set(KINDS)


def test_every_expression_is_promql(tmp_path):
    rules = []
    for i, expression in enumerate(EXPRESSIONS):
        for word, value in (("$run", "a"), ("$other", "b"), ("$__rate_interval", "1m")):
            expression = expression.replace(word, value)
        rules.append({"record": f"panel:{i}:x", "expr": expression})
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    told = promtool("check", "rules", str(path))
    assert told.returncode == 0, told.stdout + told.stderr


def test_labels_in_legends_are_those_of_the_series():
    allowed = {label for entry in CATALOG for label in entry.labels} | {"run", "node", "rank"}
    allowed |= {"preset", "git", "torch"}  # of elip_run
    for board in DASHBOARDS:
        for panel in board.panels:
            for legend in panel.shown.values():
                assert set(re.findall(r"{{(\w+)}}", legend)) <= allowed


@pytest.mark.parametrize("uid", BOARDS)
def test_a_grafana_dashboard_hangs_together(uid):
    board = BOARDS[uid]
    assert board["uid"] == uid and json.loads(json.dumps(board)) == board
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (a, b)


def test_variables_in_use_are_declared():
    for board in BOARDS.values():
        declared = {variable["name"] for variable in board["templating"]["list"]}
        used = set(re.findall(r"\$(\w+)|\$\{(\w+)\}", json.dumps(board["panels"])))
        assert {a or b for a, b in used} <= declared | {"__rate_interval"}


def test_the_page_needs_nothing_from_elsewhere():
    page = make_dashboards.page()
    assert not re.findall(r"""(src|href)\s*=|@import|url\(""", page)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "@BOARDS@" not in page and "{{" not in page
