"""Networks that see one modality or fuse two, and know no loss."""

from elip_ds.towers.bert import BERT, BERTConfig
from elip_ds.towers.clip_text import CLIPText, CLIPTextConfig
from elip_ds.towers.med import MED, MEDConfig
from elip_ds.towers.pruning import KeepIndex, check_stages
from elip_ds.towers.vit import ViT, ViTConfig

__all__ = [
    "BERT",
    "MED",
    "BERTConfig",
    "CLIPText",
    "CLIPTextConfig",
    "KeepIndex",
    "MEDConfig",
    "ViT",
    "ViTConfig",
    "check_stages",
]
