"""The step against its plain oracle in tools/naive: every model, in fp32, without dropout."""

import dataclasses

import naive
import pytest
import torch
from conftest import random_batch, tiny_task, tiny_words

from elip_ds.config import load_config
from elip_ds.objectives import Progress

PROGRESS = Progress(step=3, samples_seen=40, samples_per_epoch=64)
TOLERANCE = 1e-5
MODELS = ("albef", "blip", "meter", "clip")
VARIANTS = {
    "as published": (),
    "unpruned": ("pruning.stages=[]",),
    "zero token": (
        "pruning.empty_stage=zero_token",
        "pruning.stages=[{layer: 1, lookahead: 2, keep_ratio: 1.0}]",
    ),
    "one deep look-ahead": ("pruning.stages=[{layer: 0, lookahead: 3, keep_ratio: 0.6}]",),
}
ONE_STAGE = "layer: 1, lookahead: 1, keep_ratio:"
ONE_MODEL = [
    ("albef", ("teacher.prune=own",)),
    ("albef", ("teacher.prune=own", "objectives.mlm.guide=masked")),
    ("albef", ("objectives.mlm.alpha=0.0", "objectives.itc.queue_size=0")),
    ("albef", ("objectives.itc.weight=3.0", "objectives.itm.weight=0.5")),
    ("blip", ("objectives.lm.label_smoothing=0.0",)),
    ("meter", ("objectives.mlm.guide=clean",)),
    ("meter", ("model.text.variant=roberta",)),
    # Of 49 and 197 patches these ratios leave some of the image's 16.
    ("meter", ("pruning.keep_base=released", f"pruning.stages=[{{{ONE_STAGE} 0.2}}]")),
    ("clip", ("pruning.keep_base=released", f"pruning.stages=[{{{ONE_STAGE} 0.05}}]")),
    ("clip", ("model.guide=released",)),
    ("clip", ("model.guide=unprojected",)),
]


def batch_for(model, size=6):
    """What no model may look at is there: padding of different lengths."""
    batch = random_batch(size, seed=3)
    if model != "clip":
        return batch
    # A text of CLIP ends with its highest id.
    ids = batch.input_ids.clone()
    ids[torch.arange(size), batch.attention_mask.sum(dim=1) - 1] = 519
    return dataclasses.replace(batch, input_ids=ids)


def task_and_config(model, words=()):
    task = tiny_task(*words, model=model).train()
    # Fresh biases are 0 and fresh norms 1; an oracle that forgot one would not show.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if parameter.ndim == 1 and "temperature" not in name and "logit_scale" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return task, load_config(tiny_words(*words, model=model))


def gradients(task, total):
    task.zero_grad(set_to_none=True)
    total.backward()
    return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


def assert_same_step(model, words):
    task, config = task_and_config(model, words)
    batch = batch_for(model)
    step = task(batch, PROGRESS)
    found = gradients(task, step.total)
    task.drop_carries()
    oracle = naive.naive_step(task, config, batch, PROGRESS)
    expected = gradients(task, oracle.total)

    assert step.values.keys() == oracle.values.keys() == config.objectives.keys()
    assert all(value > 0 for value in oracle.values.values())  # there are words to guess, too
    for name, value in oracle.values.items():
        assert step.values[name].item() == pytest.approx(value.item(), abs=TOLERANCE), name
    assert step.total.item() == pytest.approx(oracle.total.item(), abs=TOLERANCE)
    assert step.kept_tokens == oracle.kept_tokens
    # A weight that a loss does not reach has no gradient or one of zeros.
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, parameter in task.named_parameters():
        none = torch.zeros_like(parameter)
        difference = (found.get(name, none) - expected.get(name, none)).abs().max()
        assert float(difference) <= TOLERANCE * largest, name
    assert len(expected) > 20
    assert not any(name.startswith("teacher.") for name in expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_are_those_of_the_plain_step(model, variant):
    assert_same_step(model, VARIANTS[variant])


@pytest.mark.parametrize(("model", "words"), ONE_MODEL)
def test_settings_of_one_model_agree_with_the_plain_step_too(model, words):
    assert_same_step(model, words)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_patches_are_kept_and_merged(model):
    task, config = task_and_config(model)
    batch = batch_for(model, size=8)
    plain = naive.naive_model(task, config)
    with torch.no_grad():
        text = task.model.encode_text(batch.input_ids, batch.attention_mask)
        image = task.model.encode_image(batch.images, text)
        seen = plain.encode_image(
            batch.images, plain.encode_text(batch.input_ids, batch.attention_mask)
        ).seen
    assert torch.equal(image.keep.origin, seen.origin)
    assert len(seen.lengths) == 2 and image.keep.lengths == seen.lengths
    assert len({tuple(row.tolist()) for row in seen.origin}) > 1  # images keep different patches
    made = image.image_embeds.shape[1]  # CLIP makes the class token alone
    assert made == (1 if model == "clip" else seen.tokens.shape[1])
    torch.testing.assert_close(image.image_embeds, seen.tokens[:, :made], rtol=1e-5, atol=1e-5)


def test_dropout_is_on_in_training_alone():
    task, config = task_and_config("albef", ("model.text.dropout=0.3",))
    batch = batch_for("albef")
    a, b = (naive.naive_step(task, config, batch, PROGRESS).total for _ in range(2))
    assert a != b
    task.eval()
    a, b = (naive.naive_step(task, config, batch, PROGRESS).total for _ in range(2))
    assert a == b


def test_a_step_after_the_plain_one_finds_the_twin_and_the_queue_where_its_own_would_be():
    after = Progress(step=4, samples_seen=48, samples_per_epoch=64)
    batch = batch_for("albef", size=8)
    fast, config = task_and_config("albef")
    plain, _ = task_and_config("albef")
    at = 0
    for _ in range(5):  # 40 rows go into a queue of 32
        for task in (fast, plain):
            with torch.no_grad():
                for parameter in task.model.parameters():
                    parameter.mul_(1.01)
        fast(batch, PROGRESS)
        fast.after_step(after, lambda parameter: parameter.data)
        loss = naive.naive_step(plain, config, batch, PROGRESS)
        at = naive.after_step(plain, config, loss, at)
    assert at == 40
    for a, b in zip(fast.teacher.parameters(), plain.teacher.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for name in ("itc.image_queue", "itc.text_queue"):
        torch.testing.assert_close(fast.state()[name], plain.state()[name], rtol=0, atol=1e-5)
