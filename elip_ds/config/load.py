"""Command line -> Config: preset + key=value, typed and frozen. The only file that sees OmegaConf.

Every error a config can have is raised here, as one line with the key, before anything starts.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from elip_ds import registry
from elip_ds.config.schema import Config
from elip_ds.config.shape import check_tree, show
from elip_ds.errors import UserError

PRESETS = Path(__file__).parent / "presets"

# What may differ between two starts of one run: it changes where and how fast, not what is learned.
FREE_SECTIONS = ("run", "engine", "checkpoint", "eval", "metrics", "preset")
FREE_KEYS = (
    "data.workers", "data.builtin.dir", "data.max_bad_share", "data.cache.dir",
    "data.cache.limit_gib", "data.time_limit_seconds", "data.retries", "batching.micro_batch_size",
    "batching.multiple_of", "batching.device_memory", "batching.headroom",
    "batching.headroom_bytes", "batching.probe", "batching.oom_retries",
)  # fmt: skip

USAGE = """\
usage: deepspeed elip_ds/train.py --deepspeed ds_configs/z2.json [preset=NAME] [key=value ...]

Train a language-image model with text-guided token pruning. Without more words it trains the demo
preset on the built-in scenes, on whatever the machine has.

  --deepspeed PATH   DeepSpeed JSON; its "auto" fields are filled in
  preset=NAME        start from a preset; preset=list shows them
  key=value          change one setting, such as optim.lr=2e-4 or pruning.stages=[]
  --help             this text

examples:
  deepspeed elip_ds/train.py --deepspeed ds_configs/z2.json
  deepspeed elip_ds/train.py --deepspeed ds_configs/z2.json pruning.stages=[] run.name=unpruned
  deepspeed elip_ds/train.py --deepspeed ds_configs/z1.json preset=albef_4m \\
      data.root=/data model.init_from=[deit.pth,bert.safetensors]
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def parse_arguments(argv: list[str]) -> tuple[str | None, list[str]]:
    """argv without the program -> (DeepSpeed JSON or None, key=value words).

    --help and preset=list print and leave with status 0.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed", metavar="PATH", nargs="?")  # bare: as DeepSpeed's own flag
    parser.add_argument("--deepspeed_config", metavar="PATH")
    parser.add_argument("--local_rank", "--local-rank", type=int)  # launchers add it
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("words", nargs="*")
    known = parser.parse_intermixed_args(argv)
    if known.help:
        sys.stdout.write(USAGE)
        raise SystemExit(0)
    if "preset=list" in known.words:
        sys.stdout.write("".join(f"{name:18} {line}\n" for name, line in list_presets().items()))
        raise SystemExit(0)
    paths = {path for path in (known.deepspeed, known.deepspeed_config) if path is not None}
    if len(paths) > 1:
        raise UserError(
            f"--deepspeed {known.deepspeed} contradicts --deepspeed_config "
            f"{known.deepspeed_config}; give one"
        )
    return next(iter(paths), None), known.words


def list_presets() -> dict[str, str]:
    """Preset name -> the first comment line of its file."""
    return {
        path.stem: path.read_text().splitlines()[0].lstrip("# ").strip()
        for path in sorted(PRESETS.glob("*.yaml"))
    }


def load_config(argv: list[str]) -> Config:
    """argv: command-line words without the program.  Raises UserError, one line, for any fault."""
    try:
        return _load(argv)
    except UserError as error:  # a word with a line break in it is quoted in some
        raise UserError(" ".join(str(error).splitlines())) from None


def _load(argv: list[str]) -> Config:
    deepspeed, words = parse_arguments(argv)
    settings = _read_words(words)
    if deepspeed is not None:
        settings.append({"engine": {"deepspeed": deepspeed}})
    preset = next((tree["preset"] for tree in reversed(settings) if "preset" in tree), "demo")
    merged = _read_preset(str(preset))
    for tree in settings:  # of two words for one setting the later counts
        merged = _merge(merged, tree)
    return build_config(merged | {"preset": preset})


def read_config(path: Path) -> Config:
    """The resolved config.yaml that a run or a checkpoint keeps."""
    try:
        return build_config(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def build_config(tree: Any) -> Config:
    """A plain tree of settings -> Config, checked section by section and across sections."""
    if isinstance(tree, dict) and isinstance(tree.get("data"), dict):
        short = {
            key: _as_sources(tree["data"][key]) for key in ("train", "val") if key in tree["data"]
        }
        tree = tree | {"data": tree["data"] | short}
    if isinstance(tree, dict) and isinstance(tree.get("model"), dict):
        tree = tree | {"model": _with_list(tree["model"], "init_from")}
    if isinstance(tree, dict) and isinstance(tree.get("teacher"), dict):
        _check_word("teacher.prune", tree["teacher"].get("prune"), ("off", "own", "student"))
    model = _model_class(tree)
    objectives = {
        name: registry.resolve(registry.OBJECTIVES, name, "objectives").Config
        for name in registry.OBJECTIVES
    }
    optional = {name: part | None for name, part in objectives.items()}
    check_tree(tree, get_type_hints(Config) | {"model": model, "objectives": optional})
    schema = OmegaConf.structured(Config)
    with read_write(schema):  # frozen classes make read-only nodes
        schema.model = OmegaConf.structured(model)
        for name, part in tree.get("objectives", {}).items():
            if part is not None:
                schema.objectives[name] = OmegaConf.structured(objectives[name])
    try:
        merged = OmegaConf.merge(schema, tree)
        _check_numbers(OmegaConf.to_container(merged, resolve=True))
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, tree)) from None
    on = {name: part for name, part in config.objectives.items() if part is not None}
    config = dataclasses.replace(config, objectives=on)
    _check_across(config)
    return config


def config_for_model(model: dict[str, Any]) -> Config:
    """The published recipe of a model's family, with the model itself as its tree says.

    Of the recipe's pruning what does not fit a tower of another depth is left out.
    """
    tree = _read_preset(f"{model['name']}_4m")
    depth = model["vision"]["depth"]
    stages = [
        stage for stage in tree["pruning"]["stages"] if stage["layer"] + stage["lookahead"] <= depth
    ]
    tree = _merge(tree, {"pruning": {"stages": stages}, "model": model})
    limit = build_config(tree | {"data": tree["data"] | {"text_length": 2}}).model.text.max_length
    length = min(tree["data"]["text_length"], limit)
    return build_config(_merge(tree, {"data": {"text_length": length}}))


def dump_config(config: Config) -> str:
    """YAML of the resolved config; read_config gives the same Config back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def changed_keys(old: Config, new: Config) -> list[str]:
    """Keys that make two configs two runs, as 'key: old -> new', free ones left out."""
    a, b = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
        and (key == "run.seed" or key.split(".")[0] not in FREE_SECTIONS)
        and key not in FREE_KEYS
        # Settled once, at the run's first start, and kept (launching/settle.py).
        and not (key == "batching.global_batch_size" and b.get(key) == "auto")
    ]


