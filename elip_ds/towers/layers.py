"""Attention and MLP blocks that the towers share.

B batch, N tokens of the sequence, M tokens of the context, D width, C context width, H heads.

Every weight is used inside the forward of the module that owns it: ZeRO-3 gathers a module's
weights when that module is called, and only then. That is why a linear layer here has a second way
through it where others would reach for its weight from outside.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from elip_ds.errors import UserError


class FusedQKV(nn.Linear):
    """One matrix for query, key and value; rows are q, then k, then v (the timm layout)."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__(width, 3 * width, bias=bias)
        self.width = width

    def forward(  # type: ignore[override]  # a second way through, for the look-ahead
        self, x: Tensor, class_row: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, N, D) -> (B, N, 3D); with class_row q (B, 1, D), k (B, N, D)."""
        if not class_row:
            return super().forward(x)
        d = self.width
        bias = self.bias if self.bias is not None else x.new_zeros(3 * d)
        query = F.linear(x[:, :1], self.weight[:d], bias[:d])
        return query, F.linear(x, self.weight[d : 2 * d], bias[d : 2 * d])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, D/H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D/H) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused qkv matrix; dropout on the attention weights."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = FusedQKV(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x: (B, N, D).  mask: bool, (B, 1, 1, N) or (B, 1, N, N), True where a token may be
        attended to.  causal: to itself and what is before it; instead of a mask.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        return self.proj(merge_heads(out))

    def class_attention(self, x: Tensor) -> Tensor:
        """Head mean of the attention row of token 0, in fp32: x (B, N, D) -> (B, N).

        The probabilities before dropout. Values, output projection and the other rows are not
        computed.
        """
        query, key = self.qkv(x, class_row=True)
        q, k = split_heads(query, self.heads), split_heads(key, self.heads)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, 1, N)
        return logits.float().softmax(dim=-1).mean(dim=1).squeeze(1)


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another of any width."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, D), context: (B, M, C) -> (B, N, D).  mask: (B, 1, 1, M) bool, True where the
        context may be attended to; None: all of it.
        """
        q = split_heads(self.query(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.key_value(context).chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.proj(merge_heads(out))


def check_heads(section: str, width: int, heads: int) -> None:
    """Raises UserError, with the section of the configuration, unless heads divide the width."""
    if width % heads:
        raise UserError(f"{section}.width={width} does not divide into heads={heads}")


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """Linear, activation (exact GELU unless another is named), linear."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class PreNormBlock(nn.Module):
    """Pre-norm transformer block: of a ViT, and, causal, of CLIP's text tower."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        eps: float,
        activation: str = "gelu",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), causal=self.causal)
        return x + self.mlp(self.norm2(x))

    def class_attention(self, x: Tensor) -> Tensor:
        """What the class token attends to inside this block: (B, N, D) -> (B, N), fp32."""
        return self.attn.class_attention(self.norm1(x))


class Table(nn.Module):
    """A learned (1, rows, D) table that is a module, so that ZeRO-3 gathers it when it is
    called."""

    def __init__(self, rows: int, width: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, rows, width))
        nn.init.trunc_normal_(self.weight, std=std)

    def forward(self) -> Tensor:
        return self.weight


def init_std(width: int) -> float:
    """0.02 at the published width of 768, and growing as 1 / sqrt(width) for narrower towers.

    # differs from ViT and BERT, which use 0.02 at any width: a narrow tower then starts with
    # signals that vanish from block to block, and a short run never gets going.
    """
    return 0.02 * (768 / width) ** 0.5


def init_linear_and_norm(module: nn.Module, std: float, truncated: bool) -> None:
    """Weights of linear layers and embeddings normal(0, std), biases 0, norms 1 and 0.

    truncated: cut at two units of 1 as timm and DeiT do (a plain normal for std 0.02).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            if truncated:
                nn.init.trunc_normal_(part.weight, std=std)
            else:
                nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)


def recomputed(block: nn.Module, *inputs: Tensor | bool | None) -> Tensor:
    """block(*inputs), storing only the inputs and running the block again in the backward pass."""
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
