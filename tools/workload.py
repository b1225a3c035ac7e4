"""A preset's step at its full size without its data: random weights, in either computation."""

from dataclasses import replace
from typing import Any

import naive
import torch
from torch import Tensor, nn

from elip_ds.config import Config
from elip_ds.data import Batch
from elip_ds.data.made_up import made_up_vocabulary
from elip_ds.errors import UserError
from elip_ds.models import LocalTensor
from elip_ds.objectives import Progress
from elip_ds.tasks import Pretrain, StepLoss, build_pretrain

PROGRESS = Progress(step=0, samples_seen=10**9, samples_per_epoch=10**6)
"Long after the warm-up: the teacher has its whole share in the targets."


def part_of(batch: Batch, rows: int) -> Batch:
    """The first rows of a batch."""
    fields = ("images", "input_ids", "attention_mask", "sample_key", "keys")
    return replace(batch, **{name: getattr(batch, name)[:rows] for name in fields})


class NaiveTask(nn.Module):
    """A task whose step is computed in the plain way; it has the task's weights and state."""

    def __init__(self, task: Pretrain, config: Config) -> None:
        super().__init__()
        if config.teacher.prune == "student" or config.pruning.schedule:
            raise UserError(
                "the naive step knows neither teacher.prune=student nor pruning.schedule; compare "
                "with it without them, and give them to --variants"
            )
        self.task, self.config = task, config
        self._last: naive.NaiveLoss | None = None
        self._keys_written = 0

    @property
    def teacher(self) -> Any:
        return self.task.teacher

    def forward(self, batch: Batch, progress: Progress) -> StepLoss:
        loss = naive.naive_step(self.task, self.config, batch, progress)
        values = {name: value.detach() for name, value in loss.values.items()}
        self._last = loss._replace(total=loss.total.detach(), values=values)
        return StepLoss(loss.total, values, {}, loss.kept_tokens)

    def after_step(self, progress: Progress, local: LocalTensor) -> None:
        assert self._last is not None
        self._keys_written = naive.after_step(
            self.task, self.config, self._last, self._keys_written
        )

    def drop_carries(self) -> None:
        self._last = None


def build_task(config: Config, *, plain: bool, like: nn.Module | None = None) -> nn.Module:
    """The task of a config, or its plain twin. like: one whose parameters it takes, where their
    names and shapes agree.
    """
    torch.manual_seed(config.run.seed)
    task = build_pretrain(config, made_up_vocabulary(config)).train()
    other: Any = like.task if isinstance(like, NaiveTask) else like
    if other is not None and _shapes(other) == _shapes(task):
        for (_, module), (_, twin) in zip(task.named_modules(), other.named_modules(), strict=True):
            module._parameters = twin._parameters
    return NaiveTask(task, config) if plain else task


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


def held(task: nn.Module) -> list[Tensor]:
    """What is there before a step: parameters and buffers."""
    return [*task.parameters(), *task.buffers()]
