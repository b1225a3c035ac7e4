"""The ten oracles of ELIP's pruning, a slow plain loop, and what KeepIndex promises.

B batch, N patches of the image, L tokens of the sequence (class token included), D width.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elip_ds.config import PruningConfig, Stage
from elip_ds.errors import UserError
from elip_ds.towers import ViT, ViTConfig, check_stages
from elip_ds.towers.pruning import (
    Pruned,
    follow,
    full_index,
    keep_count,
    lookahead_scores,
    prune_targets,
    prune_tokens,
    sequence_lengths,
    unprune,
)

ELIP = [Stage(2, 2, 0.9), Stage(4, 6, 0.65), Stage(10, 2, 0.4)]  # of ALBEF, BLIP and CLIP
METER = [Stage(2, 2, 0.9), Stage(4, 5, 0.7), Stage(9, 2, 0.45)]
SMALL = [Stage(1, 2, 0.8), Stage(3, 1, 0.5), Stage(4, 2, 0.3)]

# image side, patch side, depth, stages, tokens that each block sees, patches kept at each stage
TABLE = {
    "ALBEF 256": (256, 16, 12, ELIP, {257: 2, 232: 2, 168: 6, 104: 2}, [230, 166, 102]),
    "BLIP 224": (224, 16, 12, ELIP, {197: 2, 178: 2, 129: 6, 80: 2}, [176, 127, 78]),
    "CLIP /16 224": (224, 16, 12, ELIP, {197: 2, 178: 2, 129: 6, 80: 2}, [176, 127, 78]),
    "METER clip32 224": (224, 32, 11, METER, {50: 2, 46: 2, 36: 5, 24: 2}, [44, 34, 22]),
    "METER clip16 288": (288, 16, 11, METER, {325: 2, 293: 2, 228: 5, 147: 2}, [291, 226, 145]),
}


def make_vit(stages, *, image_size=32, patch_size=4, depth=6, width=32, seed=0, **pruning):
    """A tiny tower whose attention is uneven enough that no two scores are near each other."""
    torch.manual_seed(seed)
    config = ViTConfig(image_size, patch_size, width=width, depth=depth, heads=2)
    vit = ViT(config, PruningConfig(stages, **pruning))
    for name, parameter in vit.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02 if "patch_embed" in name else 0.15)
    return vit


def make_inputs(vit, batch=3, seed=1):
    """images (B, 3, S, S) and text_class (B, D)."""
    draw = torch.Generator().manual_seed(seed)
    side = vit.config.image_size
    images = torch.randn(batch, 3, side, side, generator=draw)
    return images, 3 * torch.randn(batch, vit.config.width, generator=draw)


# ---- the slow oracle: spec 1.2, one image at a time, nothing shared with the package but weights


def slow_attention(attn, x):
    """x: (L, D) -> output (L, D) and the whole attention (H, L, L), by softmax over all rows."""
    length, width = x.shape
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).view(length, 3, attn.heads, -1).unbind(1)
    scale = (width // attn.heads) ** -0.5
    rows = torch.einsum("qhd,khd->hqk", q, k).mul(scale).softmax(dim=-1)
    out = torch.einsum("hqk,khd->qhd", rows, v).reshape(length, width)
    return F.linear(out, attn.proj.weight, attn.proj.bias), rows


def slow_block(block, x):
    out, rows = slow_attention(block.attn, block.norm1(x))
    x = x + out
    hidden = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias), rows


def slow_prune(vit, stage, x, t):
    """x: (L, D), t: (D,) -> x', kept numbers after the class token, score of each token."""
    with torch.no_grad():
        z = x.clone()
        z[0] = vit.pruning.text_weight * t + (1 - vit.pruning.text_weight) * x[0]
        for j in range(stage.lookahead):
            z, rows = slow_block(vit.blocks[stage.layer + j], z)
        score = rows.mean(dim=0)[0, 1:]
        count = int(vit.config.num_patches * stage.keep_ratio)
        order = sorted(range(len(score)), key=lambda n: -float(score[n]))
        kept, losers = sorted(order[:count]), sorted(order[count:])
        total = sum(score[n] for n in losers) + 1e-6
        weight = {n: score[n] / total for n in losers}
    merged = sum(weight[n] * x[1 + n] for n in losers)
    return torch.stack([x[0], *(x[1 + n] for n in kept), merged]), kept, score


