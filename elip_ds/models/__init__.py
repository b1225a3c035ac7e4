"""Models wire towers and return features; they know no loss."""

from elip_ds.models.albef import ALBEF
from elip_ds.models.blip import BLIP
from elip_ds.models.clip import CLIP
from elip_ds.models.ema import LocalTensor, MomentumTwin
from elip_ds.models.features import Fused, ImageFeatures, TextFeatures
from elip_ds.models.joint import ModelConfig
from elip_ds.towers.bert import Pairing

__all__ = [
    "ALBEF",
    "BLIP",
    "CLIP",
    "Fused",
    "ImageFeatures",
    "LocalTensor",
    "ModelConfig",
    "MomentumTwin",
    "Pairing",
    "TextFeatures",
]
