"""Plans as tables for a person: memory by part, and what becomes of the batch."""

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from elip_ds.batching.sizes import show_bytes

ORDER = ("parameters", "gradients", "optimizer", "teacher", "queues and buffers", "buckets")
"Parts come in this order, then the others."


def show_plans(plans: Sequence[dict[str, Any]]) -> str:
    """plans: records of launching.planning, the first the one that others are compared with."""
    table = Table(title=f"memory of a rank, {plans[0]['device']}", title_justify="left")
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(plan["name"], justify="right", overflow="fold")
    for part in _parts(plans):
        table.add_row(part, *(_size(plan["parts"].get(part)) for plan in plans))
    for name in ("allocator", "outside of torch", "left free"):
        table.add_row(name, *(_size(plan["reserve"][name]) for plan in plans))
    table.add_section()
    for name in ("a rank's loader", "of it in /dev/shm"):
        sizes = (_size(plan.get("loader", {}).get(name)) for plan in plans)
        table.add_row(f"{name} (host)", *sizes)
    table.add_section()
    for key, told in (
        ("precision", "precision"),
        ("largest", "largest micro-batch"),
        ("micro_batch_size", "micro-batch"),
        ("gradient_accumulation_steps", "accumulation"),
        ("world_size", "ranks"),
        ("global_batch_size", "samples a step"),
        ("peak_learning_rate", "peak learning rate"),
        ("optimizer", "optimized by"),
        ("bytes_per_sample", "a sample more takes"),
    ):
        table.add_row(told, *(_value(key, plan.get(key)) for plan in plans))
    for name, told in (("warmup", "warm-up"), ("epoch", "an epoch")):
        table.add_row(told, *(_duration(plan, name) for plan in plans))
    out = io.StringIO()
    console = Console(file=out, width=max(80, 34 + 24 * len(plans)))
    console.print(table)
    of_note: dict[str, list[str]] = {}
    for plan in plans:
        for note in plan["notes"]:
            of_note.setdefault(note, []).append(plan["name"])
    for note, names in of_note.items():
        who = "" if len(names) == len(plans) > 1 else f"{', '.join(names)}: "
        console.print(f"{who}{note}", highlight=False)
    return out.getvalue()


def _parts(plans: Sequence[dict[str, Any]]) -> list[str]:
    names = {part for plan in plans for part in plan["parts"]}
    first = [part for part in ORDER if part in names]
    return first + sorted(names - set(first))


def _size(number: int | None) -> str:
    return "" if not number else show_bytes(number)


def _value(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "bytes_per_sample":
        return f"{value / 1e6:.1f} MB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(plan: dict[str, Any], name: str) -> str:
    if f"{name}_samples" not in plan:
        return "-"
    samples, steps = plan[f"{name}_samples"], plan[f"{name}_steps"]
    return "unknown without data" if samples is None else f"{samples} samples, {steps} steps"
