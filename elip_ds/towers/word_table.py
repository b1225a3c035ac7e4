"""The table of word embeddings, read by lookups and by the decoder, with one gradient for all.

Each lookup of nn.Embedding answers with a gradient of the whole table, nearly all zeros, and all of
them and the decoder's are added up: for V = 30522, D = 768 in fp32 that is 94 MB to fill and 94 MB
to add per lookup. Here the decoder's gradient is made first and the rows are added to it in place.

B batch, L tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.towers.linear import linear


class WordEmbedding(nn.Embedding):
    """Ids to vectors, and, being the decoder's matrix too, vectors to word scores.

    apart: each read has a gradient of its own; so it is under ZeRO-3, and in a trace of that.
    """

    def __init__(self, num_words: int, width: int) -> None:
        super().__init__(num_words, width)
        self.apart = False
        self._shared = _Shared()

    def forward(self, x: Tensor, decode: bool = False) -> Tensor:
        """x: ids (B, L) -> (B, L, D); with decode (..., D) -> (..., V)."""
        # ZeRO-3 has the table only inside this call; autocast rounds a parameter once a step, but
        # another tensor at every use.
        shares = torch.is_grad_enabled() and self.weight.requires_grad
        shares = shares and not (self.apart or hasattr(self.weight, "ds_id"))
        if decode:
            device = x.device.type
            rounds = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            shares = shares and not rounds
            return linear(x, self._shared.table(self.weight) if shares else self.weight, None)
        if not shares:
            return super().forward(x)
        table, pending = self._shared.table(self.weight), self._shared.pending
        rows: Tensor = _Lookup.apply(table, x, pending)
        return rows


class _Shared:
    """What the reads of one step have in common: a node of the graph behind the weight, and
    pending, the ids and gradients of the lookups that its backward pass has reached so far.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []
        self._table: Tensor | None = None
        self._state: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: Any) -> "_Shared":
        return _Shared()  # of a copy of the module, which nobody has read yet

    def table(self, weight: Tensor) -> Tensor:
        """The weight, through the shared node; another one once the weight has changed or moved."""
        state = (weight._version, weight.untyped_storage()._cdata, weight.storage_offset())
        if self._table is None or self._state != state:
            self.pending = []
            self._table, self._state = _Table.apply(weight, self.pending), state
        assert self._table is not None
        return self._table


class _Table(torch.autograd.Function):
    """The identity, whose backward runs once all reads have had theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pending: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.pending, ctx.shape = pending, weight.shape
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient = grads[0]  # of the decoder: a product that nobody else has, or None
        for ids, rows in ctx.pending:
            if gradient is None:
                gradient = rows.new_zeros(ctx.shape)
            gradient.index_put_(*_by_word(ids.flatten(), rows.flatten(0, -2)), accumulate=True)
        ctx.pending.clear()
        return gradient, None


class _Lookup(torch.autograd.Function):
    """Rows of the table; its gradient goes to the pending ones, not into a tensor of its own."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, pending: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.pending = pending
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.pending.append((ctx.saved_tensors[0], grads[0]))
        return None, None, None


def _by_word(ids: Tensor, rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
    """ids (N,), rows (N, D) -> the words among them and the sum of each one's rows, (N,) and (N, D)
    filled up with zeros for word 0.

    Summed before they are added to the table, they give plain embeddings' gradient bit for bit.
    """
    order = ids.argsort(stable=True)
    sorted_ids = ids[order]
    number = torch.zeros_like(ids)
    number[1:] = (sorted_ids[1:] != sorted_ids[:-1]).cumsum(0)
    sums = torch.zeros_like(rows).index_put_((number,), rows[order], accumulate=True)
    return (torch.zeros_like(ids).scatter_(0, number, sorted_ids),), sums
