"""The typed tree of a run. Defaults live here only; "auto" means planned, null means off.

`model` and the entries of `objectives` take the type that the registered class names as its Config,
so they are typed in load.py. Everything is frozen: a run's configuration never changes under way.
"""

from dataclasses import dataclass, field
from typing import Any

from elip_ds.config.duration import check_ascending, check_duration
from elip_ds.errors import UserError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@dataclass(frozen=True)
class RunConfig:
    name: str = "${preset}"
    "Name of the run; its folder is dir/name."
    dir: str = "runs"
    "Folder that holds the runs."
    seed: int = 42
    "Seed of weights, shuffling, masks and sampling. The same seed gives the same run."
    allow_config_change: bool = False
    "Go on in a run folder that was started with another configuration."
    on_finish: str = "evaluate"
    "What a started run does at its end: evaluate, or nothing."

    def __post_init__(self) -> None:
        _require(
            self.name not in ("", ".", "..") and not set(self.name) & {"/", "\0"},
            f"run.name={self.name!r}: the name of one folder, without a slash; run.dir holds it",
        )
        _require(bool(self.dir), "run.dir is empty: name a folder, '.' for this one")
        _require(0 <= self.seed < 2**32, f"run.seed={self.seed}: 0 to 2**32 - 1")
        _require(
            self.on_finish in ("evaluate", "nothing"),
            f"run.on_finish={self.on_finish!r}: choose evaluate or nothing",
        )


@dataclass(frozen=True)
class ShardSource:
    shards: str
    """Tar shards: a path, a glob, a brace pattern, a name with :// such as
    s3://bucket/coco-{000..113}.tar, pipe:COMMAND, or 'builtin' for the project's own scenes."""
    weight: float = 1.0
    "How often an epoch visits each sample: 2 is twice, 0.5 every other epoch."
    index: str | None = None
    "Of remote shards, where it is not index.json beside them: its name, which may be a pipe:, too."
    caption: str = "random"
    "Which of an image's captions is trained on: a random one each time, or the first."


@dataclass(frozen=True)
class BuiltinConfig:
    dir: str = "data/scenes"
    "Where the built-in scenes are kept as shards; written once, reused after."
    train: int = 12000
    "Number of training scenes."
    val: int = 1000
    "Number of held-out scenes."
    image_size: int = 64
    "Side of a scene, pixels, at least 48: smaller ones would not show what the captions say."

    def __post_init__(self) -> None:
        _require(bool(self.dir), "data.builtin.dir is empty: name a folder")
        _require(self.train >= 1, f"data.builtin.train={self.train}: 1 or more")
        _require(self.val >= 1, f"data.builtin.val={self.val}: 1 or more")
        _require(self.image_size >= 48, f"data.builtin.image_size={self.image_size}: 48 or more")


RAND_AUGMENTS = {"albef": 10, "meter": 30}
"Kinds, and the largest magnitude of each."


@dataclass(frozen=True)
class RandAugmentConfig:
    kind: str = "albef"
    "albef, which BLIP has too, after crop and mirror; or meter, its clip_randaug, before them."
    ops: int = 2
    "Operations drawn for an image."
    magnitude: int = 7
    "How strong they are: 0 to 10 for albef, 0 to 30 for meter."

    def __post_init__(self) -> None:
        _require(
            self.kind in RAND_AUGMENTS,
            f"data.rand_augment.kind={self.kind!r}: choose {' or '.join(RAND_AUGMENTS)}",
        )
        _require(self.ops >= 1, f"data.rand_augment.ops={self.ops}: 1 or more")
        most = RAND_AUGMENTS[self.kind]
        _require(
            0 <= self.magnitude <= most,
            f"data.rand_augment.magnitude={self.magnitude}: 0 to {most} for {self.kind}",
        )


TOKENIZERS = ("albef", "bert", "blip", "roberta", "clip")


@dataclass(frozen=True)
class CacheConfig:
    dir: str = "auto"
    "Folder for copies of remote shards, best on a local disk; auto: elip_ds/shards in ~/.cache."
    limit_gib: float = 100.0
    "The copies take no more than this; the least recently used ones go first."

    def __post_init__(self) -> None:
        _require(bool(self.dir), "data.cache.dir is empty: 'auto' or a folder")
        _require(self.limit_gib > 0, f"data.cache.limit_gib={self.limit_gib}: above 0")


