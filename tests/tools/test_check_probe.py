"""What counts as a miss of the probe, and the bisection that says the truth."""

import check_probe
import pytest
from check_probe import Row


def row(none: int, default: int, truth: int, long_passed: bool | None = None) -> Row:
    chosen, seconds = {"none": none, "default": default}, {"none": 1.0, "default": 1.0}
    return Row("1GiB", 2, "pruned", chosen, seconds, truth, long_passed=long_passed)


@pytest.mark.parametrize(
    ("made", "missed"),
    [
        (row(100, 90, 100), []),
        (row(97, 100, 100), []),
        (row(96, 90, 100), ["none"]),
        (row(100, 89, 100), ["default"]),
        (row(101, 90, 100), ["none"]),
        (row(100, 101, 100, False), ["default", "long"]),
    ],
)
def test_a_choice_is_missed_above_the_truth_and_below_its_share(made, missed):
    assert made.missed == missed


@pytest.mark.parametrize("truth", [1, 7, 40, 41, 97, 300])
def test_bisection_finds_the_last_size_that_fits_in_few_starts(truth, monkeypatch, tmp_path):
    tried = []

    def fits(steps, size, budget_bytes):
        tried.append(size)
        return size <= truth

    monkeypatch.setattr(check_probe, "_fits", fits)
    monkeypatch.setattr(check_probe, "_steps", lambda *_: None)
    assert check_probe.bisect(None, {}, 1, 2, {"none": 40}, tmp_path) == truth
    assert len(tried) == len(set(tried)) <= 18
