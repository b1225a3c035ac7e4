"""What every registered objective keeps to. C1 .. C10: the specification's numbers."""

import dataclasses

import pytest
import torch
from conftest import random_batch, tiny_task, tiny_words

from elip_ds import registry
from elip_ds.config import load_config
from elip_ds.objectives import Objective, Progress

CLASSES = {
    name: registry.resolve(registry.OBJECTIVES, name, "objectives") for name in registry.OBJECTIVES
}
NAMES = list(CLASSES)

# Every model with all that its tiny preset asks of it.
ON = {model: load_config(tiny_words(model=model)).objectives for model in registry.MODELS}
CASES = [(model, name) for model, names in ON.items() for name in names]

UNUSED = {
    # Alone, an objective leaves these parts of the model without a gradient.
    ("albef", "itc"): {"text.layers.1", "mlm_head"},
    ("albef", "itm"): {"mlm_head"},
    ("albef", "mlm"): {"vision_proj", "text_proj", "temperature"},
    ("blip", "itc"): {"cross", "cross_norm", "decoder_attn", "decoder_attn_norm", "lm_head"},
    ("blip", "itm"): {"decoder_attn", "decoder_attn_norm", "lm_head"},
    ("blip", "lm"): {"attn", "attn_norm", "vision_proj", "text_proj", "temperature"},
    ("clip", "contrastive"): set(),
    ("meter", "itm"): {"mlm_head"},
    # The words read the image stream's last layer nowhere.
    ("meter", "mlm"): {
        "cross_modal_image_layers.1",
        "cross_modal_text_pooler",
        "cross_modal_image_pooler",
    },
}

cases = pytest.mark.parametrize(("model", "name"), CASES)


def with_needs(model, name):
    """name and, before it, the objectives that give what it needs."""
    needs = CLASSES[name].needs(ON[model][name])
    givers = [other for other in ON[model] if CLASSES[other].gives & needs]
    return [*dict.fromkeys(x for giver in givers for x in with_needs(model, giver)), name]


def with_dependants(model, name):
    return [other for other in ON[model] if name in with_needs(model, other)]


def task_of(model, names, *words):
    """The tiny task with these objectives alone."""
    off = [f"objectives.{name}=null" for name in ON[model] if name not in names]
    return tiny_task(*words, *off, "run.on_finish=nothing", model=model)


def whole(parameter):
    return parameter.data


def progress_at(step):
    return Progress(step, samples_seen=8 * step, samples_per_epoch=32)


def train(task, steps=3, size=8, first=0):
    """Plain SGD steps; returns the losses and the gradients of each."""
    history = []
    for step in range(first, first + steps):
        task.zero_grad()
        result = task(random_batch(size, seed=step), progress_at(step))
        result.total.backward()
        trained = {n: p for n, p in task.named_parameters() if p.requires_grad}
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        history.append((result.values, {n: g.clone() for n, g in grads.items()}))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter -= 0.05 * grads[name]
        task.after_step(progress_at(step + 1), whole)
    return history


def run_objectives(task, batch):
    """The Loss of each objective, as the task collects them."""
    losses = []
    hooks = [
        objective.register_forward_hook(lambda module, inputs, loss: losses.append(loss))
        for objective in task.objectives.values()
    ]
    task(batch, progress_at(1))
    task.drop_carries()
    for hook in hooks:
        hook.remove()
    return losses


@cases
def test_an_objective_subclasses_the_base_and_takes_its_own_config(model, name):
    objective = task_of(model, with_needs(model, name)).objectives[name]
    assert isinstance(objective, Objective)
    assert isinstance(objective.config, CLASSES[name].Config)
    assert dataclasses.is_dataclass(CLASSES[name].Config)
    assert objective.config.weight >= 1.0


@cases
def test_its_losses_are_finite_fp32_scalars_and_its_logs_detached(model, name):
    task = task_of(model, with_needs(model, name))
    result = task(random_batch(8), progress_at(1))
    assert name in result.values
    for value in result.values.values():
        assert value.dtype == torch.float32 and value.shape == () and value.isfinite()
    assert not any(x.requires_grad for x in (*result.values.values(), *result.logs.values()))


@cases
def test_c1_weight_zero_equals_absent_bit_for_bit_over_three_steps(model, name):
    off = with_dependants(model, name)
    others = [other for other in ON[model] if other not in off]
    if not others:
        pytest.skip("no objective is left without it")
    zero = task_of(model, ON[model], *(f"objectives.{other}.weight=0" for other in off))
    absent = task_of(model, others)
    for with_zero, without in zip(train(zero), train(absent), strict=True):
        assert set(without[0]) == set(others)
        for loss in without[0]:
            assert torch.equal(with_zero[0][loss], without[0][loss]), loss
        for parameter in without[1]:
            assert torch.equal(with_zero[1][parameter], without[1][parameter]), parameter


