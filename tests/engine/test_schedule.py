"""Closed forms of the learning rate, and intervals against a plain list of multiples."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elip_ds.config.schema import OptimConfig, ScheduleConfig
from elip_ds.engine import due
from elip_ds.engine.schedule import learning_rate, settle_optim

OPTIM = OptimConfig(lr=1e-3)
SCHEDULE = ScheduleConfig(length="1000 samples", warmup="200 samples", warmup_lr=1e-5, min_lr=1e-4)


def lr_at(samples_seen: int, schedule: ScheduleConfig = SCHEDULE, per_epoch: int = 100) -> float:
    return learning_rate(samples_seen, OPTIM, schedule, per_epoch)


@pytest.mark.parametrize(
    ("samples_seen", "expected"),
    [
        (0, 1e-5),
        (50, 1e-5 + 0.25 * (1e-3 - 1e-5)),
        (100, (1e-5 + 1e-3) / 2),
        (200, 1e-3),
        (400, 1e-4 + (1e-3 - 1e-4) * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (600, (1e-3 + 1e-4) / 2),
        (800, 1e-4 + (1e-3 - 1e-4) * (1 - math.sqrt(0.5)) / 2),
        (1000, 1e-4),
    ],
)
def test_the_rate_is_a_line_and_then_half_a_cosine(samples_seen, expected):
    assert lr_at(samples_seen) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("samples_seen", "expected"),
    [(100, (1e-5 + 1e-3) / 2), (200, 1e-3), (600, 5.5e-4), (1000, 1e-4)],
)
def test_a_linear_decay_is_two_lines(samples_seen, expected):
    assert lr_at(samples_seen, replace(SCHEDULE, shape="linear")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("samples_seen", "expected"),
    [(0, 1e-5), (199, 1e-5 + 0.995 * (1e-3 - 1e-5)), (200, 8.1e-4), (299, 8.1e-4), (300, 7.29e-4)],
)
def test_an_exponential_decay_falls_once_an_epoch(samples_seen, expected):
    schedule = replace(SCHEDULE, shape="exponential", decay=0.9)
    assert lr_at(samples_seen, schedule) == pytest.approx(expected)


def test_an_exponential_decay_does_not_fall_below_the_lowest_rate():
    schedule = replace(SCHEDULE, shape="exponential", decay=0.5)
    assert lr_at(999, schedule) == 1e-4


def test_without_warm_up_it_starts_at_the_peak():
    assert lr_at(0, ScheduleConfig(length="1000 samples")) == OPTIM.lr


def test_past_the_end_it_stays_at_the_lowest():
    assert lr_at(1001) == lr_at(10**9) == pytest.approx(SCHEDULE.min_lr, rel=1e-12)


def test_a_run_that_is_all_warm_up_is_defined_everywhere():
    schedule = ScheduleConfig(length="200 samples", warmup="200 samples")
    assert lr_at(199, schedule) < lr_at(200, schedule) == OPTIM.lr
    assert lr_at(201, schedule) == pytest.approx(schedule.min_lr)


def test_epochs_and_samples_of_the_same_length_are_one_schedule():
    epochs = ScheduleConfig(length="10 epochs", warmup="2 epochs", warmup_lr=1e-5, min_lr=1e-4)
    assert [lr_at(n, epochs) for n in range(1100)] == [lr_at(n) for n in range(1100)]


def rates_of_a_run(batch_size: int) -> dict[int, float]:
    return {seen: lr_at(seen) for seen in range(0, 1000, batch_size)}


@pytest.mark.parametrize("batch_size", [2, 8, 20, 250])
def test_the_rate_depends_on_samples_and_not_on_steps(batch_size):
    fine, coarse = rates_of_a_run(1), rates_of_a_run(batch_size)
    assert coarse == {seen: fine[seen] for seen in coarse}


@given(st.integers(0, 999))
def test_it_rises_in_the_warm_up_and_falls_after(samples_seen):
    rises = samples_seen < 200
    assert (lr_at(samples_seen) < lr_at(samples_seen + 1)) == rises
    assert 1e-5 <= lr_at(samples_seen) <= 1e-3


@pytest.mark.parametrize(
    ("rule", "batch_size", "peak"),
    [
        ("none", 4096, 1e-3),
        ("linear", 256, 1e-3),
        ("linear", 4096, 16e-3),
        ("linear", 64, 0.25e-3),
        ("sqrt", 256, 1e-3),
        ("sqrt", 4096, 4e-3),
        ("sqrt", 64, 0.5e-3),
    ],
)
def test_the_peak_follows_the_batch_and_the_ends_do_not(rule, batch_size, peak):
    base = None if rule == "none" else 256
    optim = settle_optim(replace(OPTIM, lr_rule=rule, base_batch_size=base), batch_size)
    rates = [learning_rate(seen, optim, SCHEDULE, 100) for seen in range(1001)]
    assert max(rates) == rates[200] == pytest.approx(peak, rel=1e-12)
    assert rates[0] == SCHEDULE.warmup_lr and rates[1000] == pytest.approx(SCHEDULE.min_lr)
    assert settle_optim(optim, batch_size) == optim  # nobody applies it twice


@given(every=st.integers(1, 50), steps=st.lists(st.integers(1, 120), max_size=60))
def test_a_step_is_due_exactly_when_a_multiple_lies_in_it(every, steps):
    seen = 0
    for step in steps:
        crossed = any(n % every == 0 for n in range(seen + 1, seen + step + 1))
        seen += step
        assert due(seen, step, every) == crossed


@given(every=st.integers(1, 200), step=st.integers(1, 200), count=st.integers(0, 100))
def test_steps_within_the_interval_meet_each_multiple_once(every, step, count):
    step = min(step, every)
    met = sum(due(step * i, step, every) for i in range(1, count + 1))
    assert met == step * count // every


def test_an_interval_of_nothing_is_due_at_every_step():
    assert due(8, 8, 0) and due(16, 8, 0)


@pytest.mark.parametrize(
    ("batch_size", "name", "lr"), [(4096, "adamw", 1e-4), (4097, "lamb", 2e-3)]
)
def test_lamb_comes_in_above_a_stated_batch(batch_size, name, lr):
    optim = replace(OPTIM, lr=1e-4, lamb_above=4096, lamb_lr=2e-3)
    settled = settle_optim(optim, batch_size)
    assert (settled.name, settled.lr) == (name, lr)
    scaled = settle_optim(replace(optim, lr_rule="sqrt", base_batch_size=1024), batch_size)
    assert scaled.lr == pytest.approx(lr * (batch_size / 1024) ** 0.5)
    assert settle_optim(settled, batch_size) == settled
