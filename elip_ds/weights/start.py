"""model.init_from: weights into a task that no engine has touched yet."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elip_ds.errors import UserError
from elip_ds.run import TOKENIZER
from elip_ds.towers.pos_embed import resize_grid, resize_length
from elip_ds.weights.sizes import settings
from elip_ds.weights.source import Source, family_of, open_source
from elip_ds.weights.table import Weight, general

log = logging.getLogger(__name__)

POSITIONS = ("model.visual.pos_embed.weight", "teacher.visual.pos_embed.weight")
TEXT_POSITIONS = ("model.text.position.weight", "teacher.text.position.weight")
WORDS = "model.text.embeddings.word.weight"
WORD_COUNT = "model.text.vocab_size"
BLIP_ADDED = 2
"Words that BLIP appends to BERT's: [DEC] and [ENC]."


def saved_name(name: str) -> str:
    """A task's parameter name -> its name in a file of weights."""
    return name.replace("teacher.model.", "teacher.", 1)


def check_paths(paths: Sequence[Path]) -> None:
    """Raises UserError for one that is not there."""
    for path in paths:
        if not path.exists():
            raise UserError(
                f"model.init_from: {path} cannot be read: No such file or directory; make it "
                "first, name another, or set model.init_from=[] to start from nothing"
            )


@torch.no_grad()
def start_from(task: Any, config: Any, paths: list[Path], tokenizer: Path | None = None) -> None:
    """Copy weights into a task, file by file in this order; of two for one tensor the last counts.

    task: a Pretrain on the CPU, not sharded.  config: of its model.
    paths: what open_source takes; those that hold a part of a model fill that part.
    tokenizer: the tokenizer.json of this run, to which a checkpoint's word vectors must belong.
    Positions are scaled to the configured grid. Without a twin in the file the task's twin becomes
    a copy of the student; queues are taken over when their sizes agree.
    Raises UserError when a file does not fit, or lacks a weight that its kind has.
    """
    if not paths:
        log.info("model.init_from=[]: all weights start from random numbers")
    targets = {saved_name(name): p for name, p in task.named_parameters()}
    check_paths(paths)
    for path in paths:
        source = open_source(path)
        source.report.check()
        _warn_of_activation(source, config)
        weights = _part_for(source, config, targets)
        _check_fit(source, weights, targets, config)
        if WORDS in weights:
            _check_words(source, tokenizer)
        notes = _fill(source, weights, targets, config) + _restore_queues(task, source)
        log.info("model.init_from: %s: %s", path, "; ".join(notes))


def _check_words(source: Source, tokenizer: Path | None) -> None:
    """A checkpoint keeps the vocabulary that its word vectors are of; published files do not."""
    theirs = source.path / TOKENIZER
    if tokenizer is None or not theirs.is_file():
        return
    if theirs.read_bytes() != tokenizer.read_bytes():
        raise UserError(
            f"model.init_from: the words of {source.path} are not those of this run; set "
            f"data.vocabulary={theirs}"
        )


def _part_for(source: Source, config: Any, targets: Mapping[str, Any]) -> dict[str, Weight]:
    """What of a source may go into this model, under the model's names."""
    if source.model == config.name or not (source.model or source.family):
        return dict(source.weights)
    if source.family == "bert":
        return _text_for(source.weights, targets)
    part = {n: w for n, w in source.weights.items() if n.startswith("model.visual.")}
    if source.model == "clip" and config.name == "meter":
        part = _without_last_block(part, config.vision.depth)
    if source.model == "albef" and config.name == "meter":
        return part | _text_half(source)
    if source.model == "clip" or source.family == "deit":
        return part
    raise UserError(
        f"model.init_from: {source.path} holds another model, {source.model}; here "
        f"model.name={config.name}"
    )


def _warn_of_activation(source: Source, config: Any) -> None:
    """A table of names cannot tell it; OpenAI's archives, METER and files of ours can."""
    theirs = (source.tree or {}).get("vision", {}).get("activation")
    ours = config.vision.activation
    told = theirs == "quick_gelu" or source.report.direction == "from elip_ds"
    if theirs is not None and told and theirs != ours:
        log.warning(
            "model.init_from: %s was trained with %s, here model.vision.activation=%s",
            source.path,
            theirs,
            ours,
        )


def _without_last_block(part: dict[str, Weight], depth: int) -> dict[str, Weight]:
    """METER is one block shorter than CLIP, whose last serves the class token alone."""
    start = f"model.visual.blocks.{depth}."
    return {name: weight for name, weight in part.items() if not name.startswith(start)}


def _text_half(source: Source) -> dict[str, Weight]:
    """METER: of ALBEF's text tower what reads the text alone; the rest attends to the image."""
    fused = {name.split(".cross")[0] for name in source.weights if ".cross." in name}
    starts = ("model.text.embeddings.", "model.text.layers.")
    return {
        name: weight
        for name, weight in source.weights.items()
        if name.startswith(starts) and ".".join(name.split(".")[:4]) not in fused
    }


def _text_for(weights: Mapping[str, Weight], targets: Mapping[str, Any]) -> dict[str, Weight]:
    """A BERT for any text tower: BLIP's decoder starts as its encoder does; METER's word head, and
    segments where the tower has none, are left out.
    """
    placed = {}
    for name, weight in weights.items():
        decoder = name.replace(".attn.", ".decoder_attn.").replace("attn_norm", "decoder_attn_norm")
        for each in {name, decoder, name.replace(".mlm_head.", ".lm_head.")}:
            if each in targets or each == name:
                placed[each] = weight
    dropped = ("model.text.mlm_head.", "model.text.embeddings.token_type.")
    return {n: w for n, w in placed.items() if n in targets or not n.startswith(dropped)}


