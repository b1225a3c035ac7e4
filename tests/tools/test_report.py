"""The report, of runs that ended, were killed, or never began."""

import json
import re

import pytest
import report

from elip_ds.errors import UserError


def line(step: int, **changes: object) -> dict:
    return {
        "step": step,
        "samples_seen": 8 * step,
        "epoch": step / 8,
        "losses": {"itc": 4.0 - step / 10, "itm": 0.7},
        "logs": {"similarity_positive": 0.5, "temperature": 0.07},
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "images_per_second": 100.0 * step,
        "tflops": 0.5,
        "mfu": 0.25,
        "kept_tokens": [10, 6],
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "memory_used_bytes": 2**30,
        "memory_peak_bytes": 2**31,
        "bad_samples": 3,
        **changes,
    }


SCORES = {"recall_at_1": 0.25, "recall_at_5": 0.5, "recall_at_10": 0.75, "candidates": 16}


@pytest.fixture(autouse=True)
def few_plots(monkeypatch):
    """Each takes half a second."""
    monkeypatch.setattr(report, "PLOTS", [report.PLOTS[0], report.PLOTS[-1]])


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    lines = [line(1), line(2), line(3), {"step": 3, "samples_seen": 24, "scores": SCORES}]
    text = "".join(json.dumps(part) + "\n" for part in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "loss')  # the kill cut it
    (folder / "plan.json").write_text('{"world_size": 2}')
    return folder


def table(run) -> dict[str, str]:
    return dict(report.rows([report.read_run(run)])[1:])


def test_the_table_has_the_figures_of_the_run(run):
    rows = table(run)
    assert rows["state"] == "has not come to its end"
    assert rows["images/s"] == "250"  # the first interval warms up
    assert rows["MFU"] == "25.00 %" and rows["TFLOP/s"] == "0.5"
    assert rows["loss itc"] == "3.900 -> 3.700"
    assert rows["tokens after each stage"] == "10 -> 6"
    assert rows["recall@1/5/10"] == "25.0 / 50.0 / 75.0 % of 16"
    assert rows["global batch"] == "8: 4 a pass on 2 rank(s)"
    assert rows["peak memory of rank 0"] == "2.00 GiB" and rows["samples lost"] == "3"
    (run / "summary.json").write_text('{"state": "done"}')
    assert table(run)["state"] == "done"


def test_a_loss_that_was_no_number_is_told(run):
    with (run / "metrics.jsonl").open("w") as file:
        for part in (line(1), line(2, losses={"itc": None, "itm": 0.7})):
            file.write(json.dumps(part) + "\n")
    assert table(run)["loss itc"] == "3.900 -> not finite"


def test_a_page_has_its_plots_inside(run, tmp_path, capsys):
    out = tmp_path / "report.html"
    report.main([str(run), "--out", str(out)])
    page = out.read_text()
    assert page.count("<svg") == len(report.PLOTS) and "src=" not in page
    assert capsys.readouterr().out == f"{out}\n"


def test_runs_stand_side_by_side(run, tmp_path):
    other = tmp_path / "two"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    out = tmp_path / "both.md"
    report.main([str(run), str(other), "--out", str(out)])
    text = out.read_text()
    assert "|  | one | two |" in text
    pictures = re.findall(r"\((both-.*\.svg)\)", text)
    assert len(pictures) == len(report.PLOTS)
    assert all((tmp_path / name).read_text().count("<svg") == 1 for name in pictures)


def test_what_cannot_be_reported_is_told(run, tmp_path):
    with pytest.raises(UserError, match="no run that has trained"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"ends in \.html or \.md"):
        report.main([str(run), "--out", "x.pdf"])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no whole line"):
        report.main([str(run)])
