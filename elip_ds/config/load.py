"""Command line -> Config: preset + key=value, typed and frozen. The only file that sees OmegaConf.

Every error a config can have is raised here, as one line with the key, before anything starts.
"""

import argparse
import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from elip_ds import registry
from elip_ds.config.schema import Config
from elip_ds.errors import UserError

PRESETS = Path(__file__).parent / "presets"

# What may differ between two starts of one run: it changes where and how fast, not what is learned.
FREE_SECTIONS = ("run", "engine", "checkpoint", "eval", "metrics", "preset")
FREE_KEYS = ("data.workers", "data.builtin.dir", "data.max_bad_share", "batching.micro_batch_size")

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
  deepspeed elip_ds/train.py --deepspeed ds_configs/z1.json preset=albef_base \\
      'data.train=/data/cc3m/{000000..000331}.tar' 'data.val=/data/coco/val-*.tar'
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def parse_arguments(argv: list[str]) -> tuple[str | None, list[str]]:
    """argv without the program -> (DeepSpeed JSON or None, key=value words).

    --help and preset=list print and leave with status 0.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed", "--deepspeed_config", metavar="PATH")
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
    for word in known.words:
        if not re.match(r"[\w.]+=", word):
            raise UserError(f"{word!r} is not key=value; see --help")
    return known.deepspeed, known.words


def list_presets() -> dict[str, str]:
    """Preset name -> the first comment line of its file."""
    return {
        path.stem: path.read_text().splitlines()[0].lstrip("# ").strip()
        for path in sorted(PRESETS.glob("*.yaml"))
    }


def load_config(argv: list[str]) -> Config:
    """argv: command-line words without the program.  Raises UserError, one line, for any fault."""
    deepspeed, words = parse_arguments(argv)
    preset = "demo"
    for word in words:
        if word.startswith("preset="):
            preset = word.partition("=")[2]
    raw = OmegaConf.merge(_read_preset(preset), _read_words(words))
    assert isinstance(raw, DictConfig)
    if deepspeed is not None:
        OmegaConf.update(raw, "engine.deepspeed", deepspeed)
    OmegaConf.update(raw, "preset", preset)
    return build_config(OmegaConf.to_container(raw))


def read_config(path: Path) -> Config:
    """The resolved config.yaml that a run or a checkpoint keeps."""
    return build_config(yaml.safe_load(path.read_text()))


def build_config(tree: Any) -> Config:
    """A plain tree of settings -> Config, checked section by section and across sections."""
    tree = {key: value for key, value in tree.items() if value is not None or key == "init_from"}
    data = tree.get("data", {})
    for key in ("train", "val"):
        if key in data:
            data[key] = _as_sources(data[key])
    schema = OmegaConf.structured(Config)
    model_name = (tree.get("model") or {}).get("name", "albef")
    with read_write(schema):  # frozen classes make read-only nodes
        model = registry.resolve(registry.MODELS, model_name, "model.name")
        schema.model = OmegaConf.structured(model.Config)
        for name, part in (tree.get("objectives") or {}).items():
            objective = registry.resolve(registry.OBJECTIVES, name, "objectives")
            if part is not None:
                schema.objectives[name] = OmegaConf.structured(objective.Config)
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(schema, tree))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from None
    objectives = {name: part for name, part in config.objectives.items() if part is not None}
    config = dataclasses.replace(config, objectives=objectives)
    _check_across(config)
    return config


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
    ]


def _read_preset(name: str) -> DictConfig:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"preset={name} is not known; {registry.suggest(name, list_presets())}")
    preset = OmegaConf.load(path)
    assert isinstance(preset, DictConfig)
    base = preset.pop("extends", None)
    merged = OmegaConf.merge(_read_preset(base), preset) if base else preset
    assert isinstance(merged, DictConfig)
    return merged


def _read_words(words: list[str]) -> DictConfig:
    words = [word for word in words if not word.startswith("preset=")]
    try:
        return OmegaConf.from_dotlist(words)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        for word in words:
            try:
                OmegaConf.from_dotlist([word])
            except Exception:
                raise UserError(f"{word!r} cannot be read as key=value (YAML)") from None
        raise UserError(f"the settings contradict each other: {_first_line(error)}") from None


def _as_sources(value: Any) -> list:
    entries = value if isinstance(value, list) else [value]
    return [{"shards": entry} if isinstance(entry, str) else entry for entry in entries]


def _flatten(tree: Any, at: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= _flatten(value, f"{at}.{key}" if at else str(key))
        return flat
    return {at: tree}


def _explain(error: OmegaConfBaseException, schema: DictConfig) -> str:
    key = str(getattr(error, "full_key", "") or "")
    cause = error.__cause__
    if isinstance(cause, UserError):  # raised by a section's __post_init__
        return str(cause)
    if isinstance(error, ConfigKeyError) or "not in '" in str(error):
        known = list(_flatten(OmegaConf.to_container(schema, throw_on_missing=False)))
        sections = {k.rpartition(".")[0] for k in known}
        near = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key} is not a setting{hint}"
    if isinstance(error, ValidationError):
        return f"{key}: {_first_line(error)}"
    return f"{key}: {_first_line(error)}" if key else _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _check_across(config: Config) -> None:
    registry.resolve(registry.TASKS, config.task, "task")
    if not config.objectives:
        raise UserError("objectives: none is on; switch on at least one of itc, itm, mlm")
    config.model.check(config.pruning)
