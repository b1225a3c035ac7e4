"""Presets and words in, a Config or one clear line out."""

import dataclasses
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elip_ds.config import Config, changed_keys, dump_config, load, load_config, read_config
from elip_ds.errors import UserError

PRESETS = sorted(load.list_presets())
DEMO = load_config([])


def message(*words: str) -> str:
    """The error line of these words."""
    with pytest.raises(UserError) as caught:
        load_config(list(words))
    line = str(caught.value)
    assert "\n" not in line
    return line


# What works


def test_without_words_the_demo_is_loaded() -> None:
    config = load_config([])
    assert (config.preset, config.run.name) == ("demo", "demo")
    assert list(config.objectives) == ["itc", "itm", "mlm"]


def test_words_change_settings_of_the_preset() -> None:
    config = load_config(["optim.lr=2e-4", "data.flip=true", "eval.every=1 epoch"])
    assert (config.optim.lr, config.data.flip, config.eval.every) == (2e-4, True, "1 epoch")


def test_a_list_replaces_the_whole_list() -> None:
    assert len(DEMO.pruning.stages) > 1
    assert load_config(["pruning.stages=[]"]).pruning.stages == []
    one = load_config(["pruning.stages=[{layer: 1, lookahead: 2, keep_ratio: 0.5}]"])
    assert [stage.lookahead for stage in one.pruning.stages] == [2]


def test_null_switches_an_objective_off() -> None:
    assert list(load_config(["objectives.itm=null"]).objectives) == ["itc", "mlm"]


def test_a_section_word_merges_with_the_preset() -> None:
    config = load_config(["optim={weight_decay: 0.1}"])
    assert config.optim == dataclasses.replace(DEMO.optim, weight_decay=0.1)


@pytest.mark.parametrize("value", ["a.tar", "[a.tar]", "{shards: a.tar}", "[{shards: a.tar}]"])
def test_sources_have_short_forms(value: str) -> None:
    (source,) = load_config([f"data.train={value}"]).data.train
    assert (source.shards, source.weight) == ("a.tar", 1.0)


@pytest.mark.parametrize("name", ["007", "1e3", "on", "no", "2024-01-01", "1_000", "a b"])
def test_text_stays_as_it_was_written(name: str) -> None:
    assert load_config([f"run.name={name}"]).run.name == name


def test_a_value_may_refer_to_others() -> None:
    config = load_config(["run.name=${preset}-${run.seed}", "eval.batch_size=${run.seed}"])
    assert (config.run.name, config.eval.batch_size) == ("demo-42", 42)


@pytest.mark.parametrize(
    "argv",
    [
        ["--deepspeed", "z2.json"],
        ["--deepspeed=z2.json"],
        ["--deepspeed_config", "z2.json"],
        ["--deepspeed", "--deepspeed_config", "z2.json"],
        ["--local_rank=1", "optim.lr=1", "--deepspeed", "z2.json", "run.seed=1"],
        ["--local_rank", "0", "engine.deepspeed=z2.json"],
        ["--deepspeed", "z2.json", "engine.deepspeed=z2.json"],
    ],
)
def test_the_launcher_s_words_are_understood(argv: list[str]) -> None:
    assert load_config(argv).engine.deepspeed == "z2.json"


def test_the_same_word_twice_is_said_once() -> None:
    assert load_config(["optim.lr=1", "optim.lr=1"]).optim.lr == 1