def slow_embed(vit, image):
    """(3, S, S) -> (1 + N, D), patch by patch, row by row."""
    p, grid = vit.config.patch_size, vit.config.image_size // vit.config.patch_size
    weight = vit.patch_embed.weight.flatten(1)
    tokens = [vit.cls_token.weight[0, 0]]
    for i in range(grid):
        for j in range(grid):
            patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten()
            tokens.append(weight @ patch + vit.patch_embed.bias)
    return torch.stack(tokens) + vit.pos_embed.weight[0]


def slow_vit(vit, images, texts):
    """-> tokens (B, L, D), and of each image and stage the kept numbers."""
    at = {stage.layer: stage for stage in vit.pruning.stages}
    outputs, kept_sets = [], []
    for image, t in zip(images, texts, strict=True):
        x, kept_here = slow_embed(vit, image), []
        for layer, block in enumerate(vit.blocks):
            if layer in at:
                x, kept, _ = slow_prune(vit, at[layer], x, t)
                kept_here.append(kept)
            x, _ = slow_block(block, x)
        outputs.append(vit.norm(x))
        kept_sets.append(kept_here)
    return torch.stack(outputs), kept_sets


@dataclass
class PrunePoint:
    """One stage of a forward: what came in, what was scored, what came out."""

    x: torch.Tensor
    scores: torch.Tensor
    pruned: Pruned


@pytest.fixture
def prune_points(monkeypatch):
    """Filled by every forward with one PrunePoint a stage; the tower computes as always."""
    points = []

    def watched(x, scores, num_keep, eps):
        pruned = prune_tokens(x, scores, num_keep, eps)
        points.append(PrunePoint(x, scores, pruned))
        return pruned

    monkeypatch.setattr("elip_ds.towers.pruning.prune_tokens", watched)
    return points


def lengths_by_block(vit, images, text_class):
    """Tokens that each block sees on the main path, and on the way through the look-ahead."""
    main = [0] * vit.config.depth
    ahead = []

    def watch(layer):
        def hook(_, args):
            if torch.is_grad_enabled():
                main[layer] = args[0].shape[1]
            else:
                ahead.append((layer, args[0].shape[1]))

        return hook

    handles = [b.register_forward_pre_hook(watch(i)) for i, b in enumerate(vit.blocks)]
    vit(images, text_class)
    for handle in handles:
        handle.remove()
    return main, ahead


# ---- oracle 1: lengths


@pytest.mark.parametrize("case", TABLE)
def test_every_block_sees_as_many_tokens_as_published(case):
    image_size, patch_size, depth, stages, runs, kept = TABLE[case]
    expected = [length for length, blocks in runs.items() for _ in range(blocks)]
    num_patches = (image_size // patch_size) ** 2
    assert sequence_lengths(PruningConfig(stages), depth, num_patches) == expected
    assert [keep_count(stage.keep_ratio, num_patches) for stage in stages] == kept

    vit = make_vit(stages, image_size=image_size, patch_size=patch_size, depth=depth, width=16)
    images, text_class = make_inputs(vit, batch=1)
    main, ahead = lengths_by_block(vit, images, text_class)
    assert main == expected
    # All but the last block of a look-ahead run whole, at the length before that stage's pruning.
    before = [1 + num_patches, *(count + 2 for count in kept)]
    assert ahead == [
        (stage.layer + j, length)
        for stage, length in zip(stages, before, strict=False)
        for j in range(stage.lookahead - 1)
    ]
    tokens, index = vit(images, text_class)
    assert tokens.shape[1] == expected[-1]
    assert list(index.lengths) == [count + 2 for count in kept]


@pytest.mark.parametrize(
    ("stages", "base", "kept"), [(METER, 49, [44, 34, 22]), (ELIP, 197, [177, 128, 78])]
)
def test_counts_of_the_released_constants_are_truncated_as_there(stages, base, kept):
    assert [keep_count(stage.keep_ratio, base) for stage in stages] == kept


@settings(max_examples=25, deadline=None)
@example(first=1, gap=1, ratios=[1.0, 1.0, 0.5], empty_stage="skip")
@example(first=1, gap=1, ratios=[1.0, 1.0, 0.5], empty_stage="zero_token")
@given(
    first=st.integers(0, 2),
    gap=st.integers(1, 2),
    ratios=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3),
    empty_stage=st.sampled_from(["skip", "zero_token"]),
)
def test_planned_lengths_are_those_of_the_tower(first, gap, ratios, empty_stage):
    ratios = sorted((max(ratio, 1 / 16) for ratio in ratios), reverse=True)
    stages = [Stage(first + gap * i, 1, ratio) for i, ratio in enumerate(ratios)]
    vit = make_vit(stages, image_size=16, patch_size=4, depth=7, width=8, empty_stage=empty_stage)
    images, text_class = make_inputs(vit, batch=1)
    planned = sequence_lengths(vit.pruning, 7, 16)
    assert lengths_by_block(vit, images, text_class)[0] == planned


