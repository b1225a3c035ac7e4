import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, tiny_task

from elip_ds.errors import UserError
from elip_ds.models import Fused
from elip_ds.objectives import Pass, Progress, Setup, StepContext
from elip_ds.objectives.mlm import MLM, MLMConfig, mask_words

SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
VOCABULARY = 64


def mask(input_ids, noise, probability=0.15):
    return mask_words(input_ids, noise, probability, vocab_size=VOCABULARY, special_ids=SPECIAL_IDS)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_mlm(**config):
    setup = Setup(
        pooled_width=8, embed_dim=8, vocab_size=VOCABULARY, special_ids=SPECIAL_IDS, seed=0
    )
    return MLM(MLMConfig(**config), setup)


def context_of(batch, student, teacher, epoch=1.0):
    """A context whose fused states are already word logits: student, teacher (B, L, V)."""

    def model(states):
        def fuse(text, image, pairing):
            return Fused(states.flatten(0, 1)[pairing.places], states[:0, 0])

        return SimpleNamespace(word_logits=lambda hidden: hidden, fuse=fuse)

    progress = Progress(step=1, samples_seen=round(epoch * 1000), samples_per_epoch=1000)
    models = {"student": model(student), "teacher": model(teacher)}
    context = StepContext(batch, models, progress)
    context.passes[Pass("text", text="masked")] = context.passes[Pass("seen")] = None
    context.passes[Pass("text", "teacher", "masked")] = None
    context.passes[Pass("image", "teacher", guide=None)] = None
    return context


def selected_of(context, probability):
    input_ids = context.texts["clean"][0]
    return mask(input_ids, context.noise("mlm", 3 * input_ids.shape[1]), probability)[1]


@pytest.fixture
def batch():
    return random_batch(8)


@pytest.fixture
def logits(batch):
    """Of student and teacher, (B, L, V)."""
    shape = (*batch.input_ids.shape, VOCABULARY)
    return seeded(*shape, seed=1), seeded(*shape, seed=2)


def test_fifteen_in_a_hundred_words_are_selected_and_most_of_them_masked():
    input_ids = torch.full((2000, 100), 60)
    noise = torch.rand(2000, 300, generator=torch.Generator().manual_seed(0))
    masked, selected = mask(input_ids, noise)
    count = selected.sum().item()
    assert count / input_ids.numel() == pytest.approx(0.15, abs=0.003)
    became_mask = (masked == SPECIAL_IDS["[MASK]"])[selected].sum().item() / count
    stayed = (masked == 60)[selected].sum().item() / count
    assert became_mask == pytest.approx(0.8 + 0.1 / VOCABULARY, abs=0.01)
    assert stayed == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.01)
    assert torch.equal(masked[~selected], input_ids[~selected])


def test_random_replacements_come_evenly_from_the_whole_vocabulary():
    input_ids = torch.full((4000, 100), 60)
    noise = torch.rand(4000, 300, generator=torch.Generator().manual_seed(0))
    noise[:, 1::3] = 0.85  # every selected word is replaced by a random one
    masked, selected = mask(input_ids, noise)
    found = torch.bincount(masked[selected], minlength=VOCABULARY)
    expected = selected.sum() / VOCABULARY
    assert len(found) == VOCABULARY
    assert ((found - expected) ** 2 / expected).sum() < 103.4  # 63 degrees of freedom, p = 0.001


def test_class_token_end_token_and_padding_are_never_selected(batch):
    noise = torch.zeros(8, 36)
    ends = batch.attention_mask.sum(dim=1) - 1
    batch.input_ids[torch.arange(8), ends] = SPECIAL_IDS["[SEP]"]
    masked, selected = mask(batch.input_ids, noise, probability=0.999)
    ordinary = batch.attention_mask.bool()
    ordinary[:, 0] = False
    ordinary[torch.arange(8), ends] = False
    assert ordinary.any()
    assert torch.equal(selected, ordinary)
    assert torch.equal(masked[~ordinary], batch.input_ids[~ordinary])
    assert (masked[ordinary] == SPECIAL_IDS["[MASK]"]).all()


def test_a_sample_is_masked_alike_in_any_batch_and_otherwise_in_another_step(batch):
    def masks(rows, step):
        part = random_batch(8)
        fields = {k: getattr(part, k)[rows] for k in ("images", "input_ids", "attention_mask")}
        part = type(part)(**fields, sample_key=part.sample_key[rows])
        return mask(part.input_ids, StepContext(part, {}, Progress(step, 0, 1)).noise("mlm", 36))

    whole = masks([0, 1, 2, 3, 4, 5, 6, 7], step=3)
    turned = masks([6, 2], step=3)
    for a, b in zip(whole, turned, strict=True):
        assert torch.equal(a[[6, 2]], b)
    assert not torch.equal(whole[1], masks([0, 1, 2, 3, 4, 5, 6, 7], step=4)[1])


@pytest.mark.parametrize(("alpha", "epoch"), [(0.4, 1.0), (0.4, 0.5), (0.0, 1.0), (1.0, 1.0)])
def test_the_loss_equals_a_loop_over_the_selected_words(batch, logits, alpha, epoch):
    mlm = build_mlm(probability=0.4, alpha=alpha)
    context = context_of(batch, *logits, epoch=epoch)
    loss = mlm(context).values["mlm"]
    share, terms = alpha * epoch, []
    for b, position in selected_of(context, 0.4).nonzero().tolist():
        log_p = logits[0][b, position].log_softmax(dim=0)
        q = logits[1][b, position].softmax(dim=0)
        hard = -log_p[batch.input_ids[b, position]].item()
        terms.append((1 - share) * hard + share * -(q * log_p).sum().item())
    assert len(terms) > 10
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert loss.dtype == torch.float32 and loss.shape == ()


