"""Captions in, token ids out."""

import numpy as np

from elip_ds.data.vocabulary import KINDS, Vocabulary


class CaptionTokenizer:
    """Cleans and tokenizes captions to a fixed length, as the vocabulary's kind does it.

    A caption that is too long loses its end, but not the token that the kind puts behind it.
    """

    def __init__(self, vocabulary: Vocabulary, length: int) -> None:
        self.length = length
        self._clean = KINDS[vocabulary.kind].clean
        self._pad = vocabulary.special_ids["[PAD]"]
        self._end = vocabulary.end_id
        self._tokenizer = vocabulary.build_tokenizer()
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=self._pad)

    def __call__(self, caption: str) -> np.ndarray:
        """One caption -> ids (L,), int64."""
        return np.array(self._tokenizer.encode(self._clean(caption)).ids, dtype=np.int64)

    def attention_mask(self, input_ids: np.ndarray) -> np.ndarray:
        """1 where there is a token, 0 on padding; any shape (..., L)."""
        if self._end is None:
            return (input_ids != self._pad).astype(np.int64)
        # CLIP's padding is a word, too; no kind lets a caption spell its end token.
        ends = input_ids == self._end
        return (np.cumsum(ends, axis=-1) - ends == 0).astype(np.int64)
