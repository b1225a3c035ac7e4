"""Linear, norm, eager attention and the two kinds of transformer layer, on weights by name.

B batch, N tokens, M tokens of the context, D width, H heads.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -10000.0
"What is added to the score of a token that may not be seen, as BERT has it."


class Weights:
    """Parameters by name, of what lies under a prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def get(self, name: str) -> Tensor | None:
        return self._tensors.get(self._prefix + name)

    def under(self, name: str) -> "Weights":
        return Weights(self._tensors, f"{self._prefix}{name}.")


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def activate(x: Tensor, activation: str) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else F.gelu(x)


def mlp(w: Weights, x: Tensor, activation: str = "gelu") -> Tensor:
    return linear(w, "fc2", activate(linear(w, "fc1", x), activation))


def padding_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N) of ones and zeros -> (B, 1, 1, N) to add to scores."""
    return (1.0 - attention_mask[:, None, None, :].to(dtype)) * MASKED


def causal_mask(length: int, like: Tensor) -> Tensor:
    """(N, N) to add to scores: a token sees itself and those before it."""
    ones = torch.ones(length, length, device=like.device, dtype=like.dtype)
    return ones.triu(1) * MASKED


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """q: (B, N, D), k, v: (B, M, D) -> (B, N, D), and the probabilities (B, H, N, M) undropped.

    mask: added to the scores.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(dim=-1)
    out = F.dropout(probabilities, dropout) @ v
    return out.transpose(1, 2).flatten(-2), probabilities


def self_attention(
    w: Weights, x: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    q, k, v = linear(w, "qkv", x).chunk(3, dim=-1)
    out, probabilities = attend(q, k, v, heads, mask, dropout)
    return linear(w, "proj", out), probabilities


def cross_attention(
    w: Weights, x: Tensor, context: Tensor, heads: int, mask: Tensor | None, dropout: float
) -> Tensor:
    k, v = linear(w, "key_value", context).chunk(2, dim=-1)
    out, _ = attend(linear(w, "query", x), k, v, heads, mask, dropout)
    return linear(w, "proj", out)


def pre_norm_block(
    w: Weights, x: Tensor, heads: int, eps: float, activation: str, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of a ViT and of CLIP's text tower: x (B, N, D) -> (B, N, D), probabilities (B, H, N, N)."""
    out, probabilities = self_attention(w.under("attn"), norm(w, "norm1", x, eps), heads, mask)
    x = x + out
    return x + mlp(w.under("mlp"), norm(w, "norm2", x, eps), activation), probabilities


def bert_layer(
    w: Weights,
    x: Tensor,
    mask: Tensor | None,
    *,
    heads: int,
    eps: float,
    dropout: float,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    attn: str = "attn",
) -> Tensor:
    """Post-norm: self-attention, where there is a context cross-attention to it, feed-forward."""
    out, _ = self_attention(w.under(attn), x, heads, mask, dropout)
    x = norm(w, f"{attn}_norm", x + F.dropout(out, dropout), eps)
    if context is not None:
        out = cross_attention(w.under("cross"), x, context, heads, context_mask, dropout)
        x = norm(w, "cross_norm", x + F.dropout(out, dropout), eps)
    return norm(w, "mlp_norm", x + F.dropout(mlp(w.under("mlp"), x), dropout), eps)
