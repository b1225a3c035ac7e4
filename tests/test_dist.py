"""One rank, and who a process is.

Several ranks: objectives/test_contrastive.py, tasks/test_world_size.py and end_to_end/.
"""

import pytest
import torch

from elip_ds import dist
from elip_ds.errors import NodeError

VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID",
    "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


@pytest.fixture
def ranks_from(monkeypatch):
    """ranks_from(**variables) -> (rank, local_rank, world_size, local_world_size)."""

    def read(**variables: str) -> tuple[int, int, int, int]:
        for name in VARIABLES:
            monkeypatch.setenv(name, "")  # so that what read_ranks writes is undone, too
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        ranks = dist.read_ranks()
        return ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size

    return read


def test_with_one_rank_everything_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    for function in (dist.gather_rows, dist.sum_over_ranks, dist.max_over_ranks):
        y = function(x)
        assert torch.equal(y, x) and not y.requires_grad, function.__name__
    assert dist.gather_objects({"a": 1}) == [{"a": 1}]
    assert (dist.rank(), dist.world_size()) == (0, 1)
    dist.barrier()


def test_with_one_rank_a_gather_with_gradient_passes_both_on():
    x = torch.randn(3, 2, requires_grad=True)
    y = dist.gather_samples_with_grad(x)
    assert torch.equal(y, x)
    y.mul(torch.arange(6.0).view(3, 2)).sum().backward()
    assert torch.equal(x.grad, torch.arange(6.0).view(3, 2))


def test_sums_and_maxima_are_new_tensors():
    x = torch.ones(2)
    for function in (dist.sum_over_ranks, dist.max_over_ranks):
        function(x).zero_()
    assert x.tolist() == [1, 1]


def test_stopping_what_was_never_started_is_nothing():
    dist.stop()


def test_a_process_that_nobody_launched_is_the_only_rank(ranks_from):
    assert ranks_from() == (0, 0, 1, 1)


@pytest.mark.parametrize("local", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun, deepspeed
def test_the_launchers_variables_are_read(ranks_from, local):
    env = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", local: "4"}
    assert ranks_from(**env) == (5, 1, 8, 4)


SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize("per_node", ["4", "4(x2)", "4(x2),3"])
def test_a_slurm_step_is_read(ranks_from, per_node):
    assert ranks_from(**SLURM, SLURM_STEP_TASKS_PER_NODE=per_node) == (5, 1, 8, 4)


@pytest.mark.parametrize(("node", "tasks"), [(0, 4), (1, 4), (2, 3), (3, 1)])
def test_a_slurm_step_of_uneven_nodes_is_read(ranks_from, node, tasks):
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1", "SLURM_NODEID": str(node)}
    assert ranks_from(**env) == (5, 1, 8, tasks)


def test_a_launcher_inside_slurm_counts(ranks_from):
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert ranks_from(**SLURM, **env) == (1, 1, 2, 2)


def test_a_shell_in_a_slurm_allocation_is_one_rank(ranks_from):
    assert ranks_from(SLURM_JOB_ID="9", SLURM_PROCID="0") == (0, 0, 1, 1)


def test_reading_a_slurm_step_twice_says_the_same(ranks_from):
    first = ranks_from(**SLURM, SLURM_STEP_TASKS_PER_NODE="4(x2)")
    again = dist.read_ranks()
    assert first == (again.rank, again.local_rank, again.world_size, again.local_world_size)


def test_groups_that_others_make_wait_no_longer_than_the_first(monkeypatch):
    from torch.distributed import distributed_c10d

    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in names:  # so that what start writes is undone, too
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    cpu = torch.device("cpu")
    dist.start(dist.Ranks(0, 0, 1, 1, cpu), timeout_seconds=7)
    try:
        group = torch.distributed.new_group([0])
        assert group._get_backend(cpu).options._timeout.total_seconds() == 7
    finally:
        dist.stop()


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count): torch sees so many."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_every_rank_of_a_node_has_a_gpu_of_its_own(ranks_from, gpus):
    gpus(4)
    ranks_from(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    assert dist.read_ranks().device == torch.device("cuda", 1)
    with pytest.raises(NodeError, match="8 ranks on this node and torch sees 4 of its GPUs"):
        ranks_from(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")


@pytest.mark.parametrize("name", ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS"])
def test_gpus_that_slurm_gives_and_torch_does_not_see_are_no_reason_to_train_on_a_cpu(
    ranks_from, gpus, name
):
    gpus(0)
    given = {name: "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(NodeError, match=r"GPUs \(0,1\) and torch sees none"):
        ranks_from(**SLURM, **given)
    assert ranks_from(**SLURM, **given | {"CUDA_VISIBLE_DEVICES": ""})[0] == 5
