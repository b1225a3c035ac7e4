"""The shared blocks against attention written out: softmax over scores, head by head."""

import math

import pytest
import torch
import torch.nn.functional as F
from storages import Storages

from elip_ds.towers.layers import (
    MLP,
    CrossAttention,
    Dropout,
    FusedQKV,
    PreNormBlock,
    Readers,
    SelfAttention,
    init_linear_and_norm,
    merge_heads,
    split_heads,
)
from elip_ds.towers.recompute import keeping

HEADS, WIDTH = 4, 32


def uneven(module):
    """Weights large enough that attention is far from uniform, and biases that are not zero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def eager_attention(q, k, v, mask=None):
    """q (B, N, D), k, v (B, M, D), mask (B, M) -> output (B, N, D), weights (B, H, N, M)."""
    outputs, weights = [], []
    for h in range(HEADS):
        part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(WIDTH // HEADS)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -math.inf)
        weights.append(scores.softmax(dim=-1))
        outputs.append(weights[-1] @ v[..., part])
    return torch.cat(outputs, dim=-1), torch.stack(weights, dim=1)


@pytest.fixture
def x():
    return torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    return torch.arange(9) < torch.tensor([[9], [5], [1]])


@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_equals_the_written_out_one(x, mask, masked):
    attn = uneven(SelfAttention(WIDTH, HEADS))
    seen = mask if masked else None
    out, _ = eager_attention(*attn.qkv(x), seen)
    visible = mask[:, None, None, :] if masked else None
    torch.testing.assert_close(attn(x, visible), attn.proj(out), atol=1e-5, rtol=1e-5)


def test_a_masked_token_gets_no_attention_and_no_gradient(x, mask):
    attn = uneven(SelfAttention(WIDTH, HEADS))
    x = x.requires_grad_()
    attn(x, mask[:, None, None, :])[:, 0].sum().backward()  # what the class token collects
    assert (x.grad.abs().sum(dim=-1) > 0).equal(mask)


def test_class_attention_is_row_zero_of_the_head_mean(x):
    attn = uneven(SelfAttention(WIDTH, HEADS, dropout=0.5))
    _, weights = eager_attention(*attn.qkv(x))
    row = attn.class_attention(x)
    assert row.shape == (3, 9)
    torch.testing.assert_close(row, weights.mean(dim=1)[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(row.sum(dim=1), torch.ones(3))
    assert torch.equal(row, attn.eval().class_attention(x))  # taken before dropout


def test_class_attention_of_a_half_precision_block_is_fp32(x):
    attn = uneven(SelfAttention(WIDTH, HEADS))
    row = attn.bfloat16().class_attention(x.bfloat16())
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.sum(dim=1), torch.ones(3))


def test_class_attention_of_a_block_looks_behind_its_first_norm(x):
    block = uneven(PreNormBlock(WIDTH, HEADS, 64, eps=1e-6))
    expected = block.attn.class_attention(block.norm1(x))
    assert torch.equal(block.class_attention(x), expected)
    assert not torch.equal(block.class_attention(x), block.attn.class_attention(x))


@pytest.mark.parametrize("bias", [True, False])
def test_the_class_row_of_fused_qkv_is_a_part_of_the_whole(x, bias):
    qkv = uneven(FusedQKV(WIDTH, bias=bias))
    whole = F.linear(x, qkv.weight, qkv.bias).chunk(3, dim=-1)
    for part, mine in zip(whole, qkv(x), strict=True):
        assert torch.equal(mine, part)
    q, k, v = whole
    for asked, wanted in (
        (qkv(x, x[:, :1]), (q[:, :1], k, v)),
        (qkv(x, x[:, :1], values=False), (q[:, :1], k)),
    ):
        assert len(asked) == len(wanted)
        for mine, part in zip(asked, wanted, strict=True):
            torch.testing.assert_close(mine, part)


def test_cross_attention_equals_the_written_out_one(x):
    cross = uneven(CrossAttention(WIDTH, 20, HEADS))
    context = torch.randn(3, 6, 20)
    k, v = cross.key_value(context).chunk(2, dim=-1)
    out, _ = eager_attention(cross.query(x), k, v)
    read = cross(x, cross.key_value(context))
    torch.testing.assert_close(read, cross.proj(out), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_dropout_acts_in_training_only(x, kind):
    if kind == "self":
        attn, arguments = uneven(SelfAttention(WIDTH, HEADS, dropout=0.5)), (x,)
    else:
        attn = uneven(CrossAttention(WIDTH, WIDTH, HEADS, dropout=0.5))
        arguments = (x, attn.key_value(x))
    assert not torch.equal(attn(*arguments), attn(*arguments))
    attn.eval()
    assert torch.equal(attn(*arguments), attn(*arguments))


def test_heads_split_and_merge_back(x):
    heads = split_heads(x, HEADS)
    assert heads.shape == (3, HEADS, 9, WIDTH // HEADS)
    assert torch.equal(heads[:, 1], x[..., 8:16])
    assert torch.equal(merge_heads(heads), x)


def test_the_vit_block_is_pre_norm_and_its_mlp_uses_the_exact_gelu(x):
    block = uneven(PreNormBlock(WIDTH, HEADS, 64, eps=1e-6))
    y = x + block.attn(block.norm1(x))
    hidden = block.mlp.fc1(block.norm2(y))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(block(x), y + block.mlp.fc2(hidden), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("truncated", [True, False])
def test_init_draws_weights_and_clears_biases(truncated):
    module = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.LayerNorm(100), MLP(100, 50))
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 9.0)
    torch.manual_seed(0)
    init_linear_and_norm(module, std=0.02, truncated=truncated)
    linear, norm, mlp = module
    for part in (linear, mlp.fc1, mlp.fc2):
        assert part.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert part.weight.mean().item() == pytest.approx(0.0, abs=1e-3)
        assert not part.bias.any()
    assert (norm.weight == 1).all() and not norm.bias.any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_what_stays_and_its_gradient(p):
    torch.manual_seed(0)
    x = torch.ones(200, 300).requires_grad_()
    out = Dropout(p)(x)
    zero = out == 0
    assert abs(zero.float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
    stays = 1 - round(p * 65536) / 65536
    torch.testing.assert_close(out, torch.where(zero, 0.0, 1 / stays))
    out.sum().backward()
    assert torch.equal(x.grad, out)
    assert not torch.equal(Dropout(p)(x), out)


def test_dropout_passes_on_what_it_gets_where_there_is_nothing_to_drop(x):
    assert Dropout(0.0)(x) is x and Dropout(0.5).eval()(x) is x
    assert not Dropout(1.0)(x).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_one_byte_an_element(x, dtype):
    x = x.to(dtype).requires_grad_()
    with Storages() as storages:
        out = Dropout(0.3)(x)
        loss = out.sum()
        del out
    kept = [(m.shape, m.dtype) for m in storages.alive() if m.shape != ()]
    assert kept == [(tuple(x.shape), torch.bool)]
    loss.backward()


# ---- several texts that read one image


def make_cross(dropout=0.0):
    """CrossAttention, keys and values of 3 contexts, a mask that shows 6, 4 and 1 of their rows."""
    cross = uneven(CrossAttention(WIDTH, 20, HEADS, dropout))
    context = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(6) < torch.tensor([[6], [4], [1]]))[:, None, None, :]
    return cross, context, mask


READERS = {
    f"{own} of each{', others ' + str(others) if others else ''}": (own, others)
    for own in (0, 1, 2, 3)
    for others in (None, [1], [2, 0, 2, 2, 1])
    if own or others
}


@pytest.mark.parametrize(("own", "others"), READERS.values(), ids=READERS)
@pytest.mark.parametrize("masked", [False, True])
def test_readers_of_a_context_read_it_as_one_pair_at_a_time_would(own, others, masked):
    cross, context, mask = make_cross()
    rows = [i for i in range(3) for _ in range(own)] + (others or [])
    draw = torch.Generator().manual_seed(3)
    x, pull = (torch.randn(len(rows), 5, WIDTH, generator=draw) for _ in range(2))

    def results(together):
        seen, asking = context.clone().requires_grad_(), x.clone().requires_grad_()
        keys_values = cross.key_value(seen)
        if together:
            readers = Readers(own, None if others is None else torch.tensor(others))
            out = cross(asking, keys_values, mask if masked else None, readers)
        else:
            pairs = [
                (asking[r : r + 1], keys_values[i : i + 1], mask[i : i + 1] if masked else None)
                for r, i in enumerate(rows)
            ]
            out = torch.cat([cross(*pair) for pair in pairs])
        grads = torch.autograd.grad((out * pull).sum(), [asking, seen, *cross.parameters()])
        return [out, *grads]

    for mine, theirs in zip(results(True), results(False), strict=True):
        assert mine.shape == theirs.shape and theirs.any()
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_without_readers_row_i_reads_context_i(x):
    cross, context, mask = make_cross()
    keys_values = cross.key_value(context)
    plain = cross(x, keys_values, mask)
    assert torch.equal(plain, cross(x, keys_values, mask, Readers()))
    turned = cross(x, keys_values, mask, Readers(0, torch.tensor([2, 1, 0])))
    torch.testing.assert_close(turned[1], plain[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(turned[0], plain[0]) and not torch.allclose(turned[2], plain[2])


def test_rows_that_share_a_context_copy_neither_its_keys_nor_its_values():
    cross, context, _ = make_cross()
    x = torch.randn(9, 5, WIDTH)
    with Storages() as storages, keeping("none", True):
        keys_values = cross.key_value(context)
        loss = cross(x, keys_values, None, Readers(3)).sum()
    copies = [m for m in storages.all() if m.shape[-1:] == (2 * WIDTH,) and m.nbytes]
    assert len(copies) == 1
    with Storages() as storages, keeping("none", True):
        keys_values = cross.key_value(context)
        loss = cross(x, keys_values, None, Readers(0, torch.arange(9) % 3)).sum()
    # Rows of a context that are copied for one reader each do not outlive the forward.
    assert any("index_select" in m.operation for m in storages.all())
    assert not any("index_select" in m.operation for m in storages.alive())
    loss.backward()


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_for_one_token_gives_what_the_whole_block_gives_for_it(x, causal):
    block = uneven(PreNormBlock(WIDTH, HEADS, 64, eps=1e-6, causal=causal))
    rows = torch.tensor([0, 8, 5])
    one = block(x, rows)
    assert one.shape == (3, 1, WIDTH)
    whole = block(x)[torch.arange(3), rows].unsqueeze(1)
    torch.testing.assert_close(one, whole, atol=2e-5, rtol=1e-5)
