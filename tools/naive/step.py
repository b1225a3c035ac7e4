"""The losses of a step, plainly: specification sections 2.2 to 2.5.

B batch, L text tokens, E joint space, Q queue, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds.config import Config, duration_in_samples
from elip_ds.data import Batch
from elip_ds.launching.parts import part
from elip_ds.objectives import Progress, StepContext
from elip_ds.objectives.itm import draw_matches, draw_negatives
from elip_ds.objectives.mlm import mask_words
from elip_ds.tasks import Pretrain
from naive.layers import Weights, linear
from naive.models import MODELS, Image, Text


class NaiveLoss(NamedTuple):
    """total, values: as the task's StepLoss, but the values keep their graph.
    kept_tokens: tokens after each stage, of the first pruned pass.
    keys: the teacher's features (B, E) of images and texts, for the queue; None without.
    """

    total: Tensor
    values: dict[str, Tensor]
    kept_tokens: tuple[int, ...]
    keys: tuple[Tensor, Tensor] | None


def naive_model(task: Pretrain, config: Config, who: str = "student") -> Any:
    """The model of a task's student, or of its teacher, on the task's own parameters."""
    w = Weights(dict(task.named_parameters()), "model." if who == "student" else "teacher.model.")
    return MODELS[config.model.name](w, config.model, config.pruning, task.training)


def naive_step(task: Pretrain, config: Config, batch: Batch, progress: Progress) -> NaiveLoss:
    """The losses of task(batch, progress), differentiable with respect to its parameters."""
    step = _Step(task, config, batch, progress)
    values: dict[str, Tensor] = {}
    total: Any = 0.0
    for name, part_config in config.objectives.items():
        value = getattr(step, name)(part_config)
        values[name] = value
        total = total + part_config.weight * value
    return NaiveLoss(total, values, step.kept_tokens, step.keys)


@torch.no_grad()
def after_step(task: Pretrain, config: Config, loss: NaiveLoss, at: int) -> int:
    """Moves the teacher, parameter by parameter, and writes the keys into the queue.

    at: keys written so far.  Returns how many there are now.
    """
    if task.teacher is not None:
        students = dict(task.model.named_parameters())
        for name, parameter in task.teacher.model.named_parameters():
            m = config.teacher.momentum
            parameter.data = parameter.data * m + students[name].data * (1 - m)
    if loss.keys is None:
        return at
    state = task.state()
    for name, keys in zip(("itc.image_queue", "itc.text_queue"), loss.keys, strict=True):
        queue = state[name]
        for i, key in enumerate(keys if len(queue) else ()):
            queue[(at + i) % len(queue)] = key
    return at + len(loss.keys[0])


class _Step:
    """One batch on its way. What several losses read (the clean text, the pruned image, and the
    teacher's) is computed once, as in the published code.
    """

    def __init__(self, task: Pretrain, config: Config, batch: Batch, progress: Progress) -> None:
        self.task, self.config, self.batch, self.progress = task, config, batch, progress
        self.student = naive_model(task, config)
        self.teacher: Any = task.teacher and naive_model(task, config, "teacher")
        self.heads = Weights(dict(task.named_parameters()), "objectives.")
        self.noise = StepContext(batch, {}, progress, seed=config.run.seed).noise
        self.kept_tokens: tuple[int, ...] = ()
        self.keys: tuple[Tensor, Tensor] | None = None
        self.similarity: tuple[Tensor, Tensor] | None = None
        self._text: Text | None = None
        self._image: Image | None = None
        self._taught: tuple[Text, Image] | None = None

    def text(self) -> Text:
        if self._text is None:
            self._text = self.student.encode_text(self.batch.input_ids, self.batch.attention_mask)
        return self._text

    def image(self) -> Image:
        """Pruned by its own caption."""
        if self._image is None:
            self._image = self.see(self.batch.images, self.text())
        return self._image

    def see(self, images: Tensor, guide: Text) -> Image:
        image = self.student.encode_image(images, guide)
        self.kept_tokens = self.kept_tokens or image.seen.lengths
        return image

    def taught(self) -> tuple[Text, Image]:
        """The teacher's text and image; published, its image is not pruned."""
        if self._taught is None:
            with torch.no_grad(), part("teacher"):
                text = self.teacher.encode_text(self.batch.input_ids, self.batch.attention_mask)
                guide = text if self.config.teacher.prune == "own" else None
                self._taught = text, self.teacher.encode_image(self.batch.images, guide)
        return self._taught

    def alpha(self, config: Any) -> float:
        """The teacher's share in the targets, grown linearly by samples seen."""
        length = duration_in_samples(config.alpha_ramp, self.progress.samples_per_epoch)
        done = min(1.0, self.progress.samples_seen / length) if length else 1.0
        return config.alpha * done

    def itc(self, config: Any) -> Tensor:
        """Soft targets over the teacher's features of this batch and the queue."""
        image, text = self.image().feat, self.text().feat
        assert image is not None and text is not None
        taught_text, taught_image = self.taught()
        taught_i, taught_t = taught_image.feat, taught_text.feat
        assert taught_i is not None and taught_t is not None
        self.keys = taught_i, taught_t
        state = self.task.state()
        texts = torch.cat([taught_t, state["itc.text_queue"].clone()])  # (B + Q, E)
        images = torch.cat([taught_i, state["itc.image_queue"].clone()])
        temperature = self.student.temperature()
        sim_i2t, sim_t2i = image @ texts.T / temperature, text @ images.T / temperature
        alpha = self.alpha(config)
        hard = torch.zeros_like(sim_i2t).fill_diagonal_(1)
        losses = []
        for similarity, mine, theirs in (
            (sim_i2t, taught_i, texts),
            (sim_t2i, taught_t, images),
        ):
            with torch.no_grad():
                soft = (mine @ theirs.T / temperature).softmax(dim=1)
                target = alpha * soft + (1 - alpha) * hard
            losses.append(-(similarity.log_softmax(dim=1) * target).sum(dim=1).mean())
        rows = len(image)
        self.similarity = sim_i2t[:, :rows].detach(), sim_t2i[:, :rows].detach()
        return (losses[0] + losses[1]) / 2

    def contrastive(self, config: Any) -> Tensor:
        """All other pairs of the batch as negatives."""
        image, text = self.image().feat, self.text().feat
        assert image is not None and text is not None
        logits = image @ text.T / self.student.temperature()
        self.similarity = logits.detach(), logits.T.detach()
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def itm(self, config: Any) -> Tensor:
        noise = self.noise("itm", 2)
        passes = self.hard_pairs if config.negatives == "hard" else self.random_pairs
        pooled, labels = passes(noise)
        logits = linear(self.heads, "itm.head", pooled)
        return F.cross_entropy(logits.float(), labels)

    def hard_pairs(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A pass of the pairs, then one of each text with a wrong image and each image with a
        wrong text.
        """
        text, image = self.text(), self.image().tokens
        assert self.similarity is not None
        image_for_text = draw_negatives(self.similarity[1], noise[:, 0]).tolist()
        text_for_image = draw_negatives(self.similarity[0], noise[:, 1]).tolist()
        _, positive = self.student.fuse(text, image)
        wrong_images = torch.stack([image[i] for i in image_for_text])
        wrong = [torch.stack([x[i] for i in text_for_image]) for x in _of(text)]
        texts = Text(*(torch.cat(pair) for pair in zip(_of(text), wrong, strict=True)))
        _, negative = self.student.fuse(texts, torch.cat([wrong_images, image]))
        ones = torch.ones(len(positive), dtype=torch.long, device=noise.device)
        zeros = torch.zeros(len(negative), dtype=torch.long, device=noise.device)
        return torch.cat([positive, negative]), torch.cat([ones, zeros])

    def random_pairs(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the images are another's; the text that an image stands beside prunes it."""
        rows, labels = draw_matches(noise)
        images = torch.stack([self.batch.images[i] for i in rows.tolist()])
        text = self.text()
        return self.student.fuse(text, self.see(images, text).tokens)[1], labels

    def mlm(self, config: Any) -> Tensor:
        """Words scored at every position; those that were not selected are ignored after."""
        ids, mask = self.batch.input_ids, self.batch.attention_mask
        setup = self.task.objectives["mlm"].setup
        masked, selected = mask_words(
            ids,
            self.noise("mlm", 3 * ids.shape[1]),
            config.probability,
            vocab_size=setup.vocab_size,
            special_ids=setup.special_ids,
        )
        text = self.student.encode_text(masked, mask)
        clean = config.guide == "clean"
        image = self.image() if clean else self.see(self.batch.images, text)
        logits = self.student.word_logits(self.student.fuse(text, image.tokens)[0]).float()
        labels = torch.where(selected, ids, -100)
        count = selected.sum().clamp(min=1)
        hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
        if config.alpha == 0:
            return hard
        with torch.no_grad(), part("teacher"):
            text = self.teacher.encode_text(masked, mask)
            image = self.taught()[1]
            if self.config.teacher.prune == "own" and not clean:
                image = self.teacher.encode_image(self.batch.images, text)
            states, _ = self.teacher.fuse(text, image.tokens)
            target = self.teacher.word_logits(states).float().softmax(dim=-1)
        soft = -(logits.log_softmax(dim=-1) * target).sum(dim=-1)
        alpha = self.alpha(config)
        return (1 - alpha) * hard + alpha * soft[selected].sum() / count

    def lm(self, config: Any) -> Tensor:
        """Every word guessed from those before it, with label smoothing."""
        ids = self.batch.input_ids
        states = self.student.decode(ids, self.batch.attention_mask, self.image().tokens)
        logits = self.student.word_logits(states)[:, :-1].contiguous().float()
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == self._pad("lm"), -100)
        return F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            label_smoothing=config.label_smoothing,
        )

    def _pad(self, objective: str) -> int:
        return self.task.objectives[objective].setup.special_ids["[PAD]"]


def _of(text: Text) -> tuple[Tensor, ...]:
    return text.ids, text.mask, text.states, text.guide
