"""model.init_from: what each kind of file fills, scales, leaves alone and refuses."""

import dataclasses
import logging

import pytest
import torch
from conftest import tiny_vocabulary
from safetensors.torch import save_file
from small import (
    FAMILIES,
    build,
    published,
    read_all,
    small_config,
    small_source,
    small_task,
    source_of,
    whole_state,
)

from elip_ds.config import dump_config
from elip_ds.errors import UserError
from elip_ds.towers.pos_embed import resize_grid, resize_length
from elip_ds.weights import open_source, save_own, start_from
from elip_ds.weights.bert import FAMILY as BERT
from elip_ds.weights.clip import FAMILY as CLIP
from elip_ds.weights.table import plain, to_theirs
from elip_ds.weights.vit import FAMILY as VIT

TWIN_TEMPERATURE = "teacher.temperature.temperature"


def started(model: str, *paths, words=(), seed: int = 9) -> dict[str, torch.Tensor]:
    """Everything of another task of this model after it started from files."""
    task = small_task(model, *words, seed=seed)
    start_from(task, small_config(model, *words).model, list(paths))
    return whole_state(task)


def fresh(model: str, *words, seed: int = 9) -> dict[str, torch.Tensor]:
    """What started() has before it starts."""
    return whole_state(small_task(model, *words, seed=seed))


def equal(a: dict, b: dict, names) -> bool:
    return all(torch.equal(a[name], b[name]) for name in names)


def deit(path, state) -> dict[str, torch.Tensor]:
    """A DeiT's file, with the vision tower of a state, and a classifier."""
    theirs = to_theirs(VIT.rules, plain(of(state, "model.visual."))).made
    tensors = {name: weight.read() for name, (_, weight) in theirs.items()}
    torch.save({"model": tensors | {"head.weight": torch.ones(10, 32)}}, path)
    return of(state, "model.visual.")


def bert(path, state) -> dict[str, torch.Tensor]:
    """A BERT's file, with the text tower of an ALBEF's state, without what BERT has not."""
    kept = {n: v for n, v in of(state, "model.text.").items() if ".cross" not in n}
    theirs = to_theirs(BERT.rules, plain(kept)).made
    torch.save({n: weight.read() for n, (_, weight) in theirs.items()}, path)
    return kept


def clip(path, state) -> None:
    theirs = to_theirs(CLIP.rules, plain(state)).made
    torch.save({n: weight.read() for n, (_, weight) in theirs.items()}, path)


def of(state, start: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith(start)}


@pytest.mark.parametrize("model", FAMILIES)
def test_a_published_file_fills_a_task_bit_for_bit(tmp_path, model):
    state = published(model, tmp_path / "file.pth")
    result = started(model, tmp_path / "file.pth")
    if TWIN_TEMPERATURE in state:  # published twins have none
        state[TWIN_TEMPERATURE] = state["model.temperature.temperature"]
    assert result.keys() == state.keys()
    assert equal(result, state, state)


@pytest.mark.parametrize("model", FAMILIES)
def test_a_converted_file_and_a_checkpoint_fill_a_task_bit_for_bit(tmp_path, model):
    state = whole_state(small_task(model))
    own = dataclasses.replace(
        source_of(model, state), tree=dataclasses.asdict(small_config(model).model)
    )
    save_own(own, tmp_path / "own.safetensors")
    folder = checkpoint(tmp_path / "run" / "ckpt" / "step-00000001", model, state)
    for path in (tmp_path / "own.safetensors", folder, tmp_path / "run"):
        result = started(model, path)
        assert result.keys() == state.keys()
        assert equal(result, state, state)


def checkpoint(folder, model, state):
    folder.mkdir(parents=True)
    queues = {name: value for name, value in state.items() if name.startswith("itc.")}
    weights = {name: value for name, value in state.items() if name not in queues}
    save_file(weights, folder / "weights.safetensors")
    save_file(
        {name: value.contiguous() for name, value in queues.items()}, folder / "state.safetensors"
    )
    (folder / "config.yaml").write_text(dump_config(small_config(model)))
    (folder / "meta.json").write_text("{}")
    return folder