# ---- oracle 2: the text


def test_text_weight_zero_makes_the_text_irrelevant():
    vit = make_vit(SMALL, text_weight=0.0)
    images, text_class = make_inputs(vit)
    tokens, index = vit(images, text_class)
    other_tokens, other_index = vit(images, text_class.flip(0) + 1)
    assert torch.equal(tokens, other_tokens)
    assert torch.equal(index.origin, other_index.origin)


def test_another_text_changes_only_which_tokens_survive_and_the_weights(prune_points):
    vit = make_vit([Stage(2, 2, 0.5)])
    images, text_class = make_inputs(vit)
    vit(images, text_class)
    vit(images, -text_class)
    one, other = prune_points
    assert torch.equal(one.x, other.x)  # the text has not entered the tokens
    assert not torch.equal(one.pruned.kept, other.pruned.kept)
    assert not torch.equal(one.pruned.weights, other.pruned.weights)
    for point in prune_points:
        assert_made_from(point.x, point.pruned)


def assert_made_from(x, pruned):
    """Class token and kept tokens are those of x, bit for bit; the last is the weighted sum."""
    rows = torch.arange(len(x)).unsqueeze(1)
    assert torch.equal(pruned.tokens[:, 0], x[:, 0])
    assert torch.equal(pruned.tokens[:, 1:-1], x[rows, 1 + pruned.kept])
    merged = (pruned.weights.unsqueeze(-1) * x[:, 1:]).sum(dim=1)
    torch.testing.assert_close(pruned.tokens[:, -1], merged, atol=1e-5, rtol=0)


# ---- oracle 3: the slow loop


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stages", [SMALL, [Stage(0, 6, 0.4)], [Stage(5, 1, 0.02)]])
def test_pruning_equals_the_slow_loop_in_outputs_kept_sets_and_gradients(
    seed, stages, prune_points
):
    vit = make_vit(stages, seed=seed)
    images, text_class = make_inputs(vit, seed=seed + 10)
    loss_weights = torch.randn(vit.config.width)

    tokens, _ = vit(images, text_class)
    slow_tokens, slow_kept = slow_vit(vit, images, text_class)
    for number, point in enumerate(prune_points):
        assert point.pruned.kept.tolist() == [kept[number] for kept in slow_kept]
    assert len(prune_points) == len(stages)
    torch.testing.assert_close(tokens, slow_tokens, atol=1e-5, rtol=1e-5)

    parameters = dict(vit.named_parameters())
    losses = ((x * loss_weights).square().mean() for x in (tokens, slow_tokens))
    fast, slow = (torch.autograd.grad(loss, list(parameters.values())) for loss in losses)
    for name, mine, theirs in zip(parameters, fast, slow, strict=True):
        assert theirs.abs().sum() > 0, name
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=name)


# ---- oracle 4: what stays is untouched, in order


@pytest.mark.parametrize("num_keep", [1, 5, 11, 12])
def test_class_and_kept_tokens_are_bit_identical_and_stay_in_order(num_keep):
    torch.manual_seed(0)
    x, scores = torch.randn(4, 13, 8), torch.rand(4, 12)
    before = x.clone()
    pruned = prune_tokens(x, scores, num_keep, 1e-6)
    assert pruned.tokens.shape == (4, num_keep + 2, 8)
    assert_made_from(x, pruned)
    assert (pruned.kept.diff(dim=1) > 0).all()
    assert torch.equal(x, before)
    for b in range(4):
        best = sorted(range(12), key=lambda n: -float(scores[b, n]))[:num_keep]
        assert pruned.kept[b].tolist() == sorted(best)