def test_logits_of_words_that_were_not_selected_do_not_matter(batch, logits):
    mlm = build_mlm()
    context = context_of(batch, *logits)
    loss = mlm(context)
    elsewhere = ~selected_of(context, 0.15).unsqueeze(-1)
    changed = mlm(context_of(batch, *(x + 100 * seeded(*x.shape) * elsewhere for x in logits)))
    assert torch.equal(loss.values["mlm"], changed.values["mlm"])
    assert torch.equal(loss.logs["mlm_accuracy"], changed.logs["mlm_accuracy"])


def test_the_loss_is_linear_in_alpha(batch, logits):
    hard, soft, mixed = (
        build_mlm(alpha=alpha)(context_of(batch, *logits)).values["mlm"] for alpha in (0, 1, 0.4)
    )
    torch.testing.assert_close(mixed, 0.6 * hard + 0.4 * soft, atol=1e-6, rtol=1e-6)


def test_with_no_word_selected_the_loss_is_zero_and_its_gradient_finite(batch, logits):
    student = logits[0].requires_grad_()
    batch.input_ids[:, 1:] = SPECIAL_IDS["[PAD]"]
    loss = build_mlm()(context_of(batch, student, logits[1]))
    loss.values["mlm"].backward()
    assert loss.values["mlm"].item() == 0 and loss.logs["mlm_accuracy"].item() == 0
    assert student.grad.abs().max() == 0


def test_equal_logits_give_the_logarithm_of_the_vocabulary(batch):
    flat = torch.zeros(*batch.input_ids.shape, VOCABULARY)
    loss = build_mlm()(context_of(batch, flat, flat)).values["mlm"]
    assert loss.item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_accuracy_counts_selected_words_guessed_right(batch):
    right = F.one_hot(batch.input_ids, VOCABULARY).float()
    assert build_mlm()(context_of(batch, right, right)).logs["mlm_accuracy"].item() == 1


def test_without_alpha_the_teacher_is_not_asked(batch, logits):
    context = context_of(batch, *logits)
    del context.passes[Pass("text", "teacher", "masked")]
    assert build_mlm(alpha=0.0)(context).values["mlm"].isfinite()


@pytest.mark.parametrize("model", ["albef", "meter"])
@pytest.mark.parametrize("guide", ["clean", "masked"])
def test_the_image_is_pruned_by_the_text_that_the_guide_names(model, guide):
    task = tiny_task(f"objectives.mlm.guide={guide}", "objectives.mlm.alpha=0", model=model)
    mlm = task.objectives["mlm"]
    context = StepContext(random_batch(8), {"student": task.model}, Progress(1, 0, 1))
    mlm(context)
    text = task.model.encode_text(*context.texts[guide])
    expected = task.model.encode_image(context.views["main"], text)
    image = context.passes[Pass("image", guide=guide)]
    assert torch.equal(image.image_embeds, expected.image_embeds)
    assert torch.equal(image.keep.owner, expected.keep.owner)
    # A guide that leaks no word needs no pass over the clean text.
    texts = {spec.text for spec in context.passes if spec.tower == "text"}
    assert texts == {guide, "masked"}


def test_no_word_that_was_masked_moves_the_loss_through_a_masked_guide(batch):
    """With the clean guide it does: the patches that the clean caption chose tell of it."""

    def losses(guide):
        task = tiny_task(f"objectives.mlm.guide={guide}", model="meter")
        for other in (batch.input_ids, torch.where(hidden, 40, batch.input_ids)):
            context = StepContext(batch, {"student": task.model}, Progress(1, 0, 1))
            context.texts["clean"] = other, batch.attention_mask
            task.objectives["mlm"](context)
            yield context.fused(task.objectives["mlm"]).text

    noise = StepContext(batch, {}, Progress(1, 0, 1)).noise("mlm", 36)
    masked, _ = mask(batch.input_ids, noise)
    hidden = masked == SPECIAL_IDS["[MASK]"]
    assert hidden.any()
    assert torch.equal(*losses("masked"))
    assert not torch.equal(*losses("clean"))


def test_c7_over_micro_batches_the_loss_is_a_mean_of_means(batch, logits):
    """Equal to one batch when the parts are weighed by their words, and only then."""

    def part(rows):
        fields = ("images", "input_ids", "attention_mask", "sample_key")
        some = type(batch)(**{field: getattr(batch, field)[rows] for field in fields})
        context = context_of(some, *(x[rows] for x in logits))
        loss = build_mlm(probability=0.5)(context).values["mlm"]
        return loss, selected_of(context, 0.5).sum()

    whole, count = part(slice(None))
    (first, words), (second, other_words) = part(slice(0, 3)), part(slice(3, 8))
    torch.testing.assert_close(whole, (first * words + second * other_words) / count)
    assert (first + second) / 2 != pytest.approx(whole.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probability": 0.0}, r"objectives\.mlm\.probability=0\.0: between 0 and 1"),
        ({"alpha": -0.1}, r"objectives\.mlm\.alpha=-0\.1: 0\.\.1"),
        ({"guide": "image"}, r"objectives\.mlm\.guide='image': choose clean or masked"),
        ({"alpha_ramp": "1"}, r"objectives\.mlm\.alpha_ramp='1': write a number and a unit"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        MLMConfig(**wrong)
