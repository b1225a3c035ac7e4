"""CLIP against open_clip's, and its pruning against a plain slow loop.

B batch, L tokens, D width of the vision tower, E joint space.
"""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, tiny_task

from elip_ds.config import PruningConfig, Stage
from elip_ds.errors import UserError
from elip_ds.models.clip import CLIP, CLIPConfig, LogitScale
from elip_ds.towers import CLIPTextConfig, ViTConfig
from elip_ds.towers.pruning import match_norm

ELIP = [Stage(2, 2, 0.9), Stage(4, 6, 0.65), Stage(10, 2, 0.4)]
SMALL = [Stage(1, 2, 0.8), Stage(3, 1, 0.5)]
TOLERANCE = {"atol": 2e-5, "rtol": 0}

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2},
}


def tiny_clip(stages=(), *, guide="rescaled", vision=None, text=None, seed=0, **pruning):
    """A small tower whose attention is uneven enough that no two scores are near each other."""
    torch.manual_seed(seed)
    settings = {"image_size": 32, "patch_size": 4, "width": 32, "depth": 4, "heads": 2}
    config = CLIPConfig(
        vision=ViTConfig(**settings | {"layout": "clip"} | (vision or {})),
        text=CLIPTextConfig(
            **{"vocab_size": 50, "width": 32, "depth": 2, "heads": 2, "max_positions": 8}
            | (text or {})
        ),
        embed_dim=16,
        guide=guide,
    )
    schedule = PruningConfig(list(stages), **pruning)
    config.check(schedule)
    model = CLIP(config, schedule)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.03 if "patch_embed" in name else 0.15)
    return model


def make_inputs(model, batch=3, seed=1):
    """images (B, 3, S, S), input_ids (B, 8) with the end mark 49 at various places."""
    torch.manual_seed(seed)
    side = model.config.vision.image_size
    ids = torch.randint(1, 49, (batch, 8))
    ids[torch.arange(batch), torch.randint(2, 8, (batch,))] = 49
    return torch.randn(batch, 3, side, side), ids


# ---- open_clip


def ours(theirs, settings):
    """open_clip's model as ours, with the same weights, each once."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    activation = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    model = CLIP(
        CLIPConfig(
            vision=ViTConfig(
                vision["image_size"],
                vision["patch_size"],
                vision["width"],
                vision["layers"],
                vision["width"] // 64,
                layout="clip",
                activation=activation,
            ),
            text=CLIPTextConfig(
                text["vocab_size"],
                text["width"],
                text["layers"],
                text["heads"],
                max_positions=text["context_length"],
                activation=activation,
            ),
            embed_dim=settings["embed_dim"],
        ),
        PruningConfig(),
    )
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in (
            ("visual.proj", "visual_proj.weight"),
            ("visual.class_embedding", "visual.cls_token.weight"),
            ("visual.positional_embedding", "visual.pos_embed.weight"),
            ("visual.conv1.", "visual.patch_embed."),
            ("visual.ln_pre.", "visual.norm_pre."),
            ("visual.ln_post.", "visual.norm."),
            ("visual.transformer.resblocks.", "visual.blocks."),
            ("transformer.resblocks.", "text.blocks."),
            ("token_embedding.", "text.embeddings.word."),
            ("positional_embedding", "text.position.weight"),
            ("ln_final.", "text.norm."),
            ("text_projection", "text_projection.weight"),
            ("logit_scale", "logit_scale.logit_scale"),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        for old, new in (
            (".ln_1.", ".norm1."),
            (".ln_2.", ".norm2."),
            (".attn.in_proj_", ".attn.qkv."),
            (".attn.out_proj.", ".attn.proj."),
            (".mlp.c_fc.", ".mlp.fc1."),
            (".mlp.c_proj.", ".mlp.fc2."),
        ):
            name = name.replace(old, new)
        state[name] = value
    target = model.state_dict()
    assert state.keys() == target.keys()
    model.load_state_dict({name: state[name].view_as(target[name]) for name in target})
    return model


def uneven(model, seed=0):
    """Every weight random, none at a value that would hide it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(2.9)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=1.0 if "ln_" in name and "weight" in name else 0.0, std=0.2)
    return model.eval()