def test_everything_is_frozen() -> None:
    config = load_config([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_help_shows_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load_config(["--help"])
    assert left.value.code == 0
    examples = capsys.readouterr().out.partition("examples:")[2]
    assert examples.count("deepspeed elip_ds/train.py --deepspeed ds_configs/") == 3


def test_the_preset_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load_config(["preset=list"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == PRESETS
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_dumped_config_reads_back_equal(preset: str, tmp_path: Path) -> None:
    config = load_config([f"preset={preset}"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert read_config(path) == config
    assert changed_keys(config, read_config(path)) == []


@pytest.mark.parametrize(
    "word",
    [
        "run.name=other",
        "run.dir=elsewhere",
        "run.on_finish=nothing",
        "engine.precision=bf16",
        "checkpoint.keep=5",
        "eval.every=1 epoch",
        "metrics.port=null",
        "data.workers=3",
        "data.builtin.dir=elsewhere",
        "data.max_bad_share=0.5",
        "batching.micro_batch_size=4",
    ],
)
def test_where_and_how_fast_are_free_to_change(word: str) -> None:
    assert changed_keys(DEMO, load_config([word])) == []


@pytest.mark.parametrize(
    "word",
    [
        "run.seed=1",
        "optim.lr=0.625",
        "data.builtin.train=7",
        "model.embed_dim=24",
        "objectives.mlm.weight=2.0",
        "batching.global_batch_size=6",
        "pruning.stages=[]",
    ],
)
def test_what_is_learned_is_not_free_to_change(word: str) -> None:
    key, _, new = word.partition("=")
    old = load._flatten(dataclasses.asdict(DEMO))[key]
    assert changed_keys(DEMO, load_config([word])) == [f"{key}: {old} -> {new}"]


@pytest.mark.parametrize("value", ["x", "[x]", "['x']"])
def test_one_file_to_start_from_is_a_list_of_one(value: str) -> None:
    config = load_config([f"model.init_from={value}"])
    assert config.model.init_from == ["x"]
    assert changed_keys(DEMO, config) == ["model.init_from: [] -> ['x']"]


@pytest.mark.parametrize("value", ["null", "[]", "''"])
def test_no_file_to_start_from_is_an_empty_list(value: str) -> None:
    assert load_config([f"model.init_from={value}"]).model.init_from == []


# What does not


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim=3", "optim=3: a section; write optim.KEY=VALUE, KEY one of lr, betas"),
        ("optim=null", "optim=null: a section"),
        ("model=albef", "model=albef: a section; write model.KEY=VALUE, KEY one of name"),
        ("model=null", "model=null: a section"),
        ("objectives=3", "objectives=3: a section"),
        ("objectives.itc=3", "objectives.itc=3: a section"),
        ("optim=${model}", "optim=${model}: a section"),
        ("objectives=${model}", "objectives=${model}: a section"),
    ],
)
def test_a_value_for_a_section(word: str, line: str) -> None:
    assert message(word).startswith(line)


@pytest.mark.parametrize(
    ("word", "key", "suggestion"),
    [
        ("optim.lrr=1", "optim.lrr", "optim.lr"),
        ("optm.lr=1", "optm", "optim"),
        ("lr=1", "lr", "optim.lr"),
        ("keep=1", "keep", "checkpoint.keep"),
        ("data.seed=1", "data.seed", "run.seed"),
        ("objectives.itx={}", "objectives.itx", "objectives.itm"),
        ("objectives.itc.queue=1", "objectives.itc.queue", "objectives.itc.queue_size"),
        ("model.vision.patchsize=1", "model.vision.patchsize", "model.vision.patch_size"),
        (
            "pruning.stages=[{layer: 1, lokahead: 1, keep_ratio: .5}]",
            "pruning.stages[0].lokahead",
            "pruning.stages[0].lookahead",
        ),
        ("data.train=[{shard: a}]", "data.train[0].shard", "data.train[0].shards"),
        ("data.val=[a, {shards: b, weigth: 2}]", "data.val[1].weigth", "data.val[1].weight"),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(word: str, key: str, suggestion: str) -> None:
    assert message(word) == f"{key} is not a setting; did you mean {suggestion}?"


def test_an_unknown_key_near_nothing_gets_the_known_ones() -> None:
    assert message("checkpoint.xyzzy=1") == (
        "checkpoint.xyzzy is not a setting; known: every, every_minutes, keep"
    )


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("data.crop_scale=abc", "data.crop_scale=abc: a list is wanted, such as [0.2, 1.0]"),
        ("data.crop_scale=[a, 1]", "data.crop_scale[0]=a: a number is wanted"),
        ("data.crop_scale=[0.5]", "data.crop_scale=[0.5]: two shares"),
        ("optim.lr=fast", "optim.lr=fast: a number is wanted, such as 0.0001"),
        ("optim.lr=true", "optim.lr=true: a number is wanted"),
        ("optim.lr=.nan", "optim.lr=.nan: a number is wanted"),
        ("optim.lr=.inf", "optim.lr=.inf: a number is wanted"),
        ("optim.lr=???", "optim.lr=???: a number is wanted"),
        ("optim.lr=null", "optim.lr=null: a number is wanted"),
        ("optim.lr=", "optim.lr=null: a number is wanted"),
        ("eval.batch_size=1.5", "eval.batch_size=1.5: a whole number is wanted, such as 64"),
        (f"eval.batch_size={10**30}", f"eval.batch_size={10**30}: a whole number is wanted"),
        ("data.flip=maybe", "data.flip=maybe: true or false is wanted"),
        ("optim.multipliers=3", "optim.multipliers=3: a table is wanted"),
        ("pruning.stages=3", "pruning.stages=3: a list is wanted, such as [{layer: ..., lookahead"),
        ("pruning.stages=[3]", "pruning.stages[0]=3: wanted are settings, {layer, lookahead"),
        ("pruning.stages=[{layer: 1, lookahead: 1}]", "pruning.stages[0].keep_ratio is missing"),
        (
            "batching.micro_batch_size=1.5",
            "batching.micro_batch_size=1.5: a whole number or a text",
        ),
        ("data.train=", "data.train is empty: name at least one shard pattern"),
        ("data.train=[]", "data.train is empty"),
        (
            "data.train=[3]",
            "data.train[0]=3: wanted are settings, {shards, weight, index, ",
        ),
    ],
)
def test_a_value_of_the_wrong_kind(word: str, line: str) -> None:
    assert message(word).startswith(line)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim.lr", "'optim.lr' is not key=value"),
        ("=x", "'=x': '' is no key"),
        ("optim..lr=1", "'optim..lr=1': 'optim..lr' is no key"),
        (".=1", "'.=1': '.' is no key"),
        ("optim.lr=[1", "'optim.lr=[1': the value is no YAML; quote"),
        ("optim.lr=&a [*a]", "'optim.lr=&a [*a]': the value is no YAML"),
        ("optim.lr=!!bool x", "'optim.lr=!!bool x': the value is no YAML"),
        ("optim.lr=${", "'optim.lr=${': the value is no YAML"),
        ("data.train.0.weight=2", "'data.train.0.weight=2': a list is set as a whole, data.train="),
        ("pruning.stages[0].layer=2", "'pruning.stages[0].layer=2': a list is set as a whole"),
    ],
)
def test_a_word_that_is_no_setting(word: str, line: str) -> None:
    assert message(word).startswith(line)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim.lr=${nope}", "optim.lr=${nope}: Interpolation key 'nope' not found"),
        ("optim.lr=${optim.lr}", "optim.lr=${optim.lr}: Recursive interpolation detected"),
        ("optim.lr=${run.dir}", "optim.lr=${run.dir}: "),
    ],
)
def test_a_reference_to_nothing_usable(word: str, line: str) -> None:
    assert message(word).startswith(line)


