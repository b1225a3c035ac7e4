import copy

import pytest
import torch
from torch import nn

from elip_ds.models import MomentumTwin


def whole(parameter):
    return parameter.data


def linear(value):
    module = nn.Linear(3, 2)
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


def test_a_twin_starts_equal_and_frozen():
    student = nn.Linear(3, 2)
    twin = MomentumTwin(student)
    for mine, theirs in zip(twin.model.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
        assert not mine.requires_grad and theirs.requires_grad


def test_towards_a_constant_student_the_distance_shrinks_as_a_power_of_the_momentum():
    twin, student = MomentumTwin(linear(1.0)), linear(0.0)
    for _ in range(1000):
        twin.update(student, 0.995, whole)
    for parameter in twin.model.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.995**1000))


@pytest.mark.parametrize(("momentum", "expected"), [(1.0, 1.0), (0.0, 5.0), (0.75, 2.0)])
def test_one_update_mixes_by_the_momentum(momentum, expected):
    twin = MomentumTwin(linear(1.0))
    twin.update(linear(5.0), momentum, whole)
    assert {v for p in twin.model.parameters() for v in p.flatten().tolist()} == {expected}


def test_the_student_stays_as_it_is():
    student = nn.Linear(3, 2)
    before = copy.deepcopy(student.state_dict())
    twin = MomentumTwin(linear(1.0))
    twin.update(student, 0.9, whole)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_a_bf16_average_would_stand_still():
    average, student = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1.25)
    for _ in range(100):
        average.lerp_(student.bfloat16(), 0.005)
    assert average.item() == 1.0


def test_a_twin_in_bf16_moves_because_its_averages_are_fp32():
    twin = MomentumTwin(linear(1.0).bfloat16())
    student = linear(1.25).bfloat16()
    for _ in range(100):
        twin.update(student, 0.995, whole)
    expected = 1.25 - 0.25 * 0.995**100
    for master, parameter in zip(twin.masters(whole), twin.model.parameters(), strict=True):
        assert master.dtype == torch.float32 and parameter.dtype == torch.bfloat16
        torch.testing.assert_close(master, torch.full_like(master, expected))
        assert torch.equal(parameter, master.bfloat16())


def test_writing_back_rounds_masters_that_a_checkpoint_filled():
    twin = MomentumTwin(linear(1.0).bfloat16())
    for master in twin.masters(whole):
        master.fill_(1 / 3)
    twin.write_back(whole)
    third = torch.tensor(1 / 3).bfloat16()
    assert all((parameter == third).all() for parameter in twin.model.parameters())


def test_fp32_averages_are_the_copy_that_computes():
    twin = MomentumTwin(linear(1.0))
    for master in twin.masters(whole):
        master.fill_(7.0)
    assert all((parameter == 7.0).all() for parameter in twin.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_touches_only_what_this_rank_holds(dtype):
    def first_shard(parameter):
        return parameter.data.view(-1)[: parameter.numel() // 2]

    twin = MomentumTwin(linear(1.0).to(dtype))
    twin.update(linear(5.0).to(dtype), 0.5, first_shard)
    for parameter in twin.model.parameters():
        half = parameter.numel() // 2
        assert parameter.flatten().tolist() == [3.0] * half + [1.0] * (parameter.numel() - half)
