"""What plan.json says of memory, whatever its answers lack."""

import json
import math

from elip_ds.launching.node import _unchecked
from elip_ds.metrics.plan_file import PlannedMemory, read_memory


def test_a_node_has_its_own_memory_and_any_other_where_it_has_none(tmp_path):
    nodes = {
        "a": {"memory": {"limit": {"bytes": 10}}, "planned_bytes": 7},
        "b": {"memory": {"limit": {"bytes": 20}}},
    }
    (tmp_path / "plan.json").write_text(json.dumps({"nodes": nodes}))
    assert read_memory(tmp_path, "a") == read_memory(tmp_path, "c") == PlannedMemory(10, 7)
    other = read_memory(tmp_path, "b")
    assert other.limit_bytes == 20 and math.isnan(other.planned_bytes)


def test_where_nobody_could_look_at_the_device_nothing_is_known(tmp_path):
    nodes = {"a": _unchecked(8, "nvidia-smi does not say what memory is free")}
    (tmp_path / "plan.json").write_text(json.dumps({"nodes": nodes}))
    for folder in (tmp_path, tmp_path / "none"):
        memory = read_memory(folder, "a")
        assert math.isnan(memory.limit_bytes) and math.isnan(memory.planned_bytes)
