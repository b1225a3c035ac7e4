"""ALBEF's pre-training and retrieval files, momentum twin, heads and queues included.

Source of the names: salesforce/ALBEF; its retrieval files leave `bert.` and the word head out.
"""

import re

from elip_ds.weights.bert import IGNORED, cross_attention, text_tower, word_head
from elip_ds.weights.table import COUNTER, SCALAR, TRANSPOSED, Family, Rule, linear, rule
from elip_ds.weights.vit import vision_tower


def model(ours: str, twin: str) -> list[Rule]:
    """twin: what their names end in, empty for the student, _m for the momentum twin."""
    text = f"text_encoder{twin}"
    layer = f"{text}.bert.encoder.layer.{{i}}"
    return [
        *vision_tower(f"{ours}visual.", f"visual_encoder{twin}."),
        rule(
            f"{ours}text.embeddings.word.weight",
            f"{text}.bert.embeddings.word_embeddings.weight",
            f"{text}.cls.predictions.decoder.weight",
        ),
        *text_tower(f"{ours}text.", f"{text}.bert."),
        *cross_attention(f"{ours}text.layers.{{i}}.cross", f"{layer}.crossattention"),
        *word_head(f"{ours}text.mlm_head", f"{text}.cls.predictions"),
        *linear(f"{ours}vision_proj", f"vision_proj{twin}"),
        *linear(f"{ours}text_proj", f"text_proj{twin}"),
    ]


def itm_and_queues() -> list[Rule]:
    return [
        *linear("objectives.itm.head", "itm_head"),
        rule("itc.image_queue", "image_queue", form=TRANSPOSED),
        rule("itc.text_queue", "text_queue", form=TRANSPOSED),
        rule("itc.at", "queue_ptr", form=COUNTER),
    ]


def tidy(name: str) -> str:
    return re.sub(r"^(text_encoder(?:_m)?)\.(embeddings|encoder)\.", r"\1.bert.\2.", name)


def recognise(names: set[str]) -> str:
    segments = r"text_encoder\.(bert\.)?embeddings\.token_type_embeddings\.weight"
    found = [name for name in names if re.fullmatch(segments, name)]
    vision = any(name.startswith("visual_encoder.") for name in names)
    return found[0] if found and vision else ""


FAMILY = Family(
    title="ALBEF",
    model="albef",
    recognise=recognise,
    tidy=tidy,
    rules=(
        *model("model.", ""),
        rule("model.temperature.temperature", "temp", form=SCALAR),
        *model("teacher.", "_m"),
        *itm_and_queues(),
    ),
    ignored=IGNORED,
    refused={
        r"text_decoder(_m)?\..*": "an ALBEF fine-tuned for VQA; only pre-training and retrieval "
        "files can be read",
        r"(cls|ta)_head(_m)?\..*": "an ALBEF fine-tuned for SNLI-VE or NLVR2; only pre-training "
        "and retrieval files can be read",
    },
    optional=("model.text.mlm_head.", "teacher.text.mlm_head."),
    dropped={r"teacher\.temperature\..*": "ALBEF's twin reads the student's temperature"},
    wrap="model",
)
