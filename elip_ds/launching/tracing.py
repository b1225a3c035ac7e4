"""A configuration's own training step on tensors without data: what it makes at any micro-batch.

Needs no device, no data, no DeepSpeed; a step of any size takes seconds.

What is taken for granted of a GPU: attention is fused, which keeps queries, keys, values, output
and one number a row, dropout or not (flash and memory-efficient kernels draw it again from a seed).
So it is traced without attention dropout, by torch's fused kernel for the CPU, which keeps the
same. On a CPU, attention with dropout is our own (towers/attention.py) and keeps a byte a weight.
"eager" is attention by single operations, as without a fused kernel; then the dropout's mask, of
the text tower and the fusion alone, is not counted. Compiled blocks keep less than is said here.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from elip_ds import dist
from elip_ds.batching.gather import Gathering
from elip_ds.batching.predict import Prediction, predict
from elip_ds.batching.trace import Traced, trace_step
from elip_ds.batching.zero import Reduction, Weights, Zero, states
from elip_ds.config import Config
from elip_ds.data.batch import Batch
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.launching.parts import current_part, marked_parts
from elip_ds.objectives import Progress
from elip_ds.tasks import build_pretrain, min_micro_batch
from elip_ds.towers.layers import CrossAttention, SelfAttention
from elip_ds.towers.pruning import at_ratios, keep_stretches, sequence_lengths
from elip_ds.towers.word_table import WordEmbedding

LATE = Progress(step=0, samples_seen=10**9, samples_per_epoch=10**6)
"Long after every warm-up: the teacher has its whole share in the targets, which costs most."


@dataclass(frozen=True)
class Setting:
    """Beside its configuration, what a step's memory depends on.

    zero: of the DeepSpeed configuration.  device: cuda or cpu, which it will run on.  attention:
    fused or eager.  accumulation: micro-batches of a step.
    """

    zero: Zero
    device: str = "cuda"
    attention: str = "fused"
    accumulation: int = 1


def most_tokens(config: Config) -> tuple[float, ...]:
    """Keep ratios of the stretch of the pruning schedule in which the tower sees most tokens."""
    pruning, vision = config.pruning, config.model.vision

    def tokens(ratios: Sequence[float]) -> int:
        lengths = sequence_lengths(at_ratios(pruning, ratios), vision.depth, vision.num_patches)
        return sum(lengths)

    stretches = keep_stretches(pruning, LATE.samples_per_epoch)
    return max((ratios for _, ratios in stretches), key=tokens)


class _Mode(FakeTensorMode):
    """A tensor of it takes it along when it is copied with its model, as the twin's are."""

    # torch would look for GPUs again at every operation, an eighth of a trace; no tensor is there.
    avoid_device_init = True

    def __deepcopy__(self, memo: Any) -> "_Mode":
        return self


