"""A job is a model, objectives and scores."""

from elip_ds.tasks.pretrain import Pretrain, StepLoss, build_pretrain, match, min_micro_batch

__all__ = ["Pretrain", "StepLoss", "build_pretrain", "match", "min_micro_batch"]
