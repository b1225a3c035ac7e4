"""BLIP whole: against transformers', against a slow pruned forward, and what a model promises.

B batch, L text tokens, M image tokens that remain, D width.
"""

import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, tiny_task, tiny_words
from towers.test_med import (
    largest,
    make_inputs,
    put,
    put_text,
    their_decoder,
    their_text_config,
    uneven,
)
from towers.test_pruning import slow_vit

from elip_ds.config import PruningConfig, Stage, load_config
from elip_ds.errors import UserError
from elip_ds.models import BLIP, MomentumTwin
from elip_ds.models.blip import BLIPConfig
from elip_ds.objectives import Pass, Progress, Setup, StepContext
from elip_ds.objectives.itm import ITM, ITMConfig
from elip_ds.objectives.lm import LM, LMConfig
from elip_ds.towers import MEDConfig, ViTConfig

ELIP = [Stage(2, 2, 0.9), Stage(4, 6, 0.65), Stage(10, 2, 0.4)]
SMALL = [Stage(1, 2, 0.8), Stage(3, 1, 0.4)]

TINY = BLIPConfig(
    vision=ViTConfig(image_size=32, patch_size=8, width=32, depth=4, heads=4),
    text=MEDConfig(vocab_size=50, width=32, depth=3, heads=2, max_positions=16, dropout=0.0),
    embed_dim=16,
)
BASE = BLIPConfig(text=dataclasses.replace(MEDConfig(), dropout=0.0))

sizes = pytest.mark.parametrize(
    "config", [TINY, pytest.param(BASE, marks=pytest.mark.slow)], ids=["tiny", "base"]
)


def make_model(config, stages=()):
    return uneven(BLIP(config, PruningConfig(list(stages)))).eval()


def make_batch(config, batch=3):
    """images, input_ids, attention_mask."""
    ids, mask, _ = make_inputs(config.text, 1, batch)
    draw = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, *config.vision.pixels, generator=draw), ids, mask


def starting_with(first, ids):
    return torch.cat([torch.full((len(ids), 1), first), ids[:, 1:]], dim=1)


@pytest.fixture
def model():
    return tiny_task(model="blip").model


# ---- transformers' BLIP with our weights in it


def put_vision(theirs, ours):
    theirs.embeddings.class_embedding.data.copy_(ours.cls_token.weight.data)
    theirs.embeddings.position_embedding.data.copy_(ours.pos_embed.weight.data)
    put(theirs.embeddings.patch_embedding, ours.patch_embed)
    put(theirs.post_layernorm, ours.norm)
    for layer, block in zip(theirs.encoder.layers, ours.blocks, strict=True):
        put(layer.layer_norm1, block.norm1)
        put(layer.self_attn.qkv, block.attn.qkv)
        put(layer.self_attn.projection, block.attn.proj)
        put(layer.layer_norm2, block.norm2)
        put(layer.mlp.fc1, block.mlp.fc1)
        put(layer.mlp.fc2, block.mlp.fc2)


def their_retrieval(model, itm_head):
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=model.config.vision.width,
        intermediate_size=int(model.config.vision.width * model.config.vision.mlp_ratio),
        num_hidden_layers=model.config.vision.depth,
        num_attention_heads=model.config.vision.heads,
        image_size=model.config.vision.image_size,
        patch_size=model.config.vision.patch_size,
        layer_norm_eps=1e-6,  # as in the released code; its default here is another
    )
    text = their_text_config(model.config.text, model.config.vision.width)
    theirs = BlipForImageTextRetrieval(
        BlipConfig(
            text_config=text.to_dict() | {"attn_implementation": "eager"},
            vision_config=vision.to_dict(),
            image_text_hidden_size=model.embed_dim,
            attn_implementation="eager",
        )
    )
    put_vision(theirs.vision_model, model.visual)
    put_text(theirs.text_encoder, model.text, decode=False)
    put(theirs.vision_proj, model.vision_proj)
    put(theirs.text_proj, model.text_proj)
    put(theirs.itm_head, itm_head)
    return theirs.eval()


