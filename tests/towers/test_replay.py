"""What one tower kept and merged, done again by another; and ratios other than the configuration's.

B batch, N patches of the image, L tokens of the sequence (class token included), D width.
"""

import dataclasses

import pytest
import torch
from test_pruning import make_inputs, make_vit

from elip_ds.config import Stage
from elip_ds.towers.pruning import Choice, full_index, merge_tokens, prune_tokens

STAGES = [Stage(1, 2, 0.8), Stage(3, 1, 0.5), Stage(4, 2, 0.3)]
SKIPPING = [Stage(1, 2, 1.0), Stage(3, 1, 0.5), Stage(4, 2, 0.5)]


def slow_replay(vit, images, choices):
    """-> tokens (B, L, D): one image and one token at a time, by the numbers of the choices."""
    at = {s.layer: c for s, c in zip(vit.pruning.stages, choices, strict=True)}
    start = []
    vit.blocks[0].register_forward_pre_hook(lambda _, args: start.append(args[0].detach()))
    vit(images)
    outputs = []
    for b in range(len(images)):
        x = start[0][b]
        for layer, block in enumerate(vit.blocks):
            if at.get(layer) is not None:
                kept, weights = at[layer].kept[b].tolist(), at[layer].weights[b]
                merged = sum(weights[n] * x[1 + n] for n in range(len(weights)))
                x = torch.stack([x[0], *(x[1 + n] for n in kept), merged])
            x = block(x[None])[0]
        outputs.append(vit.norm(x))
    return torch.stack(outputs)


def same_index(a, b):
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("origin", "owner", "share"))
    pairs = zip(a.choices, b.choices, strict=True)
    choices = all(
        (x is None and y is None)
        or (torch.equal(x.kept, y.kept) and torch.equal(x.weights, y.weights))
        for x, y in pairs
    )
    return tensors and choices and a.lengths == b.lengths


@pytest.mark.parametrize("stages", [STAGES, SKIPPING, []])
@pytest.mark.parametrize("empty_stage", ["skip", "zero_token"])
def test_a_tower_that_repeats_itself_gives_the_same_bits(stages, empty_stage):
    vit = make_vit(stages, empty_stage=empty_stage)
    images, text_class = make_inputs(vit)
    tokens, index = vit(images, text_class)
    again, same = vit(images, replay=index)
    assert torch.equal(again, tokens)
    assert same_index(same, index)
    assert len(index.choices) == len(stages)


@pytest.mark.parametrize("stages", [STAGES, SKIPPING])
def test_another_tower_keeps_and_merges_what_the_first_one_chose(stages):
    vit, other = make_vit(stages), make_vit(stages, seed=5)
    images, text_class = make_inputs(vit)
    _, index = vit(images, text_class)
    tokens, same = other(images, replay=index)
    torch.testing.assert_close(tokens, slow_replay(other, images, index.choices), **CLOSE)
    assert same_index(same, index)
    own = other(images, text_class)[1]
    assert not torch.equal(own.origin, index.origin)  # it would have chosen otherwise


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def test_a_repeated_choice_runs_every_block_once_and_no_look_ahead(monkeypatch):
    vit = make_vit(STAGES)
    images, text_class = make_inputs(vit)
    _, index = vit(images, text_class)
    calls = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append("block"))
        monkeypatch.setattr(block, "class_attention", lambda *_: calls.append("look-ahead"))
    vit(images, replay=index)
    assert calls == ["block"] * len(vit.blocks)


def test_what_a_stage_chose_is_what_prune_tokens_did():
    draw = torch.Generator().manual_seed(0)
    x, scores = torch.randn(3, 9, 4, generator=draw), torch.rand(3, 8, generator=draw)
    pruned = prune_tokens(x, scores, 5, eps=1e-6)
    again = merge_tokens(x, Choice(pruned.kept, pruned.weights))
    assert torch.equal(again.tokens, pruned.tokens)
    for row in range(3):
        losers = sorted(set(range(8)) - set(pruned.kept[row].tolist()))
        total = sum(scores[row, n].item() for n in losers)
        for n in range(8):
            expected = scores[row, n].item() / total if n in losers else 0.0
            assert pruned.weights[row, n].item() == pytest.approx(expected, abs=1e-5)


def test_the_merge_weights_of_another_precision_are_not_rounded_on_the_way():
    vit = make_vit(STAGES)
    images, text_class = make_inputs(vit)
    _, index = vit.bfloat16()(images.bfloat16(), text_class.bfloat16())
    assert {choice.weights.dtype for choice in index.choices} == {torch.float32}
    tokens, _ = vit.float()(images, replay=index)
    assert tokens.dtype == torch.float32


def test_samples_are_taken_with_their_choices():
    vit = make_vit(SKIPPING)
    images, text_class = make_inputs(vit, batch=4)
    tokens, index = vit(images, text_class)
    rows = torch.tensor([2, 0, 2])
    again, same = vit(images[rows], replay=index.take(rows))
    torch.testing.assert_close(again, tokens[rows], **CLOSE)
    assert same_index(same, index.take(rows))
    assert index.take(rows).choices[0] is None


def test_an_unpruned_pass_has_nothing_to_repeat():
    index = full_index(2, 4, torch.device("cpu"))
    assert index.origin.tolist() == [[-1, 0, 1, 2, 3]] * 2
    assert index.owner.tolist() == [[1, 2, 3, 4]] * 2
    assert index.lengths == index.choices == ()


@pytest.mark.parametrize("ratios", [(1.0, 1.0, 1.0), (1.0, 0.6, 0.2), (0.9, 0.5, 0.5)])
def test_other_ratios_give_the_bits_of_a_tower_that_was_built_with_them(ratios):
    built = [dataclasses.replace(s, keep_ratio=r) for s, r in zip(STAGES, ratios, strict=True)]
    vit, other = make_vit(STAGES), make_vit(built)
    images, text_class = make_inputs(vit)
    tokens, index = vit(images, text_class, ratios)
    expected, same = other(images, text_class)
    assert torch.equal(tokens, expected)
    assert same_index(same, index)
    # The tower itself has not changed.
    assert torch.equal(vit(images, text_class)[0], make_vit(STAGES)(images, text_class)[0])


def test_a_ratio_is_wanted_for_each_stage():
    vit = make_vit(STAGES)
    with pytest.raises(ValueError, match="shorter"):
        vit(*make_inputs(vit), (0.5, 0.5))
