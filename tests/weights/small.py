"""Small tasks of all families, every weight random, and what their published files would hold."""

import functools
from pathlib import Path

import torch
from conftest import tiny_vocabulary
from torch import Tensor

from elip_ds.config import Config, PruningConfig, load_config
from elip_ds.models import ALBEF, BLIP
from elip_ds.registry import MODELS, resolve
from elip_ds.tasks import Pretrain, build_pretrain
from elip_ds.weights import Source, open_source, save_published
from elip_ds.weights.report import Report
from elip_ds.weights.sizes import build_config
from elip_ds.weights.start import saved_name
from elip_ds.weights.table import plain

FAMILIES = ("albef", "blip", "meter", "clip")
HEAD_WIDTH = 16
VISION = [
    f"model.vision.{setting}"
    for setting in ("image_size=32", "patch_size=8", "width=32", "depth=3", "heads=2")
]
TEXT = [
    f"model.text.{setting}"
    for setting in ("vocab_size=64", "width=32", "depth=2", "heads=2", "max_positions=24")
]
JOINT = ["model.embed_dim=16"]
QUEUE = ["objectives.itc.queue_size=32"]
FUSION = [f"model.fusion.{setting}" for setting in ("width=32", "depth=2", "heads=2")]
WORDS = {
    "albef": ["preset=albef_tiny", *VISION, *TEXT, *JOINT, *QUEUE, "model.text.fusion_layer=1"],
    "blip": ["preset=blip_tiny", *VISION, *TEXT, *JOINT, *QUEUE],
    "meter": [
        *("preset=meter_tiny", "model.vision.layout=clip", "model.vision.activation=quick_gelu"),
        *(*VISION, *TEXT, *FUSION),
    ],
    "clip": ["preset=clip_tiny", *VISION, *TEXT, *JOINT, "model.text.vocab_size=514"],
}
KINDS = {"albef": "albef", "blip": "blip", "meter": "bert", "clip": "clip"}


@functools.cache
def small_config(model: str, *words: str) -> Config:
    return load_config([*WORDS[model], "pruning.stages=[]", "data.text_length=20", *words])


def small_task(model: str, *words: str, seed: int = 0) -> Pretrain:
    """Twin unlike the student, queues unlike their start, norms and biases uneven."""
    torch.manual_seed(seed)
    task = build_pretrain(small_config(model, *words), tiny_vocabulary(KINDS[model]))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.3)
    state = {
        name: torch.randn_like(value) if value.is_floating_point() else value + 7
        for name, value in task.state().items()
    }
    task.load_state(state)
    return task


def whole_state(task: Pretrain) -> dict[str, Tensor]:
    """Every tensor of a task under the name that files of ours use."""
    weights = {saved_name(name): p.detach().clone() for name, p in task.named_parameters()}
    return weights | {name: value.clone() for name, value in task.state().items()}


def small_source(model: str, seed: int = 0) -> Source:
    return source_of(model, whole_state(small_task(model, seed=seed)))


def source_of(model: str, state: dict[str, Tensor]) -> Source:
    report = Report("a run", "from elip_ds")
    return Source(Path("a run"), "", model, {"name": model}, plain(state), report)


def empty_source(model: str, shapes: dict[str, tuple[int, ...]]) -> Source:
    """Shapes without values."""
    return source_of(model, {n: torch.empty(shape, device="meta") for n, shape in shapes.items()})


def published(model: str, path: Path, to: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Writes a published file of a small model; returns the state that it was made from."""
    source = small_source(model, seed)
    save_published(source, to or {"clip": "open_clip"}.get(model, model), path)
    return {name: weight.read() for name, weight in source.weights.items()}


def read_all(source: Source) -> dict[str, Tensor]:
    return {name: weight.read() for name, weight in source.weights.items()}


def build(source: Source, pruning: PruningConfig | None = None) -> "ALBEF | BLIP":
    """The model of a source, in evaluation mode."""
    assert source.tree is not None and source.model is not None
    model_class = resolve(MODELS, source.model, "model.name")
    model = model_class(build_config(source.tree), pruning or PruningConfig(stages=[]))
    weights = {n.removeprefix("model."): w.read() for n, w in source.weights.items()}
    names = model.state_dict().keys()
    model.load_state_dict({name: weights[name] for name in names})
    return model.eval()


def load(path: Path, **hints) -> "ALBEF | BLIP":
    source = open_source(path, head_width=HEAD_WIDTH, **hints)
    source.report.check()
    return build(source)
