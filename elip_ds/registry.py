"""The table of contents: every name a config may use, and what is behind it.

Strings, resolved on use, so that importing this page costs nothing and it may point upward.
"""

import difflib
import importlib
from typing import Any

from elip_ds.errors import UserError

MODELS = {
    "albef": "elip_ds.models.albef:ALBEF",
    "blip": "elip_ds.models.blip:BLIP",
    "clip": "elip_ds.models.clip:CLIP",
    "meter": "elip_ds.models.meter:METER",
}
OBJECTIVES = {
    "contrastive": "elip_ds.objectives.contrastive:Contrastive",
    "itc": "elip_ds.objectives.itc:ITC",
    "itm": "elip_ds.objectives.itm:ITM",
    "lm": "elip_ds.objectives.lm:LM",
    "mlm": "elip_ds.objectives.mlm:MLM",
}
# In the order in which a file is compared with them.
WEIGHTS = {
    "albef": "elip_ds.weights.albef:FAMILY",
    "blip": "elip_ds.weights.blip:FAMILY",
    "blip_hf": "elip_ds.weights.blip:TRANSFORMERS",
    "meter": "elip_ds.weights.meter:FAMILY",
    "clip": "elip_ds.weights.clip:FAMILY",
    "clip_hf": "elip_ds.weights.clip:TRANSFORMERS",
    "deit": "elip_ds.weights.vit:FAMILY",
    "bert": "elip_ds.weights.bert:FAMILY",
}
TASKS = {"pretrain": "elip_ds.tasks.pretrain:Pretrain"}
SOURCES = {
    "albef_json": "elip_ds.data.sources.json_list:JsonList",
    "arrow": "elip_ds.data.sources.arrow:ArrowTable",
    "img2dataset": "elip_ds.data.sources.img2dataset:Img2Dataset",
    "karpathy": "elip_ds.data.sources.karpathy:Karpathy",
    "scenes": "elip_ds.data.sources.drawn:Scenes",
    "shards": "elip_ds.data.sources.tars:Shards",
    "table": "elip_ds.data.sources.table:Table",
    "visual_genome": "elip_ds.data.sources.visual_genome:VisualGenome",
}
SCORES = {"recall": "elip_ds.scores.recall:retrieval_recall"}


def resolve(table: dict[str, str], name: str, key: str) -> Any:
    """The object behind a name. Raises UserError that names the config key and the known names."""
    if name not in table:
        raise UserError(f"{key}={name!r} is not known; {suggest(name, table)}")
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def suggest(name: str, known: Any) -> str:
    """'did you mean X? known: ...' for an error line."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(known) if len(known) <= 12 else f"{', '.join(known[:12])}, ..."
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {listed}"