@dataclass(frozen=True)
class DataConfig:
    train: list[ShardSource] = field(default_factory=lambda: [ShardSource("builtin")])
    "Training shards: one pattern, or a list of {shards, weight, caption}."
    val: list[ShardSource] = field(default_factory=lambda: [ShardSource("builtin")])
    "Held-out shards, same forms."
    builtin: BuiltinConfig = field(default_factory=BuiltinConfig)
    root: str = "data"
    "Folder of the shards and vocabularies that presets name, as ${data.root}/coco/train-*.tar."
    tokenizer: str = "albef"
    "How captions become ids: as albef, bert (METER with BERT), blip, roberta or clip does it."
    vocabulary: str = "auto"
    "A file, bert-base-uncased, roberta-base or clip; auto: learned from the training captions."
    text_length: int = 25
    "Tokens a caption is cut or padded to, those around it included."
    pad: str = "fixed"
    """Training captions are padded to text_length ('fixed'), or to the longest of their
    micro-batch, rounded up to a multiple of 8 ('longest'), which saves work and changes no loss."""
    crop_scale: list[float] | None = field(default_factory=lambda: [0.2, 1.0])
    "Share of the image's area that a training crop covers, low and high; null: no crop."
    resize: str = "squash"
    "How test images get their size: squash, or scale the short side and center_crop (METER, CLIP)."
    flip: bool = True
    "Mirror half of the training images left to right."
    rand_augment: RandAugmentConfig | None = None
    "Random changes of colour and place in training, {kind: ..., ops: ..., magnitude: ...}."
    decode: str = "fast"
    """Training images: 'fast' decodes a JPEG at a half, quarter or eighth where its crop stays
    larger than the model's images, and sizes by torch; 'exact' does as the published transforms."""
    max_pixels: int = 24_000_000
    """Larger images are skipped before they are decoded; 6000 x 4000. Until it is sized, one takes
    up to 10 bytes a pixel as a JPEG, 14 as a PNG and 22 as a WebP."""
    min_side: int = 8
    "Images with a shorter side, in pixels, are skipped: they show nothing."
    shuffle_shards: int = 16
    "Samples are shuffled among this many shards at a time; shards are shuffled every epoch."
    workers: int = 1
    "Loader processes per rank; 0 loads in the training process."
    max_bad_share: float = 0.01
    "Stop when more than this share of the samples read cannot be used."
    cache: CacheConfig = field(default_factory=CacheConfig)
    time_limit_seconds: float = 60.0
    "A read of a shard that takes longer has failed: a network file system may never answer."
    retries: int = 3
    "Further tries of a remote shard, with pauses of 0.5 s, 1 s, 2 s, ... between them."

    def __post_init__(self) -> None:
        for split, sources in (("train", self.train), ("val", self.val)):
            for i, source in enumerate(sources):
                key = f"data.{split}[{i}]"
                _require(bool(source.shards), f"{key}.shards is empty: name shards, or builtin")
                _require(
                    0 < source.weight <= 1000, f"{key}.weight={source.weight}: above 0, to 1000"
                )
                _require(
                    source.caption in ("random", "first"),
                    f"{key}.caption={source.caption!r}: choose random or first",
                )
        _require(bool(self.root), "data.root is empty: name a folder, '.' for this one")
        _require(
            self.tokenizer in TOKENIZERS,
            f"data.tokenizer={self.tokenizer!r}: choose one of {', '.join(TOKENIZERS)}",
        )
        _require(
            bool(self.vocabulary), "data.vocabulary is empty: 'auto', a file or a published name"
        )
        _require(self.text_length >= 2, f"data.text_length={self.text_length}: 2 or more")
        _require(
            self.pad in ("fixed", "longest"), f"data.pad={self.pad!r}: choose fixed or longest"
        )
        low_high = [1.0, 1.0] if self.crop_scale is None else list(self.crop_scale)
        _require(
            len(low_high) == 2 and 0 < low_high[0] <= low_high[1] <= 1,
            f"data.crop_scale={low_high}: two shares, 0 < low <= high <= 1, or null for no crop",
        )
        _require(
            self.resize in ("squash", "center_crop"),
            f"data.resize={self.resize!r}: choose squash or center_crop",
        )
        _require(
            self.decode in ("fast", "exact"),
            f"data.decode={self.decode!r}: choose fast or exact",
        )
        _require(self.max_pixels >= 1, f"data.max_pixels={self.max_pixels}: 1 or more")
        _require(self.min_side >= 1, f"data.min_side={self.min_side}: 1 or more")
        _require(self.shuffle_shards >= 1, f"data.shuffle_shards={self.shuffle_shards}: 1 or more")
        _require(self.workers >= 0, f"data.workers={self.workers}: 0 or more")
        _require(
            0 <= self.max_bad_share < 1,
            f"data.max_bad_share={self.max_bad_share}: a share, 0 or more and below 1",
        )
        _require(
            self.time_limit_seconds > 0,
            f"data.time_limit_seconds={self.time_limit_seconds}: above 0",
        )
        _require(self.retries >= 0, f"data.retries={self.retries}: 0 or more")
        _require(len(self.train) > 0, "data.train is empty: name at least one shard pattern")


