"""From the nodes' answers to the plan of the run."""

import json

import pytest
import torch
from conftest import tiny_words

from elip_ds import dist
from elip_ds.batching import Plan
from elip_ds.config import changed_keys, dump_config, load_config
from elip_ds.errors import PassingError, UserError
from elip_ds.launching import settle
from elip_ds.launching.settle import check_ranks, decide_plan, settle_batch
from elip_ds.run import Run, open_run

SCHEDULE = "pruning.schedule=[{after: 8 samples, keep_ratios: [0.5, 0.125]}]"


def answers(*largest: int, later: tuple[int, ...] = ()) -> list[dict]:
    found = [{"largest": n, "later": []} for n in largest]
    for answer, n in zip(found, later, strict=False):
        answer["later"] = [{"keep_ratios": [0.5, 0.125], "largest": n}]
    return found


@pytest.fixture
def config():
    return load_config(tiny_words("batching.multiple_of=8"))


@pytest.mark.parametrize(
    ("asked", "largest", "expected"),
    [
        ((64, "auto"), (40, 20), Plan(16, 2, 2)),
        ((64, "auto"), (100, 100), Plan(32, 1, 2)),
        (("auto", "auto"), (40, 27), Plan(24, 1, 2)),
        ((64, 8), (8, 8), Plan(8, 4, 2)),
        (("auto", 7), (7, 7), Plan(7, 1, 2)),
    ],
)
def test_the_smallest_answer_makes_the_batch(config, asked, largest, expected):
    assert decide_plan(config, asked, answers(*largest)) == expected


def test_the_global_batch_stays_where_the_micro_batch_follows_the_schedule():
    config = load_config(tiny_words(SCHEDULE))
    plan = decide_plan(config, (64, "auto"), answers(8, 9, later=(40, 16)))
    assert plan == Plan(8, 4, 2)
    assert plan.at([0.5, 0.25]) == plan and plan.at([0.5, 0.125]) == Plan(16, 2, 2)


def test_unequal_nodes_may_take_unequal_shares():
    config = load_config(tiny_words("batching.multiple_of=8", "batching.hetero=per_node"))
    plan = decide_plan(config, (64, "auto"), answers(40, 16, 16))
    assert plan == Plan(32, 1, 3, unequal=(32, 16, 16)) and plan.global_batch_size == 64
    assert decide_plan(config, (64, "auto"), answers(40, 40)) == Plan(32, 1, 2)
    assert decide_plan(config, (64, 16), answers(16, 16)) == Plan(16, 2, 2)


def test_every_rank_has_its_nodes_answer(tmp_path, monkeypatch):
    """Slurm may deal ranks out in turn, and two nodes of one machine have one name."""
    monkeypatch.setattr(dist, "_notes", {})
    dealt = [("a", True), ("b", True), ("a", False), ("b", True), ("b", False), ("a", False)]
    for rank, (name, leads) in enumerate(dealt):
        dist.leave_note(f"node-{rank}", {"name": name, "leads": leads, "device": "cpu"})
        dist.leave_note(f"answer-{rank}", {"largest": rank})
    run = Run(dist.Ranks(0, 0, len(dealt), 1, torch.device("cpu")), tmp_path, 1)
    nodes = settle._nodes_of_ranks(run)
    assert [first for _, first in nodes] == [0, 1, 0, 3, 3, 0]
    found = {name: answer["largest"] for name, answer in settle._answers(nodes).items()}
    assert found == {"a": 0, "b": 1, "b-3": 3}


def test_a_node_whose_gpus_are_gone_is_named(tmp_path, monkeypatch):
    """Its ranks would wait for the others in a group of another kind."""
    monkeypatch.setattr(dist, "_notes", {})
    for rank, device in enumerate(["cuda", "cuda", "cpu"]):
        name = f"n{rank}"
        dist.leave_note(f"node-{rank}", {"name": name, "leads": True, "device": device})
    run = Run(dist.Ranks(0, 0, 3, 1, torch.device("cuda", 0)), tmp_path, 1)
    with pytest.raises(PassingError, match="torch sees no GPU on n2, and one on n0"):
        settle._nodes_of_ranks(run)


def test_a_batch_that_no_micro_batch_makes_names_the_nearest(config):
    with pytest.raises(UserError, match=r"nearest: 28, 30, 32"):
        decide_plan(config, (2 * 17, "auto"), answers(16, 16))


