"""Weights of transformers' and open_clip's own classes, taken through the tables both ways: strict
loading, and the same outputs from the same inputs.

B batch, L text tokens.
"""

import open_clip
import pytest
import torch
import transformers
from small import HEAD_WIDTH, build, load, small_source
from torch import Tensor, nn

from elip_ds.weights import open_file, open_source, save_own, save_published

LIMIT = 2e-5
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def uneven(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def texts(vocab_size: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """input_ids, attention_mask (3, L) with 9, 5 and 2 tokens."""
    draw = torch.Generator().manual_seed(1)
    mask = (torch.arange(length) < torch.tensor([[length], [5], [2]])).long()
    return torch.randint(5, vocab_size, (3, length), generator=draw), mask


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def difference(mine: Tensor, theirs: Tensor) -> float:
    assert mine.shape == theirs.shape
    return (mine - theirs).abs().max().item()


# BERT and RoBERTa


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "RobertaModel"])
def test_a_text_tower_reads_what_transformers_writes(tmp_path, kind):
    theirs, source = bert_file(tmp_path, kind, TEXT, vocab_size=60, positions=20)
    compare_bert(theirs, source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaModel"])
def test_a_text_tower_of_base_size_reads_what_transformers_writes(tmp_path, kind):
    sizes = {"RobertaModel": (50265, 514)}.get(kind, (30522, 512))
    settings = TEXT | {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    compare_bert(*bert_file(tmp_path, kind, settings, *sizes))


def bert_file(path, kind, settings, vocab_size, positions):
    config_class = transformers.RobertaConfig if "Roberta" in kind else transformers.BertConfig
    roberta = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    config = config_class(
        **settings | (roberta if "Roberta" in kind else {}),
        vocab_size=vocab_size,
        max_position_embeddings=positions,
    )
    theirs = uneven(getattr(transformers, kind)(config))
    torch.save(theirs.state_dict(), path / "model.bin")
    said = "roberta" if "Roberta" in kind else "bert"
    width = settings["hidden_size"] // settings["num_attention_heads"]
    source = open_file(said, path / "model.bin", width)
    source.report.check()
    ignored = {name for name, _ in source.report.ignored}
    assert all("pooler" in name or "position_ids" in name for name in ignored)
    return theirs, source


def compare_bert(theirs, source) -> None:
    from elip_ds.towers.roberta import RoBERTa, RoBERTaConfig

    config = RoBERTaConfig(**source.tree["text"])
    mine = RoBERTa(config).eval()
    weights = {n.removeprefix("model.text."): w.read() for n, w in source.weights.items()}
    head = {n: weights.pop(n) for n in list(weights) if n.startswith("mlm_head.")}
    mine.load_state_dict(weights)
    input_ids, mask = texts(config.vocab_size)
    if config.variant == "roberta":
        input_ids = torch.where(mask.bool(), input_ids, 1)  # its padding, which moves positions
    with torch.no_grad():
        states = mine(input_ids, mask)
        base = getattr(theirs, "bert", theirs)
        expected = base(input_ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    found = difference(states[real], expected[real])
    assert found <= LIMIT
    if head:
        from elip_ds.towers.bert import MLMHead

        module = MLMHead(config)
        module.load_state_dict({n.removeprefix("mlm_head."): v for n, v in head.items()})
        with torch.no_grad():
            logits = theirs(input_ids, attention_mask=mask).logits
            found = max(found, difference(module(states, mine.embeddings.word)[real], logits[real]))
        assert found <= LIMIT
    print(f"{type(theirs).__name__}: {found:.2e}")


def test_a_bert_of_ours_loads_into_transformers_strictly(tmp_path):
    from elip_ds.weights.bert import FAMILY
    from elip_ds.weights.table import to_theirs

    theirs, source = bert_file(tmp_path, "BertForMaskedLM", TEXT, vocab_size=60, positions=20)
    made = to_theirs(FAMILY.rules, source.weights).made
    state = {(n if n.startswith("cls.") else f"bert.{n}"): w.read() for n, (_, w) in made.items()}
    theirs.load_state_dict(state, strict=True)
    assert theirs.state_dict().keys() == state.keys()


# CLIP


def small_open_clip(quick_gelu: bool = False, **vision):
    return open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
        | vision,
        text_cfg={"context_length": 12, "vocab_size": 70, "width": 64, "heads": 4, "layers": 2},
        quick_gelu=quick_gelu,
    )


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_reads_what_open_clip_trains(tmp_path, activation):
    theirs = uneven(small_open_clip(activation == "quick_gelu"))
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "optimizer": {}}, tmp_path / "epoch_1.pt")
    source = open_file("open_clip", tmp_path / "epoch_1.pt", 16, activation)
    source.report.check()
    assert {n for n, _ in source.report.ignored} <= {"attn_mask"}
    mine = build(source)
    assert compare_clip(mine, theirs, 32, 70, 12) <= LIMIT
    back = small_open_clip(activation == "quick_gelu")
    save_own(source, tmp_path / "own.safetensors")
    save_published(open_source(tmp_path / "own.safetensors"), "open_clip", tmp_path / "back.pt")
    back.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"])
    assert all(torch.equal(v, theirs.state_dict()[n]) for n, v in back.state_dict().items())


