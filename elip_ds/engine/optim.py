"""AdamW or LAMB, and their parameter groups."""

from typing import Any

import torch
from torch import nn

from elip_ds.config.schema import OptimConfig
from elip_ds.engine.lamb import Lamb
from elip_ds.engine.sharding import whole_shape


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by weight decay and learning-rate factor ("lr_factor").

    Vectors and biases do not decay, unless config.decay names them; matrices and tables do, unless
    config.no_decay does. For LAMB, "adaptive": those that decay take their trust ratio, also where
    config.weight_decay is 0.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = len(whole_shape(parameter)) > 1 and not name.endswith(".bias")
        if any(part in name for part in config.decay):
            decays = True
        if any(part in name for part in config.no_decay):
            decays = False
        factor = 1.0
        for part, value in config.multipliers.items():
            factor = value if part in name else factor
        groups.setdefault((decays, factor), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_factor": factor,
            **({"adaptive": decays} if config.name == "lamb" else {}),
        }
        for (decays, factor), parameters in groups.items()
    ]


def build_optimizer(
    module: nn.Module, config: OptimConfig, *, kernel: str = "torch", offload: bool = False
) -> torch.optim.Optimizer:
    """AdamW or LAMB over parameter_groups.

    kernel: whose, of those that choose_kernels (fused.py) has found to work: torch, apex or
    deepspeed; all of them compute the same.  offload: the states live on the host, beside a GPU.
    A Lamb is to be bound (bind_lamb) once DeepSpeed has it.
    """
    groups = parameter_groups(module, config)
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
    }
    if config.name == "lamb":
        if kernel == "apex":
            from apex.optimizers import FusedLAMB

            # Gradients are clipped by DeepSpeed, before; this clips once more, and has no "off".
            return FusedLAMB(groups, max_grad_norm=torch.finfo(torch.float32).max, **settings)
        return Lamb(groups, **settings)
    if kernel == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    if kernel == "deepspeed" and offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if kernel == "deepspeed":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
