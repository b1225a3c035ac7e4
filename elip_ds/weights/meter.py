"""METER's Lightning checkpoints: CLIP's tower, RoBERTa or BERT, and the co-attention layers.

Source of the names: zdou0830/METER. Heads of fine-tuned models are left out.
"""

from elip_ds.weights.bert import (
    IGNORED,
    cross_attention,
    feed_forward,
    self_attention,
    text_tower,
)
from elip_ds.weights.clip import vision_tower
from elip_ds.weights.table import Family, Rule, linear, rule


def stream(modality: str) -> list[Rule]:
    """The layers of one modality, what leads into them and what reads them."""
    name = f"cross_modal_{modality}"
    layer = f"{name}_layers.{{i}}"
    return [
        *linear(f"model.{name}_transform", f"{name}_transform"),
        *self_attention(f"model.{layer}.attn", f"{layer}.attention"),
        *cross_attention(f"model.{layer}.cross", f"{layer}.crossattention"),
        *feed_forward(f"model.{layer}", layer),
        *linear(f"model.{name}_pooler", f"{name}_pooler.dense"),
    ]


def recognise(names: set[str]) -> str:
    wanted = "cross_modal_text_transform.weight"
    return wanted if wanted in names else ""


FAMILY = Family(
    title="METER",
    model="meter",
    recognise=recognise,
    rules=(
        *vision_tower("model.visual.", "vit_model.visual."),
        rule(
            "model.text.embeddings.word.weight",
            "text_transformer.embeddings.word_embeddings.weight",
        ),
        *text_tower("model.text.", "text_transformer."),
        rule("model.token_type_embeddings.weight", "token_type_embeddings.weight"),
        *stream("text"),
        *stream("image"),
        *linear("model.mlm_head.dense", "mlm_score.transform.dense"),
        *linear("model.mlm_head.norm", "mlm_score.transform.LayerNorm"),
        rule("model.mlm_head.bias", "mlm_score.bias"),
        rule("model.mlm_head.decoder.weight", "mlm_score.decoder.weight"),
        *linear("objectives.itm.head", "itm_score.fc"),
    ),
    ignored={
        **IGNORED,
        r"vit_model\.positional_embedding|vit_model\.ln_final\..*": "left over of CLIP's text side",
        r"(vqa|nlvr2|snli)_classifier\..*|rank_output\..*": "the head of a fine-tuned model",
    },
    optional=("model.mlm_head.",),
    wrap="state_dict",
)
