"""Linear layers; where asked, in fp32 on a CPU, by oneDNN's matrix products.

torch gives bf16 to oneDNN, but fp32 to MKL, which on processors that are not Intel's leaves a tenth
of their speed unused (docs/performance.md). Both sum in fp32; rounding differs, nothing else.

D inputs, O outputs.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ASKED = torch.backends.mkldnn.is_available() and os.environ.get("ELIP_DS_ONEDNN") == "1"
"""As said above. Off otherwise: what oneDNN keeps for each shape makes a process that has seen
two micro-batches take some per cent more than one that has seen the larger alone.
"""


class Linear(nn.Linear):
    """As its base."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (..., D), weight: (O, D), bias: (O,) -> (..., O)."""
    if not _for_onednn(x):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return _product(x, weight, bias)


def _for_onednn(x: Tensor) -> bool:
    if not ASKED or torch.compiler.is_compiling():  # then torch chooses by itself
        return False
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    return plain and not torch.is_autocast_enabled("cpu")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad, weight.t(), None) if of_x else None
        # MKL's is the faster one of this form.
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None
        return grad_x, grad_weight, rows.sum(dim=0) if ctx.has_bias else None
