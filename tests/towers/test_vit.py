"""The vision tower beside its pruning: shapes, initial weights, independence, recomputing."""

import copy
import dataclasses

import pytest
import torch

from elip_ds.config import PruningConfig, Stage
from elip_ds.errors import UserError
from elip_ds.towers import ViT, ViTConfig

CONFIG = ViTConfig(image_size=32, patch_size=8, width=32, depth=4, heads=2)
PRUNING = PruningConfig([Stage(1, 2, 0.75), Stage(3, 1, 0.4)])


@pytest.fixture
def vit():
    torch.manual_seed(0)
    tower = ViT(CONFIG, PRUNING)
    for block in tower.blocks:  # attention uneven enough that kept sets differ
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return tower


@pytest.fixture
def inputs():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=draw), torch.randn(4, 32, generator=draw)


def test_tokens_come_out_class_token_first_and_normalised(vit, inputs):
    tokens, index = vit(inputs[0])
    assert tokens.shape == (4, 17, 32)
    assert index.origin.shape == (4, 17)
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(4, 17), atol=1e-5, rtol=0)
    std = tokens.std(dim=-1, correction=0)
    torch.testing.assert_close(std, torch.ones(4, 17), atol=1e-3, rtol=0)


def test_each_image_is_pruned_by_its_own_text_alone(vit, inputs):
    images, text_class = inputs
    tokens, index = vit(images, text_class)
    order = torch.tensor([2, 0, 3, 1])
    shuffled, shuffled_index = vit(images[order], text_class[order])
    torch.testing.assert_close(shuffled, tokens[order], atol=1e-5, rtol=0)
    assert torch.equal(shuffled_index.origin, index.origin[order])
    one, one_index = vit(images[2:3], text_class[2:3])
    torch.testing.assert_close(one, tokens[2:3], atol=1e-5, rtol=0)
    assert torch.equal(one_index.origin, index.origin[2:3])


def test_a_patch_token_starts_from_its_own_pixels(vit, inputs):
    images, _ = inputs
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1.0  # row 1, column 2 of a grid of four
    seen = []
    handle = vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vit(images)
    vit(changed)
    handle.remove()
    differs = (seen[0] != seen[1]).any(dim=-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 + 4 * 1 + 2]


@pytest.mark.parametrize(("mode", "calls"), [("cheap", 1), ("full", 2)])
def test_recomputing_gives_the_same_kept_sets_outputs_and_gradients_bit_for_bit(
    vit, inputs, mode, calls
):
    images, text_class = inputs
    recomputing = copy.deepcopy(vit)
    recomputing.config = dataclasses.replace(CONFIG, recompute=mode)
    called = []
    recomputing.blocks[0].register_forward_pre_hook(lambda *_: called.append(1))
    results = []
    for tower in (vit, recomputing):
        tokens, index = tower(images, text_class)
        tokens.square().mul(torch.arange(32)).sum().backward()
        results.append((tokens, index, [p.grad for p in tower.parameters()]))
    (tokens, index, grads), (same_tokens, same_index, same_grads) = results
    assert len(called) == calls  # once forward, with full once more backward
    assert torch.equal(tokens, same_tokens)
    assert torch.equal(index.origin, same_index.origin)
    assert torch.equal(index.share, same_index.share)
    for grad, same in zip(grads, same_grads, strict=True):
        assert torch.equal(grad, same)


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
@pytest.mark.parametrize("recompute", ["cheap", "full"])
def test_nothing_is_recomputed_without_a_backward_pass_to_come(vit, inputs, mode, recompute):
    vit.config = dataclasses.replace(CONFIG, recompute=recompute)
    calls = []
    vit.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    vit.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(mode != "no_grad"):
        tokens, _ = vit.train(mode != "eval")(*inputs)
    if mode == "eval":
        tokens.square().sum().backward()  # which finds all that it needs
    assert len(calls) == 2


def test_eval_and_train_mode_agree(vit, inputs):
    tokens, _ = vit.train()(*inputs)
    assert torch.equal(tokens, vit.eval()(*inputs)[0])


def test_half_precision_tower_keeps_its_precision(vit, inputs):
    images, text_class = (x.bfloat16() for x in inputs)
    tokens, index = vit.bfloat16()(images, text_class)
    assert tokens.dtype == torch.bfloat16
    assert index.share.dtype == torch.float32
    # A text tower in another precision still guides.
    assert torch.equal(vit(images, text_class.float())[0], tokens)


def test_initial_weights_of_the_published_width_are_small_and_biases_zero():
    torch.manual_seed(0)
    tower = ViT(dataclasses.replace(CONFIG, width=768, depth=1, mlp_ratio=1.0), PruningConfig())
    for name, part in tower.named_modules():
        if isinstance(part, torch.nn.Linear):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not part.bias.any(), name
        if isinstance(part, torch.nn.LayerNorm):
            assert (part.weight == 1).all() and not part.bias.any(), name
            assert part.eps == 1e-6
    assert tower.pos_embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert tower.cls_token.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_one_seed_gives_one_set_of_weights_whatever_the_schedule():
    towers = []
    for pruning in (PruningConfig(), PRUNING):
        torch.manual_seed(3)
        towers.append(ViT(CONFIG, pruning).state_dict())
    for name, value in towers[0].items():
        assert torch.equal(value, towers[1][name]), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_size": 250},
            "image_size=250 is not a multiple of patch_size=16; nearest: 240, 256",
        ),
        ({"width": 100}, "model.vision.width=100 does not divide into heads=12"),
    ],
)
def test_a_tower_that_does_not_add_up_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ViTConfig(**fields)


def test_patches_are_counted_from_the_grid():
    assert ViTConfig(image_size=288, patch_size=16).num_patches == 324
    assert ViTConfig(image_size=224, patch_size=32).num_patches == 49
