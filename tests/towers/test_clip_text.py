"""CLIP's text tower against its plain slow version; open_clip's is in models/test_clip.py.

B batch, L text tokens, D width.
"""

import pytest
import torch
import torch.nn.functional as F

from elip_ds.errors import UserError
from elip_ds.towers import CLIPText, CLIPTextConfig

END = 49


def make_text(seed=0, **changes):
    """A tiny tower with every weight random and uneven."""
    config = CLIPTextConfig(
        **{"vocab_size": 50, "width": 32, "depth": 3, "heads": 4, "max_positions": 10} | changes
    )
    torch.manual_seed(seed)
    tower = CLIPText(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    return tower


def make_ids(*lengths, total=10, seed=1):
    """(B, total): words, the end mark last of each row's length, then padding of 0."""
    torch.manual_seed(seed)
    ids = torch.randint(1, END, (len(lengths), total))
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1], row[length:] = END, 0
    return ids


def slow_tower(tower, ids):
    """One text, one token, one head at a time, each from the tokens up to it -> (L, D)."""
    width, heads = tower.config.width, tower.config.heads
    x = [
        tower.embeddings["word"].weight[word] + tower.position.weight[0, place]
        for place, word in enumerate(ids.tolist())
    ]
    for block in tower.blocks:
        qkv = [F.linear(block.norm1(t), block.attn.qkv.weight, block.attn.qkv.bias) for t in x]
        outputs = []
        for i, here in enumerate(qkv):
            parts = []
            for head in range(heads):
                own = slice(head * width // heads, (head + 1) * width // heads)
                q = here[:width][own]
                keys = torch.stack([t[width : 2 * width][own] for t in qkv[: i + 1]])
                values = torch.stack([t[2 * width :][own] for t in qkv[: i + 1]])
                parts.append((keys @ q / len(q) ** 0.5).softmax(dim=0) @ values)
            outputs.append(block.attn.proj(torch.cat(parts)))
        x = [t + out for t, out in zip(x, outputs, strict=True)]
        x = [t + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(t)))) for t in x]
    return tower.norm(torch.stack(x))


def test_it_computes_what_the_slow_tower_does():
    tower, ids = make_text(), make_ids(4, 10, 2)
    states, _ = tower(ids)
    for row, text in zip(states, ids, strict=True):
        torch.testing.assert_close(row, slow_tower(tower, text), atol=2e-5, rtol=0)


def test_a_text_is_read_at_its_end_mark():
    tower, ids = make_text(), make_ids(4, 10, 2)
    states, pooled = tower(ids)
    assert torch.equal(pooled, torch.stack([states[0, 3], states[1, 9], states[2, 1]]))


def test_what_follows_the_end_mark_changes_nothing():
    tower, ids = make_text(), make_ids(4, 7, 2)
    other = torch.where(ids.eq(END).cumsum(1).bool() & ids.ne(END), 7, ids)
    assert not torch.equal(ids, other)
    torch.testing.assert_close(tower(ids)[1], tower(other)[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(tower(ids)[1], tower(ids[:, :7])[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_changes_no_bit(mode):
    ids = make_ids(4, 10)
    grads = []
    for recompute in ("none", mode):
        tower = make_text(recompute=recompute)
        tower(ids)[1].square().sum().backward()
        grads.append([parameter.grad for parameter in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_it_starts_as_open_clip_does():
    """Spreads by the published formulas: what adds to the residual stream is smaller."""
    torch.manual_seed(0)
    tower = CLIPText(CLIPTextConfig(vocab_size=1000, width=128, depth=4, heads=2))
    block = tower.blocks[2]
    for weight, std in (
        (tower.embeddings["word"].weight, 0.02),
        (tower.position.weight, 0.01),
        (block.attn.qkv.weight, 128**-0.5),
        (block.attn.proj.weight, 128**-0.5 * 8**-0.5),
        (block.mlp.fc1.weight, 256**-0.5),
        (block.mlp.fc2.weight, 128**-0.5 * 8**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert not block.attn.qkv.bias.any() and not block.attn.proj.bias.any()
    assert (tower.norm.weight == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"model\.text\.width=32 does not divide into heads=5"),
        ({"recompute": "yes"}, r"model\.text\.recompute='yes': choose none, cheap, full"),
        ({"activation": "relu"}, r"model\.text\.activation='relu': choose gelu or quick_gelu"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_text(**change)
