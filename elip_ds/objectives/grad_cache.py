"""Losses over a step's accumulated micro-batches as if they were one batch, by two passes.

The first pass runs every micro-batch without gradient and keeps its features. The losses of all of
them together, and the gradients with respect to the features, are then computed once. The second
pass runs every micro-batch again, with gradient and the same random numbers, and goes backward from
a surrogate that has just that gradient. Source: GradCache, Gao et al., arXiv:2101.06983.

A micro-batches, B samples of each on this rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elip_ds.objectives.base import Features, Loss, Objective, Progress, StepContext


class GradCache:
    """One optimizer step's features, then the losses and gradients that follow from them."""

    def __init__(self, objectives: Mapping[str, Objective]) -> None:
        self.objectives = {name: o for name, o in objectives.items() if o.caches}
        self.clear()

    def clear(self) -> None:
        """Forget the step."""
        self._parts: dict[str, list[Features]] = {name: [] for name in self.objectives}
        self._random: list[dict[str, Tensor]] = []
        self._losses: dict[str, Loss] = {}
        self._gradients: dict[str, list[Features]] = {}

    @torch.no_grad()
    def keep(self, context: StepContext) -> None:
        """The first pass over a micro-batch, in the order of their numbers."""
        self._random.append(random_state(context.batch.images.device))
        for name, objective in self.objectives.items():
            self._parts[name].append(objective.features(context))

    def settle(self, progress: Progress) -> None:
        """Between the passes. Every rank calls it."""
        for name, objective in self.objectives.items():
            columns = zip(*(part.rows for part in self._parts[name]), strict=True)
            rows = tuple(torch.cat(column).requires_grad_() for column in columns)
            shared = tuple(x.clone().requires_grad_() for x in self._parts[name][0].shared)
            loss = objective.loss(Features(rows, shared))
            total = objective.total(loss, progress)
            gradients = torch.autograd.grad(total, [*rows, *shared], materialize_grads=True)
            per_row = [x.chunk(len(self._random)) for x in gradients[: len(rows)]]
            self._gradients[name] = [
                Features(part, gradients[len(rows) :]) for part in zip(*per_row, strict=True)
            ]
            values = {key: value.detach() for key, value in loss.values.items()}
            self._losses[name] = loss._replace(values=values)
            self._parts[name].clear()

    @property
    def settled(self) -> bool:
        return bool(self._losses)

    def replay(self, context: StepContext) -> dict[str, tuple[Loss, Tensor]]:
        """The second pass over a micro-batch: of each objective the loss of the whole step, and
        what to add to this micro-batch's total.

        The totals' mean over the micro-batches has the gradient of the weighted losses: a sample is
        in one micro-batch of A and counts A times, what is shared is in all and counts once.
        """
        at = context.progress.micro_step
        set_random_state(self._random[at])
        replayed = {}
        for name, objective in self.objectives.items():
            features, gradients = objective.features(context), self._gradients[name][at]
            of_rows = _dot(features.rows, gradients.rows)
            of_shared = _dot(features.shared, gradients.shared)
            surrogate = len(self._random) * of_rows + of_shared
            replayed[name] = self._losses[name], surrogate
        return replayed


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Any:
    return sum((a * b).sum() for a, b in zip(x, y, strict=True))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that a forward draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[str(device)] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """The inverse of random_state."""
    for device, value in state.items():
        if device == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)