def compare(settings, batch):
    """The largest differences of image features, text features and loss."""
    theirs = uneven(open_clip.CLIP(**settings))
    model = ours(theirs, settings)
    side, words = settings["vision_cfg"]["image_size"], settings["text_cfg"]["vocab_size"]
    images, ids = torch.randn(batch, 3, side, side), torch.randint(1, words - 1, (batch, 12))
    ids[torch.arange(batch), torch.randint(2, 12, (batch,))] = words - 1
    padded = F.pad(ids, (0, settings["text_cfg"]["context_length"] - 12))
    with torch.no_grad():
        image_feat, text_feat, scale = theirs(images, padded)
        text = model.encode_text(ids, torch.ones_like(ids))
        image = model.encode_image(images, text)
        loss = open_clip.ClipLoss()(image_feat, text_feat, scale)
        logits = image.image_feat @ text.text_feat.T / model.temperature()
        own = torch.arange(batch)
        loss_here = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    pairs = ((image_feat, image.image_feat), (text_feat, text.text_feat), (loss, loss_here))
    return [(a - b).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_features_and_loss_are_open_clips(quick_gelu):
    assert max(compare(TINY | {"quick_gelu": quick_gelu}, 6)) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-S-16", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32"])
def test_features_and_loss_are_open_clips_at_full_size(name):
    settings = open_clip.get_model_config(name)
    assert max(compare(settings, 4)) <= 2e-5


def test_the_two_activations_differ():
    theirs = uneven(open_clip.CLIP(**TINY))
    a, b = (ours(theirs, TINY | {"quick_gelu": quick}) for quick in (False, True))
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(
        a.encode_image(images).image_feat, b.encode_image(images).image_feat, **TOLERANCE
    )


def test_the_towers_start_as_wide_as_open_clips():
    """The spread of every weight, to 10 %; constants exactly."""
    settings = TINY | {"text_cfg": TINY["text_cfg"] | {"vocab_size": 500}}
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**settings)
    mapped = ours(theirs, settings).state_dict()
    torch.manual_seed(1)
    config = ours(theirs, settings).config
    fresh = CLIP(config, PruningConfig()).state_dict()
    for name, value in fresh.items():
        if value.numel() == 1 or value.std() == 0:
            torch.testing.assert_close(value, mapped[name])
        elif value.numel() >= 1000:
            assert value.std().item() == pytest.approx(mapped[name].std().item(), rel=0.1), name


# ---- pruning


@pytest.mark.parametrize(
    ("patch_size", "pruning", "lengths"),
    [
        (16, {"keep_base": "released"}, (179, 130, 80)),
        (16, {}, (178, 129, 80)),
        (32, {"keep_base": "released", "empty_stage": "zero_token"}, (51, 52, 53)),
        (32, {"keep_base": "released"}, (50, 50, 50)),
        (32, {}, (46, 33, 21)),
    ],
)
def test_as_many_tokens_stay_as_published_or_as_the_tower_says(patch_size, pruning, lengths):
    vision = {"image_size": 224, "patch_size": patch_size, "width": 16, "depth": 12, "heads": 1}
    model = tiny_clip(ELIP, vision=vision, **pruning)
    images, ids = make_inputs(model, batch=2)
    image = model.encode_image(images, model.encode_text(ids, torch.ones_like(ids)))
    assert image.keep.lengths == lengths
    assert image.image_embeds.shape[1] == lengths[-1]
    if (patch_size, lengths) == (32, (51, 52, 53)):
        # Nothing is merged, so all patches still carry themselves.
        assert image.keep.origin[0].tolist() == [-1, *range(49), -2, -3, -4]


def slow_attention(attn, x):
    """x: (L, D) -> output (L, D) and the whole attention (H, L, L)."""
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).view(len(x), 3, attn.heads, -1).unbind(1)
    rows = torch.einsum("qhd,khd->hqk", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=-1)
    out = torch.einsum("hqk,khd->qhd", rows, v).flatten(1)
    return F.linear(out, attn.proj.weight, attn.proj.bias), rows


