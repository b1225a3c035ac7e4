"""What several objectives want fused goes through in one pass, and each gets its own rows.

B images, L text tokens, D width.
"""

import itertools
from collections import Counter

import pytest
import torch
from conftest import random_batch, tiny_task

from elip_ds.objectives import Objective, Pass, Progress, StepContext
from elip_ds.objectives.base import ObjectiveConfig, Pairs

PROGRESS = Progress(step=1, samples_seen=8, samples_per_epoch=64)
B = 5


class Asks(Objective):
    """Asks for own texts that every image is read by, and for others that read other images."""

    def __init__(self, words, own, others, *, guide="clean", wants=(), brings=()):
        super().__init__(ObjectiveConfig(), None)
        self.words, self.own, self.others, self.guide = words, own, others, guide
        self.wants, self.gives = frozenset(wants), frozenset(brings)
        self.calls = 0

    def needs(self, config):
        return self.wants

    def pairs(self, context):
        self.calls += 1
        assert self.wants - {"fusion"} <= context.given.keys()
        own, others = texts_of(self, context)
        return Pairs(Pass("image", guide=self.guide), tuple(own), tuple(others), self.words)


def texts_of(objective, context):
    """No two of them equal, in an objective or between several."""
    text = context.run(Pass("text"))
    turn = 1 + objective.own + 3 * objective.others + objective.words
    own = [text.take((torch.arange(B) * 2 + turn + i) % B) for i in range(objective.own)]
    others = [
        (text.take((torch.arange(B) + turn + i) % B), (torch.arange(B) * 3 + i) % B)
        for i in range(objective.others)
    ]
    return own, others


def apart(objective, context):
    """(words, class tokens) that it asks for, every text in a pass of its own."""
    own, others = texts_of(objective, context)
    image, model = context.run(Pass("image", guide=objective.guide)), context.model()
    states = [model.fuse(text, image).text for text in own]
    by_image = torch.stack(states, dim=1).flatten(0, 1)
    rest = [model.fuse(text, image.take(rows)).text[:, 0] for text, rows in others]
    if not objective.words:
        rest.insert(0, by_image[:, 0])
    return (
        by_image if objective.words else by_image[:0],
        torch.cat(rest) if rest else by_image[:0, 0],
    )


KINDS = {
    "words": (True, 1, 0),
    "class": (False, 1, 0),
    "negatives": (False, 2, 1),
    "two words": (True, 2, 0),
    "words and others": (True, 1, 2),
}


def make_context(task, objectives):
    models = {"student": task.model}
    if task.teacher is not None:
        models["teacher"] = task.teacher.model
    return StepContext(random_batch(B), models, PROGRESS, seed=3, objectives=objectives)


@pytest.fixture(params=["albef", "blip"])
def task(request):
    return tiny_task("model.text.depth=3", model=request.param)


@pytest.fixture
def projections(task):
    """Counts the projections of images to keys and values, by layer."""
    counts = Counter()
    for number, layer in enumerate(task.model.text.layers):
        if hasattr(layer, "cross"):
            layer.cross.key_value.register_forward_hook(
                lambda *_, number=number: counts.update([number])
            )
    return counts


def check(context, objective):
    words, pooled = apart(objective, context)
    fused = context.fused(objective)
    torch.testing.assert_close(fused.text, words, atol=2e-5, rtol=1e-5)
    if not objective.words or objective.others:
        torch.testing.assert_close(fused.pooled, pooled, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_one_alone_gets_what_a_pass_for_every_text_gives(task, kind):
    objective = Asks(*kind)
    check(make_context(task, (objective,)), objective)
    check(make_context(task, ()), objective)  # a context that was told of no objective


@pytest.mark.parametrize("kinds", list(itertools.permutations(KINDS, 2)), ids=" and ".join)
def test_two_get_what_each_would_get_alone(task, kinds):
    objectives = tuple(Asks(*KINDS[kind]) for kind in kinds)
    context = make_context(task, objectives)
    for objective in objectives:
        check(context, objective)
        alone = make_context(task, (objective,)).fused(objective)
        fused = context.fused(objective)
        torch.testing.assert_close(fused.text, alone.text, atol=2e-5, rtol=1e-5)
    assert [objective.calls for objective in objectives] == [2, 2]  # once in each context


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_whoever_asks_first_and_whatever_their_order_all_get_their_own(task, projections, order):
    objectives = [Asks(*KINDS[kind]) for kind in ("negatives", "words", "class")]
    for told in (objectives, objectives[::-1]):
        projections.clear()
        context = make_context(task, tuple(told))
        for number in order:
            context.fused(objectives[number])
        assert set(projections.values()) == {1} and len(projections) >= 2
        for objective in objectives:
            check(context, objective)


def test_all_gradients_are_those_of_each_alone(task):
    objectives = [Asks(*kind) for kind in KINDS.values()]

    def gradients(contexts):
        task.zero_grad(set_to_none=True)
        for objective, context in zip(objectives, contexts, strict=True):
            fused = context.fused(objective)
            loss = fused.text.sin().sum()
            if not objective.words or objective.others:
                loss = loss + fused.pooled.cos().sum()
            # Of a context that they share the passes are used again.
            loss.backward(retain_graph=True)
        return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}

    together = gradients([make_context(task, tuple(objectives))] * len(objectives))
    alone = gradients([make_context(task, (objective,)) for objective in objectives])
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        close = 1e-4 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(together[name], gradient, atol=close, rtol=0, msg=name)


