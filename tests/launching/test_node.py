"""A node's answer from the plan, the cache and failures; real steps are in test_real_steps.py."""

import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import tiny_words

from elip_ds.batching.cache import Cache, fingerprint
from elip_ds.config import load_config
from elip_ds.engine.out_of_memory import OOM_FOLDER
from elip_ds.errors import UserError
from elip_ds.launching import node as module
from elip_ds.launching.budget import Memory, beside_loader
from elip_ds.launching.endings import DeviceBusy, DoesNotFit
from elip_ds.launching.limits import Limit
from elip_ds.launching.loaders import loader_bytes
from elip_ds.launching.node import Node, answer_for_node, stretches

TREE = {"zero_optimization": {"stage": 2}}
OUTSIDE = 700 * 2**20
SCHEDULE = (
    "pruning.schedule=[{after: 8 samples, keep_ratios: [0.5, 0.125]}, "
    "{after: 16 samples, keep_ratios: [0.5, 0.25]}]"
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(*words, asked=, limit=) -> a Node whose ranks have so many bytes besides OUTSIDE."""

    def node(*words: str, asked=(64, "auto"), limit: int = 2**30) -> Node:
        memory = Memory("cpu", Limit("made up", OUTSIDE + limit), 0, OUTSIDE, 1.0)
        monkeypatch.setattr(module, "node_memory", lambda *_: memory)
        config = load_config(tiny_words(*words))
        return Node(config, TREE, asked, 2, 2, "cpu", tmp_path)

    return node


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def test_a_share_that_takes_little_is_not_measured(make, cache):
    answer = answer_for_node(make(), cache)
    assert (answer["largest"], answer["source"]) == (32, "plan")
    assert OUTSIDE < answer["planned_bytes"] < (OUTSIDE + 2**30) / 2
    assert (answer["warnings"], answer["tight"]) == ([], False)
    assert "all of a rank's share" in answer["told"]


def test_a_second_start_asks_no_tracer(make, cache, monkeypatch):
    first = answer_for_node(make(limit=4 * 2**30), cache)
    monkeypatch.setattr("elip_ds.launching.forecast.StepTracer", None)
    assert answer_for_node(make(limit=4 * 2**30), cache) == first


@pytest.mark.slow
def test_the_plan_alone_leaves_a_reserve_and_fits_into_the_rest(make, cache):
    words = ["batching.probe=never", "batching.multiple_of=1"]
    tight = make(*words, asked=("auto", "auto"), limit=512 * 2**20)
    answer = answer_for_node(tight, cache)
    whole = OUTSIDE + 512 * 2**20
    assert answer["source"] == "plan" and answer["largest"] >= 2
    assert 0.84 * whole < answer["planned_bytes"] <= 0.85 * whole


def test_a_number_is_obeyed_and_a_warning_has_both_figures(make, cache):
    answer = answer_for_node(make(asked=(64, 32), limit=2**20), cache)
    assert (answer["largest"], answer["source"]) == (32, "given")
    (warning,) = answer["warnings"]
    assert "micro-batch 32 takes" in warning and "there are 701.0 MiB (made up)" in warning
    assert answer_for_node(make(asked=(64, 32)), cache)["warnings"] == []


@pytest.mark.slow
def test_a_share_with_no_divisor_that_fits_says_which_batches_would_do(make, cache):
    asked = (2 * 127, "auto")
    told = r"=254 needs micro-batches of 127 or more on 2 ranks, of which (\d+) fit; nearest: (.*)"
    with pytest.raises(UserError, match=told) as caught:
        answer_for_node(make("batching.probe=never", asked=asked, limit=150 * 2**20), cache)
    assert caught.value.status == 2
    found = re.search(told, str(caught.value))
    assert found and 2 < int(found[1]) < 127
    for batch in map(int, found[2].split(", ")):
        near = make("batching.probe=never", asked=(batch, "auto"), limit=150 * 2**20)
        assert answer_for_node(near, cache)["largest"] <= int(found[1])


@pytest.mark.slow
def test_what_does_not_fit_says_what_would_help(make, cache):
    small = make("batching.probe=never", limit=2**20)
    with pytest.raises(DoesNotFit, match=r"micro-batch 2 needs at least .*image_size=24") as caught:
        answer_for_node(small, cache)
    assert caught.value.status == 10
    # With more samples more of it helps; only what does is named, what does most first.
    forecast = module._forecast(small, cache, False)
    told = str(module._does_not_fit(small, module.node_memory(), forecast, 32, 2**20))
    found = re.search(r"micro-batch 32 needs at least ([0-9.]+) MiB", told)
    assert found, told
    needed = float(found[1])
    helps = told.partition("what would help most, by the plan: ")[2]
    left = [float(size) for size in re.findall(r"\(([0-9.]+) MiB\)", helps)]
    assert len(left) > 1 and left == sorted(left) and max(left) <= needed
    assert "recompute=full" in helps and "image_size=24" in helps


def test_what_ran_out_of_memory_under_this_plan_is_not_tried_again(make, cache, tmp_path):
    node = make()
    answer = answer_for_node(node, cache)
    (tmp_path / OOM_FOLDER).mkdir()
    record = {"rank": 1, "micro_batch_size": 32, "time": 0.0, "fingerprints": ["of another plan"]}
    (tmp_path / OOM_FOLDER / "oom-1.json").write_text(json.dumps(record))
    assert answer_for_node(node, cache)["largest"] == 32
    record["fingerprints"] = [answer["failure_key"]]
    (tmp_path / OOM_FOLDER / "oom-1.json").write_text(json.dumps(record))
    assert answer_for_node(node, cache)["largest"] == 16
    record["micro_batch_size"] = 2
    (tmp_path / OOM_FOLDER / "oom-1.json").write_text(json.dumps(record))
    with pytest.raises(DoesNotFit, match="no smaller divisor"):
        answer_for_node(node, cache)


def test_shared_memory_bounds_the_micro_batch_and_a_warning_says_so(make, cache, monkeypatch):
    node = make("data.workers=2")
    per_size = {size: loader_bytes(node.config, size).shared for size in (16, 32)}
    status = SimpleNamespace(f_frsize=1, f_blocks=1, f_bavail=2 * per_size[16])
    monkeypatch.setattr(os, "statvfs", lambda folder: status)
    answer = answer_for_node(node, cache)
    assert answer["largest"] == 16
    assert re.search(r"at micro-batch 32 takes .*data.workers=2", answer["warnings"][0])
    status.f_bavail = 2 * per_size[32]
    answer = answer_for_node(node, cache)
    assert (answer["largest"], answer["warnings"]) == (32, [])
    status.f_bavail = 1000
    with pytest.raises(DoesNotFit, match=r"micro-batch 2: .* 0.0 MiB free.*lower data.workers=2"):
        answer_for_node(node, cache)
    assert answer_for_node(make("data.workers=0"), cache)["largest"] == 32


def test_a_share_of_the_node_is_the_loaders_too(make, cache):
    node = make("data.workers=3")
    memory = module.node_memory()
    taken = loader_bytes(node.config, 32).total
    assert (
        beside_loader(node.config, memory, 32) == memory
    )  # as the user gave it: of the rank alone
    shared = replace(memory, share=memory.limit)
    less = beside_loader(node.config, shared, 32)
    assert shared.limit.bytes - less.limit.bytes == taken > 3 * 10**7
    assert less.budget_bytes == shared.budget_bytes - taken and "for its loader" in less.limit.name
    # Where the user gives less than that leaves, it is the user's word that counts, and else not.
    for given, left in ((-taken - 1, -taken - 1), (-taken + 1, -taken)):
        tight = replace(shared, limit=Limit("given", memory.limit.bytes + given))
        there = beside_loader(node.config, tight, 32)
        assert there.limit.bytes == memory.limit.bytes + left


def test_beside_a_gpu_a_loader_larger_than_the_nodes_memory_is_worth_a_word(make, monkeypatch):
    node = replace(make("data.workers=3"), device="cuda")
    taken = loader_bytes(node.config, 32).total
    for there, warned in ((taken - 1, 1), (taken, 0)):
        monkeypatch.setattr(module, "host_budget", lambda ranks, there=there: Limit("a", there))
        assert len(module._host_warnings(node, 32)) == warned
    assert module._host_warnings(replace(node, device="cpu"), 32) == []


def test_a_given_micro_batch_is_obeyed_on_a_device_that_nobody_tells_of(make, cache, monkeypatch):
    def busy(*_):
        raise DeviceBusy("GPU 0: 2.00 GiB held by pid 7")

    nodes = [make(asked=(64, micro)) for micro in (8, "auto")]
    monkeypatch.setattr(module, "node_memory", busy)
    answer = answer_for_node(nodes[0], cache)
    assert (answer["largest"], answer["told"]) == (8, "as given, unchecked")
    assert answer["warnings"] == [
        "GPU 0: 2.00 GiB held by pid 7; micro-batch 8 is taken as given, unchecked"
    ]
    with pytest.raises(DeviceBusy):
        answer_for_node(nodes[1], cache)


@pytest.mark.slow
def test_every_stretch_of_a_schedule_has_an_answer_and_fewer_tokens_fit_more(make, cache):
    words = [SCHEDULE, "batching.probe=never", "batching.multiple_of=1"]
    node = make(*words, asked=("auto", "auto"), limit=512 * 2**20)
    assert stretches(node.config.pruning) == [(0.5, 0.25), (0.5, 0.125)]
    answer = answer_for_node(node, cache)
    (later,) = answer["later"]
    assert later["keep_ratios"] == [0.5, 0.125] and later["largest"] > answer["largest"]


def test_a_change_of_anything_that_matters_changes_the_fingerprint(make):
    node = make()
    memory, sizes = module.node_memory(), [2, 4]

    def key(other: Node) -> str:
        return fingerprint(module._facts(other, memory, sizes))

    same = replace(node, folder=node.folder / "x")
    assert key(same) == key(node) == key(make("optim.lr=0.5", "run.seed=7"))
    others = [
        make("model.vision.depth=4"),
        make("pruning.stages=[]"),
        make("objectives.itc.queue_size=64"),
        make("data.text_length=10"),
        make("optim.name=lamb"),
        make("engine.precision=bf16"),
        make("engine.compile=true"),
        replace(node, tree={"zero_optimization": {"stage": 1}}),
        replace(node, world_size=4),
    ]
    assert len({key(node), *map(key, others)}) == 1 + len(others)
    less = replace(memory, limit=Limit("made up", OUTSIDE))
    assert fingerprint(module._facts(node, less, sizes)) != key(node)


@pytest.mark.slow
def test_a_probe_on_one_node_of_several_may_take_what_their_ranks_will_hold(make, cache):
    node = replace(make("optim.name=adamw"), world_size=8)
    memory = replace(module.node_memory(), headroom_bytes=2**40)
    forecast = module._forecast(node, cache, False)
    more = module._more_than_in_the_run(node, memory, forecast, 4, cache)
    alone = replace(node, world_size=2)
    states = [
        module._forecast(each, cache, False).prediction(4).parts["optimizer"]
        for each in (alone, node)
    ]
    assert states[0] == pytest.approx(4 * states[1], rel=0.001)  # slices are padded
    assert more == pytest.approx(states[0] - states[1], rel=0.01)  # gathered features are few
    tight = replace(memory, headroom_bytes=1000)
    assert module._more_than_in_the_run(node, tight, forecast, 4, cache) == 1000
    assert module._more_than_in_the_run(alone, memory, forecast, 4, cache) == 0


def test_a_measured_step_has_the_optimizer_of_the_whole_batch(make, cache, monkeypatch):
    """A trial's own batch is below any bound that LAMB is asked above."""
    seen = []

    def find(node, *_):
        seen.append(node.config.optim)
        return {"source": "plan", "largest": 4, "warnings": []}

    monkeypatch.setattr(module, "_find", find)
    for total, name in ((64, "lamb"), (32, "adamw"), ("auto", "lamb")):
        node = make("optim.lamb_above=32", "optim.lamb_lr=0.004", asked=(total, "auto"))
        answer_for_node(node, cache)
        assert seen[-1].name == name, total
        assert seen[-1].lr == (0.004 if name == "lamb" else node.config.optim.lr)
