"""What a rank writes for its node."""

import json

from metrics.prom_tools import promtool
from prometheus_client.parser import text_string_to_metric_families

from elip_ds.metrics import CATALOG
from elip_ds.metrics.exporter import Exporter

SUFFIXES = {"counter": {""}, "gauge": {""}, "info": {"_info"}}
SUFFIXES["histogram"] = {"_bucket", "_count", "_sum"}


def filled(rank: int = 0) -> Exporter:
    """Every series has a value."""
    exporter = Exporter(run="demo", node="n1", rank=rank)
    for entry in CATALOG:
        if entry.labels and exporter.has(entry):
            exporter[entry.name].labels(*entry.labels)
    return exporter


def read(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample name, labels beside run and node) -> value."""
    families = [*text_string_to_metric_families(text)]
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k not in ("run", "node")))): (
            s.value
        )
        for family in families
        for s in family.samples
    }


def test_rank_0_has_every_series_of_the_catalog_and_no_other():
    assert {name for name, _ in read(filled().text())} == {
        entry.name + suffix
        for entry in CATALOG
        for suffix in SUFFIXES[entry.kind]
        if entry.scope != "endpoint"
    }


def test_other_ranks_have_what_differs_by_rank():
    samples = read(filled(rank=3).text())
    names = {name for name, _ in samples}
    assert "elip_last_step_timestamp_seconds" in names and "elip_loss" not in names
    assert all(("rank", "3") in labels for _, labels in samples)


def test_every_sample_says_whose_it_is():
    for family in text_string_to_metric_families(filled().text()):
        for sample in family.samples:
            assert (sample.labels["run"], sample.labels["node"]) == ("demo", "n1")


def test_values_and_labels_arrive():
    exporter = Exporter(run="demo", node="n1", rank=0)
    exporter["elip_samples_total"].inc(64)
    exporter["elip_loss"].labels("itc").set(1.25)
    exporter["elip_kept_tokens"].labels(0).set(9)
    exporter["elip_step_duration_seconds"].observe(0.3)
    exporter["elip_run"].info({"preset": "albef_4m"})
    samples = read(exporter.text())
    assert samples["elip_samples_total", ()] == 64
    assert samples["elip_loss", (("objective", "itc"),)] == 1.25
    assert samples["elip_kept_tokens", (("stage", "0"),)] == 9
    of_rank = ("rank", "0")
    assert samples["elip_step_duration_seconds_bucket", (("le", "0.2"), of_rank)] == 0
    assert samples["elip_step_duration_seconds_bucket", (("le", "0.5"), of_rank)] == 1
    assert samples["elip_run_info", (("preset", "albef_4m"),)] == 1


def test_two_runs_in_one_process_do_not_mix():
    one, two = filled(), filled()
    one["elip_step"].set(1)
    two["elip_step"].set(2)
    assert [read(exporter.text())["elip_step", ()] for exporter in (one, two)] == [1, 2]


def test_a_file_says_who_wrote_it_and_is_whole_or_not_there(tmp_path):
    exporter = filled()
    exporter.write(tmp_path)
    exporter.write(tmp_path, closed=True)
    (path,) = tmp_path.iterdir()
    head, _, text = path.read_text().partition("\n")
    assert json.loads(head.removeprefix("# ")).keys() == {"rank", "closed", "pid", "created"}
    assert text == exporter.text()


def test_promtool_has_nothing_to_say_against_the_names():
    told = promtool("check", "metrics", stdin=filled().text())
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