def test_of_two_words_for_one_setting_the_later_counts() -> None:
    assert load_config(["optim.lr=1", "optim.lr=2", "optim.lr=1"]).optim.lr == 1
    assert (
        "itc"
        not in load_config(
            ["objectives.itc.alpha=0.1", "objectives.itm=null", "objectives.itc=null"]
        ).objectives
    )
    assert load_config(["engine.deepspeed=b", "--deepspeed", "a"]).engine.deepspeed == "a"
    assert load_config(["preset=albef_4m", "preset=demo"]).preset == "demo"


def test_a_value_and_a_section_of_one_name_contradict_each_other() -> None:
    assert message("optim=3", "optim.lr=2") == (
        "optim=3 contradicts optim={lr: 2}; keep one of them"
    )


def test_two_deepspeed_files_are_refused() -> None:
    assert " contradicts " in message("--deepspeed_config", "b", "--deepspeed", "a")


@pytest.mark.parametrize("name", ["a/b", "/a", ".", "..", "''"])
def test_a_run_name_is_one_folder(name: str) -> None:
    assert "the name of one folder, without a slash" in message(f"run.name={name}")


@pytest.mark.parametrize(
    "word",
    [
        "run.seed=-1",
        "run.dir=''",
        "run.on_finish=dance",
        "data.text_length=1",
        "data.crop_scale=[0, 1]",
        "data.crop_scale=[0.9, 0.2]",
        "data.shuffle_shards=0",
        "data.workers=-1",
        "data.max_bad_share=1",
        "data.max_bad_share=-0.1",
        "data.vocabulary=''",
        "data.train=[{shards: a, weight: 0}]",
        "data.train=[{shards: a, weight: -1}]",
        "data.train=[{shards: '', weight: 1}]",
        "data.builtin.dir=''",
        "data.builtin.train=0",
        "data.builtin.val=0",
        "data.builtin.image_size=47",
        "pruning.text_weight=1.5",
        "pruning.eps=0",
        "pruning.empty_stage=x",
        "pruning.stages=[{layer: -1, lookahead: 1, keep_ratio: 0.5}]",
        "pruning.stages=[{layer: 9, lookahead: 1, keep_ratio: 0.5}]",
        "pruning.stages=[{layer: 1, lookahead: 1, keep_ratio: 0}]",
        "teacher.momentum=-0.1",
        "teacher.momentum=1.1",
        "optim.lr=0",
        "optim.lr=-1",
        "optim.eps=0",
        "optim.weight_decay=-1",
        "optim.betas=[0.9]",
        "optim.betas=[0.9, 1]",
        "optim.clip_norm=-1",
        "optim.multipliers={text: -1}",
        "schedule.length=0 samples",
        "schedule.length=-1 epochs",
        "schedule.length=1 hour",
        "schedule.length=1e999 epochs",
        "schedule.warmup=100",
        "schedule.warmup_lr=-1",
        "schedule.min_lr=-1",
        "batching.global_batch_size=0",
        "batching.micro_batch_size=0",
        "batching.micro_batch_size=many",
        "engine.precision=fp8",
        "engine.deepspeed=''",
        "checkpoint.every=0 epochs",
        "checkpoint.every_minutes=0",
        "engine.timeout_seconds=0",
        "checkpoint.keep=0",
        "eval.every=0 epochs",
        "eval.every=3",
        "eval.batch_size=0",
        "eval.max_samples=0",
        "metrics.every=0.5 samples",
        "metrics.port=-1",
        "metrics.port=65536",
        "metrics.address=''",
        "model.vision.patch_size=0",
        "model.vision.patch_size=-8",
        "model.vision.heads=0",
        "model.vision.depth=0",
        "model.vision.mlp_ratio=-1",
        "model.text.vocab_size=0",
        "model.text.dropout=-0.1",
        "model.embed_dim=0",
        "objectives.itc.queue_size=-1",
        "objectives.itc.alpha=2",
        "objectives.itc.alpha_ramp=soon",
        "objectives.itm.weight=-1",
        "objectives.mlm.probability=0",
        "task=sleep",
        "model.name=resnet",
    ],
)
def test_a_number_out_of_range_is_named(word: str) -> None:
    key = word.partition("=")[0]
    section, _, name = key.rpartition(".")
    line = message(word)
    assert line.startswith(section) and name in line


