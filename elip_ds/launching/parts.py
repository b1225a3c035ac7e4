"""Which part of a model runs, told by the calls of its modules and methods."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from elip_ds.towers import pruning

PARTS = ("vision", "look-ahead", "teacher", "text", "fusion", "heads")
METHODS = {
    "encode_text": "text",
    "encode_image": "vision",
    "fuse": "fusion",
    "decode": "fusion",
    "look": "fusion",
    "word_logits": "heads",
    "temperature": "heads",
}
"Of a model, and the part that they are; what they call may be another."
MODULES = {
    "visual": "vision",
    "cross": "fusion",
    "cross_modal_text_transform": "fusion",
    "cross_modal_image_transform": "fusion",
    "cross_modal_text_layers": "fusion",
    "cross_modal_image_layers": "fusion",
    "vision_proj": "heads",
    "text_proj": "heads",
    "visual_proj": "heads",
    "text_projection": "heads",
    "mlm_head": "heads",
    "lm_head": "heads",
}
"Last part of a module's name, and the part of the model that it is, whoever calls it."

_entered: list[str] = []
listeners: list[Callable[[str], None]] = []
"Told the part that runs from now on, whenever it changes."


@contextmanager
def part(name: str) -> Iterator[None]:
    """What runs inside belongs to this part, unless a part inside says otherwise; the teacher's
    parts are all one.
    """
    _enter(name)
    try:
        yield
    finally:
        _leave()


def current_part() -> str:
    """The part that runs now; what is in none are the heads and their losses."""
    if "teacher" in _entered:
        return "teacher"
    return _entered[-1] if _entered else "heads"


def _enter(name: str) -> None:
    _entered.append(name)
    _tell()


def _leave() -> None:
    _entered.pop()
    _tell()


def _tell() -> None:
    for listener in listeners:
        listener(current_part())


@contextmanager
def marked_parts(task: Any) -> Iterator[None]:
    """While it is open, a task's own modules and methods say which part they are."""
    with ExitStack() as stack:
        models = [(task.model, False)]
        if task.teacher is not None:
            models.append((task.teacher.model, True))
        for model, teaches in models:
            for name in METHODS:
                if hasattr(model, name) and not isinstance(getattr(model, name), nn.Module):
                    kind = "teacher" if teaches else METHODS[name]
                    stack.enter_context(_marked(model, name, kind))
            for name, module in model.named_modules():
                if teaches or name.rpartition(".")[2] in MODULES:
                    kind = "teacher" if teaches else MODULES[name.rpartition(".")[2]]
                    _hook(stack, module, kind)
        stack.enter_context(_marked(pruning, "lookahead_scores", "look-ahead"))
        yield


@contextmanager
def _marked(owner: Any, name: str, kind: str) -> Iterator[None]:
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with part(kind):
            return function(*args, **kwargs)

    own = vars(owner).get(name)
    setattr(owner, name, call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _hook(stack: ExitStack, module: nn.Module, kind: str) -> None:
    before = module.register_forward_pre_hook(lambda *_: _enter(kind))
    after = module.register_forward_hook(lambda *_: _leave(), always_call=True)
    stack.callback(before.remove)
    stack.callback(after.remove)