def test_no_stage_writes_into_its_input(prune_points):
    vit = make_vit(SMALL)
    images, text_class = make_inputs(vit)
    arguments = images.clone(), text_class.clone()
    vit(images, text_class)
    assert torch.equal(images, arguments[0])
    assert torch.equal(text_class, arguments[1])

    x = prune_points[0].x.detach()
    before = x.clone()
    lookahead_scores(x, text_class, list(vit.blocks[1:3]), 0.2)
    assert torch.equal(x, before)


def test_half_precision_tokens_stay_half_and_their_weights_fp32():
    torch.manual_seed(0)
    x, scores = torch.randn(2, 9, 8), torch.rand(2, 8)
    pruned = prune_tokens(x.bfloat16(), scores.bfloat16(), 3, 1e-6)
    assert pruned.tokens.dtype == torch.bfloat16
    assert pruned.weights.dtype == torch.float32
    whole = prune_tokens(x.bfloat16().float(), scores.bfloat16().float(), 3, 1e-6)
    assert torch.equal(pruned.kept, whole.kept)
    torch.testing.assert_close(pruned.tokens.float(), whole.tokens, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("num_keep", [0, 9])
def test_a_count_that_cannot_be_kept_is_refused(num_keep):
    with pytest.raises(ValueError, match=rf"num_keep={num_keep} must lie in 1\.\.8"):
        prune_tokens(torch.zeros(1, 9, 4), torch.ones(1, 8), num_keep, 1e-6)


# ---- oracle 5: weights


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 100.0]))
def test_merge_weights_are_shares_of_the_losers_scores(seed, scale):
    torch.manual_seed(seed)
    scores = scale * torch.rand(3, 10)
    pruned = prune_tokens(torch.randn(3, 11, 4), scores, 4, 1e-6)
    kept = torch.zeros_like(scores).scatter_(1, pruned.kept, 1.0).bool()
    losers = scores.masked_fill(kept, 0.0)
    total = losers.sum(dim=1, keepdim=True)
    assert (pruned.weights >= 0).all()
    assert (pruned.weights[kept] == 0).all()
    torch.testing.assert_close(pruned.weights, losers / (total + 1e-6))
    torch.testing.assert_close(pruned.weights.sum(1), (total / (total + 1e-6)).squeeze(1))


def test_eps_of_the_config_reaches_the_weights(prune_points):
    vit = make_vit([Stage(1, 1, 0.5)], eps=0.25)
    vit(*make_inputs(vit))
    (point,) = prune_points
    losers = point.scores.scatter(1, point.pruned.kept, 0.0).sum(dim=1)
    torch.testing.assert_close(point.pruned.weights.sum(dim=1), losers / (losers + 0.25))


# ---- oracle 6: gradients


def test_gradient_reaches_merged_tokens_by_their_weight_and_never_the_scores():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 4, requires_grad=True)
    scores = torch.rand(2, 8, requires_grad=True)
    pruned = prune_tokens(x, scores, 3, 1e-6)
    upstream = torch.randn_like(pruned.tokens)
    pruned.tokens.backward(upstream)
    assert scores.grad is None
    expected = pruned.weights.unsqueeze(-1) * upstream[:, -1:]
    kept = pruned.kept.unsqueeze(-1).expand(-1, -1, 4)
    expected = expected.scatter(1, kept, upstream[:, 1:-1])
    torch.testing.assert_close(x.grad[:, 1:], expected)
    assert torch.equal(x.grad[:, 0], upstream[:, 0])
    assert (x.grad.abs().sum(dim=-1) > 0).all()


def test_no_gradient_reaches_the_text_and_every_weight_gets_one():
    vit = make_vit(SMALL)
    images, text_class = make_inputs(vit)
    text_class.requires_grad_()
    vit(images, text_class)[0].square().mean().backward()
    assert text_class.grad is None
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ---- oracle 7: the lean look-ahead