def test_one_rank_settles_alone_and_writes_what_it_rests_on(tmp_path, monkeypatch):
    words = tiny_words(f"run.dir={tmp_path}", "batching.global_batch_size=8")
    config = load_config(words)
    monkeypatch.setattr(dist, "_notes", {})
    found, plan = settle_batch(config, {"zero_optimization": {"stage": 2}}, open_run(config))
    assert plan == Plan(8, 1, 1)
    assert (found.batching.global_batch_size, found.batching.micro_batch_size) == (8, 8)
    written = json.loads((tmp_path / "demo" / "plan.json").read_text())
    assert written["micro_batch_size"] == 8 and written["peak_learning_rate"] == 1e-3
    (answer,) = written["nodes"].values()
    assert answer["source"] == "plan" and answer["planned_bytes"] > 0


@pytest.mark.parametrize(("memory", "returned"), [("cpu:64GiB", 0), ("cpu:1GiB", 1)])
def test_where_memory_is_short_what_is_freed_goes_back_at_once(
    tmp_path, monkeypatch, memory, returned
):
    """The probe's ranks do so, too: what was measured is what runs."""
    words = tiny_words(f"run.dir={tmp_path}", f"batching.device_memory={memory}")
    config = load_config([*words, "batching.global_batch_size=8", "batching.micro_batch_size=8"])
    monkeypatch.setattr(dist, "_notes", {})
    calls = []
    monkeypatch.setattr(settle, "return_at_once", lambda: calls.append(1))
    settle_batch(config, {"zero_optimization": {"stage": 2}}, open_run(config))
    assert len(calls) == returned


def test_a_nodes_refusal_is_every_ranks_with_its_status(tmp_path, monkeypatch):
    class NoMemory(UserError):
        status = 10

    def refuse(node):
        raise NoMemory("nothing fits")

    config = load_config(tiny_words(f"run.dir={tmp_path}"))
    monkeypatch.setattr(dist, "_notes", {})
    monkeypatch.setattr(settle, "answer_for_node", refuse)
    with pytest.raises(UserError, match="nothing fits") as caught:
        settle_batch(config, {"zero_optimization": {"stage": 2}}, open_run(config))
    assert caught.value.status == 10


@pytest.mark.parametrize("left", ["ckpt/step-00000001/meta.json", "memory/oom-0.json"])
def test_a_run_that_goes_on_or_ran_out_of_memory_keeps_its_global_batch(
    tmp_path, monkeypatch, left
):
    tree = {"zero_optimization": {"stage": 2}}
    monkeypatch.setattr(dist, "_notes", {})

    def begin(at_most: int) -> tuple:
        words = ("batching.global_batch_size=auto", f"batching.max_global={at_most}")
        config = load_config(
            tiny_words(f"run.dir={tmp_path}", *words, "run.allow_config_change=true")
        )
        return settle_batch(config, tree, open_run(config))

    config, plan = begin(16)
    assert plan.global_batch_size == 16
    path = tmp_path / "demo" / left
    path.parent.mkdir(parents=True)
    path.write_text('{"micro_batch_size": 16}')
    (tmp_path / "demo" / "config.yaml").write_text(dump_config(config))
    assert begin(32)[1].global_batch_size == 16
    again = load_config(tiny_words(f"run.dir={tmp_path}", "batching.global_batch_size=auto"))
    assert changed_keys(config, again) == ["batching.max_global: 16 -> None"]


@pytest.mark.parametrize(
    ("world_size", "micro", "says"),
    [
        (5, "auto", "12, which 5 ranks .*: 4, 6$"),
        (12, "auto", "12 ranks cannot share equally with 2 or more samples each; .*: 6$"),
        (2, 4, "6 for each of 2 ranks, which micro-batches of 4 .*micro_batch_size=auto"),
    ],
)
def test_ranks_that_cannot_keep_the_batch_of_a_run_are_refused(world_size, micro, says):
    with pytest.raises(UserError, match=says):
        check_ranks(12, micro, world_size, least=2)


@pytest.mark.parametrize(("world_size", "micro"), [(1, "auto"), (6, "auto"), (2, 3), (3, 4)])
def test_ranks_that_keep_the_batch_of_a_run_go_on(world_size, micro):
    check_ranks(12, micro, world_size, least=2)
