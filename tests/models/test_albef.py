import dataclasses
import inspect

import pytest
import torch
from conftest import tiny_task, tiny_words

from elip_ds.config import load_config
from elip_ds.errors import UserError
from elip_ds.models import ALBEF
from elip_ds.models.joint import Temperature


@pytest.fixture
def model():
    return tiny_task().model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_features_have_unit_norm_in_fp32(model, tiny_batch, dtype):
    model.to(dtype)
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images.to(dtype), text)
    assert text.text_embeds.dtype == image.image_embeds.dtype == dtype
    for feat in (text.text_feat, image.image_feat):
        assert feat.dtype == torch.float32 and feat.shape == (8, 16)
        torch.testing.assert_close(feat.norm(dim=1), torch.ones(8))


def test_without_a_guide_the_image_keeps_all_its_tokens(model, tiny_batch):
    image = model.encode_image(tiny_batch.images)
    unpruned = tiny_task("pruning.stages=[]").model.encode_image(tiny_batch.images)
    assert image.image_embeds.shape == (8, 1 + 16, 32) and image.keep.lengths == ()
    assert torch.equal(image.image_embeds, unpruned.image_embeds)


def test_with_a_guide_the_image_is_pruned_at_every_stage(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images, text)
    # Of 16 patches a half, then a quarter, each with the class token and a merged one.
    assert image.keep.lengths == (10, 6) and image.image_embeds.shape == (8, 6, 32)


def test_only_the_class_token_of_the_caption_guides(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    assert torch.equal(text.text_class, text.text_embeds[:, 0])
    words = dataclasses.replace(text, text_embeds=torch.zeros_like(text.text_embeds))
    opposite = dataclasses.replace(text, text_class=-50 * text.text_class)
    images = tiny_batch.images
    kept, same, other = (model.encode_image(images, t).keep.owner for t in (text, words, opposite))
    assert torch.equal(kept, same) and not torch.equal(kept, other)


def test_each_image_is_pruned_by_its_own_caption(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    together = model.encode_image(tiny_batch.images, text).image_embeds
    for i in range(8):
        alone = model.encode_text(
            tiny_batch.input_ids[i : i + 1], tiny_batch.attention_mask[i : i + 1]
        )
        image = model.encode_image(tiny_batch.images[i : i + 1], alone).image_embeds
        torch.testing.assert_close(together[i : i + 1], image)


def test_padding_changes_neither_the_text_nor_its_fusion(model, tiny_batch):
    mask = tiny_batch.attention_mask
    other_ids = torch.where(mask.bool(), tiny_batch.input_ids, 33)
    image = model.encode_image(tiny_batch.images)
    results = []
    for input_ids in (tiny_batch.input_ids, other_ids):
        text = model.encode_text(input_ids, mask)
        results.append((text.text_feat, model.fuse(text, image).text[mask.bool()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_fusion_and_decoding_have_the_shapes_they_promise(model, tiny_batch):
    mask = tiny_batch.attention_mask
    text = model.encode_text(tiny_batch.input_ids, mask)
    fused = model.fuse(text, model.encode_image(tiny_batch.images))
    assert fused.text.shape == (8, 12, 32)
    assert fused.pooled.shape == (8, model.pooled_width) == (8, 32)
    assert model.word_logits(fused.text).shape == (8, 12, 64)
    assert model.word_logits(fused.pooled[:0]).shape == (0, 64)


def test_fused_text_depends_on_the_image_and_encoded_text_does_not_take_one(model, tiny_batch):
    mask = tiny_batch.attention_mask
    text = model.encode_text(tiny_batch.input_ids, mask)
    image = model.encode_image(tiny_batch.images)
    other = dataclasses.replace(image, image_embeds=-image.image_embeds)
    assert not torch.allclose(model.fuse(text, image).text, model.fuse(text, other).text)
    assert list(inspect.signature(model.encode_text).parameters) == ["input_ids", "attention_mask"]


def test_the_caption_guides_the_pruning_without_a_gradient(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    model.encode_image(tiny_batch.images, text).image_embeds.square().sum().backward()
    assert all(parameter.grad is None for parameter in model.text.parameters())
    assert model.visual.patch_embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("value", "used"), [(0.07, 0.07), (0.5, 0.5), (0.9, 0.5), (0.0001, 0.001), (-3.0, 0.001)]
)
def test_the_temperature_is_clamped_and_its_gradient_passes_through(value, used):
    temperature = Temperature(value)
    out = temperature()
    assert out.shape == (1,) and out.item() == pytest.approx(used, abs=1e-6)
    (3 * out).sum().backward()
    assert temperature.temperature.grad.item() == 3.0
    assert temperature.temperature.item() == pytest.approx(value)


def test_the_temperature_computes_in_fp32_when_it_is_stored_in_bf16():
    assert Temperature(0.07).bfloat16()().dtype == torch.float32


def test_two_widths_that_cannot_guide_each_other_are_refused():
    with pytest.raises(
        UserError, match=r"model\.text\.width=64 must equal model\.vision\.width=32"
    ):
        load_config(tiny_words("model.text.width=64"))


def test_two_widths_are_fine_where_nothing_is_pruned(tiny_batch):
    config = load_config(tiny_words("model.text.width=64", "pruning.stages=[]"))
    model = ALBEF(config.model, config.pruning)
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images, text)
    assert model.fuse(text, image).text.shape == (8, 12, 64)


@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_activations_changes_no_gradient(tiny_batch, mode):
    def gradients(*words):
        model = tiny_task(*words).model
        text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
        image = model.encode_image(tiny_batch.images, text)
        model.fuse(text, image).text.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    stored = gradients()
    recomputed = gradients(f"model.vision.recompute={mode}", f"model.text.recompute={mode}")
    assert stored.keys() == recomputed.keys()
    for name in stored:
        assert torch.equal(stored[name], recomputed[name]), name


def test_the_default_config_is_the_published_base_model():
    config = dataclasses.asdict(ALBEF.Config())
    assert (config["embed_dim"], config["temperature"]) == (256, 0.07)
    assert config["vision"]["image_size"] == 256 and config["text"]["fusion_layer"] == 6


def test_rows_are_taken_in_any_order_and_any_number_of_times(model, tiny_batch):
    text = model.encode_text(tiny_batch.input_ids, tiny_batch.attention_mask)
    image = model.encode_image(tiny_batch.images, text)
    rows = torch.tensor([3, 3, 0, 7])
    taken, expected = (
        text.take(rows),
        model.encode_text(text.input_ids[rows], text.attention_mask[rows]),
    )
    for name, value in vars(taken).items():
        torch.testing.assert_close(value, getattr(expected, name))
    assert torch.equal(image.take(rows).image_embeds, image.image_embeds[rows])
    assert torch.equal(image.take(rows).image_feat, image.image_feat[rows])
    assert torch.equal(image.take(rows).keep.owner, image.keep.owner[rows])
    assert image.take(rows).keep.lengths == image.keep.lengths
