"""LAMB against a plain one in float64, and sharded in every way against itself whole."""

import copy
import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.engine.lamb import PADDING, Lamb, Layout, _pad, check_lamb
from elip_ds.errors import UserError

SHAPES = ((4, 3), (7,), (2, 3, 5), (1,), (6, 6))
BETAS, EPS = (0.9, 0.99), 1e-6


def draw(shapes, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def plain_lamb(weights, gradients_by_step, *, lr, decay, adaptive) -> list[torch.Tensor]:
    """Algorithm 2 of arXiv:1904.00962, tensor by tensor, step by step, in float64."""
    out = []
    for i, w in enumerate(weights):
        w = w.double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, gradients in enumerate(gradients_by_step, start=1):
            g = gradients[i].double()
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
            u = m_hat / (v_hat.sqrt() + EPS) + decay * w
            ratio = w.norm() / u.norm() if adaptive and w.norm() > 0 and u.norm() > 0 else 1.0
            w = w - lr * ratio * u
        out.append(w)
    return out


def lamb_of(weights, *, lr=0.1, decay=0.05, adaptive=True) -> Lamb:
    params = [w.clone().requires_grad_() for w in weights]
    group = {"params": params, "weight_decay": decay, "adaptive": adaptive}
    optimizer = Lamb([group], lr=lr, betas=BETAS, eps=EPS)
    optimizer.bind_whole()
    return optimizer


def feed(optimizer: Lamb, gradients) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("adaptive", [True, False])
def test_it_is_algorithm_2_of_the_paper(decay, adaptive):
    weights = draw(SHAPES, 0)
    gradients = [draw(SHAPES, step) for step in range(1, 8)]
    optimizer = lamb_of(weights, decay=decay, adaptive=adaptive)
    for step in gradients:
        feed(optimizer, step)
    expected = plain_lamb(weights, gradients, lr=0.1, decay=decay, adaptive=adaptive)
    for p, w in zip(optimizer.param_groups[0]["params"], expected, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_the_first_step_is_as_long_as_the_rate_times_the_weight():
    weights = draw(SHAPES, 0)
    optimizer = lamb_of(weights, lr=0.01)
    feed(optimizer, draw(SHAPES, 1))
    for p, w in zip(optimizer.param_groups[0]["params"], weights, strict=True):
        assert (p - w).norm().item() == pytest.approx(0.01 * w.norm().item(), rel=1e-4)


def test_without_a_ratio_and_decay_it_is_adam():
    weights = draw(SHAPES, 0)
    optimizer = lamb_of(weights, decay=0.0, adaptive=False)
    params = [w.clone().requires_grad_() for w in weights]
    adam = torch.optim.Adam(params, lr=0.1, betas=BETAS, eps=EPS)
    for step in range(1, 6):
        feed(optimizer, draw(SHAPES, step))
        for p, g in zip(params, draw(SHAPES, step), strict=True):
            p.grad = g
        adam.step()
    for ours, theirs in zip(optimizer.param_groups[0]["params"], params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_weight_or_an_update_of_zero_takes_ratio_one():
    zero, other = torch.zeros(3), torch.ones(3)
    optimizer = lamb_of([zero, other], decay=0.0, lr=0.5)
    feed(optimizer, [torch.ones(3), torch.zeros(3)])
    moved, stayed = optimizer.param_groups[0]["params"]
    torch.testing.assert_close(moved.detach(), torch.full((3,), -0.5))
    assert torch.equal(stayed, other)


def test_a_parameter_without_gradient_stays():
    weights = draw(SHAPES, 0)
    optimizer = lamb_of(weights)
    params = optimizer.param_groups[0]["params"]
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], weights[0])
    assert all(torch.equal(p, w) for p, w in zip(params[1:], weights[1:], strict=True))


def test_a_step_before_it_is_bound_moves_nothing():
    weights = draw(SHAPES, 0)
    params = [w.clone().requires_grad_() for w in weights]
    optimizer = Lamb([{"params": params}], lr=0.1, weight_decay=0.1)
    feed(optimizer, [torch.zeros_like(w) for w in weights])
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    assert all(optimizer.state[p]["step"] == 0 for p in params)


def test_a_saved_state_goes_on_bit_for_bit():
    whole, first = lamb_of(draw(SHAPES, 0)), lamb_of(draw(SHAPES, 0))
    for step in range(1, 4):
        feed(whole, draw(SHAPES, step))
        feed(first, draw(SHAPES, step))
    second = lamb_of([p.detach() for p in first.param_groups[0]["params"]])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(4, 7):
        feed(whole, draw(SHAPES, step))
        feed(second, draw(SHAPES, step))
    pairs = zip(whole.param_groups[0]["params"], second.param_groups[0]["params"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Ranks:
    """As many threads as ranks, with a sum over them that waits for all, as an all-reduce does."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=20)
        self._parts: list = [None] * count

    def total(self, rank: int):
        def sum_up(x: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = x.clone()
            self._barrier.wait()
            result = torch.stack(self._parts).sum(0)
            self._barrier.wait()
            return result

        return sum_up

    def run(self, work) -> None:
        errors = []

        def guarded(rank: int) -> None:
            try:
                work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [
            threading.Thread(target=guarded, args=(rank,)) for rank in range(len(self._parts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def shard(tensors, cuts: list[int], padding: int) -> list[tuple[torch.Tensor, Layout]]:
    """The tensors end to end, cut into flat shards; each with garbage after it."""
    flat = torch.cat([x.flatten() for x in tensors])
    ends = [0, *sorted(cut % (flat.numel() + 1) for cut in cuts), flat.numel()]
    shards = []
    for low, high in itertools.pairwise(ends):
        spans, at = [], 0
        for owner, x in enumerate(tensors):
            begin, end = max(low, at), min(high, at + x.numel())
            if begin < end:
                spans.append((begin - low, end - begin, owner))
            at += x.numel()
        garbage = torch.full((padding,), float("nan"))
        numel = high - low + padding
        shards.append((torch.cat([flat[low:high], garbage]), _pad(spans, numel, len(tensors))))
    return shards


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    cuts=st.lists(st.integers(0, 180), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_any_split_into_flat_shards_steps_as_the_whole(shapes, cuts, padding, seed):
    """Two groups of the same tensors, one with ratios: 3 steps on 2 to 4 ranks."""
    shapes = [(n,) for n in shapes]
    weights = [draw(shapes, seed), draw(shapes, seed + 1)]
    steps = [[draw(shapes, seed + 2 * t), draw(shapes, seed + 2 * t + 1)] for t in (1, 2, 3)]

    def groups(params):
        return [
            {"params": params[0], "weight_decay": 0.1, "adaptive": True},
            {"params": params[1], "weight_decay": 0.0, "adaptive": False},
        ]

    whole = Lamb(groups([[w.clone() for w in part] for part in weights]), lr=0.1, eps=EPS)
    whole.bind_whole()
    for step in steps:
        feed(whole, [g for part in step for g in part])

    ranks = Ranks(len(cuts) + 1)
    shards = [shard(part, cuts, padding) for part in weights]
    gradients = [[shard(part, cuts, padding) for part in step] for step in steps]
    results: list = [None] * (len(cuts) + 1)

    def work(rank: int) -> None:
        mine = [part[rank] for part in shards]
        optimizer = Lamb(groups([[flat] for flat, _ in mine]), lr=0.1, eps=EPS)
        optimizer.bind(dict(mine), ranks.total(rank))
        for step in gradients:
            feed(optimizer, [part[rank][0] for part in step])
        results[rank] = [layout.cut(flat) for flat, layout in mine]

    ranks.run(work)
    for i in (0, 1):
        flat = torch.cat([piece for result in results for piece in result[i]])
        expected = torch.cat([w.flatten() for w in whole.param_groups[i]["params"]])
        torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-6)


def test_norms_of_flat_tensors_would_have_been_another_answer():
    """What the layouts are for."""
    weights = [torch.full((4,), 10.0), torch.full((4,), 0.1)]
    right = lamb_of(weights)
    feed(right, draw([(4,), (4,)], 1))
    flat = lamb_of([torch.cat(weights)])
    feed(flat, [torch.cat(draw([(4,), (4,)], 1))])
    both = torch.cat(list(right.param_groups[0]["params"]))
    assert (flat.param_groups[0]["params"][0] - both).abs().max() > 0.1


def test_a_layout_names_its_padding():
    layout = _pad([(6, 2, 1), (0, 4, 0)], 9, 3)
    assert layout == Layout((4, 2, 2, 1), (0, PADDING, 1, PADDING), 3)
    pieces = layout.cut(torch.arange(9))
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [6, 7]]
    assert Layout((5,), (PADDING,), 2).cut(torch.arange(5)) == []


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device='nvme'"),
        ({"offload_param": {"device": "nvme"}}, "offload_param.device='nvme'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio=0.5"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zero_optimization.zenflow"),
        ({"mics_shard_size": 4}, "mics_shard_size=4"),
    ],
)
def test_what_would_not_be_lamb_is_refused(zero, says):
    with pytest.raises(UserError, match=r"optim\.name=lamb.*ZeRO 0 to 3") as caught:
        check_lamb({"zero_optimization": {"stage": 2} | zero})
    assert says in str(caught.value)


def test_autocast_that_skips_steps_by_rank_is_refused():
    tree = {"zero_optimization": {}, "torch_autocast": {"enabled": True, "dtype": "float16"}}
    with pytest.raises(UserError, match=r"torch_autocast.*engine\.precision"):
        check_lamb(tree)


@pytest.mark.parametrize(
    "zero",
    [{}, {"offload_optimizer": {"device": "cpu"}}, {"offload_optimizer": {"device": "none"}}],
)
def test_what_is_lamb_passes_the_door(zero):
    check_lamb({"zero_optimization": zero, "torch_autocast": {"enabled": False}})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu_does_not_wait_for_it():
    weights = [w.cuda() for w in draw(SHAPES, 0)]
    optimizer = lamb_of(weights)
    feed(optimizer, [w.cuda() for w in draw(SHAPES, 1)])  # the first makes states and indices
    params = optimizer.param_groups[0]["params"]
    for p, g in zip(params, draw(SHAPES, 2), strict=True):
        p.grad = g.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
