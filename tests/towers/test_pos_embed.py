"""Position tables for another size: closed forms, and the libraries that the models come from."""

import pytest
import torch
import torch.nn.functional as F

from elip_ds.towers.pos_embed import resize_grid, resize_length


def table(rows: int, columns: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1 + rows * columns, width, generator=draw)


@pytest.mark.parametrize("antialias", [False, True])
def test_the_class_row_stays_and_the_same_grid_changes_nothing(antialias):
    old = table(4, 4)
    assert resize_grid(old, (4, 4), (4, 4), antialias=antialias) is old
    new = resize_grid(old, (4, 4), (6, 5), antialias=antialias)
    assert new.shape == (1, 31, 6)
    assert torch.equal(new[:, 0], old[:, 0])


@pytest.mark.parametrize("antialias", [False, True])
def test_equal_positions_stay_equal(antialias):
    old = torch.full((1, 17, 3), 0.7)
    new = resize_grid(old, (4, 4), (9, 2), antialias=antialias)
    torch.testing.assert_close(new, torch.full((1, 19, 3), 0.7))


def test_rows_and_columns_are_told_apart_in_row_major_order():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).reshape(1, 32, 2)
    old = torch.cat([torch.zeros(1, 1, 2), grid], dim=1)
    new = resize_grid(old, (4, 8), (4, 4), antialias=False)[:, 1:].reshape(4, 4, 2)
    torch.testing.assert_close(new[:, 0, 0], torch.arange(4.0))  # rows as before
    torch.testing.assert_close(new[0, 1:3, 1], torch.tensor([2.5, 4.5]))  # every second column


def test_a_grid_of_equally_many_patches_is_still_another_grid():
    old = table(4, 9)
    new = resize_grid(old, (4, 9), (6, 6), antialias=False)
    assert new.shape == old.shape
    assert not torch.equal(new, old)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 24), (24, 14), (7, 12)])
def test_albef_and_meter_are_scaled_by_plain_bicubic(old, new):
    positions = table(old, old)
    square = positions[:, 1:].reshape(1, old, old, 6).permute(0, 3, 1, 2)
    scaled = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    expected = scaled.permute(0, 2, 3, 1).flatten(1, 2)
    mine = resize_grid(positions, (old, old), (new, new), antialias=False)
    torch.testing.assert_close(mine[:, 1:], expected, atol=0, rtol=0)


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4)])
def test_clip_is_scaled_as_open_clip_does(old, new):
    import open_clip

    width = 64
    model = torch.nn.Module()
    model.visual = open_clip.transformer.VisionTransformer(
        image_size=8 * new, patch_size=8, width=width, layers=1, heads=1, mlp_ratio=1, output_dim=8
    )
    positions = table(old, old, width)
    state = {"visual.positional_embedding": positions[0].clone()}
    open_clip.model.resize_pos_embed(state, model)
    mine = resize_grid(positions, (old, old), (new, new), antialias=True)
    torch.testing.assert_close(mine[0], state["visual.positional_embedding"], atol=0, rtol=0)


@pytest.mark.parametrize("length", [7, 20])
def test_a_text_table_is_scaled_as_open_clip_does(length):
    import open_clip

    model = torch.nn.Module()
    model.positional_embedding = torch.nn.Parameter(torch.zeros(length, 6))
    model.num_pos = length
    positions = table(1, 11)  # 12 rows
    state = {"positional_embedding": positions[0].clone()}
    open_clip.model.resize_text_pos_embed(state, model)
    mine = resize_length(positions, length)
    torch.testing.assert_close(mine[0], state["positional_embedding"], atol=1e-6, rtol=0)
    assert resize_length(positions, 12) is positions
