"""The count of operations in training against the bench's own, and what it costs."""

import pytest
import torch
from conftest import random_batch, tiny_task
from counts import count_step
from workload import PROGRESS

from elip_ds.engine.operations import Operations, matmul_peak


def step(task, batch) -> None:
    task(batch, PROGRESS).total.backward()
    task.drop_carries()


@pytest.mark.parametrize("model", ["albef", "clip"])
def test_a_step_has_as_many_as_the_bench_counts(model):
    task, batch = tiny_task(model=model), random_batch(4)
    counts = count_step(
        lambda: task(batch, PROGRESS), lambda loss: loss.total, inputs=[*task.parameters()]
    )
    expected = sum(counts.forward.values()) + sum(counts.backward.values())
    operations = Operations()
    with operations.of("step"):
        step(tiny_task(model=model), batch)
    assert operations.total == expected > 1e5


def test_a_kind_is_counted_once_and_added_each_time():
    operations, a, b = Operations(), torch.ones(2, 3), torch.ones(3, 5)
    for _ in range(3):
        with operations.of(("product", 2)):
            a @ b
    assert operations.total == 3 * 2 * 2 * 3 * 5
    with operations.of(("product", 2)):
        pass  # of the same kind, it is said: so nobody looks
    assert operations.total == 4 * 60


def test_counting_changes_no_result():
    results = []
    for counted in (False, True):
        task, batch, operations = tiny_task(), random_batch(4), Operations()
        if counted:
            with operations.of("step"):
                step(task, batch)
        else:
            step(task, batch)
        results.append([p.grad.clone() for p in task.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_product_takes_time():
    assert 1e6 < matmul_peak(torch.device("cpu"), torch.float32, spend_seconds=0.05) < 1e15


def test_measuring_the_peak_draws_no_number_that_training_draws():
    before = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32, spend_seconds=0.0) > 0
    assert torch.equal(torch.get_rng_state(), before)
