"""The plan against what was really allocated, in a few cases of tools/check_plan.py."""

import check_plan
import pytest
import torch
from allocations import Allocations
from check_plan import BOUNDS, SMALL, Case, in_own_processes


def test_allocations_are_told_stretch_by_stretch():
    with Allocations() as allocations:
        x = torch.empty(1000, dtype=torch.uint8)
        allocations.mark("one")
        y = torch.empty(5000, dtype=torch.uint8)
        del y
        allocations.mark("two")
        del x
        allocations.mark("three")
    assert allocations.peaks() == [("one", 1000, 1000), ("two", 6000, 1000), ("three", 1000, 0)]


def test_there_are_eight_variants_of_a_step_and_all_differ():
    assert len({case.name for case in check_plan.step_cases()}) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(size=4),
        Case(size=4, precision="bf16", attention="eager"),
        Case(size=4, words=[*SMALL, "pruning.stages=[]", "model.vision.recompute=full"]),
    ],
    ids=lambda case: case.name,
)
def test_a_step_is_predicted_phase_by_phase(case):
    low, high = BOUNDS["step"]
    result = in_own_processes(case)
    assert all(low <= error <= high for error in result["errors"].values()), result


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(size=4, world_size=2, stage=2, precision="bf16"),
        Case(size=4, world_size=8, stage=1),
        Case(size=4, world_size=8, stage=3, precision="bf16"),
        Case(size=4, world_size=64, stage=2, accumulation=2),
    ],
    ids=lambda case: case.name,
)
def test_the_real_engine_is_predicted(case):
    low, high = BOUNDS["engine"]
    result = in_own_processes(case)
    assert low <= result["error"] <= high, result
