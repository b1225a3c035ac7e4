"""Which weights a rank holds whole, and when, at ZeRO stage 3; on fake tensors.

DeepSpeed gathers a module's weights when the module is called. From its second step on it knows the
order of calls, keeps what it will use again in the same step (stage3_max_reuse_distance, beyond the
size of our models), and gathers ahead into a buffer. What is trained stays until its gradient is
done, as the backward needs it again; a frozen weight goes with its call. Two things are as they
were measured, not as they follow: a frozen weight that is called more than once, such as a word
table that also decodes, stays for the step; the buffer is full to the seventh eighth at the
forward's peak (half of it to nearly that, by precision and by the buffer's share of the model).

Source: deepspeed/runtime/zero/partitioned_param_coordinator.py of 0.19.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Gathering:
    """persist: elements up to which a weight is whole at all times.  prefetch: elements of the
    buffer.
    """

    def __init__(self, module: nn.Module, *, persist: int, prefetch: int) -> None:
        self._module, self._persist, self._prefetch = module, persist, prefetch
        self._calls: Counter[Tensor] = Counter()
        self._whole: dict[Tensor, Tensor] = {}
        self._ahead: list[Tensor] = []

    def persistent(self) -> int:
        """Elements of the weights that are whole at all times."""
        return sum(p.numel() for p in self._module.parameters() if p.numel() <= self._persist)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a forward that is run to learn how often each module is called in a step."""

        def count(module: nn.Module, *_: Any) -> None:
            self._calls.update(self._of(module))

        with self._hooked(count, lambda *_: None):
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward of a micro-batch."""
        sizes = [p.numel() for p in self._module.parameters() if p.numel() > self._persist]
        dtype = next(self._module.parameters()).dtype
        self._ahead = [torch.empty(min(self._prefetch, sum(sizes)) * 7 // 8, dtype=dtype)]
        with self._hooked(self._enter, self._leave):
            yield
        self._ahead = []

    def done(self, parameter: Tensor) -> None:
        """Its gradient is."""
        self._whole.pop(parameter, None)

    def clear(self) -> None:
        """A backward is over."""
        self._whole = {}

    def _enter(self, module: nn.Module, *_: Any) -> None:
        for parameter in self._of(module):
            if parameter not in self._whole:
                self._whole[parameter] = torch.empty_like(parameter, requires_grad=False)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        for parameter in self._of(module):
            if self._calls[parameter] < 2 and not parameter.requires_grad:
                self.done(parameter)

    def _of(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters(recurse=False) if p.numel() > self._persist]

    @contextmanager
    def _hooked(self, before: Any, after: Any) -> Iterator[None]:
        modules = [m for m in self._module.modules() if self._of(m)]
        handles = [m.register_forward_pre_hook(before) for m in modules]
        handles += [m.register_forward_hook(after, always_call=True) for m in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
