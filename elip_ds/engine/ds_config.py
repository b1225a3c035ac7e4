"""A DeepSpeed JSON from disk -> the complete dictionary that deepspeed.initialize gets.

DeepSpeed ignores unknown top-level keys and knows no "auto", so both are settled here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from elip_ds.batching import Plan
from elip_ds.config.schema import BatchingConfig, EngineConfig, OptimConfig
from elip_ds.errors import UserError
from elip_ds.registry import suggest

BATCH_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
PRECISIONS = ("bf16", "fp16")
# Top-level keys that mean something here.
KNOWN = {
    *BATCH_KEYS, *PRECISIONS, "zero_optimization", "gradient_clipping", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "data_types", "flops_profiler",
    "comms_logger", "aio", "torch_autocast", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "checkpoint", "csv_monitor", "tensorboard", "wandb", "comet",
    "compile", "disable_allgather", "sparse_gradients_enabled",
    "seq_parallel_communication_data_type", "timers",
}  # fmt: skip
# What the project's own configuration decides, or what DeepSpeed has dropped.
ELSEWHERE = {
    "optimizer": "set optim.* in the configuration",
    "scheduler": "set schedule.* in the configuration",
    "activation_checkpointing": "set model.vision.recompute and model.text.recompute",
    "elasticity": "DeepSpeed removed it; a run resumes with its global batch on other ranks",
    "amp": "DeepSpeed removed it; use bf16 or fp16",
    "sparse_attention": "DeepSpeed removed it",
    "compression_training": "DeepSpeed removed it",
    "curriculum_learning": "DeepSpeed removed it",
    "nebula": "DeepSpeed removed it",
}


def read_ds_config(path: str | None) -> dict[str, Any]:
    """The JSON as it is on disk. Raises UserError, with line and column for a syntax error."""
    if path is None:
        raise UserError("no DeepSpeed JSON is given; add --deepspeed ds_configs/z2.json")
    try:
        tree = json.loads(Path(path).read_text())
    except OSError as error:
        shipped = sorted(p.name for p in Path("ds_configs").glob("*.json"))
        known = f"; ds_configs holds {', '.join(shipped)}" if shipped else ""
        raise UserError(f"--deepspeed {path}: {error.strerror}{known}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"--deepspeed {path}: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"--deepspeed {path}: the file must hold one JSON object")
    for key in tree:
        if key in ELSEWHERE:
            raise UserError(f"--deepspeed {path}: {key!r} does not belong there: {ELSEWHERE[key]}")
        if key not in KNOWN:
            raise UserError(f"--deepspeed {path}: {key!r} is no key; {suggest(key, KNOWN)}")
    for key in (*PRECISIONS, "zero_optimization"):
        if not isinstance(tree.get(key, {}), dict):
            raise UserError(f"--deepspeed {path}: {key}={json.dumps(tree[key])}: an object {{...}}")
    for key in PRECISIONS:
        value = tree.get(key, {}).get("enabled", "auto")
        if value != "auto" and not isinstance(value, bool):
            raise UserError(f"--deepspeed {path}: {key}.enabled={value!r}: true, false or 'auto'")
    if tree.get("zero_optimization", {}).get("round_robin_gradients"):
        raise UserError(
            f"--deepspeed {path}: zero_optimization.round_robin_gradients=true: DeepSpeed then "
            "finds whole weights in the wrong places, and checkpoints would be wrong; leave it out"
        )
    stage = tree.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed {path}: zero_optimization.stage={stage!r}: 0, 1, 2 or 3")
    try:
        DeepSpeedZeroConfig(**_without_auto(tree.get("zero_optimization", {})))
    except ValidationError as error:
        fault = error.errors()[0]
        loc, why = [str(key) for key in fault["loc"]], fault["msg"]
        if fault["type"] == "extra_forbidden":
            known = f"; {suggest(loc[0], DeepSpeedZeroConfig.model_fields)}"
            why = "no key" + (known if len(loc) == 1 else " of DeepSpeed's there")
        where = ".".join(["zero_optimization", *loc])
        raise UserError(f"--deepspeed {path}: {where}: {why}") from None
    return tree


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    """What fill_ds_config is yet to settle left out, at any depth."""
    parts = {k: _without_auto(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {key: value for key, value in parts.items() if value != "auto"}


def json_batch(
    tree: dict[str, Any], batching: BatchingConfig, world_size: int
) -> tuple[int | str, int | str]:
    """(global batch, micro-batch), each a number or 'auto', that config and JSON agree on.

    A number in the JSON is obeyed; it may not contradict the configuration.
    """
    total: int | str = batching.global_batch_size
    micro: int | str = batching.micro_batch_size
    given = {key: tree[key] for key in BATCH_KEYS if tree.get(key, "auto") != "auto"}
    for key, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"DeepSpeed JSON: {key}={value!r}: 'auto', or a number from 1")
    total = _agreed(total, given, "train_batch_size", "batching.global_batch_size")
    micro = _agreed(micro, given, "train_micro_batch_size_per_gpu", "batching.micro_batch_size")
    if "gradient_accumulation_steps" in given:
        steps = given["gradient_accumulation_steps"]
        if total == "auto" and micro != "auto":
            total = int(micro) * steps * world_size
        if micro == "auto" and total != "auto" and int(total) % (steps * world_size) == 0:
            micro = int(total) // (steps * world_size)
        if "auto" in (micro, total) or int(micro) * steps * world_size != total:
            raise UserError(
                f"DeepSpeed JSON: gradient_accumulation_steps={steps} contradicts "
                f"batching.global_batch_size={total} with micro_batch_size={micro} on {world_size} "
                "ranks; write 'auto' in the JSON"
            )
    return total, micro


def _agreed(ours: int | str, given: dict[str, int], theirs: str, key: str) -> int | str:
    if theirs not in given or ours == given[theirs]:
        return ours
    if ours != "auto":
        raise UserError(
            f"DeepSpeed JSON: {theirs}={given[theirs]} contradicts {key}={ours}; make them equal, "
            "or write 'auto' in the JSON"
        )
    return given[theirs]


def fill_ds_config(
    tree: dict[str, Any],
    *,
    engine: EngineConfig,
    optim: OptimConfig,
    plan: Plan,
    device: torch.device,
) -> dict[str, Any]:
    """The JSON with every "auto" replaced. Raises UserError for one that nothing fills."""
    full = json.loads(json.dumps(tree))
    full |= {
        # The product that DeepSpeed asks for; where ranks have unequal micro-batches, its own only.
        "train_batch_size": plan.micro_batch_size
        * plan.gradient_accumulation_steps
        * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "steps_per_print": full.get("steps_per_print", 10**9),
        # Our optimizer is AdamW or LAMB of our choice; DeepSpeed would else insist on its list.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    clip = full.get("gradient_clipping", "auto")
    if clip not in ("auto", optim.clip_norm):
        raise UserError(
            f"DeepSpeed JSON: gradient_clipping={clip} contradicts optim.clip_norm="
            f"{optim.clip_norm}; write 'auto' in the JSON"
        )
    full["gradient_clipping"] = optim.clip_norm
    precision = _precision(full, engine.precision, device)
    for name in PRECISIONS:
        full.setdefault(name, {})["enabled"] = name == precision
    zero = full.setdefault("zero_optimization", {"stage": 0})
    if precision == "fp16" and not zero.get("stage", 0):
        # DeepSpeed then divides gradients by a loss scale that the loss was never multiplied by.
        raise UserError(
            "fp16 needs ZeRO stage 1, 2 or 3 (such as ds_configs/z1.json), as DeepSpeed does not "
            "scale the loss at stage 0; or set engine.precision=bf16 or fp32"
        )
    if zero.get("overlap_comm") == "auto":  # a second bucket, of no use to a rank alone
        zero["overlap_comm"] = device.type == "cuda" and plan.world_size > 1
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("pin_memory") == "auto":
            zero[name]["pin_memory"] = device.type == "cuda"
    if zero.get("stage", 0) < 3:
        # It waits for the device twice a micro-batch. At stage 3 that waiting also keeps the next
        # gathering from reading the twin's weights before they are written.
        full.setdefault("timers", {"throughput": {"enabled": False}})
    _refuse_auto(full)
    return full


BUCKETS = ("reduce_bucket_size", "stage3_prefetch_bucket_size")


def fit_buckets(tree: dict[str, Any], num_trainable: int) -> None:
    """DeepSpeed allocates a bucket whole, however small the model: none is larger than that."""
    zero = tree["zero_optimization"]
    for name in BUCKETS:
        if name in zero:
            zero[name] = min(int(zero[name]), num_trainable)


def _precision(tree: dict[str, Any], wanted: str, device: torch.device) -> str:
    fixed = {name: tree.get(name, {}).get("enabled", "auto") for name in PRECISIONS}
    on = [name for name, value in fixed.items() if value is True]
    if len(on) == 2:
        raise UserError("DeepSpeed JSON: bf16 and fp16 are both enabled; choose one")
    if on and wanted not in ("auto", on[0]):
        raise UserError(
            f"DeepSpeed JSON: {on[0]}.enabled contradicts engine.precision={wanted}; write 'auto' "
            "in the JSON"
        )
    if on:
        choice = on[0]
    elif wanted != "auto":
        choice = wanted
    elif device.type == "cpu":
        choice = "fp32"
    else:
        choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        choice = "fp32" if fixed[choice] is False else choice
    if choice != "fp32" and fixed[choice] is False:
        raise UserError(
            f"engine.precision={choice} contradicts {choice}.enabled=false in the DeepSpeed JSON"
        )
    if choice == "fp16" and device.type == "cpu":
        raise UserError("engine.precision=fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return choice


def _refuse_auto(tree: Any, at: str = "") -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_auto(value, f"{at}.{key}" if at else key)
    elif tree == "auto":
        raise UserError(f'DeepSpeed JSON: {at}="auto" is not filled by anything; write a value')
