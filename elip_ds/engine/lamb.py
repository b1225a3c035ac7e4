"""LAMB: AdamW whose step is as long as the weight it changes, for batches of tens of thousands.

Its trust ratio needs the norms of whole tensors, and DeepSpeed hands an optimizer flat tensors that
hold pieces of many. So this one is told what each tensor that it steps is made of (bind_lamb, after
deepspeed.initialize), and sums the squares of the pieces over the ranks before it steps.

Source: You et al. 2020, arXiv:1904.00962, algorithm 2.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elip_ds import dist
from elip_ds.engine.places import Place, find_places
from elip_ds.errors import UserError

PADDING = -1


@dataclass(frozen=True)
class Layout:
    """What a tensor that the optimizer steps is made of.

    sizes: elements of its consecutive pieces.  owners: which parameter each is a piece of, from 0,
    or PADDING.  count: parameters of which the ranks' tensors of this place hold pieces; the same
    on all ranks, also where this rank's share is empty.
    """

    sizes: tuple[int, ...]
    owners: tuple[int, ...]
    count: int

    def cut(self, x: Any) -> list[Tensor]:
        """Views of the pieces, without padding, in order."""
        if self.sizes == (x.numel(),):
            return [x] if self.pieces else []
        views = x.split_with_sizes(list(self.sizes))
        return [view for view, owner in zip(views, self.owners, strict=True) if owner != PADDING]

    @property
    def pieces(self) -> list[int]:
        """Owners of what cut gives."""
        return [owner for owner in self.owners if owner != PADDING]


class Lamb(torch.optim.Optimizer):
    """w -= lr * |w| / |u| * u,  where u = m / (sqrt(v) + eps) + weight_decay * w.

    m and v are Adam's averages, both bias-corrected. Norms are of whole parameters; a ratio with a
    zero in it is 1.

    A group's "adaptive" says whether its parameters take their ratio or 1.
    As in algorithm 2 with its identity for the scaling function.
    # differs from You et al.: a parameter that does not decay (bias, norm) takes ratio 1, as in
    # their code for BERT and in apex; the ratio is not clipped, as DeepSpeed's FusedLamb does; the
    # gradient is not scaled to unit length first, as NVIDIA's LAMB for BERT does: optim.clip_norm.

    step() makes the update in the gradient's memory, so no gradient outlives it.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"adaptive": True})
        self._layouts: dict[Tensor, Layout] | None = None
        self._total: Callable[[Tensor], Tensor] | None = None
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def bind(self, layouts: dict[Tensor, Layout], total: Callable[[Tensor], Tensor] | None) -> None:
        """layouts: of every tensor that will be stepped.  total: sums a tensor over the ranks that
        hold the other pieces; None where every parameter is whole here.
        """
        self._layouts, self._total, self._indices = layouts, total, {}

    def bind_whole(self) -> None:
        """Every tensor that is stepped is one whole parameter."""
        params = [p for group in self.param_groups for p in group["params"]]
        self.bind({p: Layout((p.numel(),), (0,), 1) for p in params}, None)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of what has a gradient. With total: a collective, of one call.

        Before bind() it only makes the states: DeepSpeed's 16-bit optimizers try a step out on
        zero gradients, which must not move a weight.
        """
        assert closure is None, "a step of LAMB takes no closure"
        jobs = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    # An int: a tensor that a checkpoint brings to the device would be waited for.
                    self.state[p] |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            if params:
                jobs.append((group, params))
        if self._layouts is None:
            return
        for group, params in jobs:
            self._to_updates(group, params)
        self._scale([p for group, params in jobs if group["adaptive"] for p in params])
        for group, params in jobs:
            updates: list[Any] = [p.grad for p in params]
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _to_updates(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Moments from gradients, then, in the gradients' place, Adam's direction and the decay."""
        beta1, beta2 = group["betas"]
        grads: list[Any] = [p.grad for p in params]  # all there: step() has looked
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        torch._foreach_copy_(grads, second)
        torch._foreach_sqrt_(grads)
        torch._foreach_div_(grads, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
        torch._foreach_add_(grads, group["eps"])
        torch._foreach_reciprocal_(grads)
        torch._foreach_mul_(grads, first)
        torch._foreach_div_(grads, [1 - beta1 ** state["step"] for state in states])
        if group["weight_decay"]:
            torch._foreach_add_(grads, list(params), alpha=group["weight_decay"])

    def _scale(self, params: Sequence[Tensor]) -> None:
        """Multiply the updates by their parameters' trust ratios."""
        if not params:
            return
        assert self._layouts is not None
        layouts = [self._layouts[p] for p in params]
        weights = [
            piece for x, layout in zip(params, layouts, strict=True) for piece in layout.cut(x)
        ]
        updates = [
            piece for x, layout in zip(params, layouts, strict=True) for piece in layout.cut(x.grad)
        ]
        count = sum(layout.count for layout in layouts)
        index = self._index(params, layouts)
        squares = torch.zeros((2, count), dtype=torch.float32, device=params[0].device)
        if updates:  # a rank's share of a small tensor can be padding alone
            norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(updates)])
            squares.index_add_(1, index, norms.float().square().view(2, -1))
        if self._total is not None:
            squares = self._total(squares)
        weight, update = squares.sqrt()
        ratio = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
        if updates:
            torch._foreach_mul_(updates, list(ratio[index].unbind()))

    def _index(self, params: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
        """Which row of the sums each piece belongs to. Kept, as a copy to the device is a wait."""
        key = tuple(id(p) for p in params)
        if key not in self._indices:
            rows, start = [], 0
            for layout in layouts:
                rows += [start + owner for owner in layout.pieces]
                start += layout.count
            device = params[0].device
            self._indices[key] = torch.tensor(rows, dtype=torch.long, device=device)
        return self._indices[key]


def check_lamb(ds_config: dict[str, Any]) -> None:
    """Raises UserError for what DeepSpeed does where LAMB would not be LAMB. ds_config: filled."""
    zero = ds_config["zero_optimization"]
    works = (
        "LAMB works at ZeRO 0 to 3, with the optimizer's states on the device or, whole, on 'cpu'"
    )
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key) or {}
        if part.get("device", "none") == "nvme":
            raise UserError(
                f"optim.name=lamb does not step tensors that are on disk: the DeepSpeed JSON has "
                f"zero_optimization.{key}.device='nvme'; {works}"
            )
        if part.get("ratio", 1.0) != 1.0:  # DeepSpeed steps the rest with an AdamW of its own
            raise UserError(
                "optim.name=lamb would be AdamW for a part of the weights: the DeepSpeed JSON has "
                f"zero_optimization.{key}.ratio={part['ratio']}; {works}"
            )
    if zero.get("zenflow"):
        raise UserError(
            "optim.name=lamb and zero_optimization.zenflow, which steps some columns before "
            f"others, exclude each other; {works}"
        )
    if zero.get("mics_shard_size", -1) > 0:
        raise UserError(
            "optim.name=lamb sums its norms over all ranks: the DeepSpeed JSON has "
            f"zero_optimization.mics_shard_size={zero['mics_shard_size']}; leave it out. {works}"
        )
    if ds_config.get("torch_autocast", {}).get("enabled"):
        raise UserError(
            "optim.name=lamb: under torch_autocast of the DeepSpeed JSON each rank skips overflows "
            "for itself, while LAMB sums over all; use engine.precision=bf16 or fp16"
        )


