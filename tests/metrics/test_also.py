"""The same lines elsewhere."""

import csv
import importlib.util
from pathlib import Path

import pytest
from conftest import tiny_words

from elip_ds.config import load_config
from elip_ds.errors import UserError
from elip_ds.metrics.also import CsvWriter, flatten, open_writers, write_line
from elip_ds.metrics.checks import check_metrics

LINE = {
    "step": 3,
    "samples_seen": 24,
    "losses": {"itc": 1.5, "itm": float("nan")},
    "kept_tokens": (10, 6),
    "gradient_norm": None,
    "learning_rate": 1e-4,
    "skipped": {"coco": {"decode": 2}},
}


def rows(folder: Path) -> dict[tuple[str, str], float]:
    """(step, name) -> value."""
    with (folder / "metrics.csv").open() as file:
        return {(r["step"], r["name"]): float(r["value"]) for r in csv.DictReader(file)}


def test_a_line_becomes_numbers_by_name():
    flat = dict(flatten(LINE))
    assert flat["losses/itc"] == 1.5 and flat["kept_tokens/1"] == 6
    assert "gradient_norm" not in flat


def test_csv_has_a_row_for_each_value_and_goes_on_where_it_was(tmp_path):
    config = load_config(tiny_words("metrics.also=[csv]"))
    write_line(open_writers(config, tmp_path, 0), LINE)
    write_line(open_writers(config, tmp_path, 3), LINE | {"step": 4})
    found = rows(tmp_path)
    assert found["3", "losses/itc"] == found["4", "losses/itc"] == 1.5
    assert {step for step, _ in found} == {"3", "4"}
    assert not any("skipped" in name for _, name in found)


def test_a_writer_that_fails_is_left_out(tmp_path):
    writers = [CsvWriter(load_config(tiny_words()), tmp_path, 0)]
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    write_line(writers, LINE)
    assert writers == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_starts(name, monkeypatch):
    monkeypatch.setattr("elip_ds.metrics.checks.find_spec", lambda name: None)
    config = load_config(tiny_words(f"metrics.also=[{name}]"))
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_metrics(config.metrics)


def test_an_unknown_one_is_an_error():
    with pytest.raises(UserError, match="csv, tensorboard, wandb"):
        load_config(tiny_words("metrics.also=[excel]"))


def test_tensorboard_has_the_values(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed, which nothing needs")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = open_writers(load_config(tiny_words("metrics.also=[tensorboard]")), tmp_path, 0)
    write_line(writers, LINE)
    for writer in writers:
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Scalars("losses/itc")
    assert (event.step, event.value) == (3, 1.5)
