"""Storages count from their making to the last reference, views and fakes alike."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elip_ds.batching.trace import Tracker, trace_step
from elip_ds.batching.zero import Reduction, Zero

KIB = 1024


def test_storages_count_until_the_last_reference_is_gone():
    with FakeTensorMode(), Tracker() as tracker:
        x = torch.empty(KIB)
        view = x[: KIB // 2].view(2, -1)
        assert tracker.alive_bytes == 4 * KIB
        del x
        assert tracker.alive_bytes == 4 * KIB
        del view
        assert tracker.alive_bytes == 0
        assert (tracker.lap(), tracker.lap()) == (4 * KIB, 0)


def test_what_was_there_before_is_not_counted():
    with FakeTensorMode():
        x = torch.empty(KIB)
        with Tracker() as tracker:
            x.add_(1)
            same = x.view(2, -1).detach()
            assert tracker.alive_bytes == 0
            assert same.shape == (2, KIB // 2)


def test_sizes_are_rounded_up_as_cuda_does():
    with FakeTensorMode(), Tracker() as tracker:
        x = torch.empty(1)
        assert tracker.alive_bytes == 512
        del x


def test_real_tensors_are_counted_alike():
    with Tracker() as tracker:
        x = torch.ones(KIB) + 1
        assert tracker.alive_bytes == 4 * KIB and tracker.lap() == 8 * KIB
        del x


def test_a_part_is_what_ran_when_the_storage_was_made():
    parts = iter(["text", "vision"])
    with FakeTensorMode(), Tracker(lambda: next(parts)) as tracker:
        x, y = torch.empty(KIB), torch.empty(2 * KIB)
        assert tracker.alive_by_part() == {"text": 4 * KIB, "vision": 8 * KIB}
        del x, y


def traced(zero: Zero, micro_steps: int = 1):
    """Two layers of 1024 x 1024 on 64 rows: 4 MiB a weight, 256 KiB an activation, fp32."""
    with FakeTensorMode():
        layers = [torch.nn.Linear(KIB, KIB, bias=False) for _ in range(2)]
        weights = [layer.weight for layer in layers]
        return trace_step(
            Reduction(zero, [weights]),
            micro_batch_size=64,
            micro_steps=micro_steps,
            forward=lambda _: layers[1](layers[0](torch.ones(64, KIB)).relu()).sum(),
            update=lambda: None,
        )


MIB = KIB * KIB
PLAIN = Zero(stage=0, world_size=0)


def test_a_steps_peaks_are_those_worked_out_by_hand():
    peaks = traced(PLAIN).peaks
    # input, relu's result, which takes the place of what it read, the second layer's; the sum
    assert peaks.forward == 3 * MIB // 4 + 512
    # both gradients, and what the first layer's needs: its input and its result's gradient
    assert 8 * MIB <= peaks.backward <= 8 * MIB + 3 * MIB // 4 + 1024
    assert peaks.step == 8 * MIB  # gradients, until they are dropped


def test_a_bucket_takes_the_gradients_place_at_stage_2():
    sharded = Zero(stage=2, world_size=4, bucket=3 * MIB)
    peaks = traced(sharded).peaks
    bucket, flat, owned = 12 * MIB, 8 * MIB, 4 * MIB
    assert peaks.backward == bucket + flat + owned  # all is over by then
    assert peaks.step == owned + 2 * MIB  # the fp32 gradient of a fourth of 8 MiB


def test_a_second_micro_batch_starts_with_the_first_ones_gradients():
    once, twice = (traced(PLAIN, micro_steps=n).peaks for n in (1, 2))
    assert twice.forward == once.forward + 8 * MIB
