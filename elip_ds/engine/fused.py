"""Whose LayerNorm, AdamW and LAMB run: torch's, NVIDIA apex's or DeepSpeed's.

Another's counts only where it is installed, loads and has run once on this GPU; otherwise torch's,
and of LAMB our own. None of them changes what is computed, only how fast.
"""

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from elip_ds import dist

log = logging.getLogger(__name__)

NVIDIA_APEX = "https://github.com/NVIDIA/apex"
NAMES = {"layer_norm": "LayerNorm", "adamw": "AdamW", "lamb": "LAMB"}


@dataclass(frozen=True)
class Kernels:
    """torch, apex or deepspeed for each.  optimizer: for that of optim.name; the other is not used.
    reasons: layer_norm, adamw or lamb -> why not the one that was wished for.
    """

    layer_norm: str
    optimizer: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class Place:
    """Where the optimizer will step.  stage: of ZeRO.  precision: fp32, bf16 or fp16.  offload: its
    states live on the host.  weight_decay: of those that decay.
    """

    device: torch.device
    stage: int = 0
    precision: str = "fp32"
    offload: bool = False
    weight_decay: float = 0.02


class Apex(NamedTuple):
    """module: NVIDIA's, or None for the reason in words.  unrelated: it is another project's."""

    module: ModuleType | None
    reason: str = ""
    unrelated: bool = False


def find_apex() -> Apex:
    """NVIDIA's apex, with the two sub-packages that are used of it.

    What is installed under that name may be anything: nothing is imported unless it has NVIDIA's
    folders, and whatever goes wrong while importing those is a reason, not an error.
    """
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError):  # ValueError: something put a bare module in its place
        spec = None
    if spec is None:
        return Apex(None, f"apex is not installed; NVIDIA's comes from {NVIDIA_APEX}")
    folders = list(spec.submodule_search_locations or ())
    parts = ("normalization", "optimizers")
    if not all(PathFinder.find_spec(f"apex.{part}", folders) for part in parts):
        where = next(iter(folders), spec.origin)
        reason = (
            f"the package at {where} is not NVIDIA's apex, as it has no apex.normalization and "
            f"apex.optimizers: 'apex' on PyPI is an unrelated project; NVIDIA's comes from "
            f"{NVIDIA_APEX}"
        )
        return Apex(None, reason, unrelated=True)
    try:
        for part in parts:
            importlib.import_module(f"apex.{part}")
    except Exception as error:  # of somebody else's code, which may raise what it likes
        return Apex(None, f"apex cannot be imported: {_first_line(error)}")
    return Apex(sys.modules["apex"])


@contextlib.contextmanager
def unusable_apex_hidden() -> Iterator[None]:
    """To import DeepSpeed in: it imports whatever is called apex and survives only ImportError."""
    if find_apex().module is not None:
        yield
        return
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_apex(name)}
    sys.modules["apex"] = None  # type: ignore[assignment]  # Python's own mark of "cannot be had"
    try:
        yield
    finally:
        del sys.modules["apex"]
        sys.modules.update(before)


def _is_apex(name: str) -> bool:
    return name == "apex" or name.startswith("apex.")


def choose_kernels(wish: str, place: Place, *, optimizer: str) -> Kernels:
    """Find out which implementation runs, for the wish in engine.fused, and say so once; the same
    on all ranks.

    optimizer: optim.name.  Every rank calls it.
    """
    wished = {part: _candidate(part, wish, place) for part in ("layer_norm", optimizer)}
    mine = {part: _obstacle(part, who, place) for part, who in wished.items() if who != "torch"}
    reasons: dict[str, str] = {}
    for found in dist.gather_objects(mine):  # one rank's obstacle is everybody's
        reasons = {part: reason for part, reason in found.items() if reason} | reasons
    chosen = {part: "torch" if part in reasons else who for part, who in wished.items()}
    kernels = Kernels(chosen["layer_norm"], chosen[optimizer], reasons)
    if dist.rank() == 0:
        _report(wish, kernels, optimizer)
    return kernels


def _report(wish: str, kernels: Kernels, optimizer: str) -> None:
    used = {"layer_norm": kernels.layer_norm, optimizer: kernels.optimizer}
    log.info("kernels: %s", ", ".join(f"{NAMES[p]} {used.get(p, 'not used')}" for p in NAMES))
    if wish == "auto":
        if find_apex().unrelated:
            log.warning("engine.fused=auto: %s; torch's goes on", find_apex().reason)
        return
    parts_by_reason: dict[str, list[str]] = {}
    for part, reason in kernels.reasons.items():
        parts_by_reason.setdefault(reason, []).append(NAMES[part])
    if parts_by_reason:
        why = "; ".join(f"{' and '.join(p)}: {r}" for r, p in parts_by_reason.items())
        log.warning("engine.fused=%s cannot be had, torch's goes on: %s", wish, why)


