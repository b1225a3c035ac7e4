"""What would make a model fit, in the order in which it helps most."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from elip_ds.batching.sizes import show_bytes
from elip_ds.config import Config
from elip_ds.launching.forecast import Forecast


def advice(
    config: Config,
    tree: dict[str, Any],
    micro_batch_size: int,
    needed: int,
    *,
    world_size: int,
    device: str,
    accumulation: int = 1,
    taken: Callable[[int], int],
) -> str:
    """By the plan, each change alone, at this micro-batch; one line. needed: bytes of a rank as it
    is.  taken: when so many are planned.
    """
    gains = []
    for told, changed, other in changes(config, tree):
        forecast = Forecast(
            changed, other, world_size=world_size, device=device, accumulation=accumulation
        )
        gains.append((taken(forecast.at(micro_batch_size).highest), told))
    gains = [gain for gain in gains if gain[0] < needed]
    if not gains:
        return "the plan knows of no setting that would help: a smaller model, or more ranks"
    parts = [f"{told} ({show_bytes(left)})" for left, told in sorted(gains)]
    return f"what would help most, by the plan: {', '.join(parts)}"


def changes(config: Config, tree: dict[str, Any]) -> Iterator[tuple[str, Config, dict[str, Any]]]:
    """(in words, config, DeepSpeed JSON) of what saves memory and is not done yet."""
    zero = tree.get("zero_optimization", {})
    for stage in (2, 3):
        if zero.get("stage", 0) < stage:
            yield f"ZeRO stage {stage}", config, _with_zero(tree, stage=stage)
    if "offload_optimizer" not in zero and zero.get("stage", 0) > 0:
        offload = {"device": "cpu", "pin_memory": False}
        yield "offload_optimizer to the CPU", config, _with_zero(tree, offload_optimizer=offload)
    model = config.model
    for mode in ("full", "cheap"):
        if model.vision.recompute not in (mode, "full"):
            changed = dataclasses.replace(
                model,
                vision=dataclasses.replace(model.vision, recompute=mode),
                text=dataclasses.replace(model.text, recompute=mode),
            )
            told = f"model.vision.recompute={mode} model.text.recompute={mode}"
            yield told, dataclasses.replace(config, model=changed), tree
    smaller = model.vision.image_size * 3 // 4 // model.vision.patch_size * model.vision.patch_size
    if smaller >= 2 * model.vision.patch_size and model.vision.image_width is None:
        vision = dataclasses.replace(model.vision, image_size=smaller)
        changed = dataclasses.replace(model, vision=vision)
        told = f"model.vision.image_size={smaller}"
        yield told, dataclasses.replace(config, model=changed), tree


def _with_zero(tree: dict[str, Any], **settings: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    changed.setdefault("zero_optimization", {}).update(settings)
    return changed