def slow_block(block, x):
    out, rows = slow_attention(block.attn, F.layer_norm(x, x.shape[1:], *norm(block.norm1)))
    x = x + out
    hidden = block.mlp.fc1(F.layer_norm(x, x.shape[1:], *norm(block.norm2)))
    return x + block.mlp.fc2(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))), rows


def norm(module):
    return module.weight, module.bias, 1e-5


def slow_guide(model, ids, guide):
    """(L,) -> what one caption says to the pruning, (D,), before the class token is known."""
    state = model.text(ids[None])[0][0, ids.argmax()]
    if guide == "unprojected":
        return state
    feat = state @ model.text_projection.weight
    return torch.stack([(row * feat).sum() for row in model.visual_proj.weight]) / feat.norm()


def slow_image(model, image, t, guide):
    """(3, S, S), (D,) -> image_feat (E,), and the patches kept at each stage."""
    visual, side = model.visual, model.config.vision.patch_size
    weight = visual.patch_embed.weight.flatten(1)
    grid = image.shape[-1] // side
    x = [visual.cls_token.weight[0, 0]]
    for i in range(grid):
        for j in range(grid):
            patch = image[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            x.append(weight @ patch.flatten())
    x = torch.stack(x) + visual.pos_embed.weight[0]
    x = F.layer_norm(x, x.shape[1:], *norm(visual.norm_pre))
    stages = {stage.layer: stage for stage in visual.pruning.stages}
    kept_sets = []
    for layer, block in enumerate(visual.blocks):
        if layer in stages:
            with torch.no_grad():
                length = x[0].norm() / t.norm() if guide == "rescaled" else 1.0
                z = torch.cat([0.2 * length * t[None] + 0.8 * x[:1], x[1:]])
                for ahead in range(stages[layer].lookahead):
                    z, rows = slow_block(visual.blocks[layer + ahead], z)
                score = rows.mean(dim=0)[0, 1:].tolist()
            count = int(grid * grid * stages[layer].keep_ratio)
            order = sorted(range(len(score)), key=lambda n: -score[n])
            kept, losers = sorted(order[:count]), order[count:]
            total = sum(score[n] for n in losers) + 1e-6
            merged = sum(score[n] / total * x[1 + n] for n in losers)
            x = torch.stack([x[0], *(x[1 + n] for n in kept), merged])
            kept_sets.append(kept)
        x, _ = slow_block(block, x)
    pooled = F.layer_norm(x[0], x.shape[1:], *norm(visual.norm)) @ model.visual_proj.weight
    return pooled / pooled.norm(), kept_sets


def gradients(model, feat):
    """Of every weight, from one loss of the image features."""
    model.zero_grad()
    target = torch.linspace(-1, 1, feat.numel()).view_as(feat)
    (feat * target).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("guide", ["rescaled", "released", "unprojected"])
def test_pruned_images_their_kept_patches_and_gradients_are_the_slow_loops(guide, monkeypatch):
    from elip_ds.towers import pruning

    seen = []

    def watched(*args):
        pruned = prune_tokens(*args)
        seen.append(pruned.kept)
        return pruned

    prune_tokens = pruning.prune_tokens
    monkeypatch.setattr(pruning, "prune_tokens", watched)
    model = tiny_clip(SMALL, guide=guide)
    images, ids = make_inputs(model)
    fast = model.encode_image(images, model.encode_text(ids, torch.ones_like(ids))).image_feat
    slow, kept = [], []
    for image, row in zip(images, ids, strict=True):
        feat, kept_here = slow_image(model, image, slow_guide(model, row, guide).detach(), guide)
        slow.append(feat)
        kept.append(kept_here)
    slow = torch.stack(slow)
    torch.testing.assert_close(fast, slow, **TOLERANCE)
    for b, kept_here in enumerate(kept):
        assert [stage[b].tolist() for stage in seen] == kept_here
    a, b = gradients(model, fast), gradients(model, slow)
    assert a.keys() == b.keys() == {n for n, _ in model.named_parameters() if "visual" in n}
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4, msg=name)


def test_the_guide_is_the_joint_vector_taken_back_and_carries_no_gradient():
    model = tiny_clip(SMALL)
    _, ids = make_inputs(model)
    text = model.encode_text(ids, torch.ones_like(ids))
    torch.testing.assert_close(text.text_class, text.text_feat @ model.visual_proj.weight.T)
    assert not text.text_class.requires_grad and text.text_feat.requires_grad