@sizes
@torch.no_grad()
def test_image_joint_space_and_matching_equal_those_of_transformers(config):
    model = make_model(config)
    setup = Setup(model.pooled_width, model.embed_dim, config.text.vocab_size, {}, seed=0)
    head = uneven(ITM(ITMConfig(), setup)).head
    theirs = their_retrieval(model, head)
    images, ids, mask = make_batch(config)
    text, image = model.encode_text(ids, mask), model.encode_image(images)

    joint = theirs(input_ids=ids, attention_mask=mask, pixel_values=images, use_itm_head=False)
    assert largest(image.image_embeds, joint.last_hidden_state) <= 2e-5
    assert largest(text.text_embeds, joint.question_embeds) <= 2e-5
    assert largest(image.image_feat @ text.text_feat.T, joint.itm_score) <= 2e-5
    image_feat = F.normalize(theirs.vision_proj(joint.last_hidden_state[:, 0]), dim=-1)
    assert largest(image.image_feat, image_feat) <= 2e-5
    text_feat = F.normalize(theirs.text_proj(joint.question_embeds[:, 0]), dim=-1)
    assert largest(text.text_feat, text_feat) <= 2e-5

    matched = theirs(
        input_ids=starting_with(config.text.encoder_id, ids),
        attention_mask=mask,
        pixel_values=images,
    )
    fused = model.fuse(text, image)
    assert largest(fused.text, matched.question_embeds) <= 2e-5
    assert largest(head(fused.pooled), matched.itm_score) <= 2e-5


@sizes
@torch.no_grad()
def test_the_captioning_loss_equals_that_of_transformers(config):
    model = make_model(config)
    theirs = their_decoder(model.text, config.vision.width, label_smoothing=0.1)
    images, ids, mask = make_batch(config)
    image = model.encode_image(images)
    started = starting_with(config.text.decoder_id, ids)
    expected = theirs(
        started,
        attention_mask=mask,
        encoder_hidden_states=image.image_embeds,
        encoder_attention_mask=torch.ones(image.image_embeds.shape[:2], dtype=torch.long),
        labels=started.masked_fill(ids == 0, -100),
    )
    logits = model.word_logits(model.decode(ids, mask, image))
    assert largest(logits, expected.logits) <= 2e-5

    setup = Setup(0, 0, config.text.vocab_size, {"[PAD]": 0}, seed=0)
    context = StepContext(random_batch(3), {"student": model}, Progress(0, 0, 1))
    context.texts["clean"], context.passes[Pass("image")] = (ids, mask), image
    context.passes[Pass("text")] = model.encode_text(ids, mask)
    lm = LM(LMConfig(label_smoothing=0.1), setup)
    assert lm(context).values["lm"].item() == pytest.approx(expected.loss.item(), rel=1e-5)


# ---- pruned


@torch.no_grad()
def slow_model(model, images, ids, mask):
    """Text first, then the image by its class state, one image at a time: (B, M, D), kept sets."""
    states = model.text.encode(ids, mask)
    return slow_vit(model.visual, images, states[:, 0])


def patches_in_place(index):
    """Of each image the patches that are still tokens of their own."""
    return [[n for n in row if n >= 0] for row in index.origin.tolist()]


def patches_by_hand(kept_sets, num_patches):
    """The same from the kept numbers of each stage; a merged token counts as no patch."""
    survivors = []
    for stages in kept_sets:
        tokens = list(range(num_patches))
        for kept in stages:
            tokens = [tokens[n] for n in kept] + [None]
        survivors.append([n for n in tokens if n is not None])
    return survivors


