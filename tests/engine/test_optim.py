"""Which parameter decays and how fast it learns."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from conftest import tiny_task
from torch import nn

from elip_ds.config.schema import OptimConfig
from elip_ds.engine.lamb import Lamb
from elip_ds.engine.optim import build_optimizer, parameter_groups
from elip_ds.errors import UserError


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def settings_by_name(task, config: OptimConfig) -> dict[str, tuple[float, float]]:
    """name -> (weight decay, learning-rate factor)."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["lr_factor"])
        for group in parameter_groups(task, config)
        for parameter in group["params"]
    }


def albef_decays(name: str, shape: tuple[int, ...]) -> bool:
    """timm's add_weight_decay as ALBEF calls it, where the temperature is a 0-d tensor."""
    if name == "model.temperature.temperature":
        shape = ()
    return not (len(shape) == 1 or name.endswith(".bias"))


def test_every_trainable_parameter_is_in_exactly_one_group(task):
    config = OptimConfig(no_decay=["pos_embed"], multipliers={"text": 2.0, "visual": 0.5})
    grouped = [id(p) for group in parameter_groups(task, config) for p in group["params"]]
    trainable = [id(p) for p in task.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)


def test_the_default_is_albefs_rule(task):
    decays = {name: decay > 0 for name, (decay, _) in settings_by_name(task, OptimConfig()).items()}
    assert decays == {
        name: albef_decays(name, tuple(parameter.shape))
        for name, parameter in task.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("model.visual.patch_embed.weight", True),
        ("model.visual.cls_token.weight", True),
        ("model.visual.pos_embed.weight", True),
        ("model.text.embeddings.position.weight", True),
        ("model.temperature.temperature", True),
        ("objectives.itm.head.weight", True),
        ("model.visual.blocks.0.norm1.weight", False),
        ("model.visual.blocks.0.attn.qkv.bias", False),
        ("model.text.mlm_head.bias", False),
        ("objectives.itm.head.bias", False),
    ],
)
def test_matrices_and_tables_decay_and_vectors_do_not(task, name, decays):
    settings = settings_by_name(task, OptimConfig(weight_decay=0.02))
    assert settings[name][0] == (0.02 if decays else 0.0)


def test_names_on_the_list_do_not_decay_even_if_on_the_other_too(task):
    plain = settings_by_name(task, OptimConfig())
    listed = settings_by_name(task, OptimConfig(no_decay=["pos_embed", "temperature"]))
    changed = {name for name in plain if plain[name] != listed[name]}
    assert changed == {"model.visual.pos_embed.weight", "model.temperature.temperature"}
    assert all(listed[name][0] == 0 for name in changed)


def test_without_the_exception_the_temperature_is_a_vector_like_others(task):
    settings = settings_by_name(task, OptimConfig(decay=[]))
    assert settings["model.temperature.temperature"][0] == 0


def test_the_last_multiplier_that_matches_counts(task):
    config = OptimConfig(multipliers={"model.": 0.5, "text": 3.0})
    factors = {name: factor for name, (_, factor) in settings_by_name(task, config).items()}
    assert factors["model.visual.norm.weight"] == 0.5
    assert factors["model.text.embeddings.word.weight"] == 3.0
    assert factors["objectives.itm.head.weight"] == 1.0


def test_the_frozen_teacher_is_left_out(task):
    assert task.teacher is not None
    names = settings_by_name(task, OptimConfig())
    assert names and not any(name.startswith("teacher.") for name in names)


def test_the_optimizer_is_adamw_with_the_configured_numbers(task):
    config = OptimConfig(lr=3e-4, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(task, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-6)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_torchs_kernel_is_the_same_optimizer_with_offload(task):
    kinds = {type(build_optimizer(task, OptimConfig(), offload=on)) for on in (False, True)}
    assert kinds == {torch.optim.AdamW}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_adapts_what_decays_also_where_the_decay_is_zero(task, weight_decay):
    config = OptimConfig(name="lamb", lr=3e-4, betas=[0.8, 0.9], weight_decay=weight_decay)
    optimizer = build_optimizer(task, config)
    assert isinstance(optimizer, Lamb)
    expected = {
        id(p)
        for g in parameter_groups(task, OptimConfig())
        if g["weight_decay"]
        for p in g["params"]
    }
    adaptive = {id(p) for g in optimizer.param_groups if g["adaptive"] for p in g["params"]}
    assert adaptive == expected
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"]) == (3e-4, (0.8, 0.9))
        assert group["weight_decay"] == (weight_decay if group["adaptive"] else 0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "sgd"}, "optim.name='sgd': choose adamw or lamb"),
        ({"lr_rule": "cubic"}, "optim.lr_rule='cubic': choose none, linear or sqrt"),
        ({"lr_rule": "sqrt"}, "optim.lr_rule=sqrt with optim.base_batch_size=null"),
        ({"lr_rule": "sqrt", "base_batch_size": 0}, "optim.base_batch_size=0: 1 or more"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, says):
    with pytest.raises(UserError, match=re.escape(says)):
        OptimConfig(**settings)


def test_decay_off_leaves_no_group_with_decay(task):
    config = dataclasses.replace(OptimConfig(), weight_decay=0.0)
    assert {decay for decay, _ in settings_by_name(task, config).values()} == {0.0}


def test_a_matrix_of_which_a_shard_is_left_still_decays():
    """As ZeRO 3 leaves it; a checkpoint's groups are found out from such ones."""
    module: Any = nn.Linear(3, 4)
    for p in module.parameters():
        p.ds_shape, p.ds_tensor, p.data = p.shape, p.data.flatten(), torch.empty(0)
    decaying, plain = parameter_groups(module, OptimConfig(weight_decay=0.1))
    assert (decaying["params"], decaying["weight_decay"]) == ([module.weight], 0.1)
    assert (plain["params"], plain["weight_decay"]) == ([module.bias], 0.0)
