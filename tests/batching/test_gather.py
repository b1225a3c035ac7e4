"""When weights are whole at stage 3, in sizes worked out by hand: 4 MiB each, 4 ranks.

tools/check_plan.py compares with DeepSpeed itself.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elip_ds.batching.gather import Gathering, Limits
from elip_ds.batching.trace import Tracker

KIB, MIB = 1024, 2**20
NOTHING_AHEAD = Limits(persist=0, ahead=0)


def layer(bias: bool = False, trained: bool = True) -> nn.Linear:
    return nn.Linear(KIB, KIB, bias).requires_grad_(trained)


class Run:
    """Micro-batches of one row through layers in a row.

    at_call: MiB of weights that lie there when each layer is called, in each micro-batch; in_loss:
    between forward and backward; left: after it.  peak: within all of them.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        limits: Limits,
        *,
        world: int = 4,
        times: int = 2,
        wants_gradient: bool = True,
    ):
        self.wants_gradient = wants_gradient
        self.model = nn.Sequential(*layers)
        self.gathering = Gathering(self.model, world, limits)
        self.at_call: list[list[int]] = []
        self.in_loss: list[int] = []
        self.left: list[int] = []
        self.go(times)

    def go(self, times: int) -> None:
        with Tracker() as self.tracker, self.gathering.hooked():
            handles = [
                module.register_forward_pre_hook(lambda *_: self.at_call[-1].append(self.now()))
                for module in set(self.model)
            ]
            for _ in range(times):
                self.micro_batch()
            self.peak = self.tracker.lap() // MIB
            for handle in handles:
                handle.remove()

    def now(self) -> int:
        return self.tracker.alive_bytes // MIB

    def micro_batch(self) -> None:
        self.at_call.append([])
        loss = self.model(torch.ones(1, KIB, requires_grad=self.wants_gradient)).sum()
        self.in_loss.append(self.now())
        loss.backward()
        self.gathering.end_backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.left.append(self.now())


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        yield


def test_a_weight_goes_with_its_call_until_the_order_is_known_then_stays_for_the_backward():
    run = Run([layer(), layer(), layer()], NOTHING_AHEAD)
    assert run.at_call == [[4, 4, 4], [4, 8, 12]]
    assert run.in_loss == [0, 12] and run.left == [0, 0]


def test_what_is_reused_too_late_is_gathered_again():
    far = Limits(persist=0, ahead=0, reuse=KIB * KIB)
    run = Run([layer(), layer(), layer()], far)
    # Only the last one's backward comes before so many elements of others.
    assert run.at_call[1] == [4, 4, 4] and run.in_loss[1] == 4 and run.left[1] == 0


def test_a_frozen_weight_stays_only_if_it_is_called_again():
    twice = layer(trained=False)
    run = Run([twice, layer(trained=False), twice, layer()], NOTHING_AHEAD, wants_gradient=False)
    assert run.at_call[1] == [4, 8, 4, 4] and run.in_loss[1] == 4


def test_several_weights_are_copied_out_of_one_message():
    alone, pair = Run([layer()], NOTHING_AHEAD, times=1), Run([layer(True)], NOTHING_AHEAD, times=1)
    assert pair.at_call == alone.at_call == [[4]]
    # the message beside the weight; of the backward, the gradient as well
    assert pair.peak == alone.peak == 8
    with Tracker() as tracker, pair.gathering.hooked(), torch.no_grad():
        pair.model(torch.ones(1, KIB))
        assert tracker.lap() // MIB == 8
    with Tracker() as tracker, alone.gathering.hooked(), torch.no_grad():
        alone.model(torch.ones(1, KIB))
        assert tracker.lap() // MIB == 4


def test_a_backend_that_copies_has_the_message_twice():
    run = Run([layer()], NOTHING_AHEAD)
    run.gathering = Gathering(run.model, 4, NOTHING_AHEAD, copies=True)
    with Tracker() as tracker, run.gathering.hooked(), torch.no_grad():
        run.model(torch.ones(1, KIB))
        assert tracker.lap() // MIB == 8


def test_what_comes_next_is_gathered_ahead_and_lies_there_until_all_of_it_is_used():
    ahead = Limits(persist=0, ahead=2 * KIB * KIB)
    run = Run([layer(), layer(), layer()], ahead, times=2)
    # The first two in one message, asked for by the whole. With the first call both are copied and
    # the third, which is asked for, travels by itself; with the second the message goes.
    assert run.at_call[1] == [8 + 8 + 4, 12, 12]


def test_no_more_is_gathered_ahead_than_may_be_whole():
    run = Run([layer(), layer(), layer()], Limits(persist=0, ahead=KIB**3, live=KIB * KIB))
    assert run.at_call[1] == [4, 8, 12]


def test_small_weights_are_always_whole_and_travel_never():
    small = Limits(persist=KIB * KIB, ahead=KIB**3)
    run = Run([layer(), layer(True)], small)
    assert run.at_call == [[0, 0], [0, 0]]
    assert run.gathering.persistent() == 2 * KIB * KIB + KIB


def test_one_rank_alone_has_all_and_gathers_nothing():
    run = Run([layer(), layer(True)], NOTHING_AHEAD, world=1)
    assert run.at_call == [[0, 0], [0, 0]] and run.gathering.persistent() == 0


def test_the_optimizers_step_leaves_nothing():
    run = Run([layer(), layer()], NOTHING_AHEAD)
    with Tracker() as tracker, run.gathering.hooked():
        run.model(torch.ones(1, KIB))
        assert tracker.alive_bytes // MIB == 8
        run.gathering.step()
        assert tracker.alive_bytes // MIB == 0


def test_another_order_is_learnt_anew():
    run = Run([layer(), layer(), layer()], Limits(persist=0, ahead=2 * KIB * KIB))
    run.at_call = []
    del run.model[1]
    run.go(times=3)
    assert run.at_call == [[8 + 8 + 4, 8], [4, 4], [8 + 8, 8]]
