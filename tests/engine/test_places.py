"""Where DeepSpeed keeps what, proved by values."""

import torch

from elip_ds.engine.places import sliced


def test_a_place_that_holds_other_values_is_found_out():
    params = [torch.arange(4.0), torch.arange(4.0, 10.0)]
    right, wrong = torch.arange(12.0), torch.arange(12.0).flip(0)
    assert sliced(right, params, [0, 4]).fault() is None
    assert "values" in str(sliced(wrong, params, [0, 4]).fault())
    assert "bfloat16" in str(sliced(right.bfloat16(), params, [0, 4]).fault())
