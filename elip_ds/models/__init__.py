"""Models wire towers and return features; they know no loss."""

from elip_ds.models.albef import ALBEF
from elip_ds.models.ema import LocalTensor, MomentumTwin
from elip_ds.models.features import ImageFeatures, TextFeatures

__all__ = ["ALBEF", "ImageFeatures", "LocalTensor", "MomentumTwin", "TextFeatures"]
