"""`launch plan`: what fits on a device that need not be here, and what becomes of the batch."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from elip_ds.batching import Plan, choose_micro_batch, plan_batch
from elip_ds.batching.devices import Device, find_device
from elip_ds.batching.plan import MAX_MICRO_BATCH, better_batches
from elip_ds.batching.predict import FIRST, Prediction
from elip_ds.batching.sizes import show_bytes
from elip_ds.config import Config, duration_in_samples, load_config
from elip_ds.data.order import SourceSize
from elip_ds.engine import json_batch, read_ds_config
from elip_ds.engine.schedule import settle_optim
from elip_ds.errors import UserError
from elip_ds.launching.advice import advice
from elip_ds.launching.budget import least_memory, left_free
from elip_ds.launching.forecast import Forecast
from elip_ds.launching.loaders import loader_bytes
from elip_ds.tasks import min_micro_batch

EAGER = "attention=eager"
"A word of plans alone: attention by single operations, as without a fused kernel."


def plan_all(
    words: Sequence[str], deepspeed: str, ranks: int | None, compared: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """A record for the settings, and one for each of compared, which change some of them.

    Among the changes deepspeed=JSON takes another DeepSpeed JSON, attention=eager attention by
    single operations. Raises UserError.
    """
    plans = [plan_one("plan", words, deepspeed, ranks or 1)]
    for changed in compared:
        files = [word.partition("=")[2] for word in changed if word.startswith("deepspeed=")]
        more = [word for word in changed if not word.startswith("deepspeed=")]
        other = files[-1] if files else deepspeed
        plans.append(plan_one(" ".join(changed), [*words, *more], other, ranks or 1))
    return plans


def plan_one(name: str, words: Sequence[str], deepspeed: str, ranks: int) -> dict[str, Any]:
    """Raises UserError where no memory is named: a plan looks at no device."""
    settings = [word for word in words if word not in (EAGER, "attention=fused")]
    eager = EAGER in words
    config = load_config(["--deepspeed", deepspeed, *settings])
    tree = read_ds_config(deepspeed)
    named = config.batching.device_memory
    if named is None:
        raise UserError("plan looks at no device: add --device-memory, as in 24GiB or a100-80")
    device = find_device(named)
    kind = "cpu" if named.lower().startswith("cpu:") else "cuda"
    forecast = Forecast(
        config, tree, world_size=ranks, device=kind, attention="eager" if eager else "fused"
    )
    usable = device.memory_bytes - device.outside_bytes
    free = left_free(config.batching, usable, kind)
    budget = int((usable - free) / device.kappa)
    asked = _asked_first(config, tree, ranks)
    largest = forecast.largest(budget, range(1, MAX_MICRO_BATCH + 1), asked)
    notes = _notes(device, kind)
    least = min_micro_batch(config)
    if largest is None:
        smallest = forecast.prediction(1)

        def taken(planned: int) -> int:
            return int(planned * device.kappa) + device.outside_bytes

        needed = taken(smallest.peaks.highest)
        helps = advice(config, tree, 1, needed, world_size=ranks, device=kind, taken=taken)
        least_of_all = least_memory(config.batching, needed, device.outside_bytes, kind)
        told = (
            f"not even one sample fits: with it a rank takes {show_bytes(needed)}, "
            f"{show_bytes(least_of_all)} with what is left free"
        )
        notes.insert(0, f"{told}; {helps}")
        record = _record(name, device, forecast, smallest, free, None, ranks)
        return record | {"notes": notes, "least": least}
    plan = _plan(config, tree, largest, ranks, notes)
    shown = forecast.prediction(plan.micro_batch_size if plan else largest)
    record = _record(name, device, forecast, shown, free, largest, ranks)
    loader = loader_bytes(config, shown.micro_batch_size)
    record["loader"] = {"a rank's loader": loader.total, "of it in /dev/shm": loader.shared}
    if plan is not None:
        optim = settle_optim(config.optim, plan.global_batch_size)
        record |= {
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "global_batch_size": plan.global_batch_size,
            "peak_learning_rate": optim.lr,
            "lr_rule": config.optim.lr_rule,
            "optimizer": optim.name,
            **_durations(config, plan.global_batch_size),
        }
    return record | {"notes": notes, "least": least}


def _asked_first(config: Config, tree: dict[str, Any], ranks: int) -> int:
    """A micro-batch that is likely to be shown: a rank's share of the batch, or the one given."""
    total, micro = json_batch(tree, config.batching, ranks)
    if micro != "auto":
        return int(micro)
    return FIRST if total == "auto" else max(1, int(total) // ranks)


def _durations(config: Config, global_batch_size: int) -> dict[str, int | None]:
    """Of the warm-up and of an epoch, in samples and steps; None: not without the data."""
    epoch = _samples_per_epoch(config)
    warmup = None
    if epoch is not None or "epoch" not in config.schedule.warmup:
        warmup = duration_in_samples(config.schedule.warmup, epoch or 1)
    record: dict[str, int | None] = {}
    for name, samples in (("warmup", warmup), ("epoch", epoch)):
        record[f"{name}_samples"] = samples
        record[f"{name}_steps"] = None if samples is None else ceil(samples / global_batch_size)
    return record


def _samples_per_epoch(config: Config) -> int | None:
    """Of the built-in scenes the configuration says it; shards would have to be read."""
    if any(source.shards != "builtin" for source in config.data.train):
        return None
    scenes = (config.data.builtin.train,)
    return sum(SourceSize(scenes, source.weight).per_epoch for source in config.data.train)


def _plan(
    config: Config, tree: dict[str, Any], largest: int, ranks: int, notes: list[str]
) -> Plan | None:
    """What the run would do with it; None, with a note, where the batch cannot be made."""
    total, micro = json_batch(tree, config.batching, ranks)
    least = min_micro_batch(config)
    try:
        if micro != "auto":
            size = int(micro)
            batch = size * ranks if total == "auto" else int(total)
            plan = plan_batch(batch, size, world_size=ranks, min_micro_batch=least)
            if size > largest:
                notes.append(f"micro-batch {size} is asked for and does not fit: {largest} would")
            return plan
        plan = choose_micro_batch(
            largest,
            None if total == "auto" else int(total),
            world_size=ranks,
            multiple_of=config.batching.multiple_of,
            min_micro_batch=least,
            max_global=config.batching.max_global,
        )
    except UserError as error:
        notes.append(str(error))
        return None
    better = better_batches(plan, largest, least)
    if better:
        notes.append(f"global batches that use more of it: {', '.join(map(str, better))}")
    return plan


def _notes(device: Device, kind: str) -> list[str]:
    if kind == "cpu":
        return [
            f"{device.name}: taken as all for the model and its steps; the process of a rank takes "
            "about 720 MiB besides, which a probe counts"
        ]
    if device.tested:
        return []
    return [
        f"{device.name}: what a process takes outside of torch "
        f"({show_bytes(device.outside_bytes)}) and what the allocator takes beyond what is in use "
        f"({device.kappa - 1:.0%}) are first guesses, measured on no such device; a probe decides"
    ]


def _record(
    name: str,
    device: Device,
    forecast: Forecast,
    shown: Prediction,
    free_bytes: int,
    largest: int | None,
    ranks: int,
) -> dict[str, Any]:
    beyond = int(shown.peaks.highest * (device.kappa - 1))
    return {
        "name": name,
        "device": f"{device.name}, {show_bytes(device.memory_bytes)} usable",
        "precision": forecast.precision,
        "world_size": ranks,
        "largest": largest,
        "shown_at": shown.micro_batch_size,
        "peaks": vars(shown.peaks),
        "parts": shown.parts,
        "reserve": {
            "left free": free_bytes,
            "outside of torch": device.outside_bytes,
            "allocator": beyond,
        },
        "bytes_per_sample": forecast.slope(),
    }
