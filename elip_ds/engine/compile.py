"""torch.compile over the blocks of the towers.

A block is compiled, not the step: the same graph serves all blocks of one shape, compiling takes
minutes instead of tens of them, and what a block keeps for the backward pass the compiler decides
(norms and activations it computes again, so that `recompute: cheap` adds nothing).
"""

import logging
from typing import Any

from torch import nn

from elip_ds.errors import UserError
from elip_ds.towers.bert import BERTLayer
from elip_ds.towers.layers import PreNormBlock

log = logging.getLogger(__name__)

BLOCKS = (PreNormBlock, BERTLayer)

VARIANTS = 64
"""Graphs that one kind of block may have: a length for each pruning stage, in the look-ahead, with
gradient and of the twin, pass by pass. torch gives up at 8 unless told."""


def check_compile(wanted: bool, stage: int) -> None:
    """Raises UserError where compiled blocks do not work."""
    if wanted and stage == 3:
        raise UserError(
            "engine.compile=true does not work with ZeRO stage 3, which gathers weights by hooks "
            "inside each block; use ds_configs/z0.json to z2.json, or engine.compile=false"
        )


def compile_blocks(task: nn.Module, backend: str = "inductor") -> int:
    """Have every block of the task compiled at its first call, for static shapes and in one piece.

    backend: of torch.compile.  Returns how many blocks there are. A block that cannot be one graph
    is an error, not a slow path.
    """
    import torch._dynamo  # takes seconds, which --help and a refused setting need not wait for

    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    blocks: list[Any] = [module for module in task.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        # Of the forward and not of the call, so that hooks stay outside of the graph.
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)
    log.info("compiling %d blocks; the first step of each shape takes minutes", len(blocks))
    return len(blocks)
