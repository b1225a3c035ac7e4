"""tools/show_pruning.py on a checkpoint folder and shards made here."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from elip_ds.config import dump_config
from elip_ds.config.schema import KeepChange
from elip_ds.data.record import Record
from elip_ds.data.shards import write_shards
from elip_ds.errors import UserError, exit_with
from elip_ds.tasks import build_pretrain

TOOL = Path(__file__).parents[2] / "tools" / "show_pruning.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("show_pruning", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_record(i):
    """A grey picture, wider than high; the third is no picture."""
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 200, 200)).save(file, "png")
    data = b"no picture" if i == 2 else file.getvalue()
    return Record(f"pair{i}", data, "png", (f"word{i} word7", "another"))


@pytest.fixture
def checkpoint(tmp_path, tiny_config, vocabulary):
    """A run folder with one checkpoint, and its held-out shards beside it."""
    (shard,) = write_shards(map(make_record, range(5)), tmp_path / "shards", "val")
    sources = [dataclasses.replace(tiny_config.data.val[0], shards=str(shard))]
    data = dataclasses.replace(tiny_config.data, val=sources)
    return write_checkpoint(
        tmp_path / "run", dataclasses.replace(tiny_config, data=data), vocabulary
    )


def write_checkpoint(run, config, vocabulary):
    folder = run / "ckpt" / "step-00000003"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    task = build_pretrain(config, vocabulary)
    weights = {name.replace("teacher.model.", "teacher."): p for name, p in task.named_parameters()}
    save_file({name: p.detach().contiguous() for name, p in weights.items()}, folder / FILES[2])
    (folder / FILES[0]).write_text(json.dumps({"step": 3}))
    (folder / FILES[1]).write_text(dump_config(config))
    (folder / FILES[3]).write_text(vocabulary.json)
    return folder


FILES = ("meta.json", "config.yaml", "weights.safetensors", "tokenizer.json")


def patch_light(path, grid):
    """Mean brightness of each patch of a drawn grey image, as a share of the clear one: (N,)."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[:320, :320, 0]
    cell = 320 // grid
    return pixels.reshape(grid, cell, grid, cell).mean(axis=(1, 3)).flatten() / 200


def test_each_stage_of_each_usable_pair_is_drawn_and_counted(tool, checkpoint, tmp_path, capsys):
    run = checkpoint.parents[1]
    tool.main([str(run), "--count", "3", "--out", str(tmp_path / "out"), "--json"])
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["checkpoint"] == str(checkpoint)
    assert [image["image"] for image in report["images"]] == ["pair0", "pair1", "pair3"]
    assert report["images"][1]["caption"] == "word1 word7"
    assert "skipped pair2 of " in said.err
    for image in report["images"]:
        first, second = image["stages"]
        assert (first["stage"], first["kept"], first["merged"]) == (1, 8, 8)  # of a grid of 4 x 4
        assert second["kept"] in (3, 4) and second["kept"] + second["merged"] == 16
        for stage in image["stages"]:
            assert stage["file"].endswith(f"{image['image']}-stage{stage['stage']}.png")
            light = patch_light(stage["file"], grid=4)
            assert (light > 0.99).sum() == stage["kept"]
            assert (light < 0.51).sum() == stage["merged"]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_a_later_stage_keeps_no_patch_that_an_earlier_one_merged(tool, checkpoint, capsys):
    tool.main([str(checkpoint), "--count", "1", "--json"])
    (image,) = json.loads(capsys.readouterr().out)["images"]
    first, second = (patch_light(stage["file"], grid=4) > 0.99 for stage in image["stages"])
    assert not (second & ~first).any()
    assert (checkpoint / "pruning" / "pair0-stage2.png").is_file()


def test_the_last_stage_shown_is_what_the_trained_model_does(tool, checkpoint):
    config, models, tokenizer = tool.load_models(checkpoint)
    record, image = next(tool.read_pairs(config, None))
    batch = tool.make_batch(image, record.captions[0], (32, 32), tokenizer)
    shown = tool.prune_by_stage(models, batch)
    task = build_pretrain(config, tool.read_vocabulary(checkpoint / "tokenizer.json"))
    tool.load_weights(checkpoint, task)
    guide = task.model.encode_text(batch.input_ids, batch.attention_mask)
    keep = task.model.encode_image(batch.images, guide).keep
    assert torch.equal(shown[-1].origin, keep.origin)
    assert torch.equal(shown[-1].owner, keep.owner)
    assert [index.lengths for index in shown] == [keep.lengths[:1], keep.lengths]