@cases
def test_c5_teacher_and_state_get_no_gradient(model, name):
    task = task_of(model, with_needs(model, name))
    train(task, steps=2)
    if task.teacher is not None:
        assert not any(p.requires_grad or p.grad is not None for p in task.teacher.parameters())
    assert not any(buffer.requires_grad for buffer in task.buffers())
    carries = [loss.carry for loss in run_objectives(task, random_batch(8))]
    assert not any(x.requires_grad for carry in carries for x in carry.values())


@pytest.mark.parametrize("model", ON)
def test_c5_in_the_full_task_every_trainable_parameter_gets_a_gradient(model):
    task = task_of(model, ON[model])
    task(random_batch(8), progress_at(1)).total.backward()
    missing = [
        name
        for name, p in task.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any() or not p.grad.isfinite().all())
    ]
    assert missing == []


@cases
def test_c5_alone_it_leaves_out_just_the_parts_of_the_model_that_it_does_not_use(model, name):
    task = task_of(model, with_needs(model, name))
    task(random_batch(8), progress_at(1)).total.backward()
    without = {n for n, p in task.named_parameters() if p.requires_grad and p.grad is None}
    expected = {
        n
        for n, _ in task.model.named_parameters(prefix="model")
        if any(f".{part}." in n for part in UNUSED[model, name]) and "visual" not in n
    }
    assert without == expected


@cases
@pytest.mark.parametrize("degenerate", ["nothing", "two samples", "empty captions", "flat images"])
def test_c9_in_bf16_losses_and_gradients_stay_finite(model, name, degenerate):
    task = task_of(model, with_needs(model, name)).bfloat16()
    batch = random_batch(2 if degenerate == "two samples" else 8)
    if degenerate == "empty captions":
        batch.input_ids[:, 1:] = 0
        batch.attention_mask[:, 1:] = 0
    images = batch.images.bfloat16()
    if degenerate == "flat images":
        images[:] = 0.5
    result = task(dataclasses.replace(batch, images=images), progress_at(2))
    result.total.backward()
    task.after_step(progress_at(3), whole)
    assert all(
        value.isfinite() and value.dtype == torch.float32 for value in result.values.values()
    )
    tensors = [p.grad for p in task.parameters() if p.grad is not None] + list(task.buffers())
    assert all(tensor.isfinite().all() for tensor in tensors)


@cases
def test_c9_its_smallest_micro_batch_is_enough(model, name):
    size = max(CLASSES[other].min_micro_batch for other in with_needs(model, name))
    train(task_of(model, with_needs(model, name)), steps=2, size=size)


@cases
def test_c10_keeping_every_patch_equals_no_pruning_bit_for_bit(model, name):
    stages = (
        "[{layer: 1, lookahead: 1, keep_ratio: 1.0}, {layer: 2, lookahead: 1, keep_ratio: 1.0}]"
    )
    kept = train(task_of(model, with_needs(model, name), f"pruning.stages={stages}"))
    plain = train(task_of(model, with_needs(model, name), "pruning.stages=[]"))
    for a, b in zip(kept, plain, strict=True):
        assert all(torch.equal(a[0][loss], b[0][loss]) for loss in b[0])
        assert all(torch.equal(a[1][parameter], b[1][parameter]) for parameter in b[1])


@cases
def test_pruning_reaches_its_loss(model, name):
    pruned, plain = (
        task_of(model, with_needs(model, name)),
        task_of(model, with_needs(model, name), "pruning.stages=[]"),
    )
    a, b = (task(random_batch(8), progress_at(1)).values[name] for task in (pruned, plain))
    assert not torch.equal(a, b)


@cases
def test_c8_weights_and_state_are_all_that_the_next_step_needs(model, name):
    a = task_of(model, with_needs(model, name))
    train(a, steps=3)
    b = task_of(model, with_needs(model, name))
    b.load_state_dict(a.state_dict())
    b.load_state({key: value.clone() for key, value in a.state().items()})
    (losses, grads), (losses_b, grads_b) = (train(t, steps=2, first=3)[1] for t in (a, b))
    assert all(torch.equal(losses[key], losses_b[key]) for key in losses)
    assert all(torch.equal(grads[key], grads_b[key]) for key in grads)


@cases
def test_forward_changes_no_state(model, name):
    task = task_of(model, with_needs(model, name))
    before = {key: value.clone() for key, value in task.state().items()}
    task(random_batch(8), progress_at(1))
    assert all(torch.equal(before[key], value) for key, value in task.state().items())
