"""What the momentum twin keeps of an image: all, its own choice, or the student's."""

import pytest
import torch
from conftest import random_batch, tiny_task, tiny_words

from elip_ds.config import dump_config, load_config, read_config
from elip_ds.errors import UserError
from elip_ds.objectives import Pass, Progress, StepContext

PROGRESS = Progress(step=7, samples_seen=32, samples_per_epoch=64)


def context_of(task, prune):
    models = {"student": task.model, "teacher": task.teacher.model}
    return StepContext(random_batch(4), models, PROGRESS, prune_teacher=prune)


def moved(task):
    """The task, its twin far enough from the student to choose otherwise."""
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for parameter in task.teacher.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return task


def test_the_twin_keeps_and_merges_what_the_student_chose():
    task = moved(tiny_task())
    context = context_of(task, "student")
    chosen = context.run(Pass("image"))
    repeated = context.run(Pass("image", "teacher"))
    for name in ("origin", "owner", "share"):
        assert torch.equal(getattr(repeated.keep, name), getattr(chosen.keep, name))
    expected, _ = task.teacher.model.visual(random_batch(4).images, replay=chosen.keep)
    assert torch.equal(repeated.image_embeds, expected)
    own = context_of(task, "own").run(Pass("image", "teacher"))
    assert own.keep.lengths == repeated.keep.lengths
    assert not torch.equal(own.keep.origin, chosen.keep.origin)


@pytest.mark.parametrize("model", ["albef", "blip"])
def test_a_twin_that_is_still_the_student_repeats_its_own_choice(model):
    """Two ways to the same tokens: its own look-ahead, and the student's kept set."""
    own, student = (tiny_task(f"teacher.prune={p}", model=model) for p in ("own", "student"))
    losses = [task(random_batch(8), PROGRESS) for task in (own, student)]
    assert torch.equal(losses[0].total, losses[1].total)
    for task, loss in zip((own, student), losses, strict=True):
        loss.total.backward()
        task.zero_grad(set_to_none=False)
        task.after_step(PROGRESS, lambda parameter: parameter.data)
    for key, value in own.state().items():
        assert torch.equal(value, student.state()[key]), key


def test_the_twin_does_not_look_ahead(monkeypatch):
    task = tiny_task("teacher.prune=student")
    for block in task.teacher.model.visual.blocks:
        monkeypatch.setattr(block, "class_attention", lambda *_: pytest.fail("looked ahead"))
    task(random_batch(4), PROGRESS).total.backward()


@pytest.mark.parametrize(("prune", "texts"), [("off", 1), ("own", 2), ("student", 1)])
def test_only_a_twin_that_chooses_for_itself_reads_the_clean_text_for_it(prune, texts):
    task = tiny_task(f"teacher.prune={prune}", "objectives.itc=null", "objectives.itm=null")
    calls = []
    task.teacher.model.text.embeddings.register_forward_hook(lambda *_: calls.append(1))
    task(random_batch(4), PROGRESS)
    assert len(calls) == texts


def test_of_two_guides_the_twin_repeats_each():
    task = moved(tiny_task())
    context = context_of(task, "student")
    input_ids, attention_mask = context.texts["clean"]
    context.texts["turned"] = (input_ids.flip(0), attention_mask.flip(0))
    kept = []
    for guide in ("clean", "turned"):
        spec = Pass("image", guide=guide)
        kept.append(context.run(spec).keep)
        assert torch.equal(context.run(spec._replace(who="teacher")).keep.origin, kept[-1].origin)
    assert not torch.equal(kept[0].origin, kept[1].origin)
    plain = context.run(Pass("image", "teacher", guide=None))
    assert plain.keep.lengths == ()


def test_the_student_s_pass_keeps_its_gradient_and_the_twin_has_none():
    context = context_of(tiny_task(), "student")
    student = context.run(Pass("image"))
    with torch.no_grad():
        teacher = context.run(Pass("image", "teacher"))
    assert student.image_feat.requires_grad and not teacher.image_feat.requires_grad
    assert not any(choice.weights.requires_grad for choice in student.keep.choices)


def test_a_twin_that_comes_before_the_student_is_a_fault_of_the_objective():
    with (
        torch.no_grad(),
        pytest.raises(AssertionError, match="comes first: the teacher repeats its choice"),
    ):
        context_of(tiny_task(), "student").run(Pass("image", "teacher"))


def test_without_stages_there_is_nothing_to_repeat():
    off, student = (
        tiny_task(f"teacher.prune={p}", "pruning.stages=[]") for p in ("off", "student")
    )
    assert torch.equal(*(t(random_batch(4), PROGRESS).total for t in (off, student)))


# ---- at the door


@pytest.mark.parametrize("word", ["true", "false", "both"])
def test_an_unknown_way_is_refused(word):
    with pytest.raises(UserError, match=f"teacher.prune='{word}': choose off, own or student"):
        load_config(tiny_words(f"teacher.prune={word}"))


@pytest.mark.parametrize("value", ["off", "true", "no"])
def test_a_bare_word_that_yaml_takes_for_a_truth_is_told_to_be_quoted(tmp_path, value):
    text = dump_config(load_config(tiny_words())).replace("prune: 'off'", f"prune: {value}")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r'teacher.prune=(true|false): choose one of "off", "own"'):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("prune", ["off", "own", "student"])
def test_the_word_survives_the_run_s_own_file(tmp_path, prune):
    config = load_config(tiny_words(f"teacher.prune={prune}"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config(tmp_path / "config.yaml").teacher.prune == prune
