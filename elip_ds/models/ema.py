"""The momentum twin of a model: same modules, no gradient, weights that trail the student's.

Source: ALBEF section 3.2 (theta_m <- m theta_m + (1 - m) theta once per optimizer step).
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# From a parameter to the tensors that hold it here: its whole data, or under ZeRO-3 this rank's shard
# and, for the small parameters that stay gathered, the whole data as well.
LocalTensors = Callable[[nn.Parameter], list[Tensor]]


class MomentumTwin(nn.Module):
    """A frozen copy of a model.

    It lives inside the trained module, so that ZeRO-3 shards and gathers it like the rest; update()
    moves only what this rank holds. In half precision the increments, (1 - m) of a difference, vanish
    in rounding, so the averages are kept in fp32 beside the copy that computes.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False)
        self._masters: list[Tensor] | None = None

    def _pairs(self, student: nn.Module, local: LocalTensors) -> Iterable[tuple[Tensor, Tensor]]:
        for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            yield from zip(local(mine), local(theirs), strict=True)

    def masters(self, local: LocalTensors) -> list[Tensor]:
        """The fp32 averages of what this rank holds, in parameter order."""
        if self._masters is None:
            held = [t for p in self.model.parameters() for t in local(p)]
            self._masters = [t if t.dtype == torch.float32 else t.float() for t in held]
        return self._masters

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float, local: LocalTensors) -> None:
        """One step towards the student's present weights, as its forward uses them."""
        masters = self.masters(local)
        pairs = list(self._pairs(student, local))
        theirs = [s.to(torch.float32) for _, s in pairs]
        torch._foreach_lerp_(masters, theirs, 1 - momentum)
        self.write_back(local)

    @torch.no_grad()
    def write_back(self, local: LocalTensors) -> None:
        """Round the fp32 averages into the copy that computes, where the two are not one."""
        held = [t for p in self.model.parameters() for t in local(p)]
        for tensor, master in zip(held, self.masters(local), strict=True):
            if tensor.data_ptr() != master.data_ptr():
                tensor.copy_(master)