@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_the_lean_lookahead_scores_as_the_full_last_block_does(lookahead):
    vit = make_vit([])
    images, text_class = make_inputs(vit)
    x = torch.stack([slow_embed(vit, image) for image in images])
    scores = lookahead_scores(x, text_class, list(vit.blocks[1 : 1 + lookahead]), 0.2)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad

    full = []
    for tokens, t in zip(x, text_class, strict=True):
        z = torch.cat([(0.2 * t + 0.8 * tokens[0]).unsqueeze(0), tokens[1:]])
        for block in vit.blocks[1 : 1 + lookahead]:
            z, rows = slow_block(block, z)
        full.append(rows.mean(dim=0)[0, 1:])
    full = torch.stack(full)
    torch.testing.assert_close(scores, full, atol=1e-6, rtol=0)
    for num_keep in (6, 19, 45):
        assert torch.equal(
            prune_tokens(x, scores, num_keep, 1e-6).kept, prune_tokens(x, full, num_keep, 1e-6).kept
        )


def test_scores_leave_out_the_class_tokens_own_share():
    vit = make_vit([])
    images, text_class = make_inputs(vit)
    x = torch.stack([slow_embed(vit, image) for image in images])
    scores = lookahead_scores(x, text_class, list(vit.blocks[:1]), 0.2)
    mixed = torch.cat([0.2 * text_class.unsqueeze(1) + 0.8 * x[:, :1], x[:, 1:]], dim=1)
    own = vit.blocks[0].class_attention(mixed)[:, 0]
    torch.testing.assert_close(scores.sum(dim=1) + own, torch.ones(3))


# ---- oracle 8: nothing to merge


def test_keeping_everything_equals_no_pruning_bit_for_bit():
    stages = [Stage(layer, 1, 1.0) for layer in (1, 3, 4)]
    vit, plain = make_vit(stages), make_vit([])
    images, text_class = make_inputs(vit)
    tokens, index = vit(images, text_class)
    assert torch.equal(tokens, plain(images, text_class)[0])
    assert index.lengths == (65, 65, 65) and index.choices == (None, None, None)
    assert torch.equal(index.owner, full_index(3, 64, images.device).owner)


def test_a_zero_token_is_appended_where_asked(prune_points):
    vit = make_vit([Stage(2, 1, 1.0)], empty_stage="zero_token")
    images, text_class = make_inputs(vit)
    tokens, index = vit(images, text_class)
    (point,) = prune_points
    assert torch.equal(point.pruned.tokens[:, :-1], point.x)
    assert not point.pruned.tokens[:, -1].any()
    assert tokens.shape[1] == 66 and index.lengths == (66,)
    assert torch.equal(index.origin[:, -1], torch.full((3,), -2))
    assert torch.equal(index.owner, full_index(3, 64, images.device).owner)
    assert torch.equal(index.share, torch.ones(3, 64))


# ---- oracle 9: no text


def plain_vit(vit, images):
    x = vit.patch_embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.weight.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed.weight
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


def test_without_text_the_tower_is_a_plain_vit_bit_for_bit():
    vit = make_vit(SMALL)
    images, _ = make_inputs(vit)
    tokens, index = vit(images)
    assert torch.equal(tokens, plain_vit(vit, images))
    assert index.lengths == ()


def test_without_stages_the_text_changes_no_bit():
    vit = make_vit([])
    images, text_class = make_inputs(vit)
    assert torch.equal(vit(images, text_class)[0], plain_vit(vit, images))


# ---- oracle 10: no state


def test_pruning_has_no_state_and_a_forward_changes_no_weight():
    vit, plain = make_vit(SMALL), make_vit([])
    assert vit.state_dict().keys() == plain.state_dict().keys()
    assert not list(vit.buffers())
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    vit(*make_inputs(vit))
    for name, value in vit.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- KeepIndex


@dataclass
class Simulation:
    """The same pruning told twice: by the package, and by dictionaries, one image at a time.

    tokens: (B, L, D), no block between the stages.  slots: of each image and slot {patch: share}.
    """

    patches: torch.Tensor
    tokens: torch.Tensor
    index: object
    slots: list


