"""The contract between a task and its objectives, and the passes that they share.

An objective is a module that owns its heads and its state. It asks the StepContext for forward
passes by name; two objectives that ask for the same pass share one execution, and what several want
fused with the same images is fused in one pass. It returns unweighted
losses and, as carry, what its state will take in once the optimizer has stepped. forward changes
nothing; after_step does, once per optimizer step, and not at all when that step was skipped.

Which passes run may depend on step and configuration, never on data or rank: the ranks' collectives
would no longer match.

B batch, L text tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from elip_ds import dist
from elip_ds.data import Batch
from elip_ds.models import Fused, ImageFeatures, Pairing, TextFeatures


@dataclass(frozen=True)
class ObjectiveConfig:
    weight: float = 1.0
    "Factor of this objective's losses in the total."


@dataclass(frozen=True)
class Setup:
    """What an objective may build its parts from.

    pooled_width: of Fused.pooled, 0 where the model fuses nothing.  embed_dim: of the joint space,
    0 where there is none.  vocab_size: words that exist.  special_ids: of [PAD], [CLS], [MASK], ...
    """

    pooled_width: int
    embed_dim: int
    vocab_size: int
    special_ids: dict[str, int]
    seed: int


@dataclass(frozen=True)
class Progress:
    """Where training is. step: optimizer steps done.  samples_seen: before this global batch.
    micro_step: number of the micro-batch among the micro_steps of this optimizer step.
    """

    step: int
    samples_seen: int
    samples_per_epoch: int
    micro_step: int = 0
    micro_steps: int = 1

    @property
    def epoch(self) -> float:
        return self.samples_seen / self.samples_per_epoch

    def at(self, micro_step: int, micro_steps: int) -> "Progress":
        """The same moment, in one of the step's micro-batches."""
        return replace(self, micro_step=micro_step, micro_steps=micro_steps)


class Loss(NamedTuple):
    """values: fp32 scalars by name, means over local rows, unweighted; averaged over ranks they are
    the loss of the global batch.  logs: scalars worth seeing.  carry: for after_step.
    (A named tuple, because ZeRO-3's hooks look for tensors in tuples, not in dataclasses.)
    """

    values: dict[str, Tensor]
    logs: dict[str, Tensor]
    carry: dict[str, Tensor]


class Features(NamedTuple):
    """All that a loss depends on.

    rows: of the samples, each (B, ...).  shared: whatever the sample, such as a learned scale.
    """

    rows: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()


class Pass(NamedTuple):
    """A forward pass.

    tower: text, image, seen (an image with what several passes read of it), fusion, or decoder.
    who: student or teacher.
    text: name of a text of the context.  view: name of one of its images.
    guide: the text that guides the pruning of the image; None: no pruning.
    """

    tower: str
    who: str = "student"
    text: str = "clean"
    view: str = "main"
    guide: str | None = "clean"


class Pairs(NamedTuple):
    """Texts to be fused by the student with the images of one pass.

    image: the pass of the images.  own: texts, (B, ...) each, whose row i reads image i.
    others: texts and, for each row, the image that it reads.
    words: all states of the texts are wanted; False: the pooled ones alone. Others want no words.
    """

    image: Pass
    own: tuple[TextFeatures, ...]
    others: tuple[tuple[TextFeatures, Tensor], ...] = ()
    words: bool = False


