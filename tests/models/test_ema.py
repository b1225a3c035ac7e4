import copy

import pytest
import torch
from conftest import tiny_task
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


class Thrifty(nn.Module):
    """A twin needs no head, and of the body not the extra layer."""

    twin_without = ("head", "extra")
    whole = True

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 7)
        self.body = nn.Sequential(nn.Linear(3, 3))
        self.body.extra = nn.Linear(3, 5)
        self.tail = nn.Linear(3, 2)

    def only_joint_space(self):
        self.whole = False


def test_a_twin_lacks_what_its_model_says_it_can_do_without():
    student = Thrifty()
    twin = MomentumTwin(student).model
    assert [n for n, _ in twin.named_parameters()] == [
        "body.0.weight", "body.0.bias", "tail.weight", "tail.bias"
    ]  # fmt: skip
    assert len(list(student.parameters())) == 8
    assert student.whole and not twin.whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_twin_that_lacks_parts_follows_its_student_by_name(dtype):
    student = Thrifty().to(dtype)
    twin = MomentumTwin(student)
    for i, parameter in enumerate(student.parameters()):
        nn.init.constant_(parameter, float(i))
    for parameter in twin.model.parameters():
        nn.init.constant_(parameter, 10.0)
    twin.update(student, 0.5, whole)
    values = {n: {v.item() for v in p.flatten()} for n, p in twin.model.named_parameters()}
    number = {name: i for i, (name, _) in enumerate(student.named_parameters())}
    assert values == {name: {5 + number[name] / 2} for name in values}


def test_the_twin_of_blip_saves_half_of_its_text_tower():
    student = tiny_task(model="blip").model
    kept = sum(p.numel() for p in MomentumTwin(student).model.parameters())
    width, depth, words = 32, 2, 64
    attention = 4 * (width * width + width) + 2 * width  # with its norm
    head = width * width + width + 2 * width + words
    whole_model = sum(p.numel() for p in student.parameters())
    assert whole_model - kept == 2 * depth * attention + head == 18336
    assert 4 * kept == 4 * (whole_model - 18336)  # bytes in fp32


def test_the_twin_of_albef_is_all_of_it():
    student = tiny_task().model
    names = [n for n, _ in student.named_parameters()]
    assert [n for n, _ in MomentumTwin(student).model.named_parameters()] == names


def test_the_distance_is_that_of_all_weights_together():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    twin = MomentumTwin(student)
    assert twin.distance(student, lambda p: p.data)[0] == 0
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.5)
    apart, length = twin.distance(student, lambda p: p.data).tolist()
    count = sum(p.numel() for p in student.parameters())
    assert apart == pytest.approx(0.25 * count, rel=1e-5)
    assert length == pytest.approx(
        sum((p.detach() ** 2).sum().item() for p in student.parameters()), rel=1e-5
    )