@pytest.mark.parametrize(
    ("config", "stages"),
    [(TINY, SMALL), pytest.param(BASE, ELIP, marks=pytest.mark.slow)],
    ids=["tiny", "base"],
)
@torch.no_grad()
def test_the_pruned_image_and_all_that_reads_it_equal_the_slow_loop(config, stages):
    model = make_model(config, stages)
    images, ids, mask = make_batch(config)
    text = model.encode_text(ids, mask)
    image = model.encode_image(images, text)
    tokens, kept_sets = slow_model(model, images, ids, mask)
    assert largest(image.image_embeds, tokens) <= 2e-5
    assert patches_in_place(image.keep) == patches_by_hand(kept_sets, config.vision.num_patches)
    fused, _ = model.text.fuse(starting_with(config.text.encoder_id, ids), mask, tokens)
    assert largest(model.fuse(text, image).text, fused) <= 2e-5
    decoded = model.text.decode(starting_with(config.text.decoder_id, ids), mask, tokens)
    assert largest(model.decode(ids, mask, image), decoded) <= 2e-5


def test_the_pruned_image_has_the_gradients_of_the_slow_loop():
    model = make_model(TINY, SMALL)
    images, ids, mask = make_batch(TINY)
    text = model.encode_text(ids, mask)
    grads = []
    for tokens in (
        model.encode_image(images, text).image_embeds,
        slow_vit(model.visual, images, text.text_class)[0],
    ):
        model.zero_grad(set_to_none=True)
        weight = torch.linspace(0.5, 1.5, tokens.numel()).view_as(tokens)
        (weight * tokens.sin()).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        if not name.startswith("visual"):
            assert grad is None, name
            continue
        scale = grad.abs().max()
        assert ((grad - grads[1][name]).abs().max() / scale).item() < 1e-4, name


def test_at_224_pixels_as_many_tokens_remain_as_published():
    vision = dataclasses.replace(BASE.vision, width=24, heads=2)
    text = dataclasses.replace(TINY.text, width=24, heads=2)
    model = make_model(dataclasses.replace(BASE, vision=vision, text=text), ELIP)
    images, ids, mask = make_batch(model.config, batch=1)
    image = model.encode_image(images, model.encode_text(ids, mask))
    assert image.keep.lengths == (176 + 2, 127 + 2, 78 + 2)
    assert image.image_embeds.shape == (1, 80, 24)
    assert model.encode_image(images).image_embeds.shape == (1, 197, 24)


# ---- what a model promises


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_features_have_unit_norm_in_fp32(model, tiny_batch, dtype):
    model.to(dtype)
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images.to(dtype), text)
    assert text.text_embeds.dtype == image.image_embeds.dtype == dtype
    for feat in (text.text_feat, image.image_feat):
        assert feat.dtype == torch.float32 and feat.shape == (8, 16)
        torch.testing.assert_close(feat.norm(dim=1), torch.ones(8))


def test_fusion_and_decoding_have_the_shapes_they_promise(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images, text)
    fused = model.fuse(text, image)
    assert fused.text.shape == (8, 12, 32) and fused.pooled.shape == (8, model.pooled_width)
    states = model.decode(text.input_ids, text.attention_mask, image)
    assert states.shape == (8, 12, 32)
    assert model.word_logits(states).shape == (8, 12, 64)
    assert model.word_logits(states[:0, 0]).shape == (0, 64)
    assert list(inspect.signature(model.encode_text).parameters) == ["input_ids", "attention_mask"]


def test_each_way_to_read_a_text_starts_it_with_a_word_of_its_own(model, tiny_batch):
    """The last two rows of the word table, whatever the first id was."""
    ids, mask = tiny_batch.input_ids, tiny_batch.attention_mask
    other = starting_with(17, ids)
    with torch.no_grad():
        image = model.encode_image(tiny_batch.images)
    text, other_text = model.encode_text(ids, mask), model.encode_text(other, mask)
    assert not torch.equal(text.text_class, other_text.text_class)
    assert torch.equal(model.fuse(text, image).text, model.fuse(other_text, image).text)
    assert torch.equal(model.decode(ids, mask, image), model.decode(other, mask, image))

    def rows_read(states):
        model.zero_grad(set_to_none=True)
        states.sin().sum().backward()
        return set(model.text.embeddings.word.weight.grad.any(dim=1).nonzero().flatten().tolist())

    words = set(ids[:, 1:].flatten().tolist())
    assert rows_read(model.fuse(text, image).text) == words | {63}
    assert rows_read(model.decode(ids, mask, image)) == words | {62}
    assert (ids[:, 0] == 2).all()  # the batch itself still starts with [CLS]


