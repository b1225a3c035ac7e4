"""The plan's curve between traced sizes, and what it takes for granted of a device not here."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_words

from elip_ds.batching import Peaks
from elip_ds.batching.cache import Cache
from elip_ds.batching.zero import read_zero
from elip_ds.config import load_config
from elip_ds.engine import read_ds_config
from elip_ds.launching.forecast import Curve, Forecast, complete_tree

ROOT = Path(__file__).parents[2]
TREE = {"zero_optimization": {"stage": 2}}


def test_a_curve_goes_through_what_was_traced_and_straight_on():
    curve = Curve({2: Peaks(10, 20, 30), 4: Peaks(14, 20, 30), 8: Peaks(30, 40, 30)})
    assert curve(4) == Peaks(14, 20, 30) and curve(3) == Peaks(12, 20, 30)
    assert curve(6) == Peaks(22, 30, 30) and curve(16) == Peaks(62, 80, 30)
    assert Curve({4: Peaks(1, 2, 3)})(9) == Peaks(1, 2, 3)


@pytest.mark.parametrize(
    ("tree", "word", "device", "on"),
    [
        ({}, "auto", "cuda", "bf16"),
        ({}, "auto", "cpu", "fp32"),
        ({}, "fp16", "cuda", "fp16"),
        ({"bf16": {"enabled": False}}, "auto", "cuda", "fp32"),
        ({"fp16": {"enabled": True}}, "auto", "cuda", "fp16"),
    ],
)
def test_auto_precision_is_filled_for_a_device_that_is_not_here(tree, word, device, on):
    config = load_config(tiny_words(f"engine.precision={word}"))
    full = complete_tree(config, TREE | tree, device, 2)
    assert [n for n in ("bf16", "fp16") if full[n]["enabled"]] == ([on] if on != "fp32" else [])


def test_ranks_of_gpus_are_planned_with_the_bucket_by_which_they_overlap():
    tree = read_ds_config(str(ROOT / "ds_configs/z2.json"))
    for ranks, device, overlap in ((1, "cuda", False), (2, "cuda", True), (2, "cpu", False)):
        full = complete_tree(load_config(tiny_words()), tree, device, ranks)
        assert read_zero(full, ranks, torch.bfloat16).overlap is overlap, (ranks, device)


@pytest.mark.slow
def test_the_largest_is_the_last_that_fits(tmp_path):
    config = load_config(tiny_words())
    forecast = Forecast(config, TREE, world_size=2, device="cpu", cache=Cache(tmp_path))
    budget = forecast.at(24).highest
    assert forecast.largest(budget, range(1, 1000)) == 24
    assert forecast.largest(budget, [2, 4, 8, 16, 32]) == 16
    assert forecast.largest(budget - 1, range(1, 1000)) == 23
    assert forecast.largest(1000, [2, 4]) is None
    more = forecast.at(32).highest - forecast.at(24).highest
    assert forecast.slope() == pytest.approx(more / 8, rel=0.15)  # a line for each phase, not one


def test_peaks_are_asked_once_of_all_starts(tmp_path, monkeypatch):
    config = load_config(tiny_words())
    first = Forecast(config, TREE, world_size=2, device="cpu", cache=Cache(tmp_path)).at(4)
    monkeypatch.setattr("elip_ds.launching.forecast.StepTracer", None)
    again = Forecast(config, TREE, world_size=2, device="cpu", cache=Cache(tmp_path))
    assert again.at(4) == first
    with pytest.raises(TypeError):
        again.at(8)


def test_tracing_leaves_the_random_numbers_and_threads_of_this_process_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Forecast(load_config(tiny_words()), TREE, world_size=2, device="cuda").at(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.autograd.is_multithreading_enabled()
