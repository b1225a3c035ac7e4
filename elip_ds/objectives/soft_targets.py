"""Soft targets: labels mixed with what the momentum twin believes, more of it as training goes on.

Source: ALBEF (Li et al. 2021) section 3.2 and its released code. ITC and MLM share it.

R rows, K classes.
"""

import torch.nn.functional as F
from torch import Tensor

from elip_ds.config import duration_in_samples
from elip_ds.objectives.base import Progress


def ramp(alpha: float, over: str, progress: Progress) -> float:
    """alpha, grown linearly from 0 over a duration ('1 epoch'), by samples seen."""
    length = duration_in_samples(over, progress.samples_per_epoch)
    return alpha * min(1.0, progress.samples_seen / length) if length else alpha


def soft_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor, alpha: float
) -> Tensor:
    """(R,): cross-entropy with targets alpha * softmax(teacher) + (1 - alpha) * one-hot(labels).

    logits, teacher_logits: (R, K), fp32.  labels: (R,).  No gradient reaches the teacher.
    """
    log_p = F.log_softmax(logits, dim=1)
    hard = F.nll_loss(log_p, labels, reduction="none")
    soft = -(teacher_logits.detach().softmax(dim=1) * log_p).sum(dim=1)
    return (1 - alpha) * hard + alpha * soft