def test_words_of_another_vocabulary_are_refused(tmp_path):
    folder = checkpoint(tmp_path / "step-1", "albef", fresh("albef", seed=3))
    task, config = small_task("albef"), small_config("albef").model
    (folder / "tokenizer.json").write_text(tiny_vocabulary().json)
    (tmp_path / "tokenizer.json").write_text(tiny_vocabulary().json)
    start_from(task, config, [folder], tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(tiny_vocabulary("blip").json)
    with pytest.raises(UserError, match=r"words of .*step-1 are not .* data\.vocabulary=.*step-1"):
        start_from(task, config, [folder], tmp_path / "tokenizer.json")


def test_of_two_files_the_last_counts_and_parts_fill_their_part(tmp_path):
    whole = published("albef", tmp_path / "albef.pth", seed=1)
    visual = deit(tmp_path / "deit.pth", fresh("albef", seed=2))
    text = bert(tmp_path / "bert.bin", fresh("albef", seed=3))
    paths = [tmp_path / name for name in ("albef.pth", "deit.pth", "bert.bin")]
    result = started("albef", *paths)
    assert equal(result, visual, visual)
    assert equal(result, text, text)
    others = [n for n in of(whole, "model.") if n not in visual and n not in text]
    assert any(".cross." in name for name in others)
    assert equal(result, whole, others)
    for name in visual | text:  # the twin follows
        twin = name.replace("model.", "teacher.", 1)
        assert torch.equal(result[twin], result[name]), name
    assert equal(started("albef", *reversed(paths)), whole, of(whole, "model."))


def test_deit_and_bert_start_an_albef_as_published(tmp_path):
    """Also the fusion layers' self-attention and feed-forward; the cross-attention stays random."""
    visual = deit(tmp_path / "deit.pth", fresh("albef", seed=2))
    text = bert(tmp_path / "bert.bin", fresh("albef", seed=3))
    result = started("albef", tmp_path / "deit.pth", tmp_path / "bert.bin")
    assert equal(result, visual | text, visual | text)
    assert "model.text.layers.1.attn.qkv.weight" in text  # a fusion layer
    before = fresh("albef")
    rest = [n for n in of(before, "model.") if n not in visual and n not in text]
    assert equal(result, before, rest)
    assert any("cross" in n for n in rest) and any("vision_proj" in n for n in rest)
    assert equal(result, before, [*of(before, "objectives."), *of(before, "itc.")])


def test_bert_starts_a_blip_with_two_words_more_and_the_decoder_as_the_encoder(tmp_path):
    text = bert(tmp_path / "bert.bin", fresh("albef", seed=3))
    words = ("model.text.vocab_size=66",)
    result = started("blip", tmp_path / "bert.bin", words=words)
    before = fresh("blip", *words)
    word = "model.text.embeddings.word.weight"
    assert torch.equal(result[word][:64], text[word])
    assert torch.equal(result[word][64:], before[word][64:])
    assert torch.equal(result["model.text.lm_head.bias"][:64], text["model.text.mlm_head.bias"])
    for part in ("attn.qkv.weight", "attn.proj.bias", "attn_norm.weight"):
        theirs = text[f"model.text.layers.1.{part}"]
        assert torch.equal(result[f"model.text.layers.1.{part}"], theirs)
        assert torch.equal(result[f"model.text.layers.1.decoder_{part}"], theirs)
        assert torch.equal(result[f"teacher.text.layers.1.{part}"], theirs)
    cross = "model.text.layers.1.cross.query.weight"
    assert torch.equal(result[cross], before[cross])


def test_bert_starts_the_text_tower_of_a_meter(tmp_path):
    state = fresh("meter", seed=3)
    kept = of(state, "model.text.")
    theirs = to_theirs(BERT.rules, plain(kept)).made
    torch.save({n: weight.read() for n, (_, weight) in theirs.items()}, tmp_path / "bert.bin")
    result, before = started("meter", tmp_path / "bert.bin"), fresh("meter")
    assert equal(result, kept, kept)
    assert equal(result, before, [n for n in before if n not in kept])


@pytest.mark.parametrize("converted", [False, True])
def test_clip_starts_a_meter_without_its_last_block(tmp_path, converted):
    words = ("model.vision.depth=4", "model.vision.activation=quick_gelu")
    state = fresh("clip", *words, seed=3)
    clip(tmp_path / "clip.pt", state)
    path = tmp_path / "clip.pt"
    if converted:
        save_own(open_source(path, head_width=16), tmp_path / "clip.safetensors")
        path = tmp_path / "clip.safetensors"
    result, before = started("meter", path), fresh("meter")
    kept = [n for n in of(state, "model.visual.") if ".blocks.3." not in n]
    assert equal(result, state, kept)
    assert equal(result, before, [n for n in before if n not in kept])


def test_an_albefs_towers_start_a_meter_less_what_reads_the_image(tmp_path):
    """The lower half of its text tower, and its vision tower where the layouts agree."""
    save_own(small_source("albef"), tmp_path / "albef.safetensors")
    words = ("model.vision.layout=vit", "model.vision.activation=gelu", "model.text.depth=1")
    result = started("meter", tmp_path / "albef.safetensors", words=words)
    before, albef = fresh("meter", *words), read_all(small_source("albef"))
    shared = [n for n in before if n.startswith(("model.visual.", "model.text."))]
    assert any(".layers.0." in n for n in shared) and not any(".cross." in n for n in shared)
    assert equal(result, albef, shared)
    assert equal(result, before, [n for n in before if n not in shared])
    with pytest.raises(UserError, match=r"model\.text\.depth is 1 there, 2 here"):
        started("meter", tmp_path / "albef.safetensors", words=words[:2])
    with pytest.raises(UserError, match=r"model\.vision\.layout is vit there, clip here"):
        started("meter", tmp_path / "albef.safetensors", words=words[2:])


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(48, 48), (32, 64)])
def test_positions_are_scaled_to_the_configured_grid_and_the_class_row_stays(
    tmp_path, model, height, width
):
    state = published(model, tmp_path / "file.pth")
    words = (f"model.vision.image_size={height}", f"model.vision.image_width={width}")
    result = started(model, tmp_path / "file.pth", words=words)
    name = "visual.pos_embed.weight"
    grid = (height // 8, width // 8)
    for side in ("model", "teacher"):
        if f"{side}.{name}" in state:
            old = state[f"{side}.{name}"]
            expected = resize_grid(old, (4, 4), grid, antialias=model == "clip")
            assert torch.equal(result[f"{side}.{name}"], expected)
            assert torch.equal(result[f"{side}.{name}"][:, 0], old[:, 0])
    others = [n for n in of(state, "model.") if not n.endswith(name)]
    assert equal(result, state, others)


def test_a_grid_of_ours_need_not_be_square_and_counts_as_what_it_is(tmp_path):
    words = ("model.vision.image_size=16", "model.vision.image_width=64")  # 2 x 8 patches
    state = fresh("albef", *words, seed=1)
    tree = dataclasses.asdict(small_config("albef", *words).model)
    save_own(
        dataclasses.replace(source_of("albef", state), tree=tree), tmp_path / "own.safetensors"
    )
    result = started("albef", tmp_path / "own.safetensors")  # 4 x 4: as many patches
    name = "model.visual.pos_embed.weight"
    expected = resize_grid(state[name], (2, 8), (4, 4), antialias=False)
    assert torch.equal(result[name], expected)


def test_text_positions_of_clip_are_scaled(tmp_path):
    state = published("clip", tmp_path / "clip.pt")
    words = ("model.text.max_positions=30",)
    result = started("clip", tmp_path / "clip.pt", words=words)
    name = "model.text.position.weight"
    assert torch.equal(result[name], resize_length(state[name], 30))


def test_without_a_twin_in_the_file_the_twin_equals_the_student(tmp_path):
    published("albef", tmp_path / "albef.pth")
    state = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    alone = {n: v for n, v in state.items() if "_m." not in n and not n.endswith("_m")}
    torch.save(alone, tmp_path / "alone.pth")
    result = started("albef", tmp_path / "alone.pth")
    for name in of(result, "teacher."):
        assert torch.equal(result[name], result[name.replace("teacher.", "model.", 1)]), name


def test_queues_of_another_size_are_left_alone(tmp_path, caplog):
    state = published("albef", tmp_path / "albef.pth")
    words = ("objectives.itc.queue_size=16",)
    with caplog.at_level(logging.INFO):
        result = started("albef", tmp_path / "albef.pth", words=words)
    before = fresh("albef", *words)
    assert equal(result, before, of(before, "itc."))
    assert equal(result, state, of(state, "model."))


def test_a_task_without_twin_or_heads_takes_the_model_alone(tmp_path):
    state = published("albef", tmp_path / "albef.pth")
    words = ("objectives.itc=null", "objectives.itm=null", "objectives.mlm.alpha=0")
    result = started("albef", tmp_path / "albef.pth", words=words)
    assert not of(result, "teacher.") and not of(result, "objectives.")
    assert equal(result, state, result)


def test_an_albef_retrieval_file_leaves_the_word_head_as_it_was(tmp_path):
    state = published("albef", tmp_path / "albef.pth")
    file = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    kept = {n.replace("bert.", ""): v for n, v in file.items() if ".cls." not in n}
    torch.save({"model": kept}, tmp_path / "retrieval.pth")
    save_own(open_source(tmp_path / "retrieval.pth", head_width=16), tmp_path / "own.safetensors")
    before = fresh("albef")
    for path in (tmp_path / "retrieval.pth", tmp_path / "own.safetensors"):
        result = started("albef", path)
        head = of(before, "model.text.mlm_head.")
        assert equal(result, before, head)
        assert equal(result, state, [n for n in of(state, "model.") if n not in head])


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("albef", ["model.vision.patch_size=16"], "patch_size is 8 there, 16 here"),
        ("albef", ["model.text.vocab_size=70"], "model.text.vocab_size is 64 there, 70 here"),
        ("albef", ["model.embed_dim=8"], "model.embed_dim is 16 there, 8 here"),
        ("albef", ["model.vision.depth=2"], "model.vision.depth is 3 there, 2 here"),
        ("albef", ["model.text.max_positions=30"], "max_positions is 24 there, 30 here"),
        ("blip", ["model.text.vocab_size=66"], "model.text.vocab_size is 64 there, 66 here"),
        ("meter", ["model.fusion.depth=1"], "model.fusion.depth is 2 there, 1 here"),
        ("meter", ["model.vision.mlp_ratio=2"], "mlp_ratio is 4.0 there, 2.0 here"),
        ("clip", ["model.vision.layout=vit"], "model.vision.layout is clip there, vit here"),
    ],
)
def test_a_model_of_other_sizes_is_refused_by_its_keys(tmp_path, model, words, message):
    published(model, tmp_path / "file.pth")
    with pytest.raises(
        UserError, match=rf"init_from: .*file\.pth holds another model: .*{message}"
    ):
        started(model, tmp_path / "file.pth", words=words)