@dataclass(frozen=True)
class Stage:
    layer: int
    "Prune before this block, counted from 0."
    lookahead: int
    "Blocks that the no-gradient look-ahead runs to get the scores."
    keep_ratio: float
    "Patches that survive, as a share of the tower's full patch count."


@dataclass(frozen=True)
class KeepChange:
    after: str
    "From when on these ratios hold, in epochs or samples of the run."
    keep_ratios: list[float]
    "A keep_ratio for each of pruning.stages; 1: the stage does nothing."


@dataclass(frozen=True)
class PruningConfig:
    stages: list[Stage] = field(default_factory=list)
    "Where and how much to prune; an empty list is a plain ViT."
    schedule: list[KeepChange] = field(default_factory=list)
    """Keep ratios that change as training goes on, [{after: ..., keep_ratios: [...]}]; before the
    first entry the stages' own hold. Whatever is not training prunes as the last entry says."""
    text_weight: float = 0.2
    "Share of the text's class vector in the look-ahead's class token (ELIP: 0.2)."
    eps: float = 1e-6
    "Added to the sum of the merged tokens' scores."
    keep_base: str = "patches"
    "What keep ratios refer to: the tower's 'patches', or the constant of the 'released' code."
    empty_stage: str = "skip"
    "A stage that merges nothing: 'skip' it, or append a 'zero_token' as the released code does."

    def __post_init__(self) -> None:
        _require(0 <= self.text_weight <= 1, f"pruning.text_weight={self.text_weight}: 0..1")
        _require(self.eps > 0, f"pruning.eps={self.eps}: above 0")
        for i, change in enumerate(self.schedule):
            key, ratios = f"pruning.schedule[{i}]", list(change.keep_ratios)
            check_duration(f"{key}.after", change.after, above_zero=True)
            _require(
                len(ratios) == len(self.stages),
                f"{key}.keep_ratios={ratios}: wanted is one for each of the {len(self.stages)} "
                "pruning.stages; without stages set pruning.schedule=[], too",
            )
        check_ascending("pruning.schedule[{}].after", [change.after for change in self.schedule])
        _require(
            self.empty_stage in ("skip", "zero_token"),
            f"pruning.empty_stage={self.empty_stage!r}: choose skip or zero_token",
        )
        _require(
            self.keep_base in ("patches", "released"),
            f"pruning.keep_base={self.keep_base!r}: choose patches or released",
        )