def test_a_text_longer_than_its_positions() -> None:
    assert message("data.text_length=33", "model.text.max_positions=32").startswith(
        "data.text_length=33 exceeds the 32 tokens that model.text.max_positions leaves room for"
    )


def test_a_text_longer_than_robertas_positions_which_start_at_2() -> None:
    words = ["preset=meter_4m", "data.text_length=513", "model.text.max_positions=514"]
    assert "exceeds the 512 tokens" in message(*words)


def test_no_objective() -> None:
    words = [f"objectives.{name}=null" for name in ("itc", "itm", "mlm")]
    assert message(*words).startswith("objectives: none is on")


def test_evaluation_without_held_out_shards() -> None:
    assert message("data.val=[]").startswith("data.val is empty")
    assert load_config(["data.val=[]", "run.on_finish=nothing"]).data.val == []


def test_an_unknown_preset_gets_the_nearest_one() -> None:
    assert message("preset=dmo").startswith("preset=dmo is not known; did you mean 'demo'?")
    assert message("preset=../schema").startswith("preset=../schema is not known")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--local_rank", "x"], "argument --local_rank/--local-rank: invalid int value: 'x'"),
        (["--deepspeeed", "x"], "unrecognized arguments: --deepspeeed"),
        (["--deepspeed_config"], "argument --deepspeed_config: expected one argument"),
    ],
)
def test_an_option_that_is_none(argv: list[str], line: str) -> None:
    assert message(*argv).startswith(line)


