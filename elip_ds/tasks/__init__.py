"""A job is a model, objectives and scores."""

from elip_ds.tasks.pretrain import Pretrain, StepLoss, build_pretrain

__all__ = ["Pretrain", "StepLoss", "build_pretrain"]
