"""Names of the series, by the conventions of Prometheus and of this project."""

import re

import pytest

from elip_ds.metrics import CATALOG

OTHER_UNITS = re.compile(
    r"_(ms|us|milliseconds|minutes|hours|kb|mb|gb|kilobytes|megabytes|bits|percent|pct|per)(_|$)"
)
UNIT_OF = {"duration": "seconds", "phase": "seconds", "memory": "bytes", "recall": "ratio"}


def test_no_name_is_twice():
    assert len({entry.name for entry in CATALOG}) == len(CATALOG)


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.name)
def test_a_name_follows_the_conventions(entry):
    assert re.fullmatch(r"elip_[a-z]+(_[a-z]+)*", entry.name)
    assert entry.kind in ("counter", "gauge", "histogram", "info")
    assert entry.name.endswith("_total") == (entry.kind == "counter")
    assert not OTHER_UNITS.search(entry.name), "base units only"
    for word, unit in UNIT_OF.items():
        if word in entry.name.split("_"):
            assert entry.name.removesuffix("_total").endswith(unit)
    assert not entry.name.endswith(("_count", "_sum", "_bucket", "_info"))


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.name)
def test_a_series_says_what_it_is_and_has_few_labels(entry):
    assert entry.help.endswith(".") and "\n" not in entry.help
    assert entry.meaning.endswith(".") and entry.unit
    assert entry.scope in ("run", "rank", "endpoint")
    assert len(entry.labels) <= 2
    assert not {"step", "path", "key", "sample", "shard", "rank"} & {*entry.labels}