def _candidate(part: str, wish: str, place: Place) -> str:
    if wish != "auto":
        return wish
    return "deepspeed" if part == "adamw" and place.offload else "apex"


def _obstacle(part: str, candidate: str, place: Place) -> str:
    """Why the candidate for a part cannot be had here; "" when it can."""
    if candidate == "apex":
        apex = find_apex()
        if apex.module is None:
            return apex.reason
    if place.device.type != "cuda":
        return f"{candidate}'s kernels need a GPU, the run is on the CPU"
    rule, trial = RULES[candidate, part]
    reason = rule(place)
    if reason:
        return reason
    try:
        trial(place)
    except Exception as error:  # of a compiler, a loader or a kernel: each has its own kinds
        return f"{candidate}'s {part} does not run: {_first_line(error)}"
    return ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _apex_adamw(place: Place) -> str:
    if place.offload:
        return "apex's FusedAdam cannot step what is on the host"
    if place.stage == 3:
        # Its step count is the group's, and ZeRO 3 steps a group in several parts.
        return "apex's FusedAdam counts a step for each part of a group that ZeRO 3 steps"
    return ""


def _apex_lamb(place: Place) -> str:
    if place.stage or place.precision != "fp32":
        # Shards have no whole norms; and DeepSpeed tries a 16-bit optimizer out, which moves LAMB.
        return "apex's FusedLAMB is right on whole fp32 weights only: ZeRO 0, engine.precision=fp32"
    if place.weight_decay == 0:
        return "apex's FusedLAMB is plain Adam without optim.weight_decay"
    return ""


def _try_apex_layer_norm(place: Place) -> None:
    from apex.normalization import FusedLayerNorm

    x = torch.ones(2, 8, device=place.device, requires_grad=True)
    FusedLayerNorm(8).to(place.device)(x).sum().backward()


def _try_apex_optimizer(name: str, place: Place) -> None:
    weight = nn.Parameter(torch.ones(8, device=place.device))
    weight.grad = torch.ones_like(weight)
    getattr(sys.modules["apex.optimizers"], name)([weight], lr=0.1).step()


def _try_deepspeed_adamw(place: Place) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    (CPUAdamBuilder if place.offload else FusedAdamBuilder)().load()


# (whose, part) -> why it would be wrong here, or ""; and something that raises unless it works.
RULES: dict[tuple[str, str], tuple[Callable[[Place], str], Callable[[Place], None]]] = {
    ("apex", "layer_norm"): (lambda place: "", _try_apex_layer_norm),
    ("apex", "adamw"): (_apex_adamw, lambda place: _try_apex_optimizer("FusedAdam", place)),
    ("apex", "lamb"): (_apex_lamb, lambda place: _try_apex_optimizer("FusedLAMB", place)),
    ("deepspeed", "layer_norm"): (
        lambda place: "DeepSpeed has no LayerNorm to train with",
        lambda place: None,
    ),
    ("deepspeed", "adamw"): (lambda place: "", _try_deepspeed_adamw),
    ("deepspeed", "lamb"): (
        lambda place: (
            "DeepSpeed's FusedLamb is another method: its ratio leaves the bias correction out, "
            "is clipped to 0.01..10 and also scales what does not decay"
        ),
        lambda place: None,
    ),
}


def swap_layer_norms(module: nn.Module, build: Callable[..., Any]) -> int:
    """Put a build(shape, eps=...), as apex's FusedLayerNorm, wherever an nn.LayerNorm is inside;
    returns how many.

    The very same parameters stay in place, so that names, values and state dicts are unchanged. One
    without weight or bias stays torch's: apex has none.
    """
    swapped = 0
    for parent in list(module.modules()):
        for name, old in list(parent.named_children()):
            # A class derived from it may do more than it.
            if type(old) is not nn.LayerNorm or old.weight is None or old.bias is None:
                continue
            new = build(old.normalized_shape, eps=old.eps)
            new.weight, new.bias = old.weight, old.bias
            new.train(old.training)
            setattr(parent, name, new)
            swapped += 1
    return swapped
