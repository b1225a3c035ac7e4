"""Scaled dot-product attention, fused, that keeps its inputs and not its weights.

torch's fused kernels keep queries, keys, values, output and one number a row. On a CPU they know no
dropout: torch then falls back to single operations and keeps fp32 copies of all of them, several
times what the layer itself keeps. So there attention with dropout is written out here, with a
backward pass that computes the weights again as the fused ones do (Dao et al., arXiv:2205.14135).

B batch, H heads, N queries, M keys, d width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """q: (B, H, N, d), k, v: (B, H, M, d) -> (B, H, N, d).

    mask: bool, broadcast to (B, H, N, M), True where a key may be attended to, at least one for
    each query.  dropout: share of the weights that become 0.  causal: instead of a mask.
    """
    if dropout and q.device.type == "cpu":
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        return _DropoutAttention.apply(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
    )


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        weights = _weights(q, k, mask)
        kept = torch.rand_like(weights) >= dropout
        ctx.save_for_backward(q, k, v, mask, kept)
        ctx.scale = 1 / (1 - dropout)
        # Heads side by side in memory, so that merging them costs no copy.
        out = (weights * kept).mul_(ctx.scale).to(v.dtype) @ v
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, kept = ctx.saved_tensors
        (grad,) = grads
        weights = _weights(q, k, mask)
        dropped = (weights * kept).mul_(ctx.scale)
        grad_v = dropped.to(v.dtype).mT @ grad
        grad_weights = (grad @ v.mT).float().mul_(kept).mul_(ctx.scale)
        mean = (grad_weights * weights).sum(dim=-1, keepdim=True)
        grad_scores = weights.mul_(grad_weights - mean).mul_(q.shape[-1] ** -0.5).to(q.dtype)
        return grad_scores @ k, grad_scores.mT @ q, grad_v, None, None


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N, M), fp32, before dropout."""
    scores = (q @ k.mT).float().mul_(q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(dim=-1)
