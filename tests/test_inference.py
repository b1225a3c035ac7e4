"""Features from outside a run equal those inside it, whatever the model was loaded from."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_task, tiny_vocabulary, tiny_words
from PIL import Image
from safetensors.torch import save_file

import elip_ds
from elip_ds.config import dump_config, load_config
from elip_ds.data.augment import eval_image
from elip_ds.data.batch import normalise
from elip_ds.data.text import CaptionTokenizer
from elip_ds.errors import UserError
from elip_ds.weights import open_file, save_own

MODELS = ("albef", "blip", "meter", "clip")
TEXTS = ["word3 word14", "word1", "word5 word9 word2 word6"]


def pictures(count=3):
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8))
        for i in range(count)
    ]


def uneven_task(model):
    task = tiny_task(model=model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if "temperature" not in name and "logit_scale" not in name:
                parameter.normal_(std=0.2)
    return task.eval()


def write_checkpoint(folder, model):
    """What a run leaves behind, as far as it is read here."""
    task = uneven_task(model)
    folder.mkdir(parents=True)
    weights = {n.replace("teacher.model.", "teacher."): p.data for n, p in task.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.yaml").write_text(dump_config(load_config(tiny_words(model=model))))
    (folder / "tokenizer.json").write_text(tiny_vocabulary(kind_of(model)).json)
    (folder / "meta.json").write_text(json.dumps({}))
    return task


def kind_of(model):
    return load_config(tiny_words(model=model)).data.tokenizer


def inputs_of(task, model):
    """Pictures and texts as the loader and Batch.to prepare them."""
    data = load_config(tiny_words(model=model)).data
    pixels = [eval_image(p, task.model.config.vision.pixels, data.resize) for p in pictures()]
    tokenizer = CaptionTokenizer(tiny_vocabulary(kind_of(model)), data.text_length)
    ids = np.stack([tokenizer(text) for text in TEXTS])
    return (
        normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)),
        torch.from_numpy(ids),
        torch.from_numpy(tokenizer.attention_mask(ids)),
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("whole_run", [True, False])
def test_a_checkpoint_gives_the_features_that_its_task_gives(tmp_path, model, whole_run):
    folder = tmp_path / "run" / "ckpt" / "step-00000001"
    task = write_checkpoint(folder, model)
    loaded = elip_ds.load(tmp_path / "run" if whole_run else folder, device="cpu")
    if model == "clip":  # a task's makes the tokens of the joint space alone
        task.model.visual.class_only = task.model.text.ends_only = False
    images, input_ids, attention_mask = inputs_of(task, model)
    with torch.no_grad():
        text = task.model.encode_text(input_ids, attention_mask)
        plain, pruned = task.model.encode_image(images), task.model.encode_image(images, text)
        matched = task.match(images, text)
    assert torch.equal(loaded.encode_text(TEXTS).text_embeds, text.text_embeds)
    assert torch.equal(loaded.encode_image(pictures()).image_embeds, plain.image_embeds)
    guided = loaded.encode_image(pictures(), TEXTS)
    assert torch.equal(guided.image_embeds, pruned.image_embeds)
    assert guided.keep.lengths == pruned.keep.lengths != ()
    assert torch.equal(loaded.match(pictures(), TEXTS), matched)
    assert torch.equal(loaded.match(images, TEXTS), matched)


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_preset_loads_without_a_file(model):
    loaded = elip_ds.load(f"{model}_tiny", device="cpu")
    texts = ["a red circle left of a star"] * 2
    if model != "meter":  # which matches by its head alone, and fresh weights hold none
        assert loaded.match(pictures(2), texts).shape == (2,)
    ids, mask = loaded.tokenize(texts)
    assert ids.shape == mask.shape and mask.sum() > 10
    again = elip_ds.load(f"{model}_tiny", device="cpu")
    a, b = (m.encode_text(texts).text_embeds for m in (loaded, again))
    assert torch.equal(a, b)


def test_pictures_of_any_mode_and_size_are_prepared():
    loaded = elip_ds.load("demo", device="cpu")
    odd = [
        Image.new(mode, size) for mode, size in (("L", (3, 900)), ("RGBA", (64, 64)), ("P", (1, 1)))
    ]
    features = loaded.encode_image(odd).image_feat
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert not features.requires_grad


def test_a_converted_file_loads_with_a_vocabulary_beside_it(tmp_path):
    task = write_checkpoint(tmp_path / "step-1", "albef")
    save_own(open_file("elip_ds", tmp_path / "step-1"), tmp_path / "albef.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_vocabulary().words) + "\n")
    loaded = elip_ds.load(
        tmp_path / "albef.safetensors", vocabulary=tmp_path / "vocab.txt", device="cpu"
    )
    images, input_ids, attention_mask = inputs_of(task, "albef")
    with torch.no_grad():
        plain = task.model.encode_image(images)
        text = task.model.encode_text(input_ids, attention_mask)
    assert torch.equal(loaded.encode_image(pictures()).image_feat, plain.image_feat)
    found = loaded.encode_text(TEXTS).text_embeds[:, : input_ids.shape[1]]
    real = attention_mask.bool()
    torch.testing.assert_close(found[real], text.text_embeds[real], atol=1e-5, rtol=1e-5)


def test_images_need_no_vocabulary_and_texts_say_which_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "step-1", "albef")
    save_own(open_file("elip_ds", tmp_path / "step-1"), tmp_path / "albef.safetensors")
    loaded = elip_ds.load(tmp_path / "albef.safetensors", device="cpu")
    assert loaded.encode_image(pictures()).image_feat.shape == (3, 16)
    with pytest.raises(UserError, match="bert-base-uncased"):
        loaded.encode_text(TEXTS)


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no file or folder, and as a preset: .*known"):
        elip_ds.load("nowhere")
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        elip_ds.load(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        elip_ds.load(tmp_path / "cut.safetensors")


def test_as_many_texts_as_images_are_wanted():
    loaded = elip_ds.load("demo", device="cpu")
    with pytest.raises(UserError, match="3 images, 2 texts"):
        loaded.match(pictures(), TEXTS[:2])


def test_a_model_without_a_joint_space_needs_its_head_to_match(tmp_path):
    folder = tmp_path / "step-1"
    write_checkpoint(folder, "meter")
    loaded = elip_ds.load(folder, device="cpu")
    loaded.head = None
    with pytest.raises(UserError, match="no matching head"):
        loaded.match(pictures(), TEXTS)


def test_the_package_loads_nothing_heavy_before_it_is_asked():
    probe = "import elip_ds, sys; assert 'torch' not in sys.modules; elip_ds.load"
    subprocess.run(
        [sys.executable, "-c", f"{probe}; assert 'deepspeed' not in sys.modules"], check=True
    )
