"""Budgets from made-up /proc and cgroup files and from what nvidia-smi prints."""

import resource

import pytest

from elip_ds.launching.endings import DeviceBusy
from elip_ds.launching.limits import (
    count_oom_kills,
    cuda_budget,
    host_budget,
    host_limits,
    parse_gpus,
    read_gpus,
    visible_gpus,
)

GIB = 2**30


@pytest.fixture
def node(tmp_path, monkeypatch):
    """make(cgroup line, **files) -> keywords of host_limits; 64 GiB are available."""
    monkeypatch.setattr(resource, "getrlimit", lambda number: (resource.RLIM_INFINITY,) * 2)

    def make(line: str = "0::/", **files: str) -> dict:
        proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        cgroup.mkdir()
        (proc / "self" / "cgroup").write_text(f"9:cpu:/\n{line}\n")
        (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * 2**20} kB\n")
        for name, text in files.items():
            path = cgroup / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {"proc": proc, "cgroup": cgroup, "environ": {}}

    return make


def test_what_is_available_is_shared_by_the_ranks(node):
    budget = host_budget(4, **node())
    assert budget.bytes == 16 * GIB
    assert budget.name == "64.00 GiB available, for 4 ranks"


def test_a_cgroup_above_binds_and_what_is_in_use_there_is_taken_off(node):
    where = node(
        "0::/job/step",
        job__step__memory_dot_max="max\n",
        job__memory_dot_max=str(20 * GIB),
        job__memory_dot_current=str(5 * GIB),
        job__memory_dot_stat=f"anon 1\ninactive_file {GIB}\n",
    )
    budget = host_budget(2, **where)
    assert budget.bytes == 8 * GIB
    assert "job/memory.max 20.00 GiB with 4.00 GiB in use" in budget.name


def test_the_older_cgroups_are_read_and_their_no_limit_is_none(node):
    where = node(
        "4:cpuset,memory:/job",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        memory__job__memory_dot_limit_in_bytes=str(6 * GIB),
        memory__job__memory_dot_usage_in_bytes=str(GIB),
    )
    assert [limit.bytes for limit in host_limits(1, **where)] == [64 * GIB, 5 * GIB]


def test_a_cgroup_path_of_the_host_falls_back_on_what_exists(node):
    where = node("0::/docker/abc", memory_dot_max=str(3 * GIB))
    assert host_budget(1, **where).bytes == 3 * GIB


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "8192"}, 4 * GIB),
        ({"SLURM_MEM_PER_NODE": "0"}, 32 * GIB),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "6"}, 3 * GIB),
        ({"SLURM_MEM_PER_CPU": "1024"}, 32 * GIB),
    ],
)
def test_slurm_gives_a_node_or_a_cpu_its_memory(node, environ, expected):
    assert host_budget(2, **(node() | {"environ": environ})).bytes == expected


def test_limits_of_a_process_and_of_the_user_are_a_ranks_own(node, monkeypatch):
    where = node()
    assert host_budget(2, given_bytes=7 * GIB, **where).name == "7.00 GiB as given"
    only = {resource.RLIMIT_DATA: 2 * GIB}
    monkeypatch.setattr(
        resource, "getrlimit", lambda number: (only.get(number, resource.RLIM_INFINITY),) * 2
    )
    budget = host_budget(2, given_bytes=7 * GIB, **where)
    assert (budget.bytes, budget.name) == (2 * GIB, "RLIMIT_DATA 2.00 GiB of a process")


def test_a_node_that_says_nothing_is_an_error(tmp_path):
    with pytest.raises(DeviceBusy, match="does not say how much memory is free"):
        host_budget(1, proc=tmp_path, cgroup=tmp_path, environ={})


@pytest.mark.parametrize(
    ("line", "file"),
    [
        (
            "0::/job/mine",
            {
                "job__mine__memory_dot_events": "oom 9\noom_kill 3\n",
                "job__memory_dot_events": "oom 9\noom_kill 5\n",
            },
        ),
        ("4:memory:/job", {"memory__job__memory_dot_oom_control": "under_oom 0\noom_kill 3\n"}),
    ],
)
def test_the_kernels_kills_in_this_cgroup_are_counted(node, line, file):
    where = node(line, **file)
    assert count_oom_kills(where["proc"], where["cgroup"]) == 3


GPUS = """\
0, GPU-aaa, NVIDIA A100-SXM4-40GB, 40960, 425, 40535
1, GPU-bbb, NVIDIA A100-SXM4-40GB, 40960, 6500, 34460
2, GPU-ccc, NVIDIA A100-SXM4-40GB, 40960, 900, 40060
"""


TORCH = f"""
class cuda:
    device_count = staticmethod(lambda: 1)
    mem_get_info = staticmethod(lambda i: ({19 * GIB}, {20 * GIB}))
    get_device_name = staticmethod(lambda i: "NVIDIA A100-SXM4-40GB MIG 3g.20gb")
"""


def test_the_fullest_free_device_that_a_rank_uses_binds():
    gpus = visible_gpus(parse_gpus(GPUS, ""), {"CUDA_VISIBLE_DEVICES": "GPU-ccc,0"})
    assert [gpu.index for gpu in gpus] == [2, 0]
    budget = cuda_budget(2, gpus)
    assert budget.bytes == 40060 * 2**20
    assert budget.name == "GPU 2: 39.12 GiB free of 40.00 GiB"
    assert cuda_budget(2, gpus, given_bytes=24 * GIB).name == "24.00 GiB as given"
    assert cuda_budget(1, gpus[1:]).bytes == 40535 * 2**20


@pytest.mark.parametrize(
    ("processes", "who"),
    [
        ("GPU-bbb, 4242, 6246\nGPU-bbb, 7, [N/A]\n", "6.10 GiB held by pid 4242, memory held by"),
        ("", "6.35 GiB held by processes that cannot be seen here; 33.65 GiB free of 40.00 GiB"),
    ],
)
def test_a_device_that_others_hold_is_busy(processes, who):
    with pytest.raises(DeviceBusy, match=f"GPU 1: {who}"):
        cuda_budget(3, visible_gpus(parse_gpus(GPUS, processes), {}))


def test_memory_that_nobody_tells_is_an_error():
    with pytest.raises(DeviceBusy, match="GPU 0: nvidia-smi does not say"):
        parse_gpus("0, GPU-a, GB10, [N/A], [N/A], [N/A]", "")


def test_a_part_of_a_device_is_not_taken_for_the_whole():
    with pytest.raises(DeviceBusy, match="MIG-1 is none of 0"):
        visible_gpus(parse_gpus(GPUS, ""), {"CUDA_VISIBLE_DEVICES": "MIG-1"})


def test_where_nvidia_smi_does_not_tell_torch_is_asked(monkeypatch, tmp_path):
    """Containers may lack it, and it tells nothing of a part of a GPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (gpu,) = read_gpus()
    assert (gpu.index, gpu.name) == (0, "NVIDIA A100-SXM4-40GB MIG 3g.20gb")
    assert (gpu.total_bytes, gpu.free_bytes, gpu.used_bytes) == (20 * GIB, 19 * GIB, GIB)


def test_a_missing_nvidia_smi_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceBusy, match=r"nvidia-smi does not say .*No such file"):
        read_gpus()