def test_clip_reads_the_custom_text_layout_of_open_clip(tmp_path):
    plain_model = uneven(small_open_clip())
    theirs = open_clip.CustomTextCLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 12, "vocab_size": 70, "width": 64, "heads": 4, "layers": 2},
    )
    uneven(theirs)
    torch.save(theirs.state_dict(), tmp_path / "custom.bin")
    mine = load(tmp_path / "custom.bin")
    assert mine.state_dict().keys() == build(_opened(tmp_path, plain_model)).state_dict().keys()
    assert compare_clip(mine, theirs, 32, 70, 12) <= LIMIT


def _opened(path, model):
    torch.save(model.state_dict(), path / "plain.bin")
    return open_file("open_clip", path / "plain.bin", 16)


def compare_clip(mine, theirs, size: int, vocab_size: int, length: int) -> float:
    input_ids, mask = texts(vocab_size - 1, length)
    input_ids[torch.arange(3), mask.sum(dim=1) - 1] = vocab_size - 1  # the end mark
    pictures = images(size)
    with torch.no_grad():
        found = [
            difference(mine.encode_image(pictures).image_feat, theirs.encode_image(pictures, True)),
            difference(
                mine.encode_text(input_ids, mask).text_feat, theirs.encode_text(input_ids, True)
            ),
            difference(mine.logit_scale(), theirs.logit_scale.exp().reshape(1)),
        ]
    return max(found)


def test_openai_archives_are_half_precision_torchscript_with_quick_gelu(tmp_path):
    import warnings

    from elip_ds.weights.container import read_container

    class Archive(nn.Module):
        def __init__(self, state: dict[str, Tensor]) -> None:
            super().__init__()
            for name, value in state.items():
                *path, last = name.split(".")
                at: nn.Module = self
                for part in path:
                    if not hasattr(at, part):
                        at.add_module(part, nn.Module())
                    at = getattr(at, part)
                at.register_buffer(last, value)
            for name, size in (("input_resolution", 32), ("context_length", 12)):
                self.register_buffer(name, torch.tensor(size))
            self.register_buffer("vocab_size", torch.tensor(70))

        def forward(self, x: Tensor) -> Tensor:
            return x

    theirs = uneven(small_open_clip(quick_gelu=True)).half()
    state = {n: v for n, v in theirs.state_dict().items() if n != "attn_mask"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(Archive(state)), tmp_path / "ViT-tiny.pt")
    assert read_container(tmp_path / "ViT-tiny.pt").kind == "torchscript"
    source = open_source(tmp_path / "ViT-tiny.pt", head_width=16)
    source.report.check()
    assert {n for n, _ in source.report.ignored} == {
        "input_resolution",
        "context_length",
        "vocab_size",
    }
    assert source.tree["vision"]["activation"] == source.tree["text"]["activation"] == "quick_gelu"
    mine = build(source)
    assert next(mine.parameters()).dtype == torch.float32
    assert compare_clip(mine, theirs.float(), 32, 70, 12) <= LIMIT


