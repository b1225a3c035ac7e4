"""The endpoint over real HTTP."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elip_ds.metrics import CATALOG
from elip_ds.metrics.exporter import TRIES, Exporter

SUFFIXES = {"counter": {""}, "gauge": {""}, "info": {"_info"}}
SUFFIXES["histogram"] = {"_bucket", "_count", "_sum"}


def read(url: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """(sample name, label values) -> value."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        families = [*text_string_to_metric_families(answer.read().decode())]
    return {(s.name, (*s.labels.values(),)): s.value for f in families for s in f.samples}


@pytest.fixture
def taken():
    """A listening port whose followers are free enough."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_every_series_of_the_catalog_is_served_and_no_other():
    exporter = Exporter()
    for entry in CATALOG:
        if entry.labels:
            exporter[entry.name].labels(*entry.labels)
    url = exporter.serve("127.0.0.1", 0)
    assert {name for name, _ in read(url)} == {
        entry.name + suffix for entry in CATALOG for suffix in SUFFIXES[entry.kind]
    }


def test_values_and_labels_arrive():
    exporter = Exporter()
    exporter["elip_samples_total"].inc(64)
    exporter["elip_loss"].labels("itc").set(1.25)
    exporter["elip_kept_tokens"].labels(0).set(9)
    exporter["elip_step_duration_seconds"].observe(0.3)
    exporter["elip_run"].info({"run": "demo"})
    samples = read(exporter.serve("127.0.0.1", 0))
    assert samples["elip_samples_total", ()] == 64
    assert samples["elip_loss", ("itc",)] == 1.25
    assert samples["elip_kept_tokens", ("0",)] == 9
    assert samples["elip_step_duration_seconds_bucket", ("0.2",)] == 0
    assert samples["elip_step_duration_seconds_bucket", ("0.5",)] == 1
    assert samples["elip_run_info", ("demo",)] == 1


def test_two_runs_in_one_process_do_not_mix():
    one, two = Exporter(), Exporter()
    one["elip_step"].set(1)
    two["elip_step"].set(2)
    urls = [exporter.serve("127.0.0.1", 0) for exporter in (one, two)]
    assert [read(url)["elip_step", ()] for url in urls] == [1, 2]


def test_a_taken_port_gives_way_to_the_next_free_one(taken):
    url = Exporter().serve("127.0.0.1", taken)
    port = int(url.rpartition(":")[2].removesuffix("/metrics"))
    assert taken < port < taken + TRIES
    assert ("elip_step", ()) in read(url)


def test_the_last_port_being_taken_stops_no_run():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", 65535))
        except OSError:
            pass  # somebody else has it: as good
        else:
            server.listen()
        assert Exporter().serve("127.0.0.1", 65535) is None


@pytest.mark.parametrize("address", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_stops_no_run(address):
    assert Exporter().serve(address, 0) is None
