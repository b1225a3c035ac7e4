"""The catalog's series of one rank, and the text of them that its node's endpoint reads.

A rank serves nothing itself: it writes its text into a folder of the node, whole or not at all, and
endpoint.py serves what lies there. So no scrape ever waits for a step, and a rank that dies leaves
its last values.
"""

import json
import os
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

from elip_ds.metrics.catalog import CATALOG, Series

_KINDS: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram, "info": Info}
_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class _Labelled:
    """A series whose own labels are still to be given; those of all series it has."""

    def __init__(self, series: Any, constant: tuple[str, ...]) -> None:
        self._series, self._constant = series, constant

    def labels(self, *values: object) -> Any:
        return self._series.labels(*values, *self._constant)


class Exporter:
    """exporter[name] is the series, or where it has labels of its own, exporter[name].labels()."""

    def __init__(self, *, run: str, node: str, rank: int) -> None:
        """Rank 0 has the series of scope run, too."""
        disable_created_metrics()  # a second series per counter that nobody reads
        self.registry = CollectorRegistry()
        self._rank = rank
        self._series: dict[str, Any] = {}
        constant = {"run": run, "node": node}
        for entry in CATALOG:
            if not self.has(entry):
                continue
            more = constant | ({"rank": str(rank)} if entry.scope == "rank" else {})
            extra = {"buckets": _BUCKETS} if entry.kind == "histogram" else {}
            series = _KINDS[entry.kind](
                entry.name, entry.help, (*entry.labels, *more), registry=self.registry, **extra
            )
            values = (*more.values(),)
            bound = _Labelled(series, values) if entry.labels else series.labels(*values)
            self._series[entry.name] = bound

    def has(self, entry: Series) -> bool:
        """Whether it is this rank's to tell."""
        return entry.scope == "rank" or (entry.scope == "run" and self._rank == 0)

    def __getitem__(self, name: str) -> Any:
        return self._series[name]

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def write(self, folder: Path, *, closed: bool = False) -> None:
        """For the endpoint. closed: these are the last values. Raises OSError."""
        head = {"rank": self._rank, "closed": closed, **who()}
        path = folder / f"rank-{self._rank:05d}.prom"
        partial = path.with_suffix(".partial")
        partial.write_text(f"# {json.dumps(head)}\n{self.text()}", encoding="utf-8")
        os.replace(partial, path)


def who() -> dict[str, float]:
    """This process; by pid alone a later one could be taken for it."""
    process = psutil.Process()
    return {"pid": process.pid, "created": process.create_time()}