class StepContext:
    """One micro-batch on its way through the objectives.

    texts: name -> (input_ids, attention_mask), each (B, L); starts with "clean".
    views: name -> images (B, 3, H, W); starts with "main".
    given: what earlier objectives hand to later ones (see Objective.gives).
    """

    def __init__(
        self,
        batch: Batch,
        models: dict[str, Any],
        progress: Progress,
        *,
        seed: int = 0,
        prune_teacher: str = "off",
        keep_ratios: Sequence[float] | None = None,
        objectives: Sequence["Objective"] = (),
    ) -> None:
        """objectives: all that will run, in their order.  prune_teacher: see TeacherConfig.prune.
        keep_ratios: of the pruning stages at this moment; None: those of the configuration.
        """
        self.batch, self.progress = batch, progress
        self._objectives = objectives
        self._fused: dict[Objective, Fused] = {}
        self.texts = {"clean": (batch.input_ids, batch.attention_mask)}
        self.views = {"main": batch.images}
        self.given: dict[str, Tensor] = {}
        self.passes: dict[Pass, Any] = {}
        self._models, self._seed, self._prune_teacher = models, seed, prune_teacher
        self._keep_ratios = keep_ratios

    def run(self, spec: Pass) -> Any:
        """The result of a pass, computed on first use: TextFeatures, ImageFeatures, Fused, or for
        the decoder its states (B, L, D). The teacher's passes carry no gradient.
        """
        spec = self._plain(spec)
        if spec not in self.passes:
            with torch.set_grad_enabled(torch.is_grad_enabled() and spec.who == "student"):
                self.passes[spec] = getattr(self, f"_run_{spec.tower}")(spec)
        return self.passes[spec]

    def fused(self, objective: "Objective") -> Fused:
        """What the objective's pairs() asks for, rows in this order: image by image those of own,
        then others. All that objectives want fused with the same images goes through in one pass,
        of those whose needs are met by now.
        """
        if objective not in self._fused:
            mine = objective.pairs(self)
            asked = {objective: mine}
            for other in self._objectives:
                if other not in (objective, *self._fused) and self._is_ready(other):
                    pairs = other.pairs(self)
                    if pairs is not None and self._plain(pairs.image) == self._plain(mine.image):
                        asked[other] = pairs
            self._fused |= self._fuse(asked)
        return self._fused[objective]

    def model(self, who: str = "student") -> Any:
        return self._models[who]

    def noise(self, name: str, per_sample: int) -> Tensor:
        """(B, per_sample) uniform in [0, 1), fp32, keyed by seed, step, name, sample and position.

        The same sample draws the same numbers on any rank, in any micro-batch and world size, and
        one objective's draws never move another's.
        """
        base = _mix(_mix(self._seed) + self.progress.step)
        for letter in name.encode():
            base = _mix(base + letter)
        keys = _mix(self.batch.sample_key.unsqueeze(1) + base)
        positions = torch.arange(per_sample, device=keys.device)
        return (_mix(keys + positions) & 0xFFFFFF).float() / 0x1000000

    def _plain(self, spec: Pass) -> Pass:
        """Equal passes get equal names: what a tower does not read goes back to its default."""
        if spec.who == "teacher" and self._prune_teacher == "off":
            spec = spec._replace(guide=None)
        if spec.tower == "text":
            return Pass("text", spec.who, spec.text)
        return spec._replace(text="clean") if spec.tower == "image" else spec

    def _run_text(self, spec: Pass) -> TextFeatures:
        return self._models[spec.who].encode_text(*self.texts[spec.text])

    def _run_image(self, spec: Pass) -> ImageFeatures:
        model, images = self._models[spec.who], self.views[spec.view]
        if spec.guide is None:
            return model.encode_image(images)
        if spec.who == "teacher" and self._prune_teacher == "student":
            student = spec._replace(who="student")
            # Run from here it would be without gradient, and kept for those who want one.
            assert student in self.passes, f"{student} comes first: the teacher repeats its choice"
            return model.encode_image(images, replay=self.passes[student].keep)
        guide = self.run(Pass("text", spec.who, spec.guide))
        return model.encode_image(images, guide, keep_ratios=self._keep_ratios)

    def _run_fusion(self, spec: Pass) -> Fused:
        text = self.run(spec._replace(tower="text"))
        return self._models[spec.who].fuse(text, self.run(spec._replace(tower="image")))

    def _run_seen(self, spec: Pass) -> ImageFeatures:
        """Where decoder and fusion read an image by the same weights, these work on it once."""
        image, model = self.run(spec._replace(tower="image")), self._models[spec.who]
        return model.look(image) if "decoder" in model.gives else image

    def _run_decoder(self, spec: Pass) -> Tensor:
        image = self.run(spec._replace(tower="seen"))
        return self._models[spec.who].decode(*self.texts[spec.text], image)

    def _is_ready(self, objective: "Objective") -> bool:
        """Whether all is given that it needs of other objectives."""
        to_come = {name for other in self._objectives for name in other.gives} - self.given.keys()
        return not objective.needs(objective.config) & to_come

    def _fuse(self, asked: dict["Objective", Pairs]) -> dict["Objective", Fused]:
        """One pass for all; then to each its own."""
        every = list(asked.values())
        image = self.run(every[0].image._replace(tower="seen"))
        own = [text for pairs in every for text in pairs.own]
        others = [other for pairs in every for other in pairs.others]
        if len(every) == len(own) == 1 and not others:
            alone = Pairing((every[0].words,))
            return {objective: self.model().fuse(own[0], image, alone) for objective in asked}
        wants_words = tuple(pairs.words for pairs in every for _ in pairs.own)
        rows = torch.cat([rows for _, rows in others]) if others else None
        texts = TextFeatures.pile(own, [text for text, _ in others])
        fused = self.model().fuse(texts, image, Pairing(wants_words, rows))
        return _deal(asked, fused, len(self.batch))


