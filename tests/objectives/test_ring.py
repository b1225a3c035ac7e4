from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.objectives.ring import Ring


def numbered(start, count):
    """Rows (count, 1) that hold their own number."""
    return torch.arange(start, start + count, dtype=torch.float32).unsqueeze(1)


def test_a_ring_of_10_holds_items_18_to_27_after_7_pushes_of_4():
    ring = Ring(10, 1, seed=0)
    for i in range(7):
        ring.push(numbered(4 * i, 4))
    assert sorted(ring.rows.flatten().tolist()) == list(range(18, 28))
    assert ring.rows[ring.at].item() == 18


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.lists(st.integers(0, 30), max_size=8))
def test_a_ring_equals_a_bounded_deque(size, pushes):
    ring = Ring(size, 1, seed=0)
    oracle = deque(ring.rows.flatten().tolist(), maxlen=size)
    pushed = 0
    for count in pushes:
        ring.push(numbered(pushed, count))
        oracle.extend(range(pushed, pushed + count))
        pushed += count
    assert ring.rows.roll(-ring.at, dims=0).flatten().tolist() == list(oracle)


def test_first_rows_have_unit_norm_and_come_from_the_seed_alone():
    a = Ring(50, 8, seed=3)
    torch.rand(7)
    b, c = Ring(50, 8, seed=3), Ring(50, 8, seed=4)
    torch.testing.assert_close(a.rows.norm(dim=1), torch.ones(50))
    assert torch.equal(a.rows, b.rows)
    assert not torch.equal(a.rows, c.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_stay_fp32_when_the_module_is_cast(dtype):
    ring = Ring(5, 4, seed=0)
    before = ring.rows.clone()
    torch.nn.Sequential(ring).to(dtype)
    assert torch.equal(ring.rows, before)


def test_rows_move_with_the_module():
    assert torch.nn.Sequential(Ring(5, 4, seed=0)).to("meta")[0].rows.device.type == "meta"


def test_rows_have_no_gradient_and_no_place_in_the_models_file():
    ring = Ring(5, 4, seed=0)
    ring.push(torch.randn(2, 4, requires_grad=True))
    assert not ring.rows.requires_grad
    assert not ring.state_dict()
