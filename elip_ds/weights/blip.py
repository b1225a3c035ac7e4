"""BLIP's pre-training, retrieval and captioning files, and transformers' layout of the latter two.

Their text encoder and decoder are two BERTs that share all but self-attention; here they are one,
so what is shared is read from either and must be equal in both. Source of the names:
salesforce/BLIP; transformers' BlipForImageTextRetrieval and BlipForConditionalGeneration.
"""

from elip_ds.weights.albef import itm_and_queues
from elip_ds.weights.bert import (
    IGNORED,
    cross_attention,
    embeddings,
    feed_forward,
    self_attention,
    word_head,
)
from elip_ds.weights.table import SCALAR, Family, Rule, linear, rule
from elip_ds.weights.vit import vision_tower

LAYER = "encoder.layer.{i}"


def student_text() -> list[Rule]:
    ours, both = "model.text.", ("text_encoder", "text_decoder.bert")
    layers = [f"{t}.{LAYER}" for t in both]
    return [
        rule(
            f"{ours}embeddings.word.weight",
            *(f"{t}.embeddings.word_embeddings.weight" for t in both),
            "text_decoder.cls.predictions.decoder.weight",
        ),
        *embeddings(f"{ours}embeddings", *(f"{t}.embeddings" for t in both)),
        *self_attention(f"{ours}layers.{{i}}.attn", f"{layers[0]}.attention"),
        *self_attention(f"{ours}layers.{{i}}.decoder_attn", f"{layers[1]}.attention"),
        *cross_attention(f"{ours}layers.{{i}}.cross", *(f"{t}.crossattention" for t in layers)),
        *feed_forward(f"{ours}layers.{{i}}", *layers),
        *word_head(f"{ours}lm_head", "text_decoder.cls.predictions"),
    ]


def twin() -> list[Rule]:
    """It reads texts and images each alone, so it has no cross-attention and no decoder."""
    text = "text_encoder_m"
    return [
        *vision_tower("teacher.visual.", "visual_encoder_m."),
        rule("teacher.text.embeddings.word.weight", f"{text}.embeddings.word_embeddings.weight"),
        *embeddings("teacher.text.embeddings", f"{text}.embeddings"),
        *self_attention("teacher.text.layers.{i}.attn", f"{text}.{LAYER}.attention"),
        *feed_forward("teacher.text.layers.{i}", f"{text}.{LAYER}"),
        *linear("teacher.vision_proj", "vision_proj_m"),
        *linear("teacher.text_proj", "text_proj_m"),
    ]


def projections() -> list[Rule]:
    return [
        *linear("model.vision_proj", "vision_proj"),
        *linear("model.text_proj", "text_proj"),
    ]


def tidy(name: str) -> str:
    return "queue_ptr" if name == "ptr_queue" else name


def recognise(names: set[str]) -> str:
    if not any(name.startswith("visual_encoder.") for name in names):
        return ""
    if any(name.endswith("embeddings.token_type_embeddings.weight") for name in names):
        return ""
    if any(name.startswith("text_decoder.") for name in names):
        return "text_decoder.*"
    crossing = "text_encoder.encoder.layer.0.crossattention.self.query.weight"
    return crossing if crossing in names else ""


def recognise_transformers(names: set[str]) -> str:
    wanted = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    return wanted if wanted in names else ""


NO_TWIN = {r"teacher\..*": "transformers keeps no momentum twin", r"itc\..*": "nor queues"}
# What retrieval files leave out, and what captioning files do.
OPTIONAL = (
    "model.text.lm_head.",
    "model.text.layers.{i}.decoder_attn",
    "model.text.layers.{i}.attn",
    "model.vision_proj.",
    "model.text_proj.",
    "model.temperature.",
)

FAMILY = Family(
    title="BLIP",
    model="blip",
    recognise=recognise,
    tidy=tidy,
    rules=(
        *vision_tower("model.visual.", "visual_encoder."),
        *student_text(),
        *projections(),
        rule("model.temperature.temperature", "temp", form=SCALAR),
        *twin(),
        *itm_and_queues(),
    ),
    ignored={
        **IGNORED,
        r"text_encoder_m\..*\.crossattention\..*": "the twin never fuses",
        r"idx_queue": "which image a queued feature came from",
    },
    optional=OPTIONAL,
    dropped={r"teacher\.temperature\..*": "BLIP's twin reads the student's temperature"},
    # Random values in the published file, which nothing uses; the student's stand in.
    filled=tuple(
        cross_attention("model.text.layers.{i}.cross", f"text_encoder_m.{LAYER}.crossattention")
    ),
    wrap="model",
)


def transformers_vision() -> list[Rule]:
    layer, block = "vision_model.encoder.layers.{i}", "model.visual.blocks.{i}"
    return [
        rule("model.visual.cls_token.weight", "vision_model.embeddings.class_embedding"),
        rule("model.visual.pos_embed.weight", "vision_model.embeddings.position_embedding"),
        *linear("model.visual.patch_embed", "vision_model.embeddings.patch_embedding"),
        *linear(f"{block}.norm1", f"{layer}.layer_norm1"),
        *linear(f"{block}.attn.qkv", f"{layer}.self_attn.qkv"),
        *linear(f"{block}.attn.proj", f"{layer}.self_attn.projection"),
        *linear(f"{block}.norm2", f"{layer}.layer_norm2"),
        *linear(f"{block}.mlp.fc1", f"{layer}.mlp.fc1"),
        *linear(f"{block}.mlp.fc2", f"{layer}.mlp.fc2"),
        *linear("model.visual.norm", "vision_model.post_layernorm"),
    ]


TRANSFORMERS = Family(
    title="BLIP as transformers stores it",
    model="blip",
    recognise=recognise_transformers,
    rules=(
        *transformers_vision(),
        *student_text(),
        *projections(),
        *linear("objectives.itm.head", "itm_head"),
    ),
    ignored=IGNORED,
    optional=OPTIONAL,
    dropped={r"model\.temperature\..*": "transformers keeps no temperature", **NO_TWIN},
)
