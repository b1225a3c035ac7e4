"""The Prometheus endpoint: the catalog's series and an HTTP server on rank 0."""

import errno
import logging
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    start_http_server,
)

from elip_ds.metrics.catalog import CATALOG

log = logging.getLogger(__name__)

TRIES = 20
_KINDS: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram, "info": Info}
_STEP_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Exporter:
    def __init__(self) -> None:
        disable_created_metrics()  # a second series per counter that nobody reads
        self.registry = CollectorRegistry()
        self.series: dict[str, Any] = {}
        for entry in CATALOG:
            extra = {"buckets": _STEP_BUCKETS} if entry.kind == "histogram" else {}
            self.series[entry.name] = _KINDS[entry.kind](
                entry.name, entry.help, entry.labels, registry=self.registry, **extra
            )

    def __getitem__(self, name: str) -> Any:
        return self.series[name]

    def serve(self, address: str, port: int) -> str | None:
        """Listen on the port or one of the next free ones. Returns the URL, or None with a warning:
        metrics never stop a run. Port 0 takes any free one.
        """
        last = min(port + TRIES - 1, 65535)
        for candidate in range(port, last + 1):
            try:
                server, _ = start_http_server(candidate, addr=address, registry=self.registry)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                log.warning("no metrics endpoint on %s:%d: %s", address, port, error.strerror)
                return None
            return f"http://{address}:{server.server_port}/metrics"
        log.warning("no metrics endpoint: ports %d to %d are taken", port, last)
        return None
