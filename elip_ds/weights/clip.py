"""CLIP as OpenAI and open_clip store it, and as transformers does.

Source of the names: openai/CLIP and mlfoundations/open_clip (its CustomTextCLIP puts the text side
under `text.`), transformers' CLIPModel.
"""

import re

from elip_ds.weights.table import (
    BATCHED,
    CLASS_TOKEN,
    SAME,
    SCALAR,
    TRANSPOSED,
    Family,
    Form,
    Rule,
    linear,
    rule,
)


def blocks(ours: str, theirs: str) -> list[Rule]:
    """ours, theirs: a block."""
    return [
        *linear(f"{ours}.norm1", f"{theirs}.ln_1"),
        rule(f"{ours}.attn.qkv.weight", f"{theirs}.attn.in_proj_weight"),
        rule(f"{ours}.attn.qkv.bias", f"{theirs}.attn.in_proj_bias"),
        *linear(f"{ours}.attn.proj", f"{theirs}.attn.out_proj"),
        *linear(f"{ours}.norm2", f"{theirs}.ln_2"),
        *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc"),
        *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj"),
    ]


def vision_tower(ours: str, theirs: str) -> list[Rule]:
    """Without the projection into the joint space."""
    return [
        rule(f"{ours}cls_token.weight", f"{theirs}class_embedding", form=CLASS_TOKEN),
        rule(f"{ours}pos_embed.weight", f"{theirs}positional_embedding", form=BATCHED),
        rule(f"{ours}patch_embed.weight", f"{theirs}conv1.weight"),
        *linear(f"{ours}norm_pre", f"{theirs}ln_pre"),
        *blocks(f"{ours}blocks.{{i}}", f"{theirs}transformer.resblocks.{{i}}"),
        *linear(f"{ours}norm", f"{theirs}ln_post"),
    ]


def joint(vision: str, text: str, form: Form = SAME) -> list[Rule]:
    return [
        rule("model.visual_proj.weight", vision, form=form),
        rule("model.text_projection.weight", text, form=form),
        rule("model.logit_scale.logit_scale", "logit_scale", form=SCALAR),
    ]


def tidy(name: str) -> str:
    return re.sub(r"^text\.", "", name)


def recognise(names: set[str]) -> str:
    wanted = "visual.transformer.resblocks.0.attn.in_proj_weight"
    return wanted if wanted in names else ""


def recognise_transformers(names: set[str]) -> str:
    wanted = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    return wanted if wanted in names else ""


FAMILY = Family(
    title="CLIP",
    model="clip",
    recognise=recognise,
    tidy=tidy,
    rules=(
        *vision_tower("model.visual.", "visual."),
        rule("model.text.embeddings.word.weight", "token_embedding.weight"),
        rule("model.text.position.weight", "positional_embedding", form=BATCHED),
        *blocks("model.text.blocks.{i}", "transformer.resblocks.{i}"),
        *linear("model.text.norm", "ln_final"),
        *joint("visual.proj", "text_projection"),
    ),
    ignored={
        r"input_resolution|context_length|vocab_size": "a size, which the shapes tell too",
        r"attn_mask": "the causal mask",
    },
    wrap="state_dict",
)


def transformers_blocks(ours: str, theirs: str) -> list[Rule]:
    parts = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
    return [
        *linear(f"{ours}.norm1", f"{theirs}.layer_norm1"),
        *linear(f"{ours}.attn.qkv", parts),
        *linear(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj"),
        *linear(f"{ours}.norm2", f"{theirs}.layer_norm2"),
        *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
    ]


def transformers_rules() -> list[Rule]:
    image, text = "vision_model.embeddings", "text_model.embeddings"
    positions = "position_embedding.weight"
    return [
        rule("model.visual.cls_token.weight", f"{image}.class_embedding", form=CLASS_TOKEN),
        rule("model.visual.pos_embed.weight", f"{image}.{positions}", form=BATCHED),
        rule("model.visual.patch_embed.weight", f"{image}.patch_embedding.weight"),
        *linear("model.visual.norm_pre", "vision_model.pre_layrnorm"),  # their spelling
        *transformers_blocks("model.visual.blocks.{i}", "vision_model.encoder.layers.{i}"),
        *linear("model.visual.norm", "vision_model.post_layernorm"),
        rule("model.text.embeddings.word.weight", f"{text}.token_embedding.weight"),
        rule("model.text.position.weight", f"{text}.{positions}", form=BATCHED),
        *transformers_blocks("model.text.blocks.{i}", "text_model.encoder.layers.{i}"),
        *linear("model.text.norm", "text_model.final_layer_norm"),
        *joint("visual_projection.weight", "text_projection.weight", form=TRANSPOSED),
    ]


TRANSFORMERS = Family(
    title="CLIP as transformers stores it",
    model="clip",
    recognise=recognise_transformers,
    rules=tuple(transformers_rules()),
    ignored={r".*embeddings\.position_ids": "a counter, not a weight"},
)
