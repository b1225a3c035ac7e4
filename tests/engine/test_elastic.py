"""Optimizer states cut for some ranks, and put together for others."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elip_ds.engine.elastic import (
    AVERAGES,
    MASTER,
    Part,
    Saved,
    check_saved,
    differences,
    put_saved,
    read_saved,
    set_scaler,
)
from elip_ds.engine.places import sliced
from elip_ds.errors import UserError

KEYS = (MASTER, *AVERAGES)
SHAPES = st.lists(st.sampled_from([(1,), (5,), (2, 3), (4, 1, 3), (7, 7)]), min_size=1, max_size=6)
RANKS = st.integers(1, 5)


def draw(shapes, seed=0) -> dict[str, dict[str, torch.Tensor]]:
    """key -> name -> values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: {f"p{i}": torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)}
        for key in KEYS
    }


def cut_in_slices(values, ranks: int) -> list[torch.Tensor]:
    """As ZeRO 1 and 2 do: all end to end, in equal slices, the last one padded."""
    flat = torch.cat([x.flatten() for x in values.values()])
    flat = torch.cat([flat, torch.full((-len(flat) % ranks,), torch.nan)])
    return list(flat.chunk(ranks))


def cut_in_shards(values, ranks: int) -> list[torch.Tensor]:
    """As ZeRO 3 does: each by itself."""
    pieces = [cut_in_slices({"p": x}, ranks) for x in values.values()]
    return [torch.cat([piece[rank] for piece in pieces]) for rank in range(ranks)]


def part_of(tree, ranks: int, *, sharded: bool) -> Part:
    cut = cut_in_shards if sharded else cut_in_slices
    pieces = {key: cut(values, ranks) for key, values in tree.items()}
    shapes = {name: tuple(x.shape) for name, x in tree[MASTER].items()}
    states = [{key: pieces[key][rank] for key in tree} for rank in range(ranks)]
    return Part(shapes, states, sharded)


class Task(nn.Module):
    def __init__(self, values) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(value)))


@given(SHAPES, RANKS, st.booleans())
@settings(deadline=None)
def test_what_ranks_hold_is_put_together_exactly(shapes, ranks, sharded):
    tree = draw(shapes)
    part = part_of(tree, ranks, sharded=sharded)
    for key, values in tree.items():
        for name, value in values.items():
            assert torch.equal(part.whole(name, key), value.flatten())


@given(SHAPES, RANKS, RANKS, st.booleans())
@settings(deadline=None)
def test_states_of_any_ranks_become_those_of_any_others(shapes, before, after, sharded):
    tree = draw(shapes)
    saved = Saved([part_of(tree, before, sharded=sharded)], 7, {})
    expected = {key: cut_in_slices(values, after) for key, values in tree.items()}
    for rank in range(after):
        task = Task(tree[MASTER])
        flat = torch.zeros_like(expected[MASTER][rank])
        optimizer = torch.optim.AdamW([flat])
        params = list(task.parameters())
        ends = [sum(p.numel() for p in params[:i]) for i in range(len(params))]
        place = sliced(flat, params, ends, first=rank * len(flat))
        put_saved(saved, [place], optimizer, task)
        held = {MASTER: flat} | {key: optimizer.state[flat][key] for key in AVERAGES}
        assert optimizer.state[flat]["step"] == 7
        for key, pieces in expected.items():
            assert torch.equal(held[key], pieces[rank].nan_to_num(0.0))  # padding stays 0
        for name, p in task.named_parameters():
            assert torch.equal(p, tree[MASTER][name])


@pytest.mark.parametrize("sharded", [False, True])
def test_the_step_that_follows_is_the_one_that_would_have_followed(sharded):
    """AdamW on whole tensors, two steps; and on slices, with the first step's states."""
    tree = draw([(3, 4), (5,)])
    whole = [nn.Parameter(x.clone()) for x in tree[MASTER].values()]
    optimizer = torch.optim.AdamW(whole, lr=0.1)
    gradients = [[torch.rand_like(p) for p in whole] for _ in range(2)]

    def step(optimizer, params, grads):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()

    step(optimizer, whole, gradients[0])
    names = list(tree[MASTER])
    tree = {MASTER: {n: p.detach().clone() for n, p in zip(names, whole, strict=True)}} | {
        key: {n: optimizer.state[p][key].clone() for n, p in zip(names, whole, strict=True)}
        for key in AVERAGES
    }
    saved = Saved([part_of(tree, 3, sharded=sharded)], 1, {})
    step(optimizer, whole, gradients[1])

    task = Task(tree[MASTER])
    flat = nn.Parameter(torch.zeros(17))
    resumed = torch.optim.AdamW([flat], lr=0.1)
    place = sliced(flat, list(task.parameters()), [0, 12], first=0)
    put_saved(saved, [place], resumed, task)
    step(resumed, [flat], [torch.cat([x.flatten() for x in gradients[1]])])
    assert torch.equal(flat, torch.cat([p.flatten() for p in whole]))