def test_a_run_with_a_schedule_is_shown_as_the_schedule_ends(
    tool, tmp_path, tiny_config, vocabulary
):
    changes = [KeepChange("8 samples", [1.0, 0.5]), KeepChange("16 samples", [0.75, 0.25])]
    pruning = dataclasses.replace(tiny_config.pruning, schedule=changes)
    config = dataclasses.replace(tiny_config, pruning=pruning)
    folder = write_checkpoint(tmp_path / "scheduled", config, vocabulary)
    config, models, tokenizer = tool.load_models(folder)
    record, image = next(tool.read_pairs(config, None))
    batch = tool.make_batch(image, record.captions[0], (32, 32), tokenizer)
    shown = tool.prune_by_stage(models, batch)
    assert [index.lengths for index in shown] == [(14,), (14, 6)]


def test_without_json_a_table_names_images_and_counts(tool, checkpoint, tmp_path, capsys):
    tool.main([str(checkpoint), "--count", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "pair0" in said and "merged" in said
    assert f"drawn in {tmp_path / 'out'}" in said


def test_other_pairs_can_be_shown(tool, checkpoint, tmp_path, capsys):
    write_shards(map(make_record, (7, 8)), tmp_path / "other", "new")
    pattern = str(tmp_path / "other" / "*.tar")
    tool.main([str(checkpoint), "--shards", pattern, "--out", str(tmp_path / "out"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in report["images"]] == ["pair7", "pair8"]


def test_the_builtin_scenes_need_no_files(tool, checkpoint, tiny_config):
    pairs = tool.read_pairs(tiny_config, None)
    record, image = next(pairs)
    assert record.key == "val-000000" and image.size == (48, 48)
    assert len(list(pairs)) == 15  # the tiny config holds 16 of them


def test_long_captions_are_wrapped_below_the_image(tool):
    image = Image.new("RGB", (8, 8), "white")
    light = np.ones(14 * 14)
    short = tool.draw(image, light, ["title", "words"])
    tall = tool.draw(image, light, ["title", "a caption of many words " * 10])
    assert short.width == tall.width == 322  # 14 whole cells of 23 pixels
    assert tall.height > short.height + 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN_OR_CHECKPOINT; see --help"),
        (["nowhere"], "nowhere is neither a checkpoint nor a run that has one"),
        (["nowhere", "--count", "0"], "--count 0: 1 or more"),
        (["nowhere", "--count", "x"], "argument --count: invalid int value: 'x'; see --help"),
        (["nowhere", "--colour"], "unrecognized arguments: --colour; see --help"),
    ],
)
def test_a_misuse_is_one_line_and_status_2(tool, words, message, capsys):
    with pytest.raises(SystemExit) as left:
        exit_with(tool.main, words)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_what_cannot_be_shown_is_said(tool, checkpoint, tmp_path, tiny_config, vocabulary):
    with pytest.raises(UserError, match="--shards: no file matches"):
        tool.main([str(checkpoint), "--shards", str(tmp_path / "*.none")])
    (shard,) = write_shards([make_record(2)], tmp_path / "bad", "bad")
    with pytest.raises(UserError, match="nothing to show: not one sample"):
        tool.main([str(checkpoint), "--shards", str(shard)])
    with pytest.raises(UserError, match=r"--out: .* cannot be made"):
        tool.main([str(checkpoint), "--out", str(checkpoint / "meta.json")])
    plain = dataclasses.replace(tiny_config.pruning, stages=[])
    unpruned = dataclasses.replace(tiny_config, pruning=plain)
    with pytest.raises(UserError, match=r"pruning\.stages=\[\]: nothing to show"):
        tool.main([str(write_checkpoint(tmp_path / "plain", unpruned, vocabulary))])