@dataclass(frozen=True)
class TeacherConfig:
    momentum: float = 0.995
    "Share that the momentum twin keeps of itself at every optimizer step."
    prune: str = "off"
    """Of the twin's images: 'off', it sees all tokens, as published; 'own', its own text and
    look-ahead guide it; 'student', it keeps and merges what the student chose, without looking."""

    def __post_init__(self) -> None:
        _require(
            self.prune in ("off", "own", "student"),
            f"teacher.prune={self.prune!r}: choose off, own or student",
        )
        _require(0 <= self.momentum <= 1, f"teacher.momentum={self.momentum}: 0..1")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-4
    "Peak learning rate; by lr_rule, that of a batch of base_batch_size."
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.02
    no_decay: list[str] = field(default_factory=list)
    "Parameters without decay besides biases and vectors: every name that contains one of these."
    decay: list[str] = field(default_factory=lambda: ["temperature"])
    "Vectors that do decay (the published temperature does, being a 0-d tensor there)."
    multipliers: dict[str, float] = field(default_factory=dict)
    "Learning-rate factors: every parameter whose name contains the key; the last match counts."
    clip_norm: float = 0.0
    "Largest gradient norm; 0 is off."
    name: str = "adamw"
    "adamw, or lamb for very large batches."
    lr_rule: str = "none"
    "What the peak is multiplied by: none, or linear or sqrt of global batch / base_batch_size."
    base_batch_size: int | None = None
    "Samples per step that optim.lr was found at, for lr_rule."
    lamb_above: int | None = None
    "Global batch above which LAMB takes AdamW's place; null: never."
    lamb_lr: float | None = None
    "In its place optim.lr where LAMB has come in; lr_rule goes for it as well."

    def __post_init__(self) -> None:
        _require(self.name in ("adamw", "lamb"), f"optim.name={self.name!r}: choose adamw or lamb")
        _require(self.lr > 0, f"optim.lr={self.lr}: above 0")
        _require(
            self.lr_rule in ("none", "linear", "sqrt"),
            f"optim.lr_rule={self.lr_rule!r}: choose none, linear or sqrt",
        )
        _require(
            self.base_batch_size is None or self.base_batch_size >= 1,
            f"optim.base_batch_size={self.base_batch_size}: 1 or more, or null",
        )
        _require(
            self.lr_rule == "none" or self.base_batch_size is not None,
            f"optim.lr_rule={self.lr_rule} with optim.base_batch_size=null: give the global batch "
            "size that optim.lr was found at, or set optim.lr_rule=none",
        )
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={list(self.betas)}: two numbers, 0 or more and below 1",
        )
        _require(self.eps > 0, f"optim.eps={self.eps}: above 0")
        _require(
            self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: 0 (off) or above"
        )
        for name, factor in self.multipliers.items():
            _require(factor >= 0, f"optim.multipliers.{name}={factor}: 0 or above")
        _require(
            self.lamb_above is None or self.lamb_above >= 1,
            f"optim.lamb_above={self.lamb_above}: a global batch, 1 or more, or null",
        )
        _require(
            self.lamb_lr is None or (self.lamb_above is not None and self.lamb_lr > 0),
            f"optim.lamb_lr={self.lamb_lr}: above 0, with optim.lamb_above; for LAMB in any case "
            "set optim.name=lamb and optim.lr",
        )
        _require(self.clip_norm >= 0, f"optim.clip_norm={self.clip_norm}: 0 (off) or above")


@dataclass(frozen=True)
class ScheduleConfig:
    length: str = "20 epochs"
    "How long to train, in epochs or samples."
    warmup: str = "0 samples"
    "Linear warm-up from warmup_lr to optim.lr."
    warmup_lr: float = 1e-5
    "Where the warm-up begins; like min_lr it stays as given, whatever optim.lr_rule does."
    min_lr: float = 1e-5
    "Where the decay ends, or what it does not fall below."
    shape: str = "cosine"
    "After the warm-up: cosine or linear to min_lr at the end, or exponential, by decay each epoch."
    decay: float = 0.9
    "Factor from one epoch to the next where shape is exponential."

    def __post_init__(self) -> None:
        _require(
            self.shape in ("cosine", "linear", "exponential"),
            f"schedule.shape={self.shape!r}: choose cosine, linear or exponential",
        )
        _require(0 < self.decay <= 1, f"schedule.decay={self.decay}: above 0, to 1")
        check_duration("schedule.length", self.length, above_zero=True)
        check_duration("schedule.warmup", self.warmup)
        _require(self.warmup_lr >= 0, f"schedule.warmup_lr={self.warmup_lr}: 0 or above")
        _require(self.min_lr >= 0, f"schedule.min_lr={self.min_lr}: 0 or above")


