"""METER whole: its parts against open_clip and transformers, the pruned pass, fusion and one step
against slow oracles, and what a model promises.

B batch, L text tokens, N patches, M image tokens that remain, D width.
"""

import dataclasses
import inspect
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, tiny_task, tiny_vocabulary, tiny_words
from towers.test_coattention import slow_coattend
from towers.test_med import largest, put, uneven
from towers.test_pruning import METER as STAGES
from towers.test_pruning import slow_attention

from elip_ds.config import PruningConfig, Stage, load_config
from elip_ds.engine.optim import parameter_groups
from elip_ds.engine.schedule import learning_rate
from elip_ds.errors import UserError
from elip_ds.models.meter import METER, METERConfig
from elip_ds.objectives import Pass, Progress, StepContext
from elip_ds.objectives.itm import draw_matches
from elip_ds.objectives.mlm import mask_words
from elip_ds.tasks import build_pretrain
from elip_ds.towers import ViT, ViTConfig
from elip_ds.towers.coattention import CoAttentionConfig
from elip_ds.towers.roberta import RoBERTaConfig

PROGRESS = Progress(step=3, samples_seen=24, samples_per_epoch=64)
SMALL = [Stage(1, 2, 0.7), Stage(3, 1, 0.4)]
TINY = METERConfig(
    vision=ViTConfig(
        image_size=32,
        patch_size=8,
        width=32,
        depth=4,
        heads=2,
        layout="clip",
        activation="quick_gelu",
    ),
    text=RoBERTaConfig(vocab_size=60, width=32, depth=2, heads=2, max_positions=14, dropout=0.0),
    fusion=CoAttentionConfig(width=24, depth=2, heads=3, dropout=0.0),
)
BASE = METERConfig(
    text=RoBERTaConfig(dropout=0.0), fusion=CoAttentionConfig(dropout=0.0)
)  # what is left out is the default
sizes = pytest.mark.parametrize(
    "config", [TINY, pytest.param(BASE, marks=pytest.mark.slow)], ids=["tiny", "base"]
)


def make_model(config=TINY, stages=(), **pruning):
    return uneven(METER(config, PruningConfig(list(stages), **pruning))).eval()


def make_batch(config=TINY, batch=3, length=12):
    """images (B, 3, H, W); input_ids, attention_mask (B, L) of different lengths, the last 2."""
    draw = torch.Generator().manual_seed(2)
    lengths = torch.linspace(length, 2, batch).int().unsqueeze(1)
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(2, config.text.vocab_size, (batch, length), generator=draw)
    images = torch.randn(batch, 3, *config.vision.pixels, generator=draw)
    return images, torch.where(mask.bool(), ids, 1), mask


@pytest.fixture
def model():
    return tiny_task(model="meter").model


# ---- open_clip's ViT with our weights in it