def _deal(asked: dict["Objective", Pairs], fused: Fused, batch: int) -> dict["Objective", Fused]:
    """The rows of one pass (see towers.bert.read_images), given back to those who asked."""
    counts = [sum(len(p.own) for p in asked.values() if p.words is kind) for kind in (True, False)]
    states = fused.text.unflatten(0, (batch, counts[0]))
    pooled = fused.pooled[: batch * counts[1]].unflatten(0, (batch, counts[1]))
    at, rest = {True: 0, False: 0}, batch * counts[1]
    dealt = {}
    for objective, pairs in asked.items():
        columns = slice(at[pairs.words], at[pairs.words] + len(pairs.own))
        at[pairs.words] = columns.stop
        end = rest + batch * len(pairs.others)
        parts = [fused.pooled[rest:end]]
        rest = end
        text = states[:, :0].flatten(0, 1)
        if pairs.words:
            text = states[:, columns].flatten(0, 1)
        else:
            parts.insert(0, pooled[:, columns].flatten(0, 1))
        dealt[objective] = Fused(text, torch.cat(parts))
    return dealt


_GOLDEN, _MUL1, _MUL2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(x: Any) -> Any:
    """splitmix64's finaliser on int64 tensors or ints; products wrap modulo 2**64."""
    if isinstance(x, int):
        x = (x + _GOLDEN) % 2**64
        x = (x ^ (x >> 30)) * _MUL1 % 2**64
        x = (x ^ (x >> 27)) * _MUL2 % 2**64
        return _wrap(x ^ (x >> 31))
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MUL1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MUL2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _wrap(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


class Objective(nn.Module):
    """Base class. A subclass names its Config and what it asks for; the build checks all is met."""

    Config: ClassVar[Any] = ObjectiveConfig
    inputs: ClassVar[frozenset[str]] = frozenset({"images", "input_ids", "attention_mask"})
    "Batch fields that it reads."
    gives: ClassVar[frozenset[str]] = frozenset()
    "Names that it leaves in StepContext.given."
    min_micro_batch: ClassVar[int] = 1
    "Fewer samples than this per rank and pass leave it without a loss."

    def __init__(self, config: Any, setup: Setup) -> None:
        super().__init__()
        self.config, self.setup = config, setup

    @classmethod
    def needs(cls, config: Any) -> frozenset[str]:
        """'teacher', what a model gives (joint_space, fusion, words, decoder), or names that an
        earlier objective gives.
        """
        return frozenset()

    def forward(self, context: StepContext) -> Loss:
        raise TypeError(f"{type(self).__name__} is an objective without a forward")

    def pairs(self, context: StepContext) -> Any:
        """Pairs that its forward will read by context.fused(self); None: it asks for none."""
        return None

    @property
    def caches(self) -> bool:
        """Whether accumulated micro-batches are one batch to it (see grad_cache). Such an objective
        has features and loss, and its forward is the one after the other.
        """
        return False

    def features(self, context: StepContext) -> Features:
        """Of one micro-batch."""
        raise TypeError(f"{type(self).__name__} is an objective without features")

    def loss(self, features: Features) -> Loss:
        """Of any number of micro-batches put together; it uses no weight and no randomness."""
        raise TypeError(f"{type(self).__name__} is an objective without a loss of features")

    def weight(self, name: str, progress: Progress) -> float:
        """Factor of the loss called name at this moment."""
        return self.config.weight

    def total(self, loss: Loss, progress: Progress) -> Any:
        """The weighted sum of its losses, a scalar whose mean over ranks is the loss of all."""
        own = dist.sample_weight()
        return sum(self.weight(name, progress) * own * x for name, x in loss.values.items())

    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        """Take in the carries of a global batch, one per micro-batch, after the optimizer step."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the parameters: equal on all ranks, however many."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of state."""