def simulate(counts, *, num_patches, batch, seed, merged_score=None, empty_stage="skip"):
    """counts: tokens kept at each stage.  merged_score: of merged tokens; None: drawn."""
    torch.manual_seed(seed)
    x = torch.randn(batch, 1 + num_patches, 3)
    index = full_index(batch, num_patches, x.device)
    tokens = x
    slots = [[{}, *({n: 1.0} for n in range(num_patches))] for _ in range(batch)]
    for number, count in enumerate(counts):
        if count >= tokens.shape[1] - 1 and empty_stage == "skip":
            continue
        scores = 1 + 9 * torch.rand(batch, tokens.shape[1] - 1)
        if merged_score is not None:
            scores[index.origin[:, 1:] <= -2] = merged_score
        pruned = prune_tokens(tokens, scores, min(count, scores.shape[1]), 1e-6)
        for b in range(batch):
            kept = set(pruned.kept[b].tolist())
            merged = {}
            for n, weight in enumerate(pruned.weights[b].tolist()):
                if n not in kept:
                    for patch, share in slots[b][1 + n].items():
                        merged[patch] = share * weight
            slots[b] = [{}, *(slots[b][1 + n] for n in sorted(kept)), merged]
        tokens, index = pruned.tokens, follow(index, pruned, number)
    return Simulation(x[:, 1:], tokens, index, slots)


def check_index(sim):
    """What spec/objectives.md 1.2 promises of a KeepIndex."""
    origin, owner, share = (
        x.tolist() for x in (sim.index.origin, sim.index.owner, sim.index.share)
    )
    batch, num_patches = len(owner), len(owner[0])
    for b in range(batch):
        carried = {n: slot for slot, group in enumerate(sim.slots[b]) for n in group}
        assert sorted(carried) == list(range(num_patches))  # total, and each patch in one slot
        assert owner[b] == [carried[n] for n in range(num_patches)]
        assert origin[b][0] == -1 and -1 not in origin[b][1:]
        for slot, group in enumerate(sim.slots[b][1:], start=1):
            if origin[b][slot] >= 0:  # a patch carries itself, nothing else, undiminished
                assert group == {origin[b][slot]: 1.0}
                assert share[b][origin[b][slot]] == 1.0
            else:
                assert group  # somebody's slot
                for patch, weight in group.items():
                    assert share[b][patch] == pytest.approx(weight, abs=1e-6)
                assert sum(share[b][n] for n in group) == pytest.approx(1.0, abs=1e-5)
        markers = [value for value in origin[b] if value < 0]
        assert len(set(markers)) == len(markers)  # one token a stage at most
    assert [1 + num_patches, *sim.index.lengths][-1] == len(origin[0])


pruned_in_stages = given(
    num_patches=st.integers(2, 14),
    counts=st.lists(st.integers(1, 14), min_size=1, max_size=4).map(
        lambda counts: sorted(counts, reverse=True)
    ),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    merged_score=st.sampled_from([None, 0.5, 20.0]),
)


@settings(max_examples=120, deadline=None)
@example(num_patches=9, counts=[6, 4, 2], batch=2, seed=0, merged_score=20.0)
@example(num_patches=9, counts=[6, 4, 2], batch=2, seed=0, merged_score=0.5)
@pruned_in_stages
def test_keep_index_tells_who_carries_each_patch_over_all_stages(**case):
    check_index(simulate(**case))