def bind_lamb(optimizer: Lamb, wrapped: Any) -> None:
    """Tell a Lamb what the tensors are that DeepSpeed has put into its groups.

    wrapped: the engine's optimizer, as deepspeed.initialize made it, no step taken yet. Every rank
    calls it. Raises UserError, on all ranks, when the layout is not that of DeepSpeed 0.19.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if wrapped is optimizer or isinstance(wrapped, FP16_UnfusedOptimizer):
        optimizer.bind_whole()
        return
    places = find_places(optimizer, wrapped)
    optimizer.bind({place.flat: _layout(place) for place in places}, dist.sum_over_ranks)


def _layout(place: Place) -> Layout:
    spans = [(piece.start, piece.size, piece.owner) for piece in place.pieces]
    return _pad(spans, place.flat.numel(), len(place.params))


def _pad(spans: Sequence[tuple[int, int, int]], numel: int, count: int) -> Layout:
    """spans: (start, size, owner), not overlapping -> them in order, padding wherever none is."""
    sizes, owners, at = [], [], 0
    for start, size, owner in [*sorted(spans), (numel, 0, PADDING)]:
        if start > at:
            sizes.append(start - at)
            owners.append(PADDING)
        if size:
            sizes.append(size)
            owners.append(owner)
        at = start + size
    return Layout(tuple(sizes), tuple(owners), count)
