"""Position tables for another image size or text length.

The class token's row stays as it is; the others are a picture that is scaled.

P patches of the old grid, Q of the new one, L and M tokens of the old and the new text, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows, columns


def resize_grid(table: Tensor, old: Grid, new: Grid, *, antialias: bool) -> Tensor:
    """table: (1, 1 + P, D), class token first -> (1, 1 + Q, D), by bicubic interpolation, fp32.

    antialias: as open_clip does; ALBEF, BLIP and METER do not.
    Source: the four models' loading code. Differs: there only square grids, here any.
    """
    if old == new:
        return table
    first, rest = table[:, :1].float(), table[:, 1:].float()
    picture = rest.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    scaled = F.interpolate(
        picture, size=new, mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([first, scaled.flatten(2).transpose(1, 2)], dim=1)


def resize_length(table: Tensor, length: int) -> Tensor:
    """table: (1, L, D) -> (1, M, D), by linear interpolation, fp32. Source: open_clip."""
    if table.shape[1] == length:
        return table
    line = table.float().transpose(1, 2)  # (1, D, L)
    return F.interpolate(line, size=length, mode="linear", align_corners=False).transpose(1, 2)