@settings(max_examples=60, deadline=None)
@pruned_in_stages
def test_targets_are_mixed_as_the_tokens_were(**case):
    sim = simulate(**case)
    mixed = prune_targets(sim.patches, sim.index)
    torch.testing.assert_close(mixed, sim.tokens[:, 1:], atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@pruned_in_stages
def test_unprune_gives_every_patch_the_token_that_carries_it(**case):
    sim = simulate(**case)
    dense = unprune(sim.tokens, sim.index)
    assert dense.shape == sim.patches.shape
    kept = sim.index.origin.gather(1, sim.index.owner) >= 0
    assert torch.equal(dense[kept], sim.patches[kept])
    for b, slots in enumerate(sim.slots):
        for slot, group in enumerate(slots):
            for patch in group:
                assert torch.equal(dense[b, patch], sim.tokens[b, slot])


def test_an_early_merged_token_may_survive_and_keeps_its_patches():
    sim = simulate([6, 4, 2], num_patches=9, batch=2, seed=0, merged_score=20.0)
    assert [-2 in row for row in sim.index.origin.tolist()] == [True, True]
    first = simulate([6], num_patches=9, batch=2, seed=0)
    merged_first = first.index.owner == 7
    assert torch.equal(sim.index.share[merged_first], first.index.share[merged_first])
    assert (sim.index.origin.gather(1, sim.index.owner)[merged_first] == -2).all()
    # Two of the last stage's survivors are merged tokens: it keeps no patch at all.
    assert (sim.index.origin >= 0).sum() == 0


def test_a_zero_token_merged_again_takes_its_weight_from_the_patches_beside_it():
    counts = {"counts": [5, 3], "num_patches": 5, "batch": 1, "seed": 0, "merged_score": 5.0}
    sim = simulate(**counts, empty_stage="zero_token")
    assert sim.index.origin[0, -1] == -3 and -2 not in sim.index.origin  # it is in the last token
    assert sim.index.share[sim.index.owner == 4].sum() < 0.9
    mixed = prune_targets(sim.patches, sim.index)  # and still says how the tokens were made
    torch.testing.assert_close(mixed, sim.tokens[:, 1:], atol=1e-5, rtol=1e-5)


def test_without_pruning_unprune_and_prune_targets_only_drop_the_class_token():
    torch.manual_seed(0)
    x, index = torch.randn(2, 10, 4), full_index(2, 9, torch.device("cpu"))
    assert torch.equal(unprune(x, index), x[:, 1:])
    assert torch.equal(prune_targets(x[:, 1:], index), x[:, 1:])
    assert index.origin[0].tolist() == [-1, *range(9)]


def test_the_towers_index_agrees_with_its_kept_sets(prune_points):
    vit = make_vit(SMALL)
    _, index = vit(*make_inputs(vit))
    for b in range(3):
        names = list(range(64))  # what each token after the class token is, stage by stage
        for number, point in enumerate(prune_points):
            names = [names[n] for n in point.pruned.kept[b].tolist()] + [-(2 + number)]
        assert index.origin[b].tolist() == [-1, *names]
    assert index.lengths == (53, 34, 21)


# ---- schedules that do not fit


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(-1, 1, 0.5)], r"stages\[0\]: layer=-1, lookahead=1: a layer counts from 0"),
        ([Stage(0, 0, 0.5)], r"stages\[0\]: layer=0, lookahead=0: .* at least 1 block"),
        (
            [Stage(4, 3, 0.5)],
            r"layer 4 \+ lookahead 3 is beyond .* 6 blocks; use lookahead <= 2 or a",
        ),
        ([Stage(7, 1, 0.5)], r"layer 7 \+ lookahead 1 is beyond .* 6 blocks; use layer < 6$"),
        ([Stage(0, 1, 0.0)], r"stages\[0\]: keep_ratio=0.0 must lie in \(0, 1\]"),
        ([Stage(0, 1, 1.5)], r"keep_ratio=1.5 must lie in \(0, 1\]"),
        ([Stage(0, 1, float("nan"))], r"keep_ratio=nan must lie in \(0, 1\]"),
        ([Stage(2, 1, 0.9), Stage(2, 1, 0.5)], r"\[1\]: layer 2 does not come after layer 2"),
        ([Stage(2, 1, 0.9), Stage(1, 1, 0.5)], r"\[1\]: layer 1 does not come after layer 2"),
        ([Stage(0, 1, 0.4), Stage(2, 1, 0.5)], r"\[1\]: keep_ratio 0.5 exceeds 0.4 before it"),
        ([Stage(0, 1, 0.01)], r"\[0\]: keep_ratio=0.01 of 64 patches keeps none"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_by_name(stages, message):
    with pytest.raises(UserError, match=r"^pruning\.stages") as caught:
        check_stages(stages, depth=6, num_patches=64)
    assert caught.match(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        make_vit(stages)


@pytest.mark.parametrize("stages", [[], SMALL, ELIP[:2], [Stage(5, 1, 1 / 64)]])
def test_a_schedule_that_fits_is_accepted(stages):
    check_stages(stages, depth=12, num_patches=64)
