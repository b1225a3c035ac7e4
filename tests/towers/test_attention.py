"""Attention with dropout, written out, against plain operations that draw the same mask.

B batch, H heads, N queries, M keys, d width of a head.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from storages import Storages

from elip_ds.towers.attention import attend

B, H, N, M, SIZE = 3, 2, 5, 7, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(dtype=torch.float32, keys=M):
    """q, k, v with gradients."""
    shapes = ((B, H, N, SIZE), (B, H, keys, SIZE), (B, H, keys, SIZE))
    return [(2 * draw(*s, seed=i)).to(dtype).requires_grad_() for i, s in enumerate(shapes)]


def plain(q, k, v, mask=None, *, dropout, causal=False):
    """Softmax, mask, matrix product: each an operation of torch's own with its own derivative."""
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    kept = torch.rand(weights.shape) >= dropout
    return (weights * kept / (1 - dropout)).to(v.dtype) @ v


def results(way, dtype=torch.float32, keys=M, **options):
    """Output and gradients of q, k and v, with random numbers of one seed."""
    inputs = make_inputs(dtype, keys)
    torch.manual_seed(3)
    out = way(*inputs, **options)
    (out * draw(*out.shape, seed=4).to(dtype)).sum().backward()
    return [out, *(x.grad for x in inputs)]


LENGTHS = torch.tensor([[7], [4], [1]])
MASKS = {
    "none": None,
    "of keys": (torch.arange(M) < LENGTHS)[:, None, None, :],
    "of keys for each query": (draw(B, 1, N, M, seed=9) > 0)
    | (torch.arange(M) == 2),  # at least one
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_values_and_gradients_are_those_of_plain_operations(mask, dropout):
    options = {"mask": mask, "dropout": dropout}
    for mine, theirs in zip(results(attend, **options), results(plain, **options), strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [N, N + 3])
def test_a_causal_query_reads_what_is_not_after_it(keys):
    options = {"keys": keys, "dropout": 0.3, "causal": True}
    for mine, theirs in zip(results(attend, **options), results(plain, **options), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    out = results(attend, **options)
    inputs = make_inputs(keys=keys)
    with torch.no_grad():
        for x in inputs[1:]:
            x[:, :, 2:] += 5
    torch.manual_seed(3)
    changed = attend(*inputs, dropout=0.3, causal=True)
    assert torch.equal(changed[:, :, :2], out[0][:, :, :2])
    assert not torch.equal(changed[:, :, 2:], out[0][:, :, 2:])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_in_bf16_it_is_as_near_to_fp32_as_plain_operations_are(mask):
    options = {"mask": mask, "dropout": 0.25}
    exact, mine, theirs = (
        results(*way, **options)
        for way in ((plain, torch.float32), (attend, torch.bfloat16), (plain, torch.bfloat16))
    )
    for precise, x, y in zip(exact, mine, theirs, strict=True):
        assert x.dtype == torch.bfloat16
        error, usual = ((part.float() - precise).norm().item() for part in (x, y))
        assert error < 1.5 * usual and usual < 0.02 * precise.norm()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_finite_differences_agree_with_the_written_out_derivative(mask):
    def fixed(q, k, v):
        torch.manual_seed(3)
        return attend(q, k, v, mask, dropout=0.4)

    if mask is not None:
        mask = mask[1:2]
    # The weights are fp32 whatever the inputs are, so the differences cannot be smaller.
    inputs = [x[1:2, :1].double().detach().requires_grad_() for x in make_inputs()]
    assert torch.autograd.gradcheck(fixed, inputs, eps=1e-3, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"mask": MASKS["of keys"]}, {"causal": True}])
def test_without_dropout_it_is_the_fused_one(options):
    fused = {"attn_mask": options.get("mask"), "is_causal": options.get("causal", False)}
    mine = results(lambda *x: attend(*x, **options))
    theirs = results(lambda *x: F.scaled_dot_product_attention(*x, **fused))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert "ScaledDotProduct" in type(mine[0].grad_fn).__name__
    before = torch.get_rng_state()
    attend(*make_inputs(), **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_dropout_is_nearly_the_fused_one():
    """Which also holds the scale and the softmax of the written-out one to torch's."""
    for mine, theirs in zip(
        results(attend, dropout=1e-7), results(F.scaled_dot_product_attention), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def dropped_weights(dropout, size=64, mask=None):
    """The attention weights themselves, (B, H, N, M): the values are the unit matrix."""
    q, k = (draw(B, H, size, SIZE, seed=i) for i in (0, 1))
    return q, k, attend(q, k, torch.eye(size).expand(B, H, -1, -1), mask, dropout=dropout)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.8])
def test_the_expected_share_of_the_weights_is_dropped_and_the_others_grow(dropout):
    torch.manual_seed(0)
    q, k, weights = dropped_weights(dropout)
    zero = weights == 0
    spread = math.sqrt(dropout * (1 - dropout) / zero.numel())
    assert abs(zero.float().mean().item() - dropout) < 5 * spread
    whole = (q @ k.mT / math.sqrt(SIZE)).softmax(dim=-1) / (1 - dropout)
    torch.testing.assert_close(weights, whole.masked_fill(zero, 0))


def test_every_head_row_and_call_draws_a_mask_of_its_own():
    torch.manual_seed(0)
    masks = [dropped_weights(0.5)[2] == 0 for _ in range(2)]
    rows = torch.cat([mask.flatten(0, 2) for mask in masks])
    assert len(rows.unique(dim=0)) == len(rows) == 2 * B * H * 64


def test_on_average_nothing_is_lost():
    torch.manual_seed(0)
    q, k, v = (x.detach() for x in make_inputs())
    mean = torch.stack([attend(q, k, v, dropout=0.3) for _ in range(4000)]).mean(dim=0)
    whole = F.scaled_dot_product_attention(q, k, v)
    assert (mean - whole).abs().max() < 0.1 and (mean - whole).abs().mean() < 0.02


def test_it_keeps_its_inputs_and_one_byte_a_weight():
    inputs = make_inputs()
    with Storages() as storages:
        loss = attend(*inputs, MASKS["of keys"], dropout=0.3).sum()
    kept = [(m.shape, m.dtype) for m in storages.alive() if m.shape != ()]
    assert kept == [((B, H, N, M), torch.bool)]
    loss.backward()


def test_merging_its_heads_copies_nothing():
    out = attend(*make_inputs(), dropout=0.3)
    assert out.shape == (B, H, N, SIZE) and out.transpose(1, 2).is_contiguous()


def test_inputs_that_want_no_gradient_are_no_matter():
    q, k, v = make_inputs()
    torch.manual_seed(3)
    attend(q, k.detach(), v.detach(), dropout=0.3).sum().backward()
    same = make_inputs()
    torch.manual_seed(3)
    plain(*same, dropout=0.3).sum().backward()
    torch.testing.assert_close(q.grad, same[0].grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not attend(q, k, v, dropout=0.3).requires_grad
