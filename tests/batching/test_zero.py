"""What ZeRO holds, in numbers worked out by hand; tools/check_plan.py compares with DeepSpeed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elip_ds.batching.gather import Limits
from elip_ds.batching.zero import Weights, Zero, most_owned, read_zero, shard, states

WEIGHTS = Weights([[600, 400], [10]], [600, 400, 10], other_bytes=77, twin=True)
HALF = {"dtype": torch.bfloat16, "accumulate": torch.bfloat16}


@pytest.mark.parametrize(
    ("zero", "device"),
    [
        (Zero(0, 4), {"parameters": 4040, "teacher": 4040, "optimizer": 8080}),
        (
            Zero(0, 4, **HALF),
            {"parameters": 2020, "teacher": 2020, "teacher's averages": 4040, "optimizer": 12120},
        ),
        # 250 and, filled up, 4 elements on a rank
        (Zero(1, 4), {"parameters": 4040, "teacher": 4040, "optimizer": 12 * 254}),
        (
            Zero(2, 4, **HALF),
            {
                "parameters": 2020,
                "teacher": 2020,
                "teacher's averages": 4040,
                "optimizer": 12 * 254,
            },
        ),
        # 150 + 100 + 3 elements of a rank, and the smallest parameter whole
        (
            Zero(3, 4, bucket=1000, gather=Limits(persist=10), **HALF),
            {
                "parameters": 2 * 263,
                "teacher": 2 * 263,
                "teacher's averages": 4 * 253,
                "optimizer": 12 * 253,
                "gradients": 2 * 253,
                "buckets": 2000,
            },
        ),
    ],
)
def test_states_are_those_worked_out_by_hand(zero, device):
    assert states(WEIGHTS, zero) == (device | {"queues and buffers": 77}, {})


def test_offloading_moves_the_optimizer_to_the_host():
    device, host = states(WEIGHTS, Zero(2, 4, offload=True, **HALF))
    assert "optimizer" not in device and device["offload buffer"] == 1200
    assert host == {"optimizer": (12 + 4 + 2) * 254 + 1200}


def test_a_twin_has_no_averages_of_its_own_in_fp32():
    assert "teacher's averages" not in states(WEIGHTS, Zero(2, 4))[0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 9))
def test_a_rank_owns_a_gradient_whole_of_which_it_has_a_piece(group, ranks):
    length, owned = shard(group, ranks), []
    for rank in range(ranks):
        mine = range(rank * length, (rank + 1) * length)
        starts = [sum(group[:i]) for i in range(len(group))]
        touched = [
            n for n, at in zip(group, starts, strict=True) if set(range(at, at + n)) & set(mine)
        ]
        owned.append(sum(touched))
    assert most_owned(group, ranks) == max(owned)


def test_a_deepspeed_configuration_is_read_with_its_defaults():
    assert read_zero({"zero_optimization": {"stage": 3}}, 8, torch.bfloat16) == Zero(
        3, 8, torch.bfloat16, torch.bfloat16, overlap=True
    )
    limits = {"stage3_max_live_parameters": 7, "stage3_max_reuse_distance": 1e9}
    limits |= {"stage3_prefetch_bucket_size": 9, "stage3_param_persistence_threshold": 0}
    tree = {"zero_optimization": {"stage": 3, **limits}}
    assert read_zero(tree, 2, torch.float32).gather == Limits(0, 9, 7, 10**9)
    tree = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 5e7,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu"},
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    zero = read_zero(tree, 2, torch.bfloat16)
    assert (zero.bucket, zero.overlap, zero.offload) == (50_000_000, False, True)
    assert zero.accumulate == torch.float32