class StepTracer:
    """Builds the task once; trace() then runs one of its steps at a micro-batch of one's choice."""

    def __init__(
        self, config: Config, setting: Setting, keep_ratios: Sequence[float] | None = None
    ) -> None:
        """keep_ratios: of the pruning stages; None: those of the schedule that cost most."""
        ratios = most_tokens(config) if keep_ratios is None else keep_ratios
        self.config = replace(config, pruning=at_ratios(config.pruning, ratios))
        self.setting = setting
        self._vocabulary = made_up_vocabulary(config)
        self._mode = _Mode()
        with self._mode, _nothing_drawn():
            self.task = build_pretrain(self.config, self._vocabulary).train()
            cast_parameters(self.task, setting.zero.dtype)
            if self.task.teacher is not None:
                self.task.teacher.masters(self._local)  # there from the start on, as in the engine
        # As the engine (ds_config.fit_buckets): no bucket is larger than all that goes through it.
        trained = sum(p.numel() for p in self.task.parameters() if p.requires_grad)
        zero = replace(
            setting.zero,
            bucket=min(setting.zero.bucket, trained),
            gather=replace(setting.zero.gather, ahead=min(setting.zero.gather.ahead, trained)),
            copies=setting.device == "cpu",
        )
        self.setting = replace(setting, zero=zero)
        self._gathering: Gathering | None = None
        if zero.stage == 3:
            for module in self.task.modules():
                if isinstance(module, WordEmbedding):
                    module.apart = True
        if setting.device != "cpu":
            for module in self.task.modules():
                if isinstance(module, SelfAttention | CrossAttention):
                    module.dropout = 0.0

    def weights(self) -> Weights:
        """What states() asks."""
        return Weights(
            trainable=[[p.numel() for p in group] for group in self._groups()],
            frozen=[p.numel() for p in self._frozen()],
            other_bytes=sum(x.numel() * x.itemsize for x in self.task.buffers()),
            twin=self.task.teacher is not None,
        )

    def predict(self, micro_batch_size: int) -> Prediction:
        """On a CPU what is offloaded lies in the same memory."""
        device, host = states(self.weights(), self.setting.zero)
        if self.setting.device == "cpu":
            device = {**device, **{f"offloaded {name}": size for name, size in host.items()}}
        return predict(self.trace(micro_batch_size), device)

    def trace(self, micro_batch_size: int) -> Traced:
        """The bytes of one optimizer step of so many samples a rank and pass."""
        zero = self.setting.zero
        if zero.stage == 3 and self._gathering is None:
            self._gathering = Gathering(self.task, zero.world_size, zero.gather, copies=zero.copies)
            self._trace(min_micro_batch(self.config))  # it learns the order of the calls
        return self._trace(micro_batch_size)

    def _trace(self, micro_batch_size: int) -> Traced:
        with self._surroundings(), marked_parts(self.task):
            host = random_batch(self.config, self._vocabulary, micro_batch_size)
            steps = min(self.setting.accumulation, 2)  # from the second on all are alike
            batches: list[Batch] = []  # the engine has the last one until its step is over

            def forward(micro_step: int) -> Tensor:
                batches[:] = [self._moved(host)]
                if micro_step == 0 and self.task.cache.objectives and steps > 1:
                    self._first_pass(batches[0])
                loss = self.task(batches[0], LATE.at(micro_step, steps))
                assert loss is not None
                return loss.total

            def update() -> None:
                if self.setting.device != "cpu":
                    batches.append(self._moved(host))  # see engine/prefetch.py
                self.task.after_step(LATE, self._local)

            return trace_step(
                Reduction(self.setting.zero, self._groups(), self._gathering),
                micro_batch_size=micro_batch_size,
                micro_steps=steps,
                forward=forward,
                update=update,
                part_of=current_part,
            )

    def _moved(self, batch: Batch) -> Batch:
        return batch.to(torch.device("cpu"), self.setting.zero.dtype)

    def _groups(self) -> list[list[nn.Parameter]]:
        """As engine/optim.py, but for its settings: with more groups a step would need less."""
        mine = [p for p in self.task.parameters() if p.requires_grad]
        groups = [[p for p in mine if (p.ndim > 1) is decays] for decays in (True, False)]
        return [group for group in groups if group]

    def _frozen(self) -> list[nn.Parameter]:
        return [p for p in self.task.parameters() if not p.requires_grad]

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(dist.pretended_ranks(self.setting.zero.world_size))
            stack.enter_context(self._mode)
            if self.setting.attention == "eager":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # In this thread: the counting modes are open in no other.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield

    def _first_pass(self, batch: Batch) -> None:
        """See objectives/grad_cache.py."""
        steps = self.setting.accumulation
        with torch.no_grad():
            for micro_step in range(steps):
                self.task(batch, LATE.at(micro_step, steps), first_pass=True)
        self.task.cache.settle(LATE)

    def _local(self, parameter: nn.Parameter) -> Tensor:
        """What a rank holds of it: as engine/sharding.py."""
        if self.setting.zero.stage < 3:
            return parameter.data
        return parameter.data.flatten()[: -(-parameter.numel() // self.setting.zero.world_size)]


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """torch draws truncated normals until all are inside, which fake ones never are said to be; and
    it warns of an address that it asks for itself when one is copied.
    """
    before = nn.init.trunc_normal_
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        nn.init.trunc_normal_ = before


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """As DeepSpeed does for half precision: parameters, not buffers. Fake ones cannot be moved by
    module.to(), which swaps tensors. One that several modules share stays shared.
    """
    cast: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or parameter.dtype == dtype:
                continue
            if parameter not in cast:
                data = parameter.detach().to(dtype)
                cast[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            part._parameters[name] = cast[parameter]
