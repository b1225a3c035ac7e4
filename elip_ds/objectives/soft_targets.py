"""Soft targets: labels mixed with what the momentum twin believes, more of it as training goes on.

Source: ALBEF (Li et al. 2021) section 3.2 and its released code. ITC and MLM share it.

R rows, K classes, E joint space.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds.config import duration_in_samples
from elip_ds.objectives.base import Progress

ROWS_AT_ONCE = 128
"Rows whose scores against all keys exist at one time."


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


def soft_contrast(
    x: Tensor,
    teacher: Tensor,
    keys: Sequence[Tensor],
    own: Tensor,
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    """soft_cross_entropy of the scores x @ keys.T / temperature, without keeping any score.

    x, teacher: (R, E), fp32; the teacher's scores against the same keys are its logits.
    keys: several (K_i, E), which count as one long list.  own: (R,) labels, rows of the first.
    temperature: (1,).  Returns (R,), with gradient for x and temperature.

    With p = softmax(x K^T / T) and targets t the loss is logsumexp(x K^T / T) - x . (t K) / T. Its
    derivative by x is (p K - t K) / T, by T it is -x . (p K - t K) / T^2: two means of keys, (R, E)
    each, are all that is read, and p and t, (R, K) each, are forgotten row by row.
    """
    with torch.no_grad():
        both = attend(torch.cat([x, teacher]), keys, temperature)  # the keys are read once for both
        total, (mean, target) = both.total[: len(x)], both.mean.split(len(x))
        target = alpha * target + (1 - alpha) * keys[0][own]
        value = total - (x * target).sum(dim=1) / temperature
    slope = (x * (mean - target)).sum(dim=1) / temperature
    return value + slope - slope.detach()


class Attention(NamedTuple):
    """total: (R,) log of the sum of exp of all scores.  mean: (R, E) of keys, weighted by them."""

    total: Tensor
    mean: Tensor


@torch.no_grad()
def attend(x: Tensor, keys: Sequence[Tensor], temperature: Tensor) -> Attention:
    """x: (R, E) asks, keys: several (K_i, E) answer, each with itself. No list is joined."""
    parts = [_attend(rows, keys, temperature) for rows in x.split(ROWS_AT_ONCE)]
    totals, means = zip(*parts, strict=True)
    return Attention(torch.cat(totals), torch.cat(means))


def _attend(x: Tensor, keys: Sequence[Tensor], temperature: Tensor) -> Attention:
    totals, means = [], []
    for part in keys:
        if len(part):
            scores = x @ part.T / temperature
            totals.append(scores.logsumexp(dim=1))
            means.append(scores.sub_(totals[-1].unsqueeze(1)).exp_() @ part)
    share = torch.stack(totals, dim=1)  # (R, number of parts)
    total = share.logsumexp(dim=1)
    share = (share - total.unsqueeze(1)).exp()
    return Attention(total, (share.unsqueeze(2) * torch.stack(means, dim=1)).sum(dim=1))