def _read_preset(name: str, above: Sequence[str] = ()) -> dict[Any, Any]:
    """A preset's tree, merged over those it extends. above: the presets that led here."""
    chain = " extends ".join([*above, name])
    if name not in list_presets():
        raise UserError(f"preset={chain} is not known; {registry.suggest(name, list_presets())}")
    if name in above:
        raise UserError(f"preset={chain}: a preset cannot extend itself")
    path = PRESETS / f"{name}.yaml"
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"preset={chain}: {path} cannot be read: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"preset={chain}: {path} holds no sections")
    base = tree.pop("extends", None)
    return tree if base is None else _merge(_read_preset(str(base), [*above, name]), tree)


def _merge(under: dict[Any, Any], over: dict[Any, Any], at: str = "") -> dict[Any, Any]:
    """Sections merge; a value, a list or a null replaces what was there."""
    merged = dict(under)
    for key, value in over.items():
        there, full = merged.get(key), f"{at}{key}"
        if isinstance(value, dict) and isinstance(there, dict):
            value = _merge(there, value, f"{full}.")
        elif isinstance(value, dict) and isinstance(there, str | int | float):
            raise UserError(
                f"{full}={show(there)} contradicts {full}={show(value)}; keep one of them"
            )
        merged[key] = value
    return merged