def test_heads_are_compared_where_a_file_says_them(tmp_path):
    tree = dataclasses.asdict(small_config("albef").model)
    own = dataclasses.replace(small_source("albef"), tree=tree)
    save_own(own, tmp_path / "own.safetensors")
    with pytest.raises(UserError, match=r"model\.vision\.heads is 2 there, 4 here"):
        started("albef", tmp_path / "own.safetensors", words=("model.vision.heads=4",))


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        ("albef", "blip", "holds another model, albef; here model.name=blip"),
        ("meter", "clip", "holds another model, meter; here model.name=clip"),
        ("clip", "albef", "layout is clip there, vit here"),
    ],
)
def test_another_family_is_refused(tmp_path, file, model, message):
    published(file, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        started(model, tmp_path / "file.pth")


def test_a_bert_does_not_fit_a_clip(tmp_path):
    bert(tmp_path / "bert.bin", fresh("albef"))
    with pytest.raises(UserError, match=r"holds another model: model\.text"):
        started("clip", tmp_path / "bert.bin")


def test_a_file_that_lacks_a_weight_or_is_none_is_refused(tmp_path):
    published("albef", tmp_path / "albef.pth")
    state = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    del state["visual_encoder.blocks.1.norm1.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"missing: visual_encoder\.blocks\.1\.norm1\.bias"):
        started("albef", tmp_path / "less.pth")
    with pytest.raises(UserError, match="nothing cannot be read: No such file"):
        started("albef", tmp_path / "nothing")
    with pytest.raises(UserError, match="is neither a checkpoint nor a run"):
        started("albef", tmp_path)


def test_a_checkpoint_that_lost_its_weights_says_how_to_make_them(tmp_path):
    folder = checkpoint(tmp_path / "step-00000001", "albef", fresh("albef"))
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights\.safetensors; .* --from deepspeed"):
        started("albef", folder)


def test_another_activation_is_said(tmp_path, caplog):
    published("meter", tmp_path / "meter.ckpt")
    with caplog.at_level(logging.WARNING):
        started("meter", tmp_path / "meter.ckpt", words=("model.vision.activation=gelu",))
    assert any(record.levelno == logging.WARNING for record in caplog.records)


def test_no_file_changes_nothing():
    assert equal(started("albef"), fresh("albef"), fresh("albef"))


def test_a_started_model_gives_the_features_of_the_file(tmp_path):
    published("albef", tmp_path / "albef.pth")
    task = small_task("albef", seed=9)
    start_from(task, small_config("albef").model, [tmp_path / "albef.pth"])
    source = open_source(tmp_path / "albef.pth", head_width=16)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mine = task.model.eval().encode_image(images).image_feat
        theirs = build(source).encode_image(images).image_feat
    assert torch.equal(mine, theirs)
    assert read_all(source).keys() <= whole_state(task).keys()
