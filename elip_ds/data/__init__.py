"""Records in, batches out."""

from elip_ds.data.batch import Batch
from elip_ds.data.corpus import build_vocabulary, check_inputs, open_sources
from elip_ds.data.loader import HeldOut, TrainLoader, build_loaders
from elip_ds.data.prepare import Preprocessor, named_vocabulary
from elip_ds.data.vocabulary import Vocabulary, read_vocabulary

__all__ = [
    "Batch",
    "HeldOut",
    "Preprocessor",
    "TrainLoader",
    "Vocabulary",
    "build_loaders",
    "build_vocabulary",
    "check_inputs",
    "named_vocabulary",
    "open_sources",
    "read_vocabulary",
]
