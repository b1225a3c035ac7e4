"""What autograd keeps of a layer, and what the backward pass computes again.

none: all that the derivatives read, but no copy of rows that could be gathered again.
cheap: no result of a norm or an activation either. No matrix product is computed twice; masks of
dropout stay, one byte an element.
full: a layer's inputs alone (activation checkpointing, Chen et al., arXiv:1604.06174).

Autograd keeps what an operation saves, and the next operation saves what the one before gave. A
function called through again() gives a tensor that can be made again: instead of it a recipe is
kept. That needs no list of operations and no second way through a layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from elip_ds.errors import UserError

MODES = ("none", "cheap", "full")

Run = Callable[..., Any]
"layer, *inputs -> what the layer gives for them."


def check_recompute(key: str, mode: str) -> None:
    """Raises UserError, with the configuration's key, unless it is one of MODES."""
    if mode not in MODES:
        raise UserError(f"{key}={mode!r}: choose {', '.join(MODES)}")


class Recipe(NamedTuple):
    """A tensor as a function of others, and the view of the result that was saved."""

    function: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    size: torch.Size
    stride: Any
    offset: Any

    def follow(self) -> Tensor:
        with torch.no_grad():
            whole = self.function(*self.inputs)
        return whole.as_strided(self.size, self.stride, self.offset)


class _Keeper:
    """Knows what was made by again() while it is open. Storages tell views of one tensor alike."""

    def __init__(self, cheap: bool) -> None:
        self.cheap = cheap
        self.made: dict[StorageWeakRef, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {}

    def pack(self, x: Tensor) -> Tensor | Recipe:
        made = self.made.get(StorageWeakRef(x.untyped_storage()))
        if made is not None:
            return Recipe(*made, x.size(), x.stride(), x.storage_offset())
        # An operation may save its own result: with its history, that would be a circle, and a
        # graph that no backward pass goes through would never be freed.
        return x if x.is_leaf else x.detach()

    def unpack(self, kept: Tensor | Recipe) -> Tensor:
        return kept.follow() if isinstance(kept, Recipe) else kept


_open: list[_Keeper] = []


@contextmanager
def keeping(mode: str, training: bool) -> Iterator[Run]:
    """Around the layers of a tower. Gives the function that runs one of them.

    training: without it, or without gradient, nothing is kept and nothing is special.
    """
    if not (training and torch.is_grad_enabled()):
        yield _plainly
    elif mode == "full":
        yield _checkpointed
    else:
        keeper = _Keeper(cheap=mode == "cheap")
        _open.append(keeper)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keeper.pack, keeper.unpack):
                yield _plainly
        finally:
            _open.remove(keeper)
            # The hooks live as long as the graph, and what is held here would too.
            keeper.made.clear()


def again(function: Callable[..., Tensor], *inputs: Any, copies: bool = False) -> Tensor:
    """function(*inputs), which the backward pass may compute again instead of keeping it.

    The function gives a new tensor, not a view, is cheap, and draws no random number.
    copies: it only moves rows, so that making it again costs no operation.
    """
    result = function(*inputs)
    if torch.compiler.is_compiling():  # which decides by itself what is kept
        return result
    if _open and torch.is_grad_enabled() and (copies or _open[-1].cheap):
        _open[-1].made[StorageWeakRef(result.untyped_storage())] = function, inputs
    return result


def _plainly(layer: Callable[..., Any], *inputs: Any) -> Any:
    return layer(*inputs)


def _checkpointed(layer: Callable[..., Any], *inputs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)
