"""Accumulated micro-batches as one batch: exact for objectives that cache, random numbers and all.

Plain autograd, gradients averaged over ranks here. Under DeepSpeed: end_to_end/test_accumulation.py
"""

import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from conftest import random_batch, tiny_task, tiny_vocabulary, tiny_words

from elip_ds import dist
from elip_ds.config import load_config
from elip_ds.data import Batch
from elip_ds.objectives import Progress
from elip_ds.tasks import build_pretrain

PROGRESS = Progress(step=3, samples_seen=64, samples_per_epoch=256)
ALONE = ("objectives.itc=null", "objectives.itm=null", "objectives.mlm=null")
WITH_MLM = ("objectives.itc=null", "objectives.itm=null", "objectives.mlm.alpha=0.0")
FIELDS = ("images", "input_ids", "attention_mask", "sample_key")


def split(batch, parts, part):
    """Rows of one of equal parts of a batch."""
    size = len(batch) // parts
    rows = slice(part * size, (part + 1) * size)
    return Batch(**{field: getattr(batch, field)[rows] for field in FIELDS})


def accumulate(task, batches):
    """What the engine does with a step's micro-batches -> reported losses, gradients."""
    task.zero_grad()
    steps = len(batches)
    if steps > 1 and task.cache.objectives:
        with torch.no_grad():
            for i, batch in enumerate(batches):
                task(batch, PROGRESS.at(i, steps), first_pass=True)
        task.cache.settle(PROGRESS)
    reported = []
    for i, batch in enumerate(batches):
        result = task(batch, PROGRESS.at(i, steps))
        (result.total / steps).backward()
        # Cosines are of what one micro-batch holds, whatever its size.
        logs = {k: v for k, v in result.logs.items() if not k.startswith("similarity_")}
        reported.append({**result.values, **logs})
    task.drop_carries()
    mean = {name: sum(r[name] for r in reported) / steps for name in reported[0]}
    return mean, gradients(task)


def gradients(task):
    return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


def micro_batches(batch, steps):
    return [split(batch, steps, i) for i in range(steps)]


def assert_close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_four_micro_batches_of_16_have_the_gradient_and_losses_of_one_batch_of_64(weight):
    task = tiny_task(f"objectives.contrastive.weight={weight}", model="clip")
    batch = random_batch(64)
    reported, grads = accumulate(task, micro_batches(batch, 4))
    whole, expected = accumulate(task, [batch])
    assert task(batch, PROGRESS).kept_tokens == (10, 6)  # it is pruned
    assert_close(reported, whole)
    assert_close(grads, expected)
    assert len(grads) == len(list(task.parameters()))
    assert all(grad.abs().max() > 1e-5 for grad in grads.values())


def test_the_gradient_of_the_scale_comes_once():
    task, batch = tiny_task(model="clip"), random_batch(16)
    grads = [
        accumulate(task, micro_batches(batch, steps))[1]["model.logit_scale.logit_scale"]
        for steps in (1, 2, 4, 8)
    ]
    assert grads[0].abs() > 1e-3
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=1e-6, rtol=0)


def test_without_the_cache_negatives_stay_inside_a_micro_batch():
    task = tiny_task("objectives.contrastive.cache=false", model="clip")
    batches = micro_batches(random_batch(16), 4)
    assert not task.cache.objectives
    reported, _ = accumulate(task, batches)
    alone = [task(batch, PROGRESS).values["contrastive"] for batch in batches]
    torch.testing.assert_close(reported["contrastive"], sum(alone) / 4)


def test_the_second_pass_draws_the_random_numbers_of_the_first():
    """Dropout in the text tower; the oracle is one graph over all micro-batches."""
    task = tiny_task(*ALONE, "objectives.contrastive={}", "model.text.dropout=0.3")
    batches = micro_batches(random_batch(16), 4)
    torch.manual_seed(5)
    features = []
    for batch in batches:
        text = task.model.encode_text(batch.input_ids, batch.attention_mask)
        features.append((task.model.encode_image(batch.images, text).image_feat, text.text_feat))
    image, text = (torch.cat(column) for column in zip(*features, strict=True))
    logits, own = image @ text.T / task.model.temperature(), torch.arange(16)
    ce = torch.nn.functional.cross_entropy
    loss = (ce(logits, own) + ce(logits.T, own)) / 2
    task.zero_grad()
    loss.backward()
    expected = gradients(task)

    torch.manual_seed(5)
    reported, grads = accumulate(task, batches)
    torch.testing.assert_close(reported["contrastive"], loss.detach(), atol=1e-6, rtol=0)
    assert_close(grads, expected)
    torch.manual_seed(6)
    _, others = accumulate(task, batches)
    assert not torch.allclose(others["model.text_proj.weight"], grads["model.text_proj.weight"])