# Presets that extend presets


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(load, "PRESETS", tmp_path)
    demo = load.Path(load.__file__).parent / "presets" / "demo.yaml"
    (tmp_path / "demo.yaml").write_text(demo.read_text())
    return tmp_path


def test_a_preset_changes_the_one_it_extends(presets: Path) -> None:
    (presets / "a.yaml").write_text(
        "# A\nextends: demo\noptim: {lr: 0.5}\nobjectives: {itm: null}\n"
    )
    (presets / "b.yaml").write_text("# B\nextends: a\noptim: {weight_decay: 0.25}\n")
    config = load_config(["preset=b"])
    assert (config.optim.lr, config.optim.weight_decay) == (0.5, 0.25)
    assert list(config.objectives) == ["itc", "mlm"]
    assert config.run.name == "b"


def test_a_preset_that_extends_an_unknown_one(presets: Path) -> None:
    (presets / "a.yaml").write_text("# A\nextends: nope\n")
    assert message("preset=a").startswith("preset=a extends nope is not known; known: a, demo")


def test_a_preset_that_extends_itself(presets: Path) -> None:
    (presets / "a.yaml").write_text("# A\nextends: b\n")
    (presets / "b.yaml").write_text("# B\nextends: a\n")
    assert message("preset=a") == "preset=a extends b extends a: a preset cannot extend itself"


@pytest.mark.parametrize("text", ["# A\noptim: [\n", "# A\n- 1\n"])
def test_a_preset_file_that_cannot_be_read(presets: Path, text: str) -> None:
    (presets / "a.yaml").write_text(text)
    assert message("preset=a").startswith(f"preset=a: {presets}/a.yaml ")


def test_a_saved_config_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("optim: [", "optim: {lrr: 1}", "- 1", "", "optim: {lr: -1}"):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            read_config(path)
        assert str(caught.value).startswith(f"{path}") and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_config(tmp_path / "none.yaml")


# Everything else


def demo_words() -> list[str]:
    tree = yaml.safe_load(dump_config(DEMO))
    flat = load._flatten(tree)
    return [f"{key}={load.show(value)}" for key, value in flat.items() if key != "preset"]


WORDS = demo_words()
KEYS = sorted({".".join(w.partition("=")[0].split(".")[:n]) for w in WORDS for n in (1, 2, 3)})
CHARACTERS = string.ascii_letters + string.digits + "._-=[]{}$:,#&*!?|>%@'\"\\/ \t\n~é\0"
ODD = [
    *("null", "~", "true", "on", "0", "-1", ".nan", ".inf", "???", "1e400", "0x10", "1:30", "1_0"),
    *("[]", "{}", "[[]]", "{a:}", "[1,2]", "''", "!!set{a}", "builtin", "auto", "1e-30 epochs"),
    *("${preset}", "${nope}", "${run}", "${optim.lr}", "${oc.env:HOME}", "${oc.env:NOPE}", "${"),
]
VALUES = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(ODD),
    st.sampled_from(WORDS).map(lambda word: word.partition("=")[2]),
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(KEYS))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(key)))
        key = key[:at] + draw(st.text(CHARACTERS, max_size=1)) + key[at + draw(st.integers(0, 1)) :]
    return f"{key}={draw(VALUES)}"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(mutated(), min_size=1, max_size=3))
@example(["optim.l\nr=1"])
@example(['optim={"l\\nr": 1}'])
def test_any_words_give_a_config_or_one_line(words: list[str]) -> None:
    try:
        config = load_config(words)
    except UserError as error:
        assert str(error)
        assert "\n" not in str(error)
    except SystemExit as left:
        assert left.code == 0 and any(w in ("-h", "--help", "preset=list") for w in words)
    else:
        assert isinstance(config, Config)
        assert load.build_config(yaml.safe_load(dump_config(config))) == config
