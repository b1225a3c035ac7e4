"""C6: one rank with 8 samples equals two ranks with 4 each, or with 5 and 3, in losses, gradients
and state.

Plain autograd, gradients averaged over ranks here; no DeepSpeed.
"""

import dataclasses
import socket

import pytest
import torch
import torch.multiprocessing as mp
from conftest import random_batch, tiny_task

from elip_ds import dist
from elip_ds.data import Batch
from elip_ds.objectives import Progress

pytestmark = [pytest.mark.slow, pytest.mark.world_size(2)]

CASES = {
    "gathered": ["objectives.itm=null"],
    "local keys": [
        "objectives.itm=null",
        "objectives.mlm=null",
        "objectives.itc.gather_keys=false",
    ],
    "all": [],
}
UNEQUAL = (5, 3)
CONTRASTS = {
    "contrast": [],
    "whole contrast": ["objectives.contrastive.local_loss=false"],
}


def whole(parameter):
    return parameter.data


def shares():
    return dist._deal or (8 // dist.world_size(),) * dist.world_size()


def mine(batch):
    """This rank's share: rank 0 the first rows, rank 1 the next."""
    sizes = shares()
    start = sum(sizes[: dist.rank()])
    rows = slice(start, start + sizes[dist.rank()])
    fields = ("images", "input_ids", "attention_mask", "sample_key")
    return Batch(**{field: getattr(batch, field)[rows] for field in fields})


def mean_over_ranks(x):
    return dist.sum_over_ranks(x) / dist.world_size()


def train(words, model="albef"):
    """Two SGD steps; losses and gradients averaged over ranks, and the state at the end."""
    task = tiny_task(*words, model=model)
    if task.teacher is not None:
        with torch.no_grad():
            for parameter in task.teacher.parameters():
                parameter.mul_(1.1)
    steps = []
    for step in range(2):
        progress = Progress(step, samples_seen=32, samples_per_epoch=64)
        task.zero_grad()
        result = task(mine(random_batch(8, seed=step)), progress)
        result.total.backward()
        trained = {n: p for n, p in task.named_parameters() if p.grad is not None}
        grads = {name: mean_over_ranks(p.grad) for name, p in trained.items()}
        values = {k: v * dist.sample_weight() for k, v in result.values.items()}
        steps.append(({k: mean_over_ranks(v) for k, v in values.items()}, grads))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter -= 0.05 * grads[name]
        task.after_step(progress, whole)
    return {"steps": steps, "state": task.state()}


class DealtPairs:
    """19 held-out pairs, every world_size-th for this rank, filled up to equal counts."""

    def __len__(self):
        return 19

    def __iter__(self):
        world = dist.world_size()
        everything = random_batch(19, seed=9)
        images = torch.randint(0, 256, (19, 3, 32, 32), generator=torch.Generator().manual_seed(9))
        everything = dataclasses.replace(everything, images=images.to(torch.uint8))
        places = range(dist.rank(), -(-19 // world) * world, world)
        for start in range(0, len(places), 4):
            rows = torch.tensor([place % 19 for place in places[start : start + 4]])
            fields = ("images", "input_ids", "attention_mask", "sample_key")
            yield Batch(**{field: getattr(everything, field)[rows] for field in fields})


def everything():
    cases = {name: train(words) for name, words in CASES.items()}
    cases |= {name: train(words, "clip") for name, words in CONTRASTS.items()}
    scores = tiny_task().evaluate(DealtPairs(), torch.device("cpu"))
    return cases | {"scores": scores}


def run_rank(rank, port, folder):
    torch.set_num_threads(1)
    import os

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    dist.start(dist.Ranks(rank, rank, 2, 2, torch.device("cpu")), timeout_seconds=60)
    found = everything()
    dist.deal_samples(UNEQUAL)
    found |= {f"unequal {name}": train(CASES[name]) for name in ("gathered", "local keys")}
    found |= {f"unequal {name}": train(words, "clip") for name, words in CONTRASTS.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.stop()


@pytest.fixture(scope="module")
def one_rank():
    return everything()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def close(a, b):
    return all(torch.allclose(a[key], b[key], atol=1e-5, rtol=1e-5) for key in a.keys() | b.keys())


@pytest.mark.parametrize("dealt", ["", "unequal "])
@pytest.mark.parametrize(
    ("case", "objectives"),
    [("gathered", {"itc", "mlm"}), *((name, {"contrastive"}) for name in CONTRASTS)],
)
def test_losses_and_gradients_do_not_depend_on_the_ranks(
    one_rank, two_ranks, case, objectives, dealt
):
    alone, together = one_rank[case]["steps"], two_ranks[0][dealt + case]["steps"]
    for (losses, grads), (losses_2, grads_2) in zip(alone, together, strict=True):
        assert set(losses) == objectives
        assert close(losses, losses_2)
        assert close(grads, grads_2)


def test_queues_end_equal_on_all_ranks_and_as_on_one(one_rank, two_ranks):
    for case in ("gathered", "all", "local keys"):
        states = [ranks[case]["state"] for ranks in (one_rank, *two_ranks)]
        assert all(torch.equal(states[1][key], states[2][key]) for key in states[1])
    assert close(one_rank["gathered"]["state"], two_ranks[0]["gathered"]["state"])
    assert two_ranks[0]["gathered"]["state"]["itc.at"] == 16
    for case in ("gathered", "local keys"):
        states = [ranks[f"unequal {case}"]["state"] for ranks in two_ranks]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    unequal = two_ranks[0]["unequal gathered"]["state"]
    assert close(unequal, one_rank["gathered"]["state"])


def test_with_local_keys_or_local_negatives_the_number_of_ranks_shows(one_rank, two_ranks):
    """The documented exceptions."""
    for case, loss in (("local keys", "itc"), ("all", "itm")):
        alone, together = (run[case]["steps"][0][0][loss] for run in (one_rank, two_ranks[0]))
        assert not torch.allclose(alone, together, atol=1e-5, rtol=1e-5)
    assert close(*({"itc": run["all"]["steps"][0][0]["itc"]} for run in (one_rank, two_ranks[0])))


def test_held_out_scores_do_not_depend_on_the_number_of_ranks(one_rank, two_ranks):
    assert one_rank["scores"] == two_ranks[0]["scores"] == two_ranks[1]["scores"]
    assert one_rank["scores"]["candidates"] == 19
