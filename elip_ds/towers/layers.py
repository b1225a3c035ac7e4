"""Attention and MLP blocks that the towers share.

B batch, N tokens of the sequence, M tokens of the context, D width, C context width, H heads.

Every weight is used inside the forward of the module that owns it: ZeRO-3 gathers a module's
weights when that module is called, and only then. That is why a linear layer here has a second way
through it where others would reach for its weight from outside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.errors import UserError
from elip_ds.towers.attention import attend
from elip_ds.towers.linear import Linear, linear
from elip_ds.towers.recompute import again


class FusedQKV(Linear):
    """One matrix for query, key and value; rows are q, then k, then v (the timm layout)."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__(width, 3 * width, bias=bias)
        self.width = width

    def forward(  # type: ignore[override]  # other ways through, where few tokens ask
        self, x: Tensor, asking: Tensor | None = None, values: bool = True
    ) -> tuple[Tensor, ...]:
        """x: (B, N, D) -> q, k, v, each (B, N, D).

        asking: (..., D) that alone get a q, (..., D).  values: False leaves out v then.
        """
        d = self.width
        if asking is None:
            return super().forward(x).chunk(3, dim=-1)
        end = (3 if values else 2) * d
        bias = self.bias if self.bias is not None else x.new_zeros(3 * d)
        query = linear(asking, self.weight[:d], bias[:d])
        rest = linear(x, self.weight[d:end], bias[d:end])
        return query, *rest.split(d, dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, D/H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D/H) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(-2)


def pick(x: Tensor, places: Tensor) -> Tensor:
    """(R, N, D) -> (S, D), those of the R * N tokens."""
    return x.flatten(0, 1)[places]