def test_padding_changes_no_real_token_of_fusion_and_decoding(model, tiny_batch):
    mask = tiny_batch.attention_mask
    other_ids = torch.where(mask.bool(), tiny_batch.input_ids, 33)
    image = model.encode_image(tiny_batch.images)
    results = []
    for input_ids in (tiny_batch.input_ids, other_ids):
        text = model.encode_text(input_ids, mask)
        decoded = model.decode(input_ids, mask, image)
        real = mask.bool()
        results.append((text.text_feat, model.fuse(text, image).text[real], decoded[real]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_caption_guides_the_pruning_without_a_gradient(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    model.encode_image(tiny_batch.images, text).image_embeds.sin().sum().backward()
    assert all(parameter.grad is None for parameter in model.text.parameters())
    assert model.visual.patch_embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_activations_changes_no_gradient(tiny_batch, mode):
    def gradients(*words):
        model = tiny_task(*words, model="blip").model
        text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
        image = model.encode_image(tiny_batch.images, text)
        decoded = model.decode(text.input_ids, text.attention_mask, image)
        (model.fuse(text, image).text.sin().sum() + decoded.sin().sum()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    stored = gradients()
    recomputed = gradients(f"model.vision.recompute={mode}", f"model.text.recompute={mode}")
    assert stored.keys() == recomputed.keys()
    for name in stored:
        assert torch.equal(stored[name], recomputed[name]), name


def test_the_three_objectives_together_reach_every_parameter():
    task = tiny_task(model="blip")
    task(random_batch(8), Progress(1, 8, 32)).total.backward()
    trained = [(n, p) for n, p in task.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or not p.grad.any()] == []


def test_the_twin_encodes_as_the_student_does_and_holds_nothing_else(model, tiny_batch):
    twin = MomentumTwin(model).model.requires_grad_(True)
    ids, mask = tiny_batch.input_ids, tiny_batch.attention_mask
    text, twin_text = model.encode_text(ids, mask), twin.encode_text(ids, mask)
    assert torch.equal(text.text_feat, twin_text.text_feat)
    image, twin_image = (m.encode_image(tiny_batch.images, text) for m in (model, twin))
    # Of its last block the twin computes the class token alone, by smaller products.
    torch.testing.assert_close(image.image_feat, twin_image.image_feat, atol=1e-6, rtol=0)
    assert twin_image.image_embeds.shape[1] == 1
    (twin_text.text_feat.sum() + twin_image.image_feat.sum()).backward()
    unread = {n for n, p in twin.named_parameters() if p.grad is None}
    assert unread == {"temperature.temperature"}  # the twin uses the student's


def test_two_widths_that_cannot_guide_each_other_are_refused():
    message = r"model\.text\.width=64 must equal model\.vision\.width=32: BLIP's"
    with pytest.raises(UserError, match=message):
        load_config(tiny_words("model.text.width=64", model="blip"))


def test_two_widths_are_fine_where_nothing_is_pruned(tiny_batch):
    words = tiny_words("model.text.width=64", "pruning.stages=[]", model="blip")
    config = load_config(words)
    model = BLIP(config.model, config.pruning)
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images, text)
    assert model.fuse(text, image).pooled.shape == (8, 64)
    assert model.decode(text.input_ids, text.attention_mask, image).shape == (8, 12, 64)


def test_the_default_config_is_the_published_base_model():
    config = BLIP.Config()
    assert (config.embed_dim, config.temperature, config.vision.image_size) == (256, 0.07, 224)
    assert (config.text.vocab_size, config.text.depth, config.text.dropout) == (30524, 12, 0.1)


def test_the_published_recipe_is_that_of_the_spec():
    config = load_config(["preset=blip_4m", "data.root=/data"])
    assert config.model == BLIP.Config()
    assert config.pruning.stages == ELIP
    assert list(config.objectives) == ["itc", "itm", "lm"]
    assert [s.shards.split("/")[2] for s in config.data.train] == ["coco", "vg", "sbu", "cc3m"]
