"""The momentum twin of a model: its modules, no gradient, weights that trail the student's.

Source: ALBEF section 3.2 (theta_m <- m theta_m + (1 - m) theta once per optimizer step).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# From a parameter to the tensor that this rank holds of it: all of it, or under ZeRO-3 its shard.
LocalTensor = Callable[[nn.Parameter], Tensor]


class MomentumTwin(nn.Module):
    """A frozen copy of a model, without the modules whose names it lists as `twin_without`: it then
    serves the joint space alone.

    It lives inside the trained module, so that ZeRO-3 shards and gathers it like the rest; update()
    moves only what this rank holds. In half precision the increments, (1 - m) of a difference,
    vanish in rounding, so the averages are then kept in fp32 beside the copy that computes.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        twin: Any = copy.deepcopy(student).requires_grad_(False)
        self.model: nn.Module = twin
        for name in getattr(student, "twin_without", ()):  # few models have it
            for module in self.model.modules():
                if name in dict(module.named_children()):
                    delattr(module, name)
        if hasattr(student, "twin_without"):
            twin.only_joint_space()
        self._masters: list[Tensor] | None = None

    def masters(self, local: LocalTensor) -> list[Tensor]:
        """The fp32 averages of what this rank holds, in parameter order."""
        held = [local(parameter) for parameter in self.model.parameters()]
        if all(tensor.dtype == torch.float32 for tensor in held):
            return held
        if self._masters is None:
            self._masters = [tensor.float() for tensor in held]
        return self._masters

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float, local: LocalTensor) -> None:
        """One step towards the student's present weights, as its forward uses them."""
        parameters = dict(student.named_parameters())
        followed = (parameters[name] for name, _ in self.model.named_parameters())
        theirs = [local(parameter).to(torch.float32) for parameter in followed]
        torch._foreach_lerp_(self.masters(local), theirs, 1 - momentum)
        self.write_back(local)

    @torch.no_grad()
    def distance(self, student: nn.Module, local: LocalTensor) -> Tensor:
        """(2,), fp32: of what this rank holds, the squared length of the difference to the student,
        and that of the student itself.
        """
        parameters = dict(student.named_parameters())
        apart, length = [], []
        for (name, _), mine in zip(self.model.named_parameters(), self.masters(local), strict=True):
            theirs = local(parameters[name]).float()
            apart.append((mine.to(theirs.device) - theirs).square().sum())
            length.append(theirs.square().sum())
        return torch.stack([torch.stack(apart).sum(), torch.stack(length).sum()])

    @torch.no_grad()
    def write_back(self, local: LocalTensor) -> None:
        """Round the fp32 averages into the copy that computes, where the two are not one."""
        for parameter, master in zip(self.model.parameters(), self.masters(local), strict=True):
            if local(parameter) is not master and local(parameter).dtype != torch.float32:
                local(parameter).copy_(master)