@pytest.mark.slow
def test_other_objectives_accumulate_beside_it_as_they_do_alone():
    batches = micro_batches(random_batch(16), 4)
    both = tiny_task(*WITH_MLM, "objectives.contrastive={}")
    alone = {
        "mlm": tiny_task(*WITH_MLM),
        "contrastive": tiny_task(*ALONE, "objectives.contrastive={}"),
    }
    reported, grads = accumulate(both, batches)
    expected = {}
    for name, task in alone.items():
        task.load_state_dict(
            {k: v for k, v in both.state_dict().items() if not k.startswith("teacher.")},
            strict=False,
        )
        values, part = accumulate(task, batches)
        torch.testing.assert_close(reported[name], values[name])
        for key, grad in part.items():
            expected[key] = expected.get(key, 0) + grad
    assert_close(grads, expected)


def test_hard_negatives_are_drawn_by_the_similarities_of_the_micro_batch():
    """Cached or not: matching pairs stay inside a micro-batch, so its loss is the same."""
    batches, seen = micro_batches(random_batch(16), 2), []
    for cache in ("true", "false"):
        config = load_config(tiny_words(f"objectives.contrastive.cache={cache}"))
        objectives = {name: config.objectives[name] for name in ("contrastive", "itm")}
        torch.manual_seed(0)
        task = build_pretrain(replace(config, objectives=objectives), tiny_vocabulary())
        seen.append(accumulate(task, batches))
    (cached, grads), (plain, expected) = seen
    assert torch.equal(cached["itm"], plain["itm"])
    assert cached["contrastive"] > plain["contrastive"]  # twice as many candidates
    head = "objectives.itm.head.weight"
    torch.testing.assert_close(grads[head], expected[head])


def test_a_skipped_step_leaves_nothing_to_the_next():
    task, batch = tiny_task(model="clip"), random_batch(16)
    with torch.no_grad():
        for i, part in enumerate(micro_batches(random_batch(16, seed=9), 2)):
            task(part, PROGRESS.at(i, 2), first_pass=True)
    task.cache.settle(PROGRESS)
    task.drop_carries()
    reported, grads = accumulate(task, micro_batches(batch, 2))
    whole, expected = accumulate(task, [batch])
    assert_close(reported, whole)
    assert_close(grads, expected)


@pytest.mark.parametrize("steps", [2, 4])
def test_in_bf16_it_is_as_near_the_exact_gradient_as_one_batch_is(steps):
    task, batch = tiny_task(model="clip"), random_batch(16)
    _, exact = accumulate(task, [batch])
    task = task.bfloat16()
    batch = replace(batch, images=batch.images.bfloat16())
    whole, one = accumulate(task, [batch])
    reported, several = accumulate(task, micro_batches(batch, steps))
    torch.testing.assert_close(reported["contrastive"], whole["contrastive"], atol=1e-4, rtol=0)
    assert distance(several, exact) < 1.2 * distance(one, exact)


def distance(a, b):
    """Of two gradients, as if each were one vector."""
    return sum((a[name].float() - b[name].float()).square().sum() for name in b).sqrt()


# ---- two ranks


def mine(batch):
    return split(batch, dist.world_size(), dist.rank())


def run_cases():
    """Micro-batches of 16 from 64 samples on however many ranks -> mean over ranks."""
    task, batch = tiny_task(model="clip"), mine(random_batch(64))
    results = []
    for steps in (1, len(batch) // 16):
        reported, grads = accumulate(task, micro_batches(batch, steps))
        world = dist.world_size()
        results.append(
            [{k: dist.sum_over_ranks(v) / world for k, v in x.items()} for x in (reported, grads)]
        )
    return results


def run_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    dist.start(dist.Ranks(rank, rank, 2, 2, torch.device("cpu")), timeout_seconds=60)
    torch.save(run_cases(), folder / f"{rank}.pt")
    dist.stop()


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_neither_ranks_nor_micro_batches_change_losses_or_gradients(tmp_path):
    """One rank with one batch of 64, with four of 16; two ranks with 32 each, with two of 16."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (port, tmp_path), nprocs=2)
    (values, grads), *others = [*run_cases(), *torch.load(tmp_path / "0.pt")]
    assert len(others) == 3
    for values_2, grads_2 in others:
        assert_close(values_2, values)
        assert_close(grads_2, grads)
