"""A batch without data, the dearest that there can be: for measuring and predicting a step."""

import torch

from elip_ds.config import Config
from elip_ds.data.batch import Batch
from elip_ds.data.vocabulary import BYTES, KINDS, SPECIALS, Vocabulary
from elip_ds.errors import UserError


def made_up_vocabulary(config: Config) -> Vocabulary:
    """As many entries as the model has words, among them the special ones of the tokenizer."""
    kind, size = config.data.tokenizer, config.model.text.vocab_size
    if size < KINDS[kind].min_entries:
        raise UserError(
            f"model.text.vocab_size={size}: data.tokenizer={kind} has {KINDS[kind].min_entries} "
            "entries at least"
        )
    if KINDS[kind].model == "wordpiece":
        words = size - len(SPECIALS) - len(KINDS[kind].added)
        return Vocabulary.of_words((*SPECIALS, *(f"word{i}" for i in range(words))), kind)
    pairs = ((a, b) for a in BYTES for b in BYTES)
    return Vocabulary.of_merges(pairs, kind, size)


def random_batch(config: Config, vocabulary: Vocabulary, size: int) -> Batch:
    """As the loader hands it over, every caption of full length, which costs most.

    The second half has the sample keys of the first, so that both draw the same masks.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = config.model.vision.pixels
    length = min(config.data.text_length, config.model.text.max_length)
    images = torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8, generator=generator)
    special = set(vocabulary.special_ids.values())
    plain = torch.tensor([i for i in range(len(vocabulary)) if i not in special])
    input_ids = plain[torch.randint(0, len(plain), (size, length), generator=generator)]
    input_ids[:, 0] = vocabulary.special_ids["[CLS]"]
    if vocabulary.end_id is not None:
        input_ids[:, -1] = vocabulary.end_id
    half = (size + 1) // 2
    return Batch(
        images=images,
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        sample_key=torch.arange(size) % half,
        keys=tuple(f"sample{i}" for i in range(size)),
    )
