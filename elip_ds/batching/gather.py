"""Which weights a rank holds whole, and when, at ZeRO stage 3; on fake tensors.

DeepSpeed gathers a module's weights when the module is called, forward and backward, and lets them
go afterwards unless they are used again soon. From the second micro-batch on it knows the order of
calls and gathers ahead. Several weights travel as one flat message, which lies beside the weights
that are copied out of it until the last of them was needed.

Source: deepspeed/runtime/zero/partitioned_param_coordinator.py and parameter_offload.py of 0.19,
followed call by call, with the hooks that they have. Left out: quantized and secondary weights,
leaf modules, weights used outside of their module. A release takes the storage along; DeepSpeed's
stays while autograd has a view of it, which matters only where stage3_max_reuse_distance lets go
what the backward needs.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Limits:
    """Elements. persist: up to which a weight is whole at all times.  ahead: of a message for what
    is not yet called.  live: whole at once, beyond which nothing is gathered ahead.  reuse: of the
    weights called before the next call, up to which one is kept for it.
    """

    persist: int = 100_000
    ahead: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000


class Gathering:
    """The state lasts from one micro-batch to the next, as DeepSpeed's does."""

    def __init__(
        self, module: nn.Module, world_size: int, limits: Limits, *, copies: bool = False
    ) -> None:
        """copies: whether a message is copied on its way."""
        self._module, self._world, self._limits = module, world_size, limits
        self._copies = copies
        self._weights = {m: list(m.parameters(recurse=False)) for m in module.modules()}
        self._whole: dict[Tensor, Tensor] = {}
        self._on_the_way: dict[Tensor, _Message] = {}
        self._users: dict[Tensor, set[nn.Module]] = defaultdict(set)
        self._in_backward: dict[nn.Module, None] = {}
        self._inputs_left: dict[nn.Module, int] = {}
        self._recomputed: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self._order = _Order([], self._weights)
        self._mode = "unknown"  # then recorded, then known
        self._restart()

    def persistent(self) -> int:
        """Elements of the weights that are whole at all times."""
        if self._world == 1:  # its shard is the weight
            return 0
        return sum(p.numel() for p in self._module.parameters() if self._persists(p))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Around micro-batches, forward and backward, and the steps between them."""
        handles = [self._module.register_forward_pre_hook(lambda *_: self._begin())]
        for module in self._weights:
            handles += [
                module.register_forward_pre_hook(lambda m, _: self._fetch(m)),
                module.register_forward_hook(lambda m, *_: self._release(m)),
                module.register_forward_hook(self._before_backward),
                module.register_forward_pre_hook(self._after_backward),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_backward(self) -> None:
        """What a module took whose backward did not end by itself, as its input has no gradient."""
        while self._in_backward:
            module, _ = self._in_backward.popitem()
            for parameter in (*self._weights[module], *self._recomputed.pop(module, ())):
                self._let_go(parameter, module)

    def step(self) -> None:
        """The optimizer's: nothing stays."""
        self._receive_all()
        self._whole = {}
        self._users.clear()

    def _persists(self, parameter: Tensor) -> bool:
        return parameter.numel() <= self._limits.persist

    # Of a micro-batch.

    def _begin(self) -> None:
        self._receive_all()
        if self._mode == "recorded":
            self._order, self._mode = _Order(self._called, self._weights), "known"
        elif self._mode == "unknown":
            self._mode = "recorded"
        self._restart()

    def _restart(self) -> None:
        self._queue = deque(self._order.uses)
        self._fetched_for: dict[Tensor, int] = defaultdict(lambda: -1)
        self._called: list[nn.Module] = []
        self._num_available = 0

    def _receive_all(self) -> None:
        for parameter in list(self._on_the_way):
            self._receive(parameter)
            self._drop(parameter)

    # Of a module's call.

    def _fetch(self, module: nn.Module, *, backward: bool = False) -> None:
        step, mine = len(self._called), self._weights[module]
        if self._mode == "known" and not self._order.expects(module, step):
            self._receive_all()
            self._order, self._mode = _Order([], self._weights), "unknown"
        self._called.append(module)
        if backward:
            self._in_backward[module] = None
        self._gather(mine)
        recomputes = not backward and torch._C._current_graph_task_id() != -1
        for parameter in mine:
            self._users[parameter].add(module)
            if recomputes and self._in_backward and not parameter.requires_grad:
                self._belongs(parameter, next(reversed(self._in_backward)))
            self._receive(parameter)
        if self._mode == "known":
            self._skip({p for p in mine if self._fetched_for[p] < step})
            self._gather_ahead()

    def _belongs(self, parameter: Tensor, module: nn.Module) -> None:
        """A frozen weight that is used in a recomputed forward stays until that backward is over:
        it has no gradient of its own to go with.
        """
        self._recomputed[module].append(parameter)
        self._users[parameter].add(module)

    def _skip(self, wanted: set[Tensor]) -> None:
        """What was just fetched need not be gathered ahead."""
        found: set[Tensor] = set()
        while self._queue and len(found) < len(wanted):
            parameter, at = self._queue.popleft()
            self._fetched_for[parameter] = at
            found.add(parameter)

    def _gather_ahead(self) -> None:
        room = min(self._limits.live - self._num_available, self._limits.ahead)
        count = 0
        wanted: dict[Tensor, None] = {}
        while self._queue and count < room:
            parameter, at = self._queue.popleft()
            self._fetched_for[parameter] = max(self._fetched_for[parameter], at)
            if not self._is_here(parameter) and parameter not in wanted:
                wanted[parameter] = None
                count += parameter.numel()
        self._gather(list(wanted))

    def _release(self, module: nn.Module, *, backward: bool = False) -> None:
        step = len(self._called)
        for parameter in self._weights[module]:
            self._users[parameter].discard(module)
            again = self._mode == "known" and (
                self._fetched_for[parameter] > step
                or self._order.is_soon(parameter, step, self._limits.reuse)
            )
            if not again:
                self._let_go(parameter, module)
        if backward:
            self._in_backward.pop(module, None)
            for frozen in self._recomputed.pop(module, ()):
                self._let_go(frozen, module)

    def _before_backward(self, module: nn.Module, _: Any, output: Any) -> Any:
        fetch = partial(self._fetch, module, backward=True)
        return _at_tensors(output, lambda x: _Told.apply(x, fetch))

    def _after_backward(self, module: nn.Module, inputs: Any) -> Any:
        """Once all inputs of its last call that want a gradient have it: an earlier call of the
        same module never comes to that.
        """
        self._inputs_left[module] = 0

        def arrived() -> None:
            self._inputs_left[module] -= 1
            if self._inputs_left[module] == 0:
                self._release(module, backward=True)

        def wrap(x: Tensor) -> Tensor:
            self._inputs_left[module] += x.requires_grad
            return _Told.apply(x, arrived)

        return _at_tensors(inputs, wrap)

    # Of weights.

    def _is_here(self, parameter: Tensor) -> bool:
        return (
            parameter in self._whole or parameter in self._on_the_way or self._persists(parameter)
        )

    def _gather(self, parameters: Sequence[Tensor]) -> None:
        missing = [p for p in parameters if not self._is_here(p)]
        if not missing:
            return
        self._num_available += sum(p.numel() for p in missing)
        message = _Message(missing, self._world)
        if self._copies:
            copy = message.flat.clone()
            del copy
        self._on_the_way.update(dict.fromkeys(missing, message))

    def _receive(self, parameter: Tensor) -> None:
        message = self._on_the_way.pop(parameter, None)
        if message is not None:
            self._whole.update(message.unpack())

    def _let_go(self, parameter: Tensor, module: nn.Module) -> None:
        self._users[parameter].discard(module)
        if not self._persists(parameter):
            self._drop(parameter)

    def _drop(self, parameter: Tensor) -> None:
        if parameter in self._whole and not self._users[parameter]:
            del self._whole[parameter]
            self._num_available -= parameter.numel()