def _read_words(words: list[str]) -> list[dict[str, Any]]:
    """key=value words -> a tree for each."""
    trees: list[dict[str, Any]] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not key=value; see --help")
        parts = key.split(".")
        if not all(parts):
            raise UserError(f"{word!r}: {key!r} is no key; write SECTION.KEY=VALUE; see --help")
        tree: Any = text if key == "preset" else _read_value(word, text)
        if isinstance(tree, int | float) and _is_text(parts):
            tree = text  # run.name=007 and run.name=on mean what they say
        for i, part in reversed(list(enumerate(parts))):
            if part.isdigit() or "[" in part:
                whole = ".".join(parts[: i + ("[" in part)]).partition("[")[0]
                raise UserError(f"{word!r}: a list is set as a whole, {whole}=[...]")
            tree = {part: tree}
        trees.append(tree)
    return trees


def _is_text(parts: list[str]) -> bool:
    """Whether the setting at these parts of a key holds text."""
    shape: Any = Config
    for part in parts:
        shape = get_type_hints(shape).get(part) if dataclasses.is_dataclass(shape) else None
    return shape in (str, str | None)


def _read_value(word: str, text: str) -> Any:
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception:  # the YAML reader raises all sorts: KeyError, AttributeError, RecursionError
        key = word.partition("=")[0]
        raise UserError(
            f"{word!r}: the value is no YAML; quote a text with any of {{}}[],:# in it, "
            f"""as in '{key}="..."'"""
        ) from None
    return tree["value"]


def _as_sources(value: Any) -> list:
    """The short forms of data.train and data.val: one pattern, or a list that holds patterns."""
    entries = value if isinstance(value, list) else [] if value in (None, "") else [value]
    return [{"shards": entry} if isinstance(entry, str) else entry for entry in entries]


def _with_list(section: dict[str, Any], key: str) -> dict[str, Any]:
    """The short forms of a list of texts: one text, or null for none."""
    value = section.get(key, [])
    if value is None or isinstance(value, str):
        return section | {key: [value] if value else []}
    return section


def _check_word(key: str, value: Any, words: Sequence[str]) -> None:
    """YAML takes a bare off for false: what to write instead."""
    if isinstance(value, bool):
        choice = ", ".join(f'"{word}"' for word in words)
        raise UserError(
            f"{key}={show(value)}: choose one of {choice}, with the quotes, as YAML reads a bare "
            "off as false"
        )


def _model_class(tree: Any) -> type:
    """The Config class of the model that a tree names."""
    model = tree.get("model") if isinstance(tree, dict) else None
    name = model.get("name", "albef") if isinstance(model, dict) else "albef"
    return registry.resolve(registry.MODELS, str(name), "model.name").Config


def _flatten(tree: Any, at: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= _flatten(value, f"{at}.{key}" if at else str(key))
        return flat
    return {at: tree}


def _explain(error: OmegaConfBaseException, tree: dict[str, Any]) -> str:
    key, what = str(error.full_key or ""), str(error).partition("\n")[0]
    value = _flatten(tree).get(key)
    return what if value is None else f"{key}={show(value)}: {what}"


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _check_numbers(tree: Any) -> None:
    """What holds for the numbers of any model and objective; each class checks the rest."""
    for section, low in (("model", 1), ("objectives", 0)):
        for key, value in _flatten(tree[section], section).items():
            least = low if isinstance(value, int) else 0
            if isinstance(value, int | float) and not isinstance(value, bool) and value < least:
                raise UserError(f"{key}={value}: {least} or more")


def _check_across(config: Config) -> None:
    registry.resolve(registry.TASKS, config.task, "task")
    if not config.objectives:
        raise UserError(
            f"objectives: none is on; switch one on, objectives.NAME={{}}, NAME one of "
            f"{', '.join(registry.OBJECTIVES)}"
        )
    if config.batching.hetero == "per_node" and config.pruning.schedule:
        raise UserError(
            "batching.hetero=per_node does not work with pruning.schedule, whose stretches have "
            "micro-batches of their own; set batching.hetero=common or pruning.schedule=[]"
        )
    positions = config.model.text.max_length
    if config.data.text_length > positions:
        raise UserError(
            f"data.text_length={config.data.text_length} exceeds the {positions} tokens that "
            "model.text.max_positions leaves room for; lower the one or raise the other"
        )
    if not config.data.val and (config.eval.every or config.run.on_finish == "evaluate"):
        raise UserError(
            "data.val is empty: name held-out shards, or set eval.every=null and "
            "run.on_finish=nothing"
        )
    config.model.check(config.pruning)
