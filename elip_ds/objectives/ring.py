"""Ring: a first-in-first-out store of feature rows, equal on all ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ring(nn.Module):
    """rows: (size, E), always fp32. Starts with random unit rows from the seed, as ALBEF's queue.

    # differs from ALBEF, which stores the transpose and wants the size to be a multiple of what is
    # pushed. The pointer is a Python int, since a tensor would cost a sync.
    """

    rows: Tensor

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = F.normalize(torch.randn(size, width, generator=generator), dim=1)
        # Not persistent: DeepSpeed's model file would tie it to precision and stage;
        # Objective.state carries it instead.
        self.register_buffer("rows", start, persistent=False)
        self.at = 0

    @torch.no_grad()
    def push(self, new: Tensor) -> None:
        """new: (R, E), the same on every rank. Of more rows than fit, the last ones stay."""
        size = len(self.rows)
        if size == 0:
            return
        slots = torch.arange(self.at, self.at + len(new), device=new.device) % size
        self.rows[slots[-size:]] = new[-size:]
        self.at = (self.at + len(new)) % size

    def _apply(self, fn: Any, recurse: bool = True) -> "Ring":
        """Moves with the task, but is not cast with it: half precision would blunt the features."""
        rows = self.rows
        super()._apply(fn, recurse)
        self.rows = rows.to(self.rows.device)
        return self