class _Message:
    """Weights on the way to this rank. One alone arrives where it stays."""

    def __init__(self, parameters: Sequence[Tensor], world_size: int) -> None:
        self._parameters, self._alone = parameters, len(parameters) == 1
        self._empty = world_size == 1  # nothing is sent, and its shards are the weights
        count = sum(-(-p.numel() // world_size) * world_size for p in parameters)
        self.flat = parameters[0].new_empty(0 if self._empty else count)

    def unpack(self) -> dict[Tensor, Tensor]:
        """All of them with the first; the others' wait finds them there already."""
        parameters, self._parameters = self._parameters, ()
        if self._alone or self._empty:
            return dict.fromkeys(parameters, self.flat)
        return {p: self.flat.new_empty(p.numel()) for p in parameters}


class _Order:
    """Modules in the order of their calls in one micro-batch, forward and backward."""

    def __init__(
        self, called: Sequence[nn.Module], weights: dict[nn.Module, list[nn.Parameter]]
    ) -> None:
        self._called = called
        self.uses = [(p, at) for at, module in enumerate(called) for p in weights[module]]
        "Weights and the calls that they are for."
        self._calls: dict[Tensor, list[int]] = defaultdict(list)
        for parameter, at in self.uses:
            self._calls[parameter].append(at)
        sizes = (sum(p.numel() for p in weights[module]) for module in called)
        self._before = list(accumulate(sizes, initial=0))

    def expects(self, module: nn.Module, step: int) -> bool:
        return step < len(self._called) and self._called[step] is module

    def is_soon(self, parameter: Tensor, step: int, distance: int) -> bool:
        """Whether it is used from that call on, before so many elements of others were."""
        calls = self._calls[parameter]
        following = bisect_left(calls, step)
        if following == len(calls):
            return False
        return self._before[calls[following]] - self._before[step] < distance


class _Told(torch.autograd.Function):
    """The tensor itself; calls when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grad, None


def _at_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Of a tensor, and of tuples, lists and dicts of them; whatever else hides its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return value | {key: _at_tensors(x, change) for key, x in value.items()}
    if isinstance(value, tuple | list):
        items = [_at_tensors(x, change) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