@dataclass(frozen=True)
class BatchingConfig:
    global_batch_size: int | str = 64
    """Samples per optimizer step over all ranks and accumulation steps; auto: as many as fit in one
    pass of all ranks."""
    max_global: int | None = None
    "Where global_batch_size is auto: no more than so many."
    micro_batch_size: int | str = "auto"
    "Samples per rank and pass; auto: the most that fit into memory, planned or measured."
    multiple_of: int = 8
    "The micro-batch is a multiple of it where the global batch has such a divisor."
    device_memory: str | None = None
    "Memory of a rank, such as 24GiB, or a device's name; null: what is found."
    headroom: float | int | str = "auto"
    "Share of the memory for the model and its steps that is left free; auto: 0.06, on a CPU 0.05."
    headroom_bytes: int | str = "auto"
    """At least so many are left free; auto: 2**30. On a CPU never less than 2 MiB, by which starts
    differ."""
    probe: str = "auto"
    """Real steps before training: always, never (the plan alone decides, with more headroom), or
    auto: where the plan's batch is near what memory allows."""
    hetero: str = "common"
    """Where nodes differ in memory: common, the smallest answer for all, or per_node, unequal
    micro-batches in proportion to what fits."""
    oom_retries: int = 2
    "How often the launcher starts again with a smaller micro-batch after memory has run out."

    def __post_init__(self) -> None:
        for name, size in (
            ("global_batch_size", self.global_batch_size),
            ("micro_batch_size", self.micro_batch_size),
        ):
            _require(
                size == "auto" or (isinstance(size, int) and size >= 1),
                f"batching.{name}={size!r}: auto, or a number from 1",
            )
        _require(
            self.max_global is None or self.max_global >= 1,
            f"batching.max_global={self.max_global}: 1 or more, or null",
        )
        _require(self.multiple_of >= 1, f"batching.multiple_of={self.multiple_of}: 1 or more")
        share, least = self.headroom, self.headroom_bytes
        _require(
            share == "auto" or (isinstance(share, int | float) and 0 <= share < 1),
            f"batching.headroom={share!r}: auto, or a share from 0 and below 1",
        )
        _require(
            least == "auto" or (isinstance(least, int) and least >= 0),
            f"batching.headroom_bytes={least!r}: auto, or a number from 0",
        )
        _require(
            self.probe in ("auto", "always", "never"),
            f"batching.probe={self.probe!r}: choose auto, always or never",
        )
        _require(
            self.hetero in ("common", "per_node"),
            f"batching.hetero={self.hetero!r}: choose common or per_node",
        )
        _require(self.oom_retries >= 0, f"batching.oom_retries={self.oom_retries}: 0 or more")