def test_clip_and_transformers_read_each_other(tmp_path):
    config = transformers.CLIPConfig(
        text_config=TOWER
        | {"vocab_size": 70, "max_position_embeddings": 12, "eos_token_id": 69, "bos_token_id": 68},
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    theirs = uneven(transformers.CLIPModel(config))
    torch.save(theirs.state_dict(), tmp_path / "hf.bin")
    source = open_file("clip", tmp_path / "hf.bin", HEAD_WIDTH)  # their default is quick_gelu too
    source.report.check()
    mine = build(source)
    input_ids, mask = texts(68, 12)
    input_ids[torch.arange(3), mask.sum(dim=1) - 1] = 69
    input_ids = torch.where(mask.bool(), input_ids, 0)
    pictures = images(32)
    with torch.no_grad():
        out = theirs(input_ids=input_ids, pixel_values=pictures)
        assert difference(mine.encode_image(pictures).image_feat, out.image_embeds) <= LIMIT
        assert difference(mine.encode_text(input_ids, mask).text_feat, out.text_embeds) <= LIMIT
    save_own(source, tmp_path / "own.safetensors")
    save_published(open_source(tmp_path / "own.safetensors"), "hf", tmp_path / "back.bin")
    state = torch.load(tmp_path / "back.bin", weights_only=True)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


# BLIP


def blip_config(vocab_size: int = 64):
    return transformers.BlipConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "hidden_act": "gelu",
            "bos_token_id": vocab_size - 2,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        image_text_hidden_size=16,
    )


def test_a_blip_of_ours_loads_into_transformers_and_judges_and_writes_the_same(tmp_path):
    save_own(_with_tree(tmp_path), tmp_path / "own.safetensors")
    source = open_source(tmp_path / "own.safetensors")
    save_published(source, "hf", tmp_path / "hf.bin")
    state = torch.load(tmp_path / "hf.bin", weights_only=True)
    mine = build(source)
    judge = transformers.BlipForImageTextRetrieval(blip_config()).eval()
    writer = transformers.BlipForConditionalGeneration(blip_config()).eval()
    for model in (judge, writer):
        wanted = model.state_dict().keys()
        load_strictly(model, {n: v for n, v in state.items() if n in wanted})
    assert state.keys() == judge.state_dict().keys() | writer.state_dict().keys()

    input_ids, mask = texts(62)
    pictures = images(32)
    with torch.no_grad():
        text, image = mine.encode_text(input_ids, mask), mine.encode_image(pictures)
        out = judge(input_ids, pictures, attention_mask=mask, use_itm_head=False)
        assert difference(image.image_embeds, out.last_hidden_state) <= LIMIT
        assert difference(image.image_feat @ text.text_feat.T, out.itm_score) <= LIMIT
        asked = torch.cat([torch.full((3, 1), 63), input_ids[:, 1:]], dim=1)  # [ENC]
        out = judge(asked, pictures, attention_mask=mask)
        weight, bias = (
            source.weights[f"objectives.itm.head.{k}"].read() for k in ("weight", "bias")
        )
        logits = nn.functional.linear(mine.fuse(text, image).pooled, weight, bias)
        assert difference(logits, out.itm_score) <= LIMIT
        begun = torch.cat([torch.full((3, 1), 62), input_ids[:, 1:]], dim=1)  # [DEC]
        out = writer(pictures, input_ids=begun, attention_mask=mask)
        words = mine.word_logits(mine.decode(input_ids, mask, image))
        real = mask.bool()
        assert difference(words[real], out.logits[real]) <= LIMIT


def load_strictly(model, state) -> None:
    missing = model.state_dict().keys() - state.keys()
    assert not missing, missing
    model.load_state_dict(state, strict=True)


def _with_tree(path):
    """A small BLIP that says how it is made, as a run would."""
    import dataclasses

    from small import small_config

    source = small_source("blip")
    tree = dataclasses.asdict(small_config("blip").model)
    return dataclasses.replace(source, tree=tree)


def test_blip_reads_what_transformers_holds(tmp_path):
    judge = uneven(transformers.BlipForImageTextRetrieval(blip_config()))
    torch.save(judge.state_dict(), tmp_path / "hf.bin")
    source = open_file("blip", tmp_path / "hf.bin", HEAD_WIDTH)
    source.report.check()
    name = "model.text.layers.1.cross.key_value.weight"
    layer = judge.text_encoder.encoder.layer[1].crossattention.self
    expected = torch.cat([layer.key.weight, layer.value.weight])
    assert torch.equal(source.weights[name].read(), expected)
