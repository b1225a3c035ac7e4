"""AdamW and its parameter groups."""

from typing import Any

import torch
from torch import nn

from elip_ds.config.schema import OptimConfig


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by weight decay and learning-rate factor ("lr_factor").

    Vectors and biases do not decay, unless config.decay names them; matrices and tables do, unless
    config.no_decay does.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias")
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
        }
        for (decays, factor), parameters in groups.items()
    ]


def build_optimizer(
    module: nn.Module, config: OptimConfig, *, offload: bool, device: torch.device
) -> torch.optim.Optimizer:
    """offload: states live on the host; beside a GPU, DeepSpeed's CPU Adam then runs there."""
    groups = parameter_groups(module, config)
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
    }
    if offload and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