def test_what_is_fused_with_other_images_goes_in_a_pass_of_its_own(task, projections):
    first, other, second = (
        Asks(True, 1, 0),
        Asks(False, 1, 0, guide=None),
        Asks(False, 2, 1),
    )
    context = make_context(task, (first, other, second))
    for objective in (first, second):
        context.fused(objective)
        assert set(projections.values()) == {1}
    context.fused(other)
    assert set(projections.values()) == {2}
    for objective in (first, other, second):
        check(context, objective)


def test_one_that_waits_for_what_another_gives_is_not_asked_before(task):
    first = Asks(True, 1, 0, brings=["late"])
    waits, free = Asks(False, 2, 1, wants=["late", "fusion"]), Asks(False, 1, 0, wants=[])
    context = make_context(task, (first, waits, free))
    context.fused(first)
    assert (first.calls, waits.calls, free.calls) == (1, 0, 1)
    context.given["late"] = torch.zeros(())
    for objective in (first, waits, free):
        check(context, objective)
    assert (first.calls, waits.calls, free.calls) == (1, 1, 1)


def test_one_that_is_there_already_takes_those_with_it_that_waited_for_it(task, projections):
    waits = Asks(False, 2, 1, wants=["late"])
    objectives = (Asks(True, 1, 0, brings=["late"]), waits, Asks(False, 1, 0))
    context = make_context(task, objectives)
    context.given["late"] = torch.zeros(())
    for objective in objectives:
        context.fused(objective)
    assert set(projections.values()) == {1}


def test_one_without_pairs_is_left_out():
    task = tiny_task("model.text.depth=3")
    asks = Asks(True, 1, 0)
    context = make_context(task, (task.objectives["itc"], asks))
    check(context, asks)


def test_asked_twice_it_is_one_object(task):
    objective = Asks(False, 2, 1)
    context = make_context(task, (objective,))
    assert context.fused(objective) is context.fused(objective)
    assert objective.calls == 1


# ---- the objectives that there are


def losses(task, told, order):
    context = make_context(task, tuple(task.objectives[name] for name in told))
    return {name: task.objectives[name](context).values[name] for name in order}


@pytest.mark.parametrize(
    ("model", "order", "passes"),
    [
        ("albef", ["itc", "itm", "mlm"], 1),
        ("albef", ["itc", "mlm", "itm"], 1),
        ("albef", ["mlm", "itc", "itm"], 2),  # the matching pairs are not drawn yet
        ("blip", ["itc", "itm", "lm"], 1),
        ("blip", ["itc", "lm", "itm"], 1),
        ("blip", ["lm", "itc", "itm"], 1),  # the decoder reads the same keys and values
    ],
)
def test_no_loss_depends_on_what_is_asked_with_it_nor_on_the_order(model, order, passes):
    task = tiny_task("model.text.depth=3", "objectives.itm.weight=1.0", model=model)
    layers = [layer for layer in task.model.text.layers if hasattr(layer, "cross")]
    seen = []
    for layer in layers:
        layer.cross.key_value.register_forward_hook(
            lambda _, inputs, output: seen.append(tuple(inputs[0].shape))
        )
    found = losses(task, order, order)
    # 6 tokens of each of the B images remain; what is projected has no row for each text.
    assert seen == len(layers) * passes * [(B, 6, 32)]
    for name in order:
        needed = ["itc", name] if name == "itm" else [name]
        alone = losses(task, [], needed)[name]
        torch.testing.assert_close(found[name], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["none", "cheap", "full"])
def test_a_step_and_its_backward_pass_project_an_image_once_a_layer(mode):
    task = tiny_task("model.text.depth=3", f"model.text.recompute={mode}")
    calls = []
    for layer in task.model.text.layers[1:]:
        layer.cross.key_value.register_forward_hook(lambda *_: calls.append(1))
    task(random_batch(B), PROGRESS).total.backward()
    assert len(calls) == 2
