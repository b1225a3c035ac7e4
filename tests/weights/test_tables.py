"""Every family's table: ours -> published -> ours, its names, its files' variants and errors."""

import re

import pytest
import torch
from small import (
    FAMILIES,
    HEAD_WIDTH,
    published,
    read_all,
    small_source,
    small_task,
    source_of,
    whole_state,
)

from elip_ds import registry
from elip_ds.errors import UserError
from elip_ds.weights import open_file, open_source, save_own, save_published
from elip_ds.weights.source import export, family_of
from elip_ds.weights.table import TRANSPOSED, general, linear, plain, rule, to_ours, to_theirs

UNSTORED = {"teacher.temperature.temperature"}  # published twins have no temperature
KINDS = ("weight", "bias")


@pytest.mark.parametrize("to", [*FAMILIES, "blip-hf", "clip-hf"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_ours_to_published_to_ours_gives_back_every_tensor_bit_for_bit(tmp_path, to, ending):
    model, _, layout = to.partition("-")
    file = tmp_path / f"file.{ending}"
    state = published(model, file, layout or None)
    source = open_file(model, file, head_width=HEAD_WIDTH)
    source.report.check()
    back = read_all(source)
    unstored = UNSTORED
    if layout:
        unstored = {n for n in state if n.startswith(("teacher.", "itc.", "model.temperature."))}
    assert back.keys() == state.keys() - unstored
    for name, value in back.items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("model", FAMILIES)
def test_published_to_ours_to_published_gives_back_every_tensor_bit_for_bit(tmp_path, model):
    published(model, tmp_path / "a.pth")
    save_own(open_file(model, tmp_path / "a.pth", HEAD_WIDTH), tmp_path / "own.safetensors")
    to = {"clip": "open_clip"}.get(model, model)
    save_published(open_source(tmp_path / "own.safetensors"), to, tmp_path / "b.pth")
    key = family_of(model).wrap
    first, second = (torch.load(tmp_path / f"{n}.pth", weights_only=True)[key] for n in ("a", "b"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_names_of_a_published_albef_are_those_of_its_released_code(tmp_path):
    published("albef", tmp_path / "albef.pth")
    names = torch.load(tmp_path / "albef.pth", weights_only=True)["model"].keys()
    expected = {"temp", "image_queue", "text_queue", "queue_ptr"}
    expected |= {f"itm_head.{k}" for k in KINDS}
    for m in ("", "_m"):
        expected |= vit_names(f"visual_encoder{m}.", depth=3)
        expected |= bert_names(f"text_encoder{m}.bert.", depth=2, segments=True, crossing=[1])
        expected |= head_names(f"text_encoder{m}.cls.predictions.")
        expected |= {f"{side}_proj{m}.{k}" for side in ("vision", "text") for k in KINDS}
    assert names == expected


def test_names_of_a_published_blip_are_those_of_its_released_code(tmp_path):
    published("blip", tmp_path / "blip.pth")
    names = torch.load(tmp_path / "blip.pth", weights_only=True)["model"].keys()
    expected = {"temp", "image_queue", "text_queue", "queue_ptr"}
    expected |= {f"itm_head.{k}" for k in KINDS}
    for m in ("", "_m"):
        expected |= vit_names(f"visual_encoder{m}.", depth=3)
        expected |= bert_names(f"text_encoder{m}.", depth=2, segments=False, crossing=[0, 1])
        expected |= {f"{side}_proj{m}.{k}" for side in ("vision", "text") for k in KINDS}
    expected |= bert_names("text_decoder.bert.", depth=2, segments=False, crossing=[0, 1])
    expected |= head_names("text_decoder.cls.predictions.")
    assert names == expected


def test_names_of_a_published_meter_are_those_of_its_released_code(tmp_path):
    published("meter", tmp_path / "meter.ckpt")
    names = torch.load(tmp_path / "meter.ckpt", weights_only=True)["state_dict"].keys()
    visual, layer = "vit_model.visual.", "vit_model.visual.transformer.resblocks.{}."
    expected = {f"{visual}{n}" for n in ("class_embedding", "positional_embedding")}
    expected |= {f"{visual}conv1.weight", "token_type_embeddings.weight", "mlm_score.bias"}
    expected |= {f"{visual}{n}.{k}" for n in ("ln_pre", "ln_post") for k in KINDS}
    for i in range(3):
        for part in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
            expected |= {f"{layer.format(i)}{part}.{k}" for k in KINDS}
        expected |= {f"{layer.format(i)}attn.in_proj_{k}" for k in KINDS}
    expected |= bert_names("text_transformer.", depth=2, segments=True, crossing=())
    for side in ("text", "image"):
        expected |= {
            f"cross_modal_{side}_{n}.{k}" for n in ("transform", "pooler.dense") for k in KINDS
        }
        for i in range(2):
            expected |= layer_names(f"cross_modal_{side}_layers.{i}.", crossing=True)
    expected |= {f"mlm_score.transform.{n}.{k}" for n in ("dense", "LayerNorm") for k in KINDS}
    expected |= {"mlm_score.decoder.weight", "itm_score.fc.weight", "itm_score.fc.bias"}
    assert names == expected


def vit_names(start: str, depth: int) -> set[str]:
    names = {f"{start}{n}" for n in ("cls_token", "pos_embed")}
    parts = ["patch_embed.proj", "norm"]
    for i in range(depth):
        inner = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        parts += [f"blocks.{i}.{n}" for n in inner]
    return names | {f"{start}{part}.{k}" for part in parts for k in KINDS}


def bert_names(start: str, depth: int, segments: bool, crossing) -> set[str]:
    tables = ["word_embeddings", "position_embeddings"]
    tables += ["token_type_embeddings"] if segments else []
    names = {f"{start}embeddings.{table}.weight" for table in tables}
    names |= {f"{start}embeddings.LayerNorm.{k}" for k in KINDS}
    for i in range(depth):
        names |= layer_names(f"{start}encoder.layer.{i}.", crossing=i in crossing)
    return names


def layer_names(start: str, crossing: bool) -> set[str]:
    parts = ["intermediate.dense", "output.dense", "output.LayerNorm"]
    for block in ("attention", "crossattention") if crossing else ("attention",):
        parts += [f"{block}.self.{n}" for n in ("query", "key", "value")]
        parts += [f"{block}.output.{n}" for n in ("dense", "LayerNorm")]
    return {f"{start}{part}.{k}" for part in parts for k in KINDS}


def head_names(start: str) -> set[str]:
    names = {f"{start}bias", f"{start}decoder.weight", f"{start}decoder.bias"}
    return names | {f"{start}transform.{n}.{k}" for n in ("dense", "LayerNorm") for k in KINDS}


def test_rows_of_a_fused_matrix_are_query_key_value_as_they_lie_there():
    parts = {f"a.{n}.weight": torch.randn(4, 3) for n in "qkv"}
    parts |= {f"a.{n}.bias": torch.randn(4) for n in "qkv"}
    rules = linear("b", ["a.q", "a.k", "a.v"])
    made = to_ours(rules, parts).made
    assert made["b.weight"][1].shape == (12, 3)
    assert torch.equal(made["b.weight"][1].read()[4:8], parts["a.k.weight"])
    back = to_theirs(rules, {name: weight for name, (_, weight) in made.items()}).made
    for name, value in parts.items():
        assert torch.equal(back[name][1].read(), value), name


def test_nothing_is_read_before_it_is_asked_for():
    made = to_ours([rule("b", "a", form=TRANSPOSED)], {"a": torch.empty(2, 3, device="meta")}).made
    assert made["b"][1].shape == (3, 2)


def test_half_precision_becomes_single():
    made = to_ours([rule("b", "a")], {"a": torch.tensor([0.1], dtype=torch.float16)}).made
    assert made["b"][1].dtype == made["b"][1].read().dtype == torch.float32


def test_every_rule_of_every_table_can_be_told_by_its_names():
    for name in registry.WEIGHTS:
        family = family_of(name)
        ours = [each.ours for each in family.rules]
        theirs = [part for each in family.rules for place in each.theirs for part in place]
        assert len(set(ours)) == len(ours), name
        assert len(set(theirs)) == len(theirs), name
        assert all(general(each)[0] == each for each in theirs), name


# Files of one family that differ in what they hold.


def test_blip_parts_that_should_be_one_must_be_equal(tmp_path):
    state = blip_file(tmp_path)
    name = "text_encoder.encoder.layer.1.crossattention.self.key.weight"
    state[name] = state[name] + 1e-3
    torch.save({"model": state}, tmp_path / "untied.pth")
    source = open_source(tmp_path / "untied.pth", head_width=HEAD_WIDTH)
    with pytest.raises(UserError, match=r"layer\.1\.crossattention.*differ.*one tensor"):
        save_own(source, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("kind", ["retrieval", "caption"])
def test_blip_files_without_decoder_or_without_encoder_are_read(tmp_path, kind):
    state = blip_file(tmp_path)
    if kind == "retrieval":
        kept = {n: v for n, v in state.items() if not n.startswith("text_decoder.")}
        kept["ptr_queue"] = kept.pop("queue_ptr")
        kept["idx_queue"] = torch.zeros(1, 32, dtype=torch.long)
    else:
        kept = {
            n: v for n, v in state.items() if n.startswith(("visual_encoder.", "text_decoder."))
        }
    torch.save({"model": kept}, tmp_path / "part.pth")
    source = open_source(tmp_path / "part.pth", head_width=HEAD_WIDTH)
    source.report.check()
    absent = {general(name)[0] for name in source.report.absent}
    decoder = "model.text.layers.{i}.decoder_attn.qkv.weight"
    assert (decoder in absent) == (kind == "retrieval")
    assert ("model.text.layers.{i}.attn.qkv.weight" in absent) == (kind == "caption")
    assert ("itc.at" in source.weights) == (kind == "retrieval")


def blip_file(tmp_path) -> dict[str, torch.Tensor]:
    published("blip", tmp_path / "blip.pth")
    return torch.load(tmp_path / "blip.pth", weights_only=True)["model"]


def test_albef_retrieval_files_leave_out_a_prefix_and_the_word_head(tmp_path):
    state = published("albef", tmp_path / "albef.pth")
    file = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    kept = {n.replace("bert.", ""): v for n, v in file.items() if ".cls." not in n}
    torch.save({"model": kept}, tmp_path / "retrieval.pth")
    source = open_file("albef", tmp_path / "retrieval.pth", HEAD_WIDTH)
    source.report.check()
    heads = ("model.text.mlm_head.", "teacher.text.mlm_head.")
    assert all(name.startswith(heads) for name in source.report.absent)
    for name, weight in source.weights.items():
        assert torch.equal(weight.read(), state[name]), name


def test_files_that_transformers_wrote_long_ago_or_without_a_prefix_are_one_bert(tmp_path):
    names = bert_names("", depth=2, segments=True, crossing=()) | head_names("cls.predictions.")
    draw = torch.Generator().manual_seed(0)
    plain_file = {name: torch.randn(shape_of(name), generator=draw) for name in sorted(names)}
    tie(plain_file)
    variants = {
        "plain": plain_file,
        "prefixed": {
            (n if n.startswith("cls.") else f"bert.{n}"): v for n, v in plain_file.items()
        },
        "old": {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for n, v in plain_file.items()
        },
        "with_pooler": plain_file
        | {"pooler.dense.weight": torch.ones(8, 8), "embeddings.position_ids": torch.arange(4)},
    }
    read = {}
    for kind, tensors in variants.items():
        torch.save(tensors, tmp_path / f"{kind}.bin")
        source = open_file("bert", tmp_path / f"{kind}.bin", head_width=4)
        source.report.check()
        read[kind] = read_all(source)
    assert len(read["plain"]) == 5 + 2 * 12 + 5
    for kind, tensors in read.items():
        assert tensors.keys() == read["plain"].keys(), kind
        assert all(torch.equal(v, read["plain"][n]) for n, v in tensors.items()), kind


def shape_of(name: str) -> tuple[int, ...]:
    for part, shape in (
        ("word_embeddings", (10, 8)),
        ("decoder.weight", (10, 8)),
        ("predictions.bias", (10,)),
        ("decoder.bias", (10,)),
        ("position_embeddings", (6, 8)),
        ("token_type", (2, 8)),
        ("intermediate.dense.weight", (16, 8)),
        ("intermediate.dense.bias", (16,)),
        ("attention.output.dense.weight", (8, 8)),
        ("output.dense.weight", (8, 16)),
        ("LayerNorm", (8,)),
    ):
        if part in name:
            return shape
    return (8, 8) if name.endswith("weight") else (8,)


def tie(tensors: dict[str, torch.Tensor]) -> None:
    tensors["cls.predictions.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]


# What goes wrong.


def test_a_missing_key_is_named_in_their_words(tmp_path):
    published("albef", tmp_path / "albef.pth")
    state = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    lost = ["text_encoder.bert.encoder.layer.1.attention.self.key.bias", "visual_encoder.norm.bias"]
    for name in lost:
        del state[name]
    torch.save({"model": state}, tmp_path / "less.pth")
    source = open_source(tmp_path / "less.pth", head_width=HEAD_WIDTH)
    assert source.report.missing == lost
    with pytest.raises(UserError, match=rf"less\.pth, from ALBEF: missing: {lost[0]}.*\(2\)"):
        source.report.check()


def test_a_twin_that_is_there_in_part_is_not_complete(tmp_path):
    published("albef", tmp_path / "albef.pth")
    state = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    del state["text_proj_m.bias"]
    torch.save({"model": state}, tmp_path / "less.pth")
    assert open_source(tmp_path / "less.pth", head_width=HEAD_WIDTH).report.missing == [
        "text_proj_m.bias"
    ]


def test_a_key_that_no_rule_reads_is_an_error(tmp_path):
    published("meter", tmp_path / "meter.ckpt")
    state = torch.load(tmp_path / "meter.ckpt", weights_only=True)["state_dict"]
    state |= {"surprise.weight": torch.ones(1), "vqa_classifier.0.weight": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "more.ckpt")
    source = open_source(tmp_path / "more.ckpt", head_width=HEAD_WIDTH)
    assert source.report.ignored == [("vqa_classifier.0.weight", "the head of a fine-tuned model")]
    with pytest.raises(UserError, match=r"left over: surprise\.weight \(1\)"):
        source.report.check()


@pytest.mark.parametrize("family", ["albef", "blip", "meter", "clip", "clip_hf"])
def test_no_key_can_be_lost_or_bent_unnoticed(tmp_path, family):
    """Of a tied pair one may be lost, as safetensors loses it; the heads have no fixed shape."""
    weights, _ = export(small_source(family.partition("_")[0]), family)
    state = {name: weight.read() for name, weight in weights.items()}
    twice = [
        part
        for each in family_of(family).rules[:]
        if len(each.theirs) > 1
        for place in each.theirs
        for part in place
    ]
    free = re.compile(r"itm_|.*_queue|text_encoder_m.*crossattention")
    names = [n for n in state if general(n)[0] not in twice and not free.match(n)]
    file = tmp_path / "file.pth"
    for i, name in enumerate(names):
        if i % 7 and not name.endswith((".fc1.weight", "_norm.bias", "embed", "embedding")):
            continue
        for other in ({}, {name: torch.ones(3, 5, 7)}):
            torch.save({n: v for n, v in state.items() if n != name} | other, file)
            with pytest.raises(UserError, match=r"file\.pth"):
                open_source(file, head_width=HEAD_WIDTH).report.check()


@pytest.mark.parametrize(
    ("said", "is_a", "message"),
    [
        ("albef", "blip", r"is not ALBEF; this looks like BLIP: has text_decoder\.\*"),
        ("blip", "albef", r"is not BLIP.*looks like ALBEF: has .*token_type_embeddings"),
        ("meter", "clip", r"is not METER; this looks like CLIP: has visual\.transformer"),
        ("deit", "meter", r"looks like METER: has cross_modal_text_transform\.weight"),
        ("bert", "albef", r"is not BERT; this looks like ALBEF"),
        ("elip_ds", "albef", r"is not elip_ds; this looks like ALBEF"),
    ],
)
def test_a_file_of_another_family_is_told_by_its_names(tmp_path, said, is_a, message):
    published(is_a, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        open_file(said, tmp_path / "file.pth", HEAD_WIDTH)


def test_our_own_file_is_not_taken_for_a_published_one(tmp_path):
    save_own(small_source("albef"), tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="this looks like elip_ds"):
        open_file("albef", tmp_path / "own.safetensors")


@pytest.mark.parametrize("extra", ["text_decoder.bert.embeddings.x", "cls_head.0.weight"])
def test_an_albef_fine_tuned_for_another_task_is_refused(tmp_path, extra):
    published("albef", tmp_path / "albef.pth")
    state = torch.load(tmp_path / "albef.pth", weights_only=True)["model"]
    torch.save({"model": state | {extra: torch.ones(1)}}, tmp_path / "tuned.pth")
    with pytest.raises(UserError, match=r"is an ALBEF fine-tuned for .*can be read"):
        open_source(tmp_path / "tuned.pth", head_width=HEAD_WIDTH)


def test_a_distilled_deit_is_refused(tmp_path):
    state = {name: torch.ones(1) for name in vit_names("", depth=1)} | {"dist_token": torch.ones(1)}
    torch.save({"model": state}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match=r"\(dist_token\) is a distilled DeiT"):
        open_source(tmp_path / "deit.pth")


def test_something_else_is_of_no_known_family(tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"no known family \(layer1.*known: albef, blip"):
        open_source(tmp_path / "resnet.pth")


def test_head_widths_that_do_not_divide_are_named(tmp_path):
    published("albef", tmp_path / "albef.pth")
    with pytest.raises(UserError, match=r"32 wide, which heads of 64.*--head-width N"):
        open_file("albef", tmp_path / "albef.pth", 64)


def test_a_model_cannot_become_another_family(tmp_path):
    with pytest.raises(UserError, match=r"is model\.name=albef, which cannot become BLIP"):
        save_published(small_source("albef"), "blip", tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"transformers does not have.*clip or blip"):
        save_published(small_source("meter"), "hf", tmp_path / "x.pth")


def test_a_weight_of_ours_without_a_place_there_is_left_over(tmp_path):
    state = whole_state(small_task("albef")) | {"objectives.new.head": torch.ones(1)}
    with pytest.raises(UserError, match=r"to ALBEF: left over: objectives\.new\.head \(1\)"):
        save_published(source_of("albef", state), "albef", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_the_report_names_what_was_reshaped_and_what_was_ignored():
    _, report = export(small_source("albef"), "albef")
    assert ("model.vision_proj.weight", "vision_proj.weight") in report.renamed
    stacked = "text_encoder.bert.encoder.layer.0.attention.self.{query,key,value}.weight"
    ours = "model.text.layers.0.attn.qkv.weight"
    assert (ours, stacked, "(96, 32) -> (32, 32)") in report.reshaped
    assert ("itc.image_queue", "image_queue", "(32, 16) -> (16, 32)") in report.reshaped
    assert [name for name, _ in report.ignored] == ["teacher.temperature.temperature"]
    assert plain({"x": torch.ones(2)})["x"].shape == (2,)