def test_released_the_text_hardly_turns_what_it_is_mixed_into_and_rescaled_it_does():
    """The reason for the departure, by cosines, at the start of training."""
    torch.manual_seed(0)
    vision = ViTConfig(224, 16, 384, 1, 6, layout="clip")
    text = CLIPTextConfig(100, 384, 1, 6)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_dim=384), PruningConfig())
    guide = model.encode_text(torch.arange(20).view(2, 10), torch.ones(2, 10)).text_class
    token = model.visual.norm_pre(torch.randn(2, 384))
    released, rescaled = (
        F.cosine_similarity(0.8 * token + 0.2 * mixed_in, token)
        for mixed_in in (guide, match_norm(guide, token))
    )
    assert (released > 0.9995).all() and (rescaled < 0.98).all()


def test_without_a_guide_the_image_keeps_all_its_tokens():
    pruned, plain = tiny_clip(SMALL), tiny_clip()
    images, _ = make_inputs(pruned)
    image = pruned.encode_image(images)
    assert image.keep.lengths == () and image.image_embeds.shape == (3, 65, 32)
    assert torch.equal(image.image_feat, plain.encode_image(images).image_feat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_features_have_unit_norm_in_fp32(dtype):
    model = tiny_clip(SMALL).to(dtype)
    images, ids = make_inputs(model)
    text = model.encode_text(ids, torch.ones_like(ids))
    image = model.encode_image(images.to(dtype), text)
    assert text.text_embeds.dtype == image.image_embeds.dtype == text.text_class.dtype == dtype
    for feat in (text.text_feat, image.image_feat):
        assert feat.dtype == torch.float32 and feat.shape == (3, 16)
        torch.testing.assert_close(feat.norm(dim=1), torch.ones(3))


# ---- scale


@pytest.mark.parametrize(("start", "scale"), [(-1.0, 1.0), (0.5, math.exp(0.5)), (6.0, 100.0)])
def test_the_scale_is_clamped_and_its_gradient_passes_through(start, scale):
    module = LogitScale(start)
    value = module()
    value.sum().backward()
    assert value.shape == (1,) and value.item() == pytest.approx(scale)
    assert module.logit_scale.grad.item() == pytest.approx(scale)


def test_the_temperature_is_one_over_the_scale():
    model = tiny_clip()
    assert model.temperature().item() == pytest.approx(0.07)
    assert model.logit_scale().item() == pytest.approx(1 / 0.07)


# ---- settings that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guide": "best"}, r"model\.guide='best': choose rescaled, released, unprojected"),
        (
            {"guide": "unprojected", "text": {"width": 64}},
            r"unprojected needs model\.text\.width=64 equal to model\.vision\.width=32; make them",
        ),
        ({"stages": [Stage(3, 2, 0.5)]}, r"pruning\.stages\[0\]: layer 3 \+ lookahead 2"),
        ({"stages": [Stage(1, 1, 0.01)]}, r"keep_ratio=0.01 of 64 patches keeps none"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        tiny_clip(**change)
    assert "\n" not in str(caught.value)


def test_widths_may_differ_where_the_guide_is_projected():
    model = tiny_clip(SMALL, text={"width": 64})
    images, ids = make_inputs(model)
    image = model.encode_image(images, model.encode_text(ids, torch.ones_like(ids)))
    assert image.keep.lengths == (53, 34)


def test_a_step_that_reads_the_joint_space_alone_gets_the_same_features():
    batch = random_batch(8)
    whole, lean = tiny_task(model="clip").model, tiny_task(model="clip").model
    whole.visual.class_only = whole.text.ends_only = False
    for model, tokens in ((whole, None), (lean, 1)):
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        image = model.encode_image(batch.images, text)
        assert tokens in (None, text.text_embeds.shape[1])
        assert tokens in (None, image.image_embeds.shape[1])
        model.found = text.text_feat, image.image_feat, image.keep.origin
    assert torch.equal(whole.found[2], lean.found[2])
    for a, b in zip(whole.found[:2], lean.found[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
