"""What a run's plan.json says of memory."""

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PlannedMemory:
    """Of one rank; NaN where nobody has said it."""

    limit_bytes: float = math.nan
    planned_bytes: float = math.nan


def read_memory(run_dir: Path, node: str) -> PlannedMemory:
    """Of a node, or where it has no entry of its own of any: all have the same plan."""
    try:
        nodes = json.loads((run_dir / "plan.json").read_text())["nodes"]
    except (OSError, ValueError, KeyError):
        return PlannedMemory()
    if not nodes:
        return PlannedMemory()
    answer = nodes.get(node) or next(iter(nodes.values()))
    memory = answer.get("memory")  # none where a given micro-batch could not be checked
    limit = memory["limit"]["bytes"] if memory else math.nan
    return PlannedMemory(limit, answer.get("planned_bytes", math.nan))
