"""Learning rate as a function of samples seen, so that the batch size does not bend it."""

import dataclasses
import math

from elip_ds.config import duration_in_samples
from elip_ds.config.schema import OptimConfig, ScheduleConfig


def choose_optimizer(optim: OptimConfig, global_batch_size: float) -> OptimConfig:
    """LAMB for AdamW where the batch is above lamb_above."""
    if optim.lamb_above is None or global_batch_size <= optim.lamb_above:
        return optim
    lr = optim.lr if optim.lamb_lr is None else optim.lamb_lr
    return dataclasses.replace(optim, name="lamb", lr=lr, lamb_above=None, lamb_lr=None)


def settle_optim(optim: OptimConfig, global_batch_size: int) -> OptimConfig:
    """For this batch: LAMB where it is above lamb_above, and the rule of the learning rate applied,
    lr times (global batch / base) or the square root of that.

    linear: Goyal et al., arXiv:1706.02677.  sqrt: for LAMB, You et al., arXiv:1904.00962. Only the
    peak moves: schedule.warmup_lr and schedule.min_lr stay as they are given.
    """
    optim = choose_optimizer(optim, global_batch_size)
    if optim.lr_rule == "none":
        return optim
    assert optim.base_batch_size is not None
    factor = global_batch_size / optim.base_batch_size
    if optim.lr_rule == "sqrt":
        factor = math.sqrt(factor)
    # Without the rule, so that nobody applies it twice.
    return dataclasses.replace(optim, lr=optim.lr * factor, lr_rule="none", base_batch_size=None)


def learning_rate(
    samples_seen: int, optim: OptimConfig, schedule: ScheduleConfig, samples_per_epoch: int
) -> float:
    """Linear warm-up from warmup_lr to lr, then down to min_lr.  optim: as scale_lr gives it.

    cosine (ALBEF, CLIP) and linear (METER) reach it at the end; exponential (BLIP) multiplies by
    decay at every whole epoch and stays above it.
    # differs from ALBEF, whose warm-up is a staircase of iterations inside the first epoch and
    # whose cosine steps once an epoch: both are cut off or coarse at a large batch.
    """
    warmup = duration_in_samples(schedule.warmup, samples_per_epoch)
    length = duration_in_samples(schedule.length, samples_per_epoch)
    if samples_seen < warmup:
        return schedule.warmup_lr + (optim.lr - schedule.warmup_lr) * samples_seen / warmup
    if schedule.shape == "exponential":
        return max(
            schedule.min_lr, optim.lr * schedule.decay ** (samples_seen // samples_per_epoch)
        )
    done = min(1.0, (samples_seen - warmup) / max(1, length - warmup))
    left = 1 - done if schedule.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr + (optim.lr - schedule.min_lr) * left


def due(samples_seen: int, step_samples: int, every_samples: int) -> bool:
    """Whether the step that ended at samples_seen crossed a multiple of the interval."""
    if every_samples <= 0:
        return True
    return samples_seen // every_samples > (samples_seen - step_samples) // every_samples
