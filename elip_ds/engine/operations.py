"""Operations of a training step, counted once for each kind of pass, and what a device can do.

Two for a multiply-add, of matrix products, convolutions and attention, as
torch.utils.flop_counter counts them, recomputed ones among them. Attention counts as the plain
matrix products it stands for, whatever kernel runs it: forward two, backward four, masked tokens
included.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def _product(a: Tensor, b: Tensor) -> int:
    """(..., m, k) with (k, n) or (..., k, n); of a vector n is 1."""
    return 2 * a.numel() * (b.shape[-1] if b.ndim > 1 else 1)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """(B, H, N, d), (B, H, M, d), (B, H, M, e): scores, and their product with the values."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return _attention(query, key, value)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    # torch counts a fifth product, of the scores that fused kernels compute anew.
    return 2 * _attention(query, key, value)


def formulas() -> dict[Any, Callable[..., int]]:
    """Operator -> operations of a call with these arguments. torch's, with what they miss."""
    known: dict[Any, Callable[..., int]] = dict(flop_registry)
    kinds = ("efficient", "flash", "cudnn", "flash")
    ends = ("", "", "", "_for_cpu")
    for kind, end in zip(kinds, ends, strict=True):
        name = f"_scaled_dot_product_{kind}_attention{end}"
        known[getattr(aten, name)] = _without_out(_attention_forward)
        known[getattr(aten, f"{name}_backward")] = _without_out(_attention_backward)
    for name in ("mv", "dot", "vdot"):
        known[getattr(aten, name)] = _without_out(lambda a, b: _product(a, b))
    # Of torch's oneDNN, where it is built in: x (..., D), weight (O, D).
    if torch.backends.mkldnn.is_available():
        one = torch.ops.mkldnn._linear_pointwise
        known[one] = _without_out(lambda x, weight, *_: 2 * x.numel() * weight.shape[0])
    for name in ("addmv", "addmv_", "addmm_", "baddbmm_", "addbmm", "addbmm_", "_addmm_activation"):
        known[getattr(aten, name)] = _without_out(lambda _, a, b, **__: _product(a, b))
    return known


def _without_out(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: formula(*args, **kwargs)


class CountingMode(TorchDispatchMode):
    """Hands every operator to run, taken apart until it has a formula or has no parts."""

    def __init__(self) -> None:
        super().__init__()
        self._formulas = formulas()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self.run(func, args, kwargs, formula)

    def run(self, func: Any, args: Any, kwargs: Any, formula: Callable[..., int] | None) -> Any:
        """Call it, and count. formula: None: it has no operations."""
        raise NotImplementedError


class _Counter(CountingMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def run(self, func: Any, args: Any, kwargs: Any, formula: Callable[..., int] | None) -> Any:
        out = func(*args, **kwargs)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=out)
        return out


class Operations:
    """total: of this rank since its start. A pass of a kind that was met before costs nothing: it
    has as many operations as the first one, which was slowed by some tenths of a second.
    """

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}

    @contextmanager
    def of(self, kind: Hashable) -> Iterator[None]:
        """What runs inside. kind: all that its operations depend on, as the shapes of its input."""
        if kind not in self._known:
            with _Counter() as counter:
                yield
            self._known[kind] = counter.operations
        else:
            yield
        self.total += self._known[kind]


def matmul_peak(device: torch.device, dtype: torch.dtype, spend_seconds: float = 0.3) -> float:
    """Operations a second of a large square matrix product, the best of the tries in that time."""
    side = 4096 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # dropout draws from the common one
    a, b = (torch.randn(side, side, generator=own, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + spend_seconds
    while best == 0.0 or time.perf_counter() < end:  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
