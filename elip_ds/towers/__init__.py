"""Networks that see one modality or fuse two, and know no loss."""

from elip_ds.towers.bert import BERT, BERTConfig
from elip_ds.towers.pruning import (
    KeepIndex,
    check_stages,
    prune_targets,
    sequence_lengths,
    unprune,
)
from elip_ds.towers.vit import ViT, ViTConfig

__all__ = [
    "BERT",
    "BERTConfig",
    "KeepIndex",
    "ViT",
    "ViTConfig",
    "check_stages",
    "prune_targets",
    "sequence_lengths",
    "unprune",
]
