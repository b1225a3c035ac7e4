"""From the shapes of weights to the configuration of the model that has them."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch

from elip_ds import registry
from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.models import ModelConfig
from elip_ds.towers import ViT, ViTConfig
from elip_ds.towers.bert import MLMHead
from elip_ds.towers.roberta import RoBERTa, RoBERTaConfig
from elip_ds.weights.table import general

Shapes = Mapping[str, tuple[int, ...]]
Tree = dict[str, Any]


# What settings() cannot do without, of each tower that a file has.
CORE = (
    "model.visual.cls_token.weight",
    "model.visual.pos_embed.weight",
    "model.visual.patch_embed.weight",
    "model.visual.blocks.0.mlp.fc1.weight",
    "model.text.embeddings.word.weight",
    "model.text.embeddings.position.weight",
    "model.text.position.weight",
    "model.text.layers.0.mlp.fc1.weight",
    "model.text.blocks.0.mlp.fc1.weight",
    "model.cross_modal_text_transform.bias",
    "model.cross_modal_text_layers.0.mlp.fc1.weight",
)


def settings(shapes: Shapes) -> dict[str, Any]:
    """Config key -> value, as far as shapes under our names tell it, heads and image size not."""
    found: dict[str, Any] = {}
    for tower, first, blocks in (
        ("vision", "model.visual.cls_token.weight", "model.visual.blocks."),
        ("text", "model.text.embeddings.word.weight", "model.text.layers."),
        ("text", "model.text.embeddings.word.weight", "model.text.blocks."),
        ("fusion", "model.cross_modal_text_transform.bias", "model.cross_modal_text_layers."),
    ):
        fc1 = f"{blocks}0.mlp.fc1.weight"
        if first in shapes and fc1 in shapes:
            key, width = f"model.{tower}", shapes[first][-1]
            numbers = [int(general(name)[1]) for name in shapes if name.startswith(blocks)]
            found |= {f"{key}.width": width, f"{key}.depth": max(numbers) + 1}
            found[f"{key}.mlp_ratio"] = shapes[fc1][0] / width
    if "model.visual.patch_embed.weight" in shapes:
        found["model.vision.patch_size"] = shapes["model.visual.patch_embed.weight"][-1]
        clip = any(name.startswith("model.visual.norm_pre.") for name in shapes)
        found["model.vision.layout"] = "clip" if clip else "vit"
    if "model.text.embeddings.word.weight" in shapes:
        found["model.text.vocab_size"] = shapes["model.text.embeddings.word.weight"][0]
    for name, rows in (("embeddings.position.weight", 0), ("position.weight", 1)):
        if f"model.text.{name}" in shapes:
            found["model.text.max_positions"] = shapes[f"model.text.{name}"][rows]
    for name, column in (("vision_proj", 0), ("visual_proj", 1)):
        if f"model.{name}.weight" in shapes:
            found["model.embed_dim"] = shapes[f"model.{name}.weight"][column]
    return found


def infer(
    model: str | None, shapes: Shapes, *, head_width: int | None, activation: str | None
) -> Tree:
    """The tree of a model's configuration, without a name if it is a part of one.

    head_width: of one attention head; None: 64 where that divides, or else all of a tower's.
    activation: of CLIP's and METER's towers; None: as usual.
    Raises UserError for what no model here can have.
    """
    found = settings(shapes)
    usual = "quick_gelu" if model == "meter" else "gelu"
    tree: Tree = {} if model is None else {"name": model}
    for key, value in found.items():
        *section, last = key.split(".")[1:]
        part = tree.setdefault(section[0], {}) if section else tree
        part[last] = value
    for tower in ("vision", "text", "fusion"):
        if tower in tree:
            tree[tower]["heads"] = _heads(tower, tree[tower]["width"], head_width)
    if "vision" in tree:
        patches = shapes["model.visual.pos_embed.weight"][1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise UserError(f"the file has {patches} patches, which make no square")
        tree["vision"]["image_size"] = side * tree["vision"]["patch_size"]
        if tree["vision"]["layout"] == "clip":
            tree["vision"]["activation"] = activation or usual
    if "text" in tree and model == "clip":
        tree["text"]["activation"] = activation or usual
    if "text" in tree and model == "albef":
        tree["text"]["fusion_layer"] = min(
            int(general(name)[1]) for name in shapes if ".cross." in name
        )
    segments = shapes.get("model.text.embeddings.token_type.weight")
    if segments and model in ("meter", None):
        tree["text"]["variant"] = "roberta" if segments[0] == 1 else "bert"
    return tree


def _heads(tower: str, width: int, head_width: int | None) -> int:
    if head_width is None:
        return width // 64 if width % 64 == 0 else 1
    if width % head_width:
        raise UserError(
            f"the {tower} tower is {width} wide, which heads of {head_width} do not divide; "
            "--head-width N says how wide a head is"
        )
    return width // head_width


def build_config(tree: Tree) -> ModelConfig:
    """The inverse of dataclasses.asdict, for the model that the tree names."""
    return _build(registry.resolve(registry.MODELS, tree["name"], "model.name").Config, tree)


def _build(kind: Any, tree: Tree) -> Any:
    hints = get_type_hints(kind)
    return kind(
        **{
            name: _build(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in tree.items()
        }
    )


def tree_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a model, or of the towers that a tree without a name has."""
    with torch.device("meta"):
        if "name" in tree:
            config = build_config(tree)
            build = registry.resolve(registry.MODELS, config.name, "model.name")
            modules = {"model": build(config, PruningConfig(stages=[]))}
        else:
            modules = {}
            if "vision" in tree:
                vision = ViTConfig(**tree["vision"])
                modules["model.visual"] = ViT(vision, PruningConfig(stages=[]))
            if "text" in tree:
                text = RoBERTaConfig(**tree["text"])
                modules |= {"model.text": RoBERTa(text), "model.text.mlm_head": MLMHead(text)}
    return {
        f"{start}.{name}": tuple(parameter.shape)
        for start, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def to_metadata(family: str, tree: Tree | None) -> dict[str, str]:
    """What a converted file says of itself."""
    return {"elip_ds": json.dumps({"family": family, "model": tree})}


def from_metadata(metadata: Mapping[str, str]) -> tuple[str, Tree | None]:
    """Its inverse: family and tree. Of a file that says nothing: '' and None."""
    if "elip_ds" not in metadata:
        return "", None
    said = json.loads(metadata["elip_ds"])
    return said["family"], said["model"]