def their_vit(ours):
    """open_clip's ViT of one block more than ours, as CLIP has it; what it computes up to ours."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    config = ours.config
    theirs = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        layers=config.depth + 1,
        heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        act_layer=QuickGELU,
    )
    theirs.conv1.weight.data.copy_(ours.patch_embed.weight.data)
    theirs.class_embedding.data.copy_(ours.cls_token.weight.data[0, 0])
    theirs.positional_embedding.data.copy_(ours.pos_embed.weight.data[0])
    put(theirs.ln_pre, ours.norm_pre)
    put(theirs.ln_post, ours.norm)
    for block, mine in zip(theirs.transformer.resblocks, ours.blocks, strict=False):
        put(block.ln_1, mine.norm1)
        put(block.ln_2, mine.norm2)
        block.attn.in_proj_weight.data.copy_(mine.attn.qkv.weight.data)
        block.attn.in_proj_bias.data.copy_(mine.attn.qkv.bias.data)
        put(block.attn.out_proj, mine.attn.proj)
        put(block.mlp.c_fc, mine.mlp.fc1)
        put(block.mlp.c_proj, mine.mlp.fc2)
    return theirs.eval()


@sizes
@torch.no_grad()
def test_the_vision_tower_equals_clips_without_its_last_block(config):
    ours = uneven(ViT(config.vision, PruningConfig())).eval()
    theirs = their_vit(ours)
    seen = []
    theirs.transformer.resblocks[-2].register_forward_hook(lambda _, args, out: seen.append(out))
    images, _, _ = make_batch(config, batch=2)
    theirs(images)
    tokens, _ = ours(images)
    assert tokens.shape == (2, 1 + config.vision.num_patches, config.vision.width)
    assert largest(tokens, theirs.ln_post(seen[0])) <= 2e-5


# ---- transformers' masked-word head with our weights in it


@sizes
@torch.no_grad()
def test_word_logits_equal_those_of_an_untied_bert_head_of_transformers(config):
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLMPredictionHead

    head = uneven(METER(config, PruningConfig())).mlm_head
    theirs = BertLMPredictionHead(
        BertConfig(hidden_size=config.fusion.width, vocab_size=config.text.vocab_size)
    )
    put(theirs.transform.dense, head.dense)
    put(theirs.transform.LayerNorm, head.norm)
    theirs.decoder.weight.data.copy_(head.decoder.weight.data)
    theirs.bias.data.copy_(head.bias.data)
    theirs.decoder.bias = theirs.bias
    hidden = torch.randn(3, 5, config.fusion.width, generator=torch.Generator().manual_seed(4))
    assert largest(head(hidden), theirs(hidden)) <= 2e-5


# ---- the pruned pass: spec 1.2, one image at a time, nothing shared with the package but weights


def slow_block(block, x):
    """x: (L, D) -> x after the block, attention (H, L, L)."""
    out, rows = slow_attention(block.attn, slow_norm(x, block.norm1))
    x = x + out
    hidden = slow_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias, rows


def slow_norm(x, norm):
    centred = x - x.mean(dim=-1, keepdim=True)
    spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * norm.weight + norm.bias


def slow_embed(vit, image):
    """(3, S, S) -> (1 + N, D), patch by patch, row by row."""
    p = vit.config.patch_size
    tokens = [vit.cls_token.weight[0, 0]]
    for i in range(vit.config.grid[0]):
        for j in range(vit.config.grid[1]):
            patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            tokens.append(vit.patch_embed.weight.flatten(1) @ patch.flatten())
    return slow_norm(torch.stack(tokens) + vit.pos_embed.weight[0], vit.norm_pre)


def slow_prune(vit, stage, x, t, base):
    """x: (L, D), t: (D,) -> x', kept numbers after the class token."""
    with torch.no_grad():
        z = torch.cat([(0.2 * t + 0.8 * x[0]).unsqueeze(0), x[1:]])
        for block in vit.blocks[stage.layer : stage.layer + stage.lookahead]:
            z, rows = slow_block(block, z)
        score = rows.mean(dim=0)[0, 1:].tolist()
        order = sorted(range(len(score)), key=lambda n: -score[n])
        count = int(base * stage.keep_ratio)
        kept, losers = sorted(order[:count]), order[count:]
        total = sum(score[n] for n in losers) + 1e-6
    merged = sum(score[n] / total * x[1 + n] for n in losers)
    return torch.stack([x[0], *(x[1 + n] for n in kept), merged]), kept


def slow_vit(vit, images, texts, stages, base):
    """texts: (B, D), or None for no pruning -> tokens of each image, and the kept numbers of each
    stage.
    """
    at = {stage.layer: stage for stage in stages} if texts is not None else {}
    outputs, kept_sets = [], []
    for b, image in enumerate(images):
        x, kept_here = slow_embed(vit, image), []
        for layer, block in enumerate(vit.blocks):
            if layer in at:
                x, kept = slow_prune(vit, at[layer], x, texts[b], base)
                kept_here.append(kept)
            x, _ = slow_block(block, x)
        outputs.append(slow_norm(x, vit.norm))
        kept_sets.append(kept_here)
    return outputs, kept_sets


def survivors(kept_sets, num_patches):
    """Of each image the patches that are still tokens of their own; a merged token is none."""
    result = []
    for stages in kept_sets:
        tokens = list(range(num_patches))
        for kept in stages:
            tokens = [tokens[n] for n in kept] + [None]
        result.append([n for n in tokens if n is not None])
    return result