@dataclass(frozen=True)
class EngineConfig:
    deepspeed: str | None = None
    "DeepSpeed JSON; usually given as --deepspeed ds_configs/z2.json."
    precision: str = "auto"
    "fp32, bf16, fp16; auto: bf16 where the GPU has it, else fp16 on a GPU, fp32 on a CPU."
    compile: bool = False
    "torch.compile the blocks of the towers, for ZeRO 0 to 2; costs minutes at the start."
    fused: str = "auto"
    "Whose LayerNorm, AdamW, LAMB run on a GPU: torch, apex, deepspeed; auto: apex's if it works."
    timeout_seconds: float = 1800
    "How long a rank waits for the others in a step before it gives up, and the run with it."

    def __post_init__(self) -> None:
        _require(self.deepspeed != "", "engine.deepspeed is empty: name a DeepSpeed JSON")
        _require(
            self.precision in ("auto", "fp32", "bf16", "fp16"),
            f"engine.precision={self.precision!r}: choose auto, fp32, bf16 or fp16",
        )
        _require(
            self.fused in ("auto", "torch", "apex", "deepspeed"),
            f"engine.fused={self.fused!r}: choose auto, torch, apex or deepspeed",
        )
        _require(
            self.timeout_seconds > 0,
            f"engine.timeout_seconds={self.timeout_seconds}: more than 0, and than an evaluation",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    every: str = "1 epoch"
    "Interval between checkpoints, in epochs or samples."
    every_minutes: float | None = None
    "Besides, whenever so much time has passed, looked at every ten steps or seconds; null: never."
    keep: int = 2
    "How many of the newest checkpoints stay."

    def __post_init__(self) -> None:
        check_duration("checkpoint.every", self.every, above_zero=True)
        _require(
            self.every_minutes is None or self.every_minutes > 0,
            f"checkpoint.every_minutes={self.every_minutes}: more than 0, or null for none",
        )
        _require(self.keep >= 1, f"checkpoint.keep={self.keep}: 1 or more")


@dataclass(frozen=True)
class EvalConfig:
    every: str | None = None
    "Interval between held-out evaluations; null: only at the end."
    batch_size: int = 64
    "Samples per rank and forward pass."
    max_samples: int | None = None
    "Score only the first so many held-out pairs."
    match_candidates: int = 64
    "Held-out pairs that a model without a joint space ranks by its matching head, all with all."
    prune: bool | None = None
    "Prune the images by the captions that they are matched with; null: as the released code does."

    def __post_init__(self) -> None:
        if self.every is not None:
            check_duration("eval.every", self.every, above_zero=True)
        _require(self.batch_size >= 1, f"eval.batch_size={self.batch_size}: 1 or more")
        _require(
            self.max_samples is None or self.max_samples >= 1,
            f"eval.max_samples={self.max_samples}: 1 or more, or null for all",
        )
        _require(
            self.match_candidates >= 2,
            f"eval.match_candidates={self.match_candidates}: 2 or more",
        )


@dataclass(frozen=True)
class MetricsConfig:
    every: str = "1024 samples"
    "Interval between lines in the log, in metrics.jsonl and in the endpoint's values."
    port: int | None = 19400
    "Port of each node's Prometheus endpoint, the next free one if taken; null: none."
    address: str = "127.0.0.1"
    "Address that endpoints listen on: loopback, a cluster interface's, or 0.0.0.0 for all."
    sd_dir: str | None = None
    "Folder in which each node keeps a target file while it runs, for Prometheus' file_sd_configs."
    textfile_dir: str | None = None
    "Folder of node_exporter's textfile collector, where nothing else may be scraped."
    certificate: str | None = None
    "PEM file; with it endpoints speak TLS."
    key: str | None = None
    "PEM file of the certificate's key, where it is not in the same."
    password_file: str | None = None
    "File with USER:PASSWORD that endpoints ask for."
    device_peak_tflops: float | None = None
    "What a device can do, for the MFU; null: what a large matrix product reaches at the start."
    also: list[str] = field(default_factory=list)
    "Where else to write the lines of metrics.jsonl: csv, tensorboard, wandb."

    def __post_init__(self) -> None:
        check_duration("metrics.every", self.every, above_zero=True)
        _require(
            self.port is None or 0 <= self.port <= 65535,
            f"metrics.port={self.port}: 0 (any free one) to 65535, or null for none",
        )
        _require(bool(self.address), "metrics.address is empty: 127.0.0.1, or 0.0.0.0 for all")
        for name in ("sd_dir", "textfile_dir", "certificate", "key", "password_file"):
            _require(getattr(self, name) != "", f"metrics.{name} is empty: a path, or null")
        _require(
            self.key is None or self.certificate is not None,
            "metrics.key without metrics.certificate: give both, or neither",
        )
        _require(
            self.device_peak_tflops is None or self.device_peak_tflops > 0,
            f"metrics.device_peak_tflops={self.device_peak_tflops}: above 0, or null",
        )
        for name in self.also:
            _require(
                name in ("csv", "tensorboard", "wandb"),
                f"metrics.also={list(self.also)}: choose among csv, tensorboard, wandb",
            )


@dataclass(frozen=True)
class Config:
    preset: str = "demo"
    task: str = "pretrain"
    "Name of a registered task."
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: Any = None
    "name: a registered model; the rest is that model's Config."
    pruning: PruningConfig = field(default_factory=PruningConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objectives: dict[str, Any] = field(default_factory=dict)
    "Registered objectives by name, in the order they run; null switches one off."
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
