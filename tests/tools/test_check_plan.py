"""The plan against what was really allocated, in a few cases of tools/check_plan.py."""

import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import check_plan
import pytest
from allocations import Allocations, counting
from check_plan import BOUNDS, SMALL, Case, in_own_processes

COUNTED = """
import threading, torch
from allocations import Allocations
allocations = Allocations()
x = torch.empty(1000, dtype=torch.uint8)
allocations.mark("one")
y = [torch.empty(5000, dtype=torch.uint8)]
elsewhere = threading.Thread(target=y.clear)
elsewhere.start()
elsewhere.join()
allocations.mark("two")
del x
allocations.mark("three")
print(allocations.peaks())
"""


@pytest.mark.slow
def test_allocations_are_told_stretch_by_stretch_whichever_thread_frees(tmp_path):
    tools = Path(check_plan.__file__).parent
    env = os.environ | {"PYTHONPATH": str(tools)} | counting(tmp_path)
    command = [sys.executable, "-c", COUNTED]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert literal_eval(told) == [("one", 1000, 1000), ("two", 6000, 1000), ("three", 1000, 0)]


def test_a_process_that_is_not_counted_says_so():
    with pytest.raises(RuntimeError, match="counting"):
        Allocations()


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
