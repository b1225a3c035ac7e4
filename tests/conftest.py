"""One tiny config and batch for all tests. The functions are for tests in other processes."""

import os
import tempfile

import pytest
import torch

from elip_ds.config import Config, load_config
from elip_ds.data import Batch, Vocabulary
from elip_ds.tasks import Pretrain, build_pretrain

torch.set_num_threads(1)
# Plans that tests make are neither taken from this user's cache nor left there.
_cache = tempfile.TemporaryDirectory(prefix="elip_cache_")
os.environ["XDG_CACHE_HOME"] = _cache.name

pytest_plugins = ["end_to_end.jobs", "slurm.clusters"]  # real runs of train.py; a real Slurm

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


TEXT = ["model.text.depth=2", "model.text.dropout=0.0"]
JOINT_SPACE = ["model.embed_dim=16"]
FUSION = [f"model.fusion.{x}" for x in ("width=32", "depth=2", "heads=2", "dropout=0.0")]
PARTS_BY_MODEL = {
    "albef": [*TEXT, "model.text.fusion_layer=1", *JOINT_SPACE],
    "blip": [*TEXT, *JOINT_SPACE],
    "meter": [
        *("model.init_from=[]", "model.vision.layout=clip", "model.vision.activation=quick_gelu"),
        *(*TEXT, *FUSION),
    ],
    # Its kind of vocabulary has 514 entries at least.
    "clip": ["model.text.depth=2", "model.text.vocab_size=520", *JOINT_SPACE],
}
TEACHER = ["objectives.itc.queue_size=32", "objectives.itc.alpha=0.4", "objectives.itc.weight=1.0"]
OBJECTIVES_BY_MODEL = {
    "albef": [*TEACHER, "objectives.mlm.alpha=0.4"],
    "blip": TEACHER,
    "meter": ["objectives.itm.weight=1.0"],
    "clip": [],
}


def tiny_words(*changes: str, model: str = "albef") -> list[str]:
    """Words that shrink a model's tiny preset to something that steps in milliseconds.

    changes: further words; each takes the place of those that it contradicts.
    """
    words = [
        f"preset={'demo' if model == 'albef' else f'{model}_tiny'}",
        "data.text_length=12",
        "data.workers=0",
        "data.builtin.train=64",
        "data.builtin.val=16",
        "data.builtin.image_size=48",
        "model.vision.image_size=32",
        "model.vision.patch_size=8",
        "model.vision.width=32",
        "model.vision.depth=3",
        "model.vision.heads=2",
        "model.text.vocab_size=64",
        "model.text.width=32",
        "model.text.heads=2",
        "model.text.max_positions=16",
        *PARTS_BY_MODEL[model],
        "pruning.stages=[{layer: 1, lookahead: 1, keep_ratio: 0.5}, "
        "{layer: 2, lookahead: 1, keep_ratio: 0.25}]",
        *OBJECTIVES_BY_MODEL[model],
        "teacher.momentum=0.995",
        "optim.lr=1e-3",
        "schedule.length=64 samples",
        "schedule.warmup=0 samples",
        "batching.global_batch_size=8",
        "metrics.every=8 samples",
        "metrics.port=null",
    ]
    keys = [change.partition("=")[0] for change in changes]

    def contradicted(word: str) -> bool:
        mine = word.partition("=")[0]
        return any(f"{mine}.".startswith(f"{k}.") or f"{k}.".startswith(f"{mine}.") for k in keys)

    return [*(word for word in words if not contradicted(word)), *changes]


def tiny_vocabulary(kind: str = "albef") -> Vocabulary:
    """64 entries; of roberta and clip as few as they can have, 261 and 514."""
    if kind in ("roberta", "clip"):
        return Vocabulary.of_merges([], kind)
    added = 2 if kind == "blip" else 0
    words = (*SPECIALS, *(f"word{i}" for i in range(64 - len(SPECIALS) - added)))
    return Vocabulary.of_words(words, kind)


def random_batch(size: int, seed: int = 0) -> Batch:
    """As the loader hands it over after to(cpu, fp32): captions of 2 to 12 tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator}
    lengths = torch.randint(2, 13, (size, 1), **draw)
    input_ids = torch.randint(len(SPECIALS), 64, (size, 12), **draw)
    input_ids[:, 0] = SPECIALS.index("[CLS]")
    attention_mask = (torch.arange(12) < lengths).long()
    batch = Batch(
        images=torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, **draw),
        input_ids=input_ids * attention_mask,  # [PAD] is 0
        attention_mask=attention_mask,
        sample_key=torch.randint(-(2**62), 2**62, (size,), **draw),
        keys=tuple(f"sample{i}" for i in range(size)),
    )
    return batch.to(torch.device("cpu"), torch.float32)


def tiny_task(*words: str, model: str = "albef") -> Pretrain:
    """The task of the tiny config changed by words, with the same weights at every call."""
    torch.manual_seed(0)
    return build_pretrain(load_config(tiny_words(*words, model=model)), tiny_vocabulary())


@pytest.fixture
def tiny_config() -> Config:
    return load_config(tiny_words())


@pytest.fixture
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture
def tiny_batch() -> Batch:
    return random_batch(8)