def _check_fit(
    source: Source, weights: Mapping[str, Weight], targets: Mapping[str, Any], config: Any
) -> None:
    """Raises UserError that names the settings, or else the weights, in which the two differ."""
    theirs = settings({name: weight.shape for name, weight in weights.items()})
    ours = settings({name: tuple(p.shape) for name, p in targets.items()})
    if _grows(source, config) and WORD_COUNT in theirs:
        theirs[WORD_COUNT] += BLIP_ADDED
    if config.name == "clip":  # its text positions are scaled
        theirs.pop("model.text.max_positions", None)
    for key, value in _unseen(source, config.name).items():
        section, name = key.split(".")[1:]
        theirs[key], ours[key] = value, getattr(getattr(config, section), name)
    wrong = [
        f"{key} is {theirs[key]} there, {ours[key]} here"
        for key in sorted(theirs.keys() & ours)
        if theirs[key] != ours[key]
    ]
    surplus = [name for name in weights if name.startswith("model.") and name not in targets]
    if surplus and not wrong:
        wrong = [f"{surplus[0]} has no place here ({len(surplus)} such)"]
    if wrong:
        raise UserError(f"model.init_from: {source.path} holds another model: {', '.join(wrong)}")
    missing = _lacking(source, weights, targets, config)
    if missing:
        raise UserError(
            f"model.init_from: {source.path} lacks {missing[0]} ({len(missing)} in all)"
        )


def _unseen(source: Source, model: str) -> dict[str, Any]:
    """Settings that shapes do not tell but a file of ours, or a published one, says."""
    tree = source.tree or {}
    if source.model != model:
        return {}
    own = source.report.direction == "from elip_ds"
    return {
        f"model.{section}.{name}": part[name]
        for section, part in tree.items()
        if isinstance(part, dict)
        for name in ("heads", "variant")
        if name in part and (own or name == "variant")
    }


def _grows(source: Source, config: Any) -> bool:
    """BLIP starts from BERT, which has fewer words."""
    return source.family == "bert" and config.name == "blip"


def _lacking(
    source: Source, weights: Mapping[str, Weight], targets: Mapping[str, Any], config: Any
) -> list[str]:
    """Weights of the model that such a file should have; groups that it may lack are none."""
    kinds = {general(name)[0] for name in weights}
    whole = source.model == config.name or not (source.model or source.family)
    expected = {
        name
        for name in targets
        if name.startswith("model.") and (whole or general(name)[0] in kinds)
    }
    missing = expected - weights.keys()
    for start in family_of(source.family).optional if source.family else ():
        of_group = {name for name in expected if general(name)[0].startswith(start)}
        if of_group <= missing:
            missing -= of_group
    return sorted(missing)


def _fill(
    source: Source, weights: Mapping[str, Weight], targets: Mapping[str, Any], config: Any
) -> list[str]:
    """Copies, and says what happened."""
    filled, notes = set(), []
    for name, weight in weights.items():
        twin = f"teacher.{name.removeprefix('model.')}"
        follows = name.startswith("model.") and twin in targets and twin not in weights
        places = [each for each in (name, *([twin] if follows else [])) if each in targets]
        if not places:
            continue
        value = _resized(source, name, weight.read(), targets[places[0]], config)
        if value.shape != weight.shape:
            notes.append(f"resized {name} {tuple(weight.shape)} -> {tuple(value.shape)}")
        for each in places:
            target = targets[each]
            if _grows(source, config) and len(value) + BLIP_ADDED == len(target):
                target = target[: len(value)]
            if value.shape != target.shape:
                raise UserError(
                    f"model.init_from: {source.path}: {name} is {tuple(value.shape)} there, "
                    f"{tuple(target.shape)} here"
                )
            target.copy_(value)
            filled.add(each)
    fresh = {_module(n) for n in targets.keys() - filled if not n.startswith("teacher.")}
    unused = [n for n in weights if n not in targets and not n.startswith("itc.")]
    notes.insert(0, f"{len(filled)} tensors")
    notes += [f"not in it, as before: {', '.join(sorted(fresh))}"] if fresh else []
    notes += [f"not used: {len(unused)}, such as {unused[0]}"] if unused else []
    return notes


def _module(name: str) -> str:
    """model.text.layers.3.attn.qkv.weight -> model.text.layers"""
    return ".".join(name.split(".")[:3] if name.startswith("model.") else name.split(".")[:2])


def _resized(source: Source, name: str, value: Tensor, target: Tensor, config: Any) -> Tensor:
    if name in POSITIONS:
        antialias = config.name == "clip"
        return resize_grid(value, _grid(source, value), config.vision.grid, antialias=antialias)
    if name in TEXT_POSITIONS:
        return resize_length(value, target.shape[1])
    return value


def _grid(source: Source, table: Tensor) -> tuple[int, int]:
    """Rows and columns of a source's patches; square unless its configuration says otherwise."""
    vision = (source.tree or {}).get("vision", {})
    patches = table.shape[1] - 1
    if vision.get("image_width"):
        return tuple(vision[k] // vision["patch_size"] for k in ("image_size", "image_width"))
    side = round(patches**0.5)
    return side, side


def _restore_queues(task: Any, source: Source) -> list[str]:
    here = task.state()
    there = {name: weight for name, weight in source.weights.items() if name.startswith("itc.")}
    if not there:
        return []
    if {n: w.shape for n, w in there.items()} != {n: tuple(v.shape) for n, v in here.items()}:
        return ["queues not used: other sizes"]
    task.load_state({name: weight.read() for name, weight in there.items()})
    return ["queues restored"]
