"""Ring: a first-in-first-out store of feature rows, equal on all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ring(nn.Module):
    """rows: (size, E), fp32. Starts with random unit rows from the seed, as ALBEF's queue does.

    # differs from ALBEF, which stores the transpose and drops the wrap-around: any number of rows up to
    # the size may be pushed at once. The pointer is a Python int, since a tensor would cost a sync.
    """

    rows: Tensor

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = F.normalize(torch.randn(size, width, generator=generator), dim=1)
        # Not persistent: DeepSpeed's model file would tie it to precision and stage; Objective.state
        # carries it instead.
        self.register_buffer("rows", start, persistent=False)
        self.at = 0

    @torch.no_grad()
    def push(self, new: Tensor) -> None:
        """new: (R, E) with R <= size, in the same order on every rank."""
        size = len(self.rows)
        assert len(new) <= size, f"{len(new)} rows do not fit a ring of {size}"
        head = min(len(new), size - self.at)
        self.rows[self.at : self.at + head] = new[:head]
        self.rows[: len(new) - head] = new[head:]
        self.at = (self.at + len(new)) % size