def test_parts_that_are_too_short_are_no_part():
    tree = draw([(4,), (5,)])
    held = [{key: cut_in_slices(values, 2)[0] for key, values in tree.items()}]
    with pytest.raises(ValueError, match="of 9"):
        Part({"p0": (4,), "p1": (5,)}, held)


# Files as DeepSpeed 0.19 writes them at stage 2; real ones are read in tests/end_to_end.


@pytest.fixture
def folder(tmp_path):
    """Of two ranks, after 3 steps."""
    tree = draw([(4,), (5,)])
    part = part_of(tree, 2, sharded=False)
    for rank, held in enumerate(part.ranks):
        averages = {key: held[key] for key in AVERAGES}
        write_rank(tmp_path, rank, held[MASTER], {"step": torch.tensor(3.0), **averages})
    shapes = {name: torch.Size(shape) for name, shape in part.shapes.items()}
    torch.save({"param_shapes": [shapes]}, tmp_path / "mp_rank_00_model_states.pt")
    return tmp_path


def write_rank(folder, rank, master, state, **more) -> None:
    base = {"state": {0: state}, "param_groups": [{"params": [0], "lr": 0.1}]}
    tree = {"base_optimizer_state": base, "single_partition_of_fp32_groups": [master], **more}
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": tree}, folder / name)


META = {"zero_stage": 2, "world_size": 2}


def read(folder) -> Saved:
    return read_saved(folder, META, nn.Module())


def test_states_are_read_by_name(folder):
    saved, tree = read(folder), draw([(4,), (5,)])
    assert saved.step == 3 and saved.names == {"p0", "p1"}
    for key in KEYS:
        assert torch.equal(saved.whole("p1", key), tree[key]["p1"])
    check_saved(saved, {**tree[MASTER], "teacher.p0": torch.ones(4)}, (0, 1))


def test_a_missing_rank_is_named(folder):
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"zero_pp_rank_1_\*_optim_states.pt is missing"):
        read(folder)


@pytest.mark.parametrize("size", [0, 100, -50])
def test_a_cut_file_is_one_line(folder, size):
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="cannot go on in another form") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(folder):
    sign = folder / "run"
    write_rank(folder, 0, torch.zeros(5), {"step": Payload(str(sign))})
    with pytest.raises(UserError, match="Weights only load failed"):
        read(folder)
    assert not sign.exists()


def test_ranks_that_differ_in_their_steps_are_refused(folder):
    averages = {key: torch.zeros(5) for key in AVERAGES}
    write_rank(folder, 1, torch.zeros(5), {"step": torch.tensor(4.0), **averages})
    with pytest.raises(UserError, match=r"updates they had: \[3, 4\]"):
        read(folder)


def test_other_weights_than_the_checkpoints_own_are_found_out(folder):
    weights = draw([(4,), (5,)])[MASTER]
    weights["p1"][2] += 0.5
    check_saved(read(folder), weights, (0, 2))  # the other rank's share has it
    with pytest.raises(UserError, match="other values of p1"):
        check_saved(read(folder), weights, (1, 2))
    with pytest.raises(UserError, match="differ in p2"):
        check_saved(read(folder), weights | {"p2": torch.ones(1)}, (0, 1))


def test_the_loss_scale_goes_on(folder):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = {"scale_window": 1000, "min_scale": 1, "delayed_shift": 2}
    scaler |= {"consecutive_hysteresis": False}
    before, after = DynamicLossScaler(2.0**16, **scaler), DynamicLossScaler(2.0**20, **scaler)
    before.cur_scale, before.cur_iter = 2.0**15, 9
    before.last_overflow_iter, before.cur_hysteresis = 5, 1
    states = {key: torch.zeros(5) for key in AVERAGES} | {"step": 3}
    write_rank(folder, 0, torch.zeros(5), states, loss_scaler=before)

    class Wrapped:
        loss_scaler = after

    set_scaler(read(folder), Wrapped)
    assert vars(after) == vars(before)


def test_differences_are_told_with_both_sides():
    here = {"world_size": 3, "zero_stage": 2}
    assert differences(META | {"precision": "fp32"}, here) == ["world_size 2 -> 3"]
