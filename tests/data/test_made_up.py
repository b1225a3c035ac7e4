"""A batch without data has the shape and the cost of a real one."""

import pytest
import torch

from elip_ds.config import load_config
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.errors import UserError


@pytest.mark.parametrize("preset", ["albef_4m", "blip_4m", "meter_4m", "clip_4m", "demo"])
def test_a_made_up_vocabulary_and_batch_have_the_presets_size(preset):
    config = load_config([f"preset={preset}"])
    vocabulary = made_up_vocabulary(config)
    assert len(vocabulary) == config.model.text.vocab_size
    batch = random_batch(config, vocabulary, 4)
    assert batch.input_ids.shape == (4, config.data.text_length)
    assert batch.attention_mask.all() and batch.images.shape[2:] == config.model.vision.pixels
    assert (batch.input_ids[:, 0] == vocabulary.special_ids["[CLS]"]).all()
    inner = batch.input_ids[:, 1:-1]
    assert not torch.isin(inner, torch.tensor([*vocabulary.special_ids.values()])).any()
    if vocabulary.end_id is not None:
        assert (batch.input_ids[:, -1] == vocabulary.end_id).all()
    assert batch.sample_key.tolist() == [0, 1, 0, 1]  # both halves draw alike


def test_a_vocabulary_that_its_tokenizer_cannot_have_is_refused():
    config = load_config(["model.text.vocab_size=64", "data.tokenizer=roberta"])
    with pytest.raises(UserError, match=r"model\.text\.vocab_size=64.*261"):
        made_up_vocabulary(config)