def spread(tokens: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of pick, zeros elsewhere: (S, D) -> (R, N, D)."""
    rows = tokens.new_zeros(shape.numel(), tokens.shape[-1])
    return rows.index_copy(0, places, tokens).view(*shape, -1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused qkv matrix; dropout on the attention weights."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = FusedQKV(width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        asking: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """x: (B, N, D) -> (B, N, D).

        mask: bool, (B, 1, 1, N) or (B, 1, N, N), True where a token may be attended to.
        causal: to itself and what is before it; instead of a mask.
        asking: (B, A, D), tokens of x for which alone the result is wanted; (B, A, D).
        places: (S,), then asking is (S, D), those of the B * N tokens, in any order; (S, D).
        """
        query, *rest = self.qkv(x, asking)
        if places is not None:
            query = again(spread, query, places, x.shape[:2], copies=True)
        q, k, v = (split_heads(part, self.heads) for part in (query, *rest))
        dropout = self.dropout if self.training else 0.0
        out = merge_heads(attend(q, k, v, mask, dropout=dropout, causal=causal))
        return self.proj(out if places is None else pick(out, places))

    def class_attention(self, x: Tensor) -> Tensor:
        """Head mean of the attention row of token 0, in fp32: x (B, N, D) -> (B, N).

        The probabilities before dropout. Values, output projection and the other rows are not
        computed.
        """
        query, key = self.qkv(x, x[:, :1], values=False)
        q, k = split_heads(query, self.heads), split_heads(key, self.heads)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, 1, N)
        return logits.float().softmax(dim=-1).mean(dim=1).squeeze(1)


class Readers(NamedTuple):
    """Which of R rows of queries reads which of B contexts.

    own: the first B * own rows, image by image: rows i * own to (i + 1) * own - 1 read context i.
    others: (R - B * own,) for each further row the number of the context that it reads.
    """

    own: int = 1
    others: Tensor | None = None


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another of any width."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = Linear(width, width)
        self.key_value = Linear(context_width, 2 * width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        keys_values: Tensor,
        mask: Tensor | None = None,
        readers: Readers | None = None,
        among: tuple[Tensor, torch.Size] | None = None,
    ) -> Tensor:
        """x: (R, N, D) -> (R, N, D).  keys_values: (B, M, 2D), what key_value gives for a context.
        mask: (B, 1, 1, M) bool, True where the context may be attended to; None: all of it.
        readers: None where R = B and row i reads context i.
        among: where x is (S, D), the places of these tokens among those of the rows, and (R, N);
        (S, D).

        Rows that read the same context are one longer sequence of queries to it: its keys and
        values are there once. A context for a single row is copied for it.
        """
        own, others = readers or Readers()
        q = self.query(x)
        if among is not None:
            q = again(spread, q, *among, copies=True)
        batch, length = len(keys_values), q.shape[1]
        parts = []
        if own:
            first = q[: batch * own].unflatten(0, (batch, own)).flatten(1, 2)  # (B, own * N, D)
            out = self._attend(first, keys_values, mask)
            parts.append(out.unflatten(1, (own, length)).flatten(0, 1))
        if others is not None:
            theirs = again(_rows, keys_values, others, copies=True)
            seen = None if mask is None else mask[others]
            parts.append(self._attend(q[batch * own :], theirs, seen))
        whole = again(_joined, *parts, copies=True) if len(parts) > 1 else parts[0]
        return self.proj(whole if among is None else pick(whole, among[0]))

    def _attend(self, query: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
        q = split_heads(query, self.heads)
        k, v = (split_heads(part, self.heads) for part in keys_values.chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        return merge_heads(attend(q, k, v, mask, dropout=dropout))


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def check_heads(section: str, width: int, heads: int) -> None:
    """Raises UserError, with the section of the configuration, unless heads divide the width."""
    if width % heads:
        raise UserError(f"{section}.width={width} does not divide into heads={heads}")


class Dropout(nn.Dropout):
    """As its base, but on a CPU, too, it keeps one byte an element, where torch keeps the factor.

    There it drops p rounded to 1 / 65536: an element's draw is 16 bits of a 64-bit number, which
    takes a quarter of the time of torch's mask.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        dropped = round(self.p * 65536)
        plain = x.device.type != "cpu" or torch.compiler.is_compiling()
        if plain or not 0 < dropped < 65536:
            return torch.native_dropout(x, self.p, True)[0]
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = numbers.view(torch.int16)[: x.numel()].view(x.shape)  # -32768..32767
        return x * (bits >= dropped - 32768) * (65536 / (65536 - dropped))


class _QuickGELU(torch.autograd.Function):
    """Keeps its input alone, as torch's GELU does; single operations would keep three tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        share = torch.sigmoid(1.702 * x)
        return grads[0] * share * (1 + 1.702 * x * (1 - share))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU."""
    return _QuickGELU.apply(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "quick_gelu": lambda x: x.mul_(torch.sigmoid(1.702 * x)),
}
"The same on a tensor that nobody else reads, without gradient."


class MLP(nn.Module):
    """Linear, activation (exact GELU unless another is named), linear."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation, self.overwrite = ACTIVATIONS[activation], IN_PLACE[activation]
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if torch.is_grad_enabled():
            return self.fc2(again(self.activation, hidden))
        return self.fc2(self.overwrite(hidden))


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

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x: (B, N, D) -> (B, N, D).  rows: (B,), the one token of each that is wanted; (B, 1, D).

        What no one reads is not computed: of the other tokens, keys and values alone.
        """
        normed = again(self.norm1, x)
        if rows is None:
            x = x + self.attn(normed, causal=self.causal)
        else:
            before = None
            if self.causal:
                places = torch.arange(x.shape[1], device=x.device)
                before = (places <= rows.unsqueeze(1))[:, None, None, :]
            x = _token(x, rows) + self.attn(normed, before, asking=_token(normed, rows))
        return x + self.mlp(again(self.norm2, x))

    def class_attention(self, x: Tensor) -> Tensor:
        """What the class token attends to inside this block: (B, N, D) -> (B, N), fp32."""
        return self.attn.class_attention(self.norm1(x))


def _token(x: Tensor, rows: Tensor) -> Tensor:
    """(B, N, D), (B,) -> (B, 1, D)."""
    return x.gather(1, rows.view(-1, 1, 1).expand(-1, 1, x.shape[-1]))


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