@pytest.mark.parametrize(
    ("config", "stages", "keep_base"),
    [
        (TINY, SMALL, "patches"),
        pytest.param(BASE, STAGES, "patches", marks=pytest.mark.slow),
        pytest.param(BASE, STAGES, "released", marks=pytest.mark.slow),
    ],
    ids=["tiny", "base", "base released"],
)
@torch.no_grad()
def test_the_pruned_image_equals_the_slow_loop_in_outputs_and_kept_sets(config, stages, keep_base):
    model = make_model(config, stages, keep_base=keep_base)
    images, ids, mask = make_batch(config, batch=2)
    text = model.encode_text(ids, mask)
    image = model.encode_image(images, text)
    base = 49 if keep_base == "released" else config.vision.num_patches
    states = model.text(ids, mask)
    tokens, kept_sets = slow_vit(model.visual, images, states[:, 0], stages, base)
    assert largest(image.image_embeds, torch.stack(tokens)) <= 2e-5
    kept = [[n for n in row if n >= 0] for row in image.keep.origin.tolist()]
    assert kept == survivors(kept_sets, config.vision.num_patches)


def test_the_pruned_image_has_the_gradients_of_the_slow_loop():
    model = make_model(stages=SMALL)
    images, ids, mask = make_batch()
    text = model.encode_text(ids, mask)
    pull = torch.randn(1000, 32, generator=torch.Generator().manual_seed(5))
    parameters = dict(model.visual.named_parameters())
    fast = model.encode_image(images, text).image_embeds
    slow = torch.stack(slow_vit(model.visual, images, text.text_class, SMALL, 16)[0])
    losses = ((x * pull[: x.shape[1]]).sum() for x in (fast, slow))
    fast, slow = (torch.autograd.grad(loss, list(parameters.values())) for loss in losses)
    for name, mine, theirs in zip(parameters, fast, slow, strict=True):
        assert theirs.any(), name
        largest_part = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, atol=1e-5 * largest_part, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("image_size", "keep_base", "kept"),
    [
        (224, "released", (44, 34, 22)),
        (288, "released", (44, 34, 22)),
        (224, "patches", (176, 137, 88)),
        (288, "patches", (291, 226, 145)),
    ],
)
@torch.no_grad()
def test_as_many_tokens_remain_as_published_and_as_meant(image_size, keep_base, kept):
    vision = dataclasses.replace(BASE.vision, image_size=image_size, width=16, heads=2)
    text = dataclasses.replace(TINY.text, width=16)
    config = METERConfig(vision=vision, text=text, fusion=TINY.fusion)
    model = make_model(config, STAGES, keep_base=keep_base)
    images, ids, mask = make_batch(model.config, batch=1)
    image = model.encode_image(images, model.encode_text(ids, mask))
    assert image.keep.lengths == tuple(count + 2 for count in kept)
    assert image.image_embeds.shape == (1, kept[-1] + 2, 16)
    whole = model.encode_image(images)
    assert whole.image_embeds.shape == (1, 1 + (image_size // 16) ** 2, 16)


# ---- fusion and one training step


def slow_fuse(model, states, tokens, mask):
    """states (B, L, D), tokens (B, M, D) -> of each sample words (length, D), pooled (2 D)."""
    text_type, image_type = model.token_type_embeddings.weight
    to_text, to_image = model.cross_modal_text_transform, model.cross_modal_image_transform
    text = [x @ to_text.weight.T + to_text.bias + text_type for x in states]
    image = [x @ to_image.weight.T + to_image.bias + image_type for x in tokens]
    layers = model.cross_modal_text_layers, model.cross_modal_image_layers
    results = []
    for words, patches in slow_coattend(*layers, text, image, mask, model.config.fusion.heads):
        pooled = [
            torch.tanh(x[0] @ pooler.weight.T + pooler.bias)
            for x, pooler in (
                (words, model.cross_modal_text_pooler),
                (patches, model.cross_modal_image_pooler),
            )
        ]
        results.append((words, torch.cat(pooled)))
    return results


@sizes
@torch.no_grad()
def test_fusion_equals_the_formulas(config):
    model = make_model(config)
    images, ids, mask = make_batch(config)
    text, image = model.encode_text(ids, mask), model.encode_image(images)
    fused = model.fuse(text, image)
    assert fused.text.shape == (3, 12, config.fusion.width)
    assert fused.pooled.shape == (3, model.pooled_width) == (3, 2 * config.fusion.width)
    slow = slow_fuse(model, text.text_embeds, image.image_embeds, mask)
    for b, (words, pooled) in enumerate(slow):
        assert largest(fused.text[b, : len(words)], words) <= 2e-5
        assert largest(fused.pooled[b], pooled) <= 2e-5


def slow_words(model, hidden):
    head = model.mlm_head
    hidden = hidden @ head.dense.weight.T + head.dense.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    hidden = F.layer_norm(hidden, hidden.shape[-1:], head.norm.weight, head.norm.bias, 1e-12)
    return hidden @ head.decoder.weight.T + head.bias


def slow_pass(task, images, ids, mask, stages):
    """Text, the images pruned by it, fusion: of each sample words, pooled."""
    model = task.model
    states = model.text(ids, mask)
    tokens, _ = slow_vit(model.visual, images, states[:, 0], stages, 16)
    return slow_fuse(model, states, tokens, mask)


def test_a_step_equals_masked_words_and_random_pairs_each_by_a_pass_of_its_own():
    words = ["model.vision.layout=clip", "model.vision.activation=quick_gelu"]
    task = uneven(tiny_task(*words, "objectives.mlm.probability=0.3", model="meter"))
    stages = task.model.visual.pruning.stages
    batch = random_batch(8)
    loss = task(batch, PROGRESS)
    assert loss.values.keys() == {"mlm", "itm"}

    # A second context draws the same masks and pairs: noise is keyed by step and sample.
    context = StepContext(batch, {}, PROGRESS, seed=42)
    ids, mask = batch.input_ids, batch.attention_mask
    masked, selected = mask_words(
        ids,
        context.noise("mlm", 36),
        0.3,
        vocab_size=64,
        special_ids=tiny_vocabulary().special_ids,
    )
    assert (masked != ids).any()
    terms = []
    for b, (words, _) in enumerate(slow_pass(task, batch.images, masked, mask, stages)):
        for position in selected[b].nonzero().flatten().tolist():
            log_p = slow_words(task.model, words[position]).log_softmax(dim=0)
            terms.append(-log_p[ids[b, position]])
    assert len(terms) > 8
    mlm = sum(terms) / len(terms)

    rows, label = draw_matches(context.noise("itm", 2))
    head = task.objectives["itm"].head
    terms = []
    pairs = slow_pass(task, batch.images[rows], ids, mask, stages)
    for b, (_, pooled) in enumerate(pairs):
        log_p = (pooled @ head.weight.T + head.bias).log_softmax(dim=0)
        terms.append(-log_p[label[b]])
    itm = sum(terms) / 8
    assert loss.values["mlm"].item() == pytest.approx(mlm.item(), abs=2e-5, rel=1e-5)
    assert loss.values["itm"].item() == pytest.approx(itm.item(), abs=2e-5, rel=1e-5)
    assert loss.total.item() == pytest.approx((mlm + itm).item(), abs=4e-5, rel=1e-5)

    parameters = dict(task.named_parameters())
    fast, slow = (
        torch.autograd.grad(total, list(parameters.values())) for total in (loss.total, mlm + itm)
    )
    for name, mine, theirs in zip(parameters, fast, slow, strict=True):
        largest_part = theirs.abs().max().item()
        assert largest_part > 0, name
        torch.testing.assert_close(mine, theirs, atol=2e-4 * largest_part, rtol=1e-3, msg=name)


def test_a_step_reads_two_texts_and_two_sets_of_images():
    task = tiny_task(model="meter")
    counts = Counter()
    for name, module in {
        "text": task.model.text,
        "image": task.model.visual,
        "fusion": task.model.cross_modal_text_layers[0],
        "words": task.model.mlm_head,
        "match": task.objectives["itm"].head,
    }.items():
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    total = task(random_batch(4), PROGRESS).total
    assert counts == {"text": 2, "image": 2, "fusion": 2, "words": 1, "match": 1}
    counts.clear()
    total.backward()
    assert counts == {"words": 1}  # made again rather than kept
    assert task.teacher is None


def test_masked_text_prunes_the_image_of_the_masked_pass_and_leaks_no_word():
    task = tiny_task(model="meter")
    batch = random_batch(8)
    context = StepContext(batch, {"student": task.model}, PROGRESS, seed=42)
    for objective in task.objectives.values():
        objective(context)
    assert set(context.passes) == {
        Pass("text"),
        Pass("text", text="masked"),
        Pass("image", guide="masked"),
        Pass("image", view="matched"),
        Pass("seen", guide="masked"),  # which MLM's pairs are fused with
        Pass("seen", view="matched"),
    }


# ---- what a model promises


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_have_the_shapes_they_promise_and_no_joint_space(model, tiny_batch, dtype):
    model.to(dtype)
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images.to(dtype), text)
    fused = model.fuse(text, image)
    assert text.text_feat is None and image.image_feat is None and model.embed_dim == 0
    assert image.image_embeds.dtype == fused.pooled.dtype == dtype
    assert fused.text.shape == (8, 12, 32) and fused.pooled.shape == (8, 64)
    assert model.word_logits(fused.text).shape == (8, 12, 64)
    assert model.word_logits(fused.text[:0, 0]).shape == (0, 64)
    assert list(inspect.signature(model.encode_text).parameters) == ["input_ids", "attention_mask"]
    assert model.gives == {"fusion", "words"} and model.prunes_in_match


def test_padding_changes_neither_the_pooled_pair_nor_a_real_token(model, tiny_batch):
    mask = tiny_batch.attention_mask
    results = []
    for ids in (tiny_batch.input_ids, torch.where(mask.bool(), tiny_batch.input_ids, 33)):
        text = model.encode_text(ids, mask)
        image = model.encode_image(tiny_batch.images, text)
        fused = model.fuse(text, image)
        results.append((image.image_embeds, fused.text[mask.bool()], fused.pooled))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_text_guides_by_its_first_state_before_the_transform_and_without_a_gradient(
    model, tiny_batch
):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    assert torch.equal(text.text_class, model.text(text.input_ids, text.attention_mask)[:, 0])
    with torch.no_grad():
        model.cross_modal_text_transform.weight.fill_(float("nan"))
    image = model.encode_image(tiny_batch.images, text)
    image.image_embeds.sin().sum().backward()
    assert all(parameter.grad is None for parameter in model.text.parameters())
    assert model.visual.patch_embed.weight.grad.any()
    opposite = dataclasses.replace(text, text_class=-50 * text.text_class)
    other = model.encode_image(tiny_batch.images, opposite)
    assert not torch.equal(image.keep.owner, other.keep.owner)


def test_without_a_guide_the_image_keeps_all_its_tokens(model, tiny_batch):
    image = model.encode_image(tiny_batch.images)
    assert image.image_embeds.shape == (8, 1 + 16, 32) and image.keep.lengths == ()


def test_each_stream_of_the_pair_depends_on_the_other(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images)
    fused = model.fuse(text, image).pooled
    rolled = torch.arange(8).roll(1)
    other_image = model.fuse(text, image.take(rolled)).pooled
    other_text = model.fuse(text.take(rolled), image).pooled
    assert not torch.allclose(fused[:, :32], other_image[:, :32])  # the text's half
    assert not torch.allclose(fused[:, 32:], other_text[:, 32:])  # the image's half


@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_activations_changes_no_gradient(tiny_batch, mode):
    def gradients(*words):
        task = tiny_task(*words, model="meter")
        task(tiny_batch, PROGRESS).total.backward()
        return {n: p.grad for n, p in task.named_parameters()}

    flags = [f"model.{part}.recompute={mode}" for part in ("vision", "text", "fusion")]
    stored, recomputed = gradients(), gradients(*flags)
    for name in stored:
        assert torch.equal(stored[name], recomputed[name]), name


def test_the_two_objectives_together_reach_every_parameter():
    task = tiny_task(model="meter")
    task(random_batch(8), PROGRESS).total.backward()
    assert [n for n, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_parameters_have_the_names_that_converted_weights_use():
    names = set(make_model().state_dict())
    for name in (
        "visual.norm_pre.weight",
        "visual.blocks.3.attn.qkv.weight",
        "text.embeddings.token_type.weight",
        "text.layers.1.mlp_norm.bias",
        "cross_modal_text_transform.weight",
        "cross_modal_image_transform.bias",
        "token_type_embeddings.weight",
        "cross_modal_text_layers.1.cross.key_value.weight",
        "cross_modal_image_layers.0.cross_norm.weight",
        "cross_modal_text_pooler.weight",
        "cross_modal_image_pooler.bias",
        "mlm_head.dense.weight",
        "mlm_head.norm.bias",
        "mlm_head.decoder.weight",
        "mlm_head.bias",
    ):
        assert name in names, name
        names.discard(name)
    assert "visual.patch_embed.bias" not in names and "mlm_head.decoder.bias" not in names


def test_new_parts_start_small_and_normal_and_their_biases_at_zero():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, fusion=CoAttentionConfig(depth=1, mlp_ratio=1.0))
    model = METER(config, PruningConfig())
    for name, parameter in model.named_parameters():
        if name.startswith(("visual", "text.")):
            continue
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif "norm" in name and "weight" in name:
            assert (parameter == 1).all(), name
        else:
            assert not parameter.any(), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.text.width=64"],
            r"model\.text\.width=64 must equal model\.vision\.width=32: METER's first text token",
        ),
        (
            ["model.vision.depth=2"],
            r"pruning\.stages\[1\]: layer 2 \+ lookahead 1 is beyond the tower's 2 blocks",
        ),
        (["model.fusion.heads=5"], r"model\.fusion\.width=32 does not divide into heads=5"),
        (["data.text_length=17"], r"data\.text_length=17 exceeds the 16 tokens"),
        (["model.text.variant=roberta", "data.text_length=16"], r"exceeds the 14 tokens"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_config(tiny_words(*words, model="meter"))


def test_two_widths_are_fine_where_nothing_is_pruned(tiny_batch):
    words = tiny_words("model.text.width=64", "pruning.stages=[]", model="meter")
    config = load_config(words)
    model = METER(config.model, config.pruning)
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    assert model.fuse(text, model.encode_image(tiny_batch.images, text)).pooled.shape == (8, 64)


# ---- the published recipe


def test_the_default_config_is_the_published_base_model():
    config = METER.Config()
    assert config.vision == ViTConfig(288, 16, 768, 11, 12, layout="clip", activation="quick_gelu")
    assert (config.text.vocab_size, config.text.depth, config.text.max_length) == (50265, 12, 512)
    assert dataclasses.astuple(config.fusion) == (768, 6, 12, 4.0, 0.1, "none")


def test_the_preset_is_the_published_recipe():
    config = load_config(["preset=meter_4m", "data.root=/data"])
    assert config.model == METER.Config()
    assert config.pruning.stages == STAGES and config.pruning.keep_base == "patches"
    assert (config.data.text_length, config.data.tokenizer) == (50, "roberta")
    assert (config.data.crop_scale, config.data.flip) == (None, False)
    assert list(config.objectives) == ["mlm", "itm"]
    mlm, itm = config.objectives.values()
    assert (mlm.probability, mlm.alpha, mlm.guide, itm.negatives) == (0.15, 0, "masked", "random")
    assert [s.shards.split("/")[2] for s in config.data.train] == ["coco", "vg", "sbu", "cc3m"]

    def rate(step):
        return learning_rate(4096 * step, config.optim, config.schedule, samples_per_epoch=10**6)

    assert rate(0) == 0 and rate(5000) == pytest.approx(5e-6)
    assert rate(10_000) == pytest.approx(1e-5) and rate(55_000) == pytest.approx(5e-6)
    assert rate(100_000) == 0
    assert config.batching.global_batch_size == 4096


def test_the_preset_gives_each_parameter_the_published_rate_and_decay():
    config = load_config(
        [
            "preset=meter_4m",
            *(f"model.{part}.width=24" for part in ("vision", "text", "fusion")),
            "model.vision.depth=2",
            "model.text.depth=1",
            "model.text.vocab_size=64",
            "model.fusion.depth=1",
            "pruning.stages=[]",
        ]
    )
    task = build_pretrain(config, tiny_vocabulary())
    found = {
        id(parameter): (group["lr_factor"], group["weight_decay"])
        for group in parameter_groups(task, config.optim)
        for parameter in group["params"]
    }
    # METER by its own names: rates by what contains cross_modal or is a head; no decay for biases
    # and LayerNorms, but CLIP's ln_1, ln_2, ln_pre and ln_post are not called that.
    for name, parameter in task.named_parameters():
        fast = "cross_modal" in name or name.startswith(("model.mlm_head", "objectives.itm"))
        is_norm = "norm" in name and not name.startswith("model.visual")
        exempt = name.endswith("bias") or is_norm
        expected = (5.0 if fast else 1.0, 0.0 if exempt else 0.01)
        assert found[id(parameter)] == expected, name
