"""The shared blocks against attention written out: softmax over scores, head by head."""

import math

import pytest
import torch
import torch.nn.functional as F

from elip_ds.towers.bert import WordEmbedding
from elip_ds.towers.layers import (
    MLP,
    CrossAttention,
    FusedQKV,
    PreNormBlock,
    SelfAttention,
    init_linear_and_norm,
    merge_heads,
    split_heads,
)

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
        (qkv(x, asks="class"), (q[:, :1], k, v)),
        (qkv(x, asks="class", values=False), (q[:, :1], k)),
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


def test_word_embedding_decodes_with_the_matrix_it_encodes_with():
    word = WordEmbedding(11, 8)
    hidden = torch.randn(2, 5, 8)
    assert torch.equal(word(hidden, decode=True), F.linear(hidden, word.weight))
    assert torch.equal(word(torch.tensor([[3]]))[0, 0], word.weight[3])
    assert [tuple(p.shape) for p in word.parameters()] == [(11, 8)]


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
