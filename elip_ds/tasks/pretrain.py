"""Pre-training: a model, its momentum twin where an objective asks for it, and the objectives.

B batch, E joint space.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from elip_ds import dist, registry
from elip_ds.config import Config, PruningConfig
from elip_ds.data import Batch, Vocabulary
from elip_ds.errors import UserError
from elip_ds.models import LocalTensor, MomentumTwin, TextFeatures
from elip_ds.objectives import GradCache, Objective, Progress, Setup, StepContext
from elip_ds.scores import matching_recall, retrieval_recall
from elip_ds.towers.pruning import keep_ratios_at


class Pairs(Protocol):
    """Held-out pairs, dealt to the ranks in turn and filled up at the end; len() is the pairs'."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


class StepLoss(NamedTuple):
    """total: weighted sum, to go backward.  values, logs: detached scalars by name.
    kept_tokens: sequence length after each pruning stage.
    """

    total: Tensor
    values: dict[str, Tensor]
    logs: dict[str, Tensor]
    kept_tokens: tuple[int, ...]


class Pretrain(nn.Module):
    """The module that the engine trains; everything trainable is inside it."""

    def __init__(
        self,
        model: nn.Module,
        objectives: Mapping[str, Objective],
        *,
        teacher_momentum: float,
        prune_teacher: str,
        pruning: PruningConfig,
        seed: int,
    ) -> None:
        super().__init__()
        # Any, because to a type checker every attribute of an nn.Module may be a tensor.
        self.model: Any = model
        self.objectives: Any = nn.ModuleDict(objectives)
        taught = any("teacher" in o.needs(o.config) for o in objectives.values())
        self.teacher = MomentumTwin(model) if taught else None
        lean: Any = model
        if not {"fusion", "words", "decoder"} & lean.gives:  # no one reads single tokens
            lean.only_joint_space()
        self._momentum, self._prune_teacher, self._seed = teacher_momentum, prune_teacher, seed
        self._pruning = pruning
        self._carries: dict[str, list[dict[str, Tensor]]] = {name: [] for name in objectives}
        self.cache = GradCache(objectives)

    @property
    def inputs(self) -> frozenset[str]:
        """Batch fields that some objective reads."""
        return frozenset().union(*(o.inputs for o in self.objectives.values()))

    def forward(
        self, batch: Batch, progress: Progress, first_pass: bool = False
    ) -> StepLoss | None:
        """first_pass: of two over the step's micro-batches; it only fills the cache, and gives
        None. Between the passes comes cache.settle(). A step without accumulation has only the one.
        """
        models: dict[str, Any] = {"student": self.model}
        if self.teacher is not None:
            models["teacher"] = self.teacher.model
        context = StepContext(
            batch,
            models,
            progress,
            seed=self._seed,
            prune_teacher=self._prune_teacher,
            # Of the step's start, and so the same in all its micro-batches and on all ranks.
            keep_ratios=keep_ratios_at(
                self._pruning, progress.samples_seen, progress.samples_per_epoch
            ),
            objectives=tuple(self.objectives.values()),
        )
        if first_pass:
            self.cache.keep(context)
            return None
        replayed = self.cache.replay(context) if self.cache.settled else {}
        total: Any = 0.0
        values: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            if name in replayed:
                loss, part = replayed[name]
            else:
                loss = objective(context)
                part = objective.total(loss, progress)
            total = total + part
            values |= {key: value.detach() for key, value in loss.values.items()}
            logs |= loss.logs
            if name not in replayed or progress.micro_step == 0:
                self._carries[name].append(loss.carry)
        logs |= _similarities(context, logs)
        kept = _kept_tokens(context)
        return StepLoss(total, values, logs, kept)

    def drop_carries(self) -> None:
        """Forget the step: the optimizer skipped it, or all is done."""
        self.cache.clear()
        for carries in self._carries.values():
            carries.clear()

    def after_step(self, progress: Progress, local: LocalTensor) -> None:
        """Once per optimizer step that was applied: the twin moves, then the objectives' state."""
        if self.teacher is not None:
            self.teacher.update(self.model, self._momentum, local)
        for name, objective in self.objectives.items():
            objective.after_step(self._carries[name], progress)
        self.drop_carries()

    def state(self) -> dict[str, Tensor]:
        """The objectives' state, as 'objective.name', for a checkpoint."""
        return {
            f"{name}.{key}": value
            for name, objective in self.objectives.items()
            for key, value in objective.state().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of state. Raises UserError, naming a difference, unless it is this task's."""
        here = {key: tuple(value.shape) for key, value in self.state().items()}
        saved = {key: tuple(value.shape) for key, value in state.items()}
        for key in sorted(here.keys() | saved):
            if here.get(key) != saved.get(key):
                raise UserError(
                    f"the saved state of the objectives does not fit: {key} is "
                    f"{saved.get(key, 'missing')}, here {here.get(key, 'unknown')}"
                )
        for name, objective in self.objectives.items():
            start = f"{name}."
            objective.load_state(
                {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            )

    def match(self, images: Tensor, text: TextFeatures, prune: bool | None = None) -> Tensor:
        """match() of this task's model and head."""
        head = self.objectives["itm"].head if "itm" in self.objectives else None
        return match(self.model, head, images, text, prune)

    @torch.no_grad()
    def evaluate(
        self,
        pairs: Pairs,
        device: torch.device,
        *,
        match_candidates: int = 64,
        prune: bool | None = None,
    ) -> dict[str, float]:
        """Held-out retrieval. Every rank calls it.

        By the joint space over all pairs, images encoded without text and so unpruned (ALBEF's
        zero-shot retrieval, without its re-ranking); a model without one scores all pairs among the
        first match_candidates by its matching head, prune as in match (METER); where these prune,
        then by the keep ratios with which the schedule ends, as the model will be used.
        Returns recall_at_1, _5, _10 (mean of both directions), tr_ and ir_at_k, and candidates.
        """
        was_training = self.training
        self.eval()
        dtype = next(p.dtype for p in self.model.parameters())
        if "joint_space" in self.model.gives:
            scores = self._joint_recall(pairs, device, dtype)
        else:
            scores = self._matching_recall(pairs, device, dtype, match_candidates, prune)
        self.train(was_training)
        return scores

    def _joint_recall(
        self, pairs: Pairs, device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        images, texts = [], []
        for batch in pairs:
            batch = batch.to(device, dtype)
            texts.append(self.model.encode_text(batch.input_ids, batch.attention_mask).text_feat)
            images.append(self.model.encode_image(batch.images).image_feat)
        count = len(pairs)
        image_feat, text_feat = (_in_order(torch.cat(x), count) for x in (images, texts))
        return retrieval_recall(image_feat, text_feat) | {"candidates": count}

    def _matching_recall(
        self,
        pairs: Pairs,
        device: torch.device,
        dtype: torch.dtype,
        candidates: int,
        prune: bool | None,
    ) -> dict[str, float]:
        count = min(candidates, len(pairs))
        own = -(-count // dist.world_size())  # as many on every rank: their collectives must match
        batches, rows, at_once = [], 0, 0
        for batch in pairs:
            batches.append(batch.to(device, dtype))
            rows, at_once = rows + len(batch), max(at_once, len(batch))
            if rows >= own:
                break
        images, input_ids, mask = (
            torch.cat([getattr(batch, name) for batch in batches])[:own]
            for name in ("images", "input_ids", "attention_mask")
        )
        text = self.model.encode_text(_in_order(input_ids, count), _in_order(mask, count))
        scores = []
        for image in images:
            for part in torch.arange(count, device=device).split(at_once):
                repeated = image.expand(len(part), -1, -1, -1)
                scores.append(self.match(repeated, text.take(part), prune))
        return matching_recall(_in_order(torch.cat(scores).view(own, count), count)) | {
            "candidates": count
        }


def match(
    model: Any,
    head: nn.Module | None,
    images: Tensor,
    text: TextFeatures,
    prune: bool | None = None,
) -> Tensor:
    """Does text i belong to image i: (B,), fp32, higher is likelier.

    images: (B, 3, H, W).  head: ITM's, whose logit it then is; None: the cosine of the joint space.
    prune: the images by these texts; None: as the released code of the model does at test.
    """
    prune = model.prunes_in_match if prune is None else prune
    image = model.encode_image(images, text if prune else None)
    if head is not None:
        return head(model.fuse(text, image).pooled)[:, 1].float()
    return (image.image_feat * text.text_feat).sum(dim=1)


def _kept_tokens(context: StepContext) -> tuple[int, ...]:
    """Sequence lengths after the pruning stages of the student's first image pass."""
    images = (p for spec, p in context.passes.items() if spec[:2] == ("image", "student"))
    return next((image.keep.lengths for image in images), ())


@torch.no_grad()
def _similarities(context: StepContext, logs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean cosines within the micro-batch, where an objective gives them: of pairs, of non-pairs,
    and of each image's most similar wrong text. When features collapse all three become one.
    """
    if "sim_i2t" not in context.given:
        return {}
    temperature = logs["temperature"] if "temperature" in logs else 1 / logs["logit_scale"]
    cosines = context.given["sim_i2t"].float() * temperature
    size = len(cosines)
    own = cosines.diagonal()
    wrong = cosines - 3 * torch.eye(size, device=cosines.device)  # out of a cosine's range
    return {
        "similarity_positive": own.mean(),
        "similarity_negative": (cosines.sum() - own.sum()) / max(1, size * (size - 1)),
        "similarity_hardest_negative": wrong.amax(dim=1).mean(),
    }


def _in_order(rows: Tensor, count: int) -> Tensor:
    """This rank's rows, every world_size-th -> all rows in order, fill-up rows dropped."""
    gathered = dist.gather_rows(rows).unflatten(0, (dist.world_size(), -1))
    return gathered.transpose(0, 1).flatten(0, 1)[:count]


def min_micro_batch(config: Config) -> int:
    """The fewest samples per rank and pass that give every objective of a config its loss."""
    return max(
        registry.resolve(registry.OBJECTIVES, name, "objectives").min_micro_batch
        for name in config.objectives
    )


def build_pretrain(config: Config, vocabulary: Vocabulary) -> Pretrain:
    """The task of a config, on the CPU, in fp32, the same on every rank.

    Raises UserError when an objective needs what no earlier one gives.
    """
    build_model = registry.resolve(registry.MODELS, config.model.name, "model.name")
    model = build_model(config.model, config.pruning)
    setup = Setup(
        pooled_width=model.pooled_width,
        embed_dim=model.embed_dim,
        vocab_size=len(vocabulary),
        special_ids=vocabulary.special_ids,
        seed=config.run.seed,
    )
    scored = config.eval.every or config.run.on_finish == "evaluate"
    if scored and "joint_space" not in model.gives and "itm" not in config.objectives:
        raise UserError(
            f"model.name={config.model.name} has no joint space, so held-out retrieval needs its "
            "matching head: switch objectives.itm on, or set eval.every=null run.on_finish=nothing"
        )
    objectives: dict[str, Objective] = {}
    given: set[str] = {"teacher", *model.gives}
    for name, part in config.objectives.items():
        build = registry.resolve(registry.OBJECTIVES, name, "objectives")
        missing = build.needs(part) - given
        if missing:
            raise UserError(
                f"objectives.{name} needs {', '.join(sorted(missing))}, which neither "
                f"model.name={config.model.name} nor an objective before it gives; order now: "
                f"{', '.join(config.objectives)}"
            )
        given |= build.gives
        objectives[name] = build(part, setup)
    return Pretrain(
        model,
        objectives,
        teacher_momentum=config.teacher.momentum,
        prune_teacher=config.teacher.prune,
        pruning=config.pruning,
        seed=config.run.seed,
    )
