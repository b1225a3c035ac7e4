"""What a checkpoint holds and how a start takes it up again, the same start or one of another form.

All that is public here is a collective: every rank calls it.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import Tensor, nn

import elip_ds
from elip_ds import dist
from elip_ds.config import Config, dump_config
from elip_ds.data import TrainLoader
from elip_ds.engine import checkpoint as files
from elip_ds.engine import elastic
from elip_ds.engine.places import find_places
from elip_ds.engine.sharding import gather_whole, local_tensor, refresh, shard_of
from elip_ds.engine.weights import read_tensors
from elip_ds.errors import UserError
from elip_ds.run import CONFIG, STATE, TOKENIZER, WEIGHTS, Run, list_checkpoints
from elip_ds.tasks import Pretrain

log = logging.getLogger(__name__)


def newest_step(run: Run) -> int | None:
    """Of the newest checkpoint, as rank 0 sees it: file systems show a name late elsewhere."""
    found = list_checkpoints(run.dir / "ckpt") if run.first else []
    step = files.read_meta(found[-1])["step"] if found else None
    return dist.gather_objects(step)[0]


class Saving:
    """The checkpoints of a run, in its folder ckpt.

    form: what decides how DeepSpeed lays its files out, by name: world_size, zero_stage, precision,
    optimizer.  newest: step of the newest checkpoint, or None.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        task: Pretrain,
        wrapped: deepspeed.DeepSpeedEngine,
        form: dict[str, Any],
        newest: int | None,
    ) -> None:
        self.config, self.run, self.task, self.form = config, run, task, form
        self.newest = newest
        self.folder = run.dir / "ckpt"
        self._wrapped = wrapped
        self._files = files.CarefulFiles()
        wrapped.checkpoint_engine = self._files

    def save(self, step: int, samples_seen: int, loader: TrainLoader) -> Path | None:
        """Returns the checkpoint's folder, or None when it could not be written: the one before
        stays as it was, and the reason is in the log.
        """
        final = self.folder / files.checkpoint_name(step)
        if step == self.newest:  # nothing happened since it was written
            return final
        partial = self.folder / f".{final.name}.partial"
        self._files.failure = None
        with self._files.attempt(self.folder):
            if self.run.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                files.clear_leftovers(self.folder)
                partial.mkdir()
        if self._failed_anywhere():
            return None
        position = {"step": step, "samples_seen": samples_seen}
        digests = dist.gather_objects(self._state_digest(position))
        self._wrapped.save_checkpoint(
            str(self.folder),
            tag=partial.name,
            client_state={},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        self._save_ours(partial, {**position, "data": loader.state(), "state_digests": digests})
        if self._failed_anywhere():
            return None
        if self.run.first:
            with self._files.attempt(final):
                files.publish(partial, final, self.config.checkpoint.keep)
        if self._failed_anywhere():
            return None
        log.info("saved %s", final)
        self.newest = step
        return final

    def load(self, loader: TrainLoader) -> tuple[int, int]:
        """Of the newest checkpoint: all but the loader's place. Returns steps, samples seen.

        Raises UserError where it was saved by another optimizer or from other data, or where files
        of it are missing or damaged.
        """
        assert self.newest is not None
        path = self.folder / files.checkpoint_name(self.newest)
        meta = files.read_meta(path)
        theirs, ours = (kind.split(" ")[0] for kind in (meta["optimizer"], self.form["optimizer"]))
        if theirs != ours:  # each has states of its own meaning
            raise UserError(
                f"{path} was saved with optim.name={theirs}, this start has {ours}; set it as it "
                f"was, or start a new run with model.init_from={path}"
            )
        loader.check_state(meta["data"])
        changes = elastic.differences(meta, self.form)
        if changes:
            self._load_elastic(path, meta)
            log.info("states rearranged for this start: %s", ", ".join(changes))
            if self.run.world_size > meta["world_size"]:
                log.info("ranks from %d on draw dropout from new generators", meta["world_size"])
        else:
            done, _ = self._wrapped.load_checkpoint(
                str(path.parent), tag=path.name, load_module_strict=False
            )
            if done is None:
                raise UserError(f"{path} has no DeepSpeed files for this start")
        self._load_teacher(read_tensors(path / WEIGHTS))
        self.task.load_state(read_tensors(path / STATE, str(self.run.device)))
        self._load_rng(path, meta)
        log.info("resumed %s: step %d, %d samples seen", path, meta["step"], meta["samples_seen"])
        return meta["step"], meta["samples_seen"]

    def _failed_anywhere(self) -> bool:
        failures = [f for f in dist.gather_objects(self._files.failure) if f]
        if failures and self.run.first:
            log.error(
                "checkpoint NOT saved (%s); the one before it is untouched. Free some space or "
                "change run.dir; training goes on",
                failures[0],
            )
            files.clear_leftovers(self.folder)
        self.run.wait()
        return bool(failures)

    def _state_digest(self, position: dict[str, int]) -> str:
        """Of the queues and the position, which must be equal on all ranks."""
        digest = hashlib.blake2b(str(position).encode(), digest_size=8)
        for name, value in sorted(self.task.state().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _save_ours(self, partial: Path, meta: dict[str, Any]) -> None:
        weights = self._whole_weights()  # a collective under ZeRO-3
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.run.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.run.device)
        self._files.save(rng, str(self._rng_file(partial)))
        if len(set(meta["state_digests"])) > 1:
            raise RuntimeError(f"the ranks' queues differ: {meta['state_digests']}")
        if not self.run.first:
            return
        versions = {
            "elip_ds": elip_ds.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        with self._files.attempt(partial):
            save_file(weights, partial / WEIGHTS)
            state = {k: v.detach().cpu().contiguous() for k, v in self.task.state().items()}
            save_file(state, partial / STATE)
            (partial / CONFIG).write_text(dump_config(self.config))
            (partial / TOKENIZER).write_bytes((self.run.dir / TOKENIZER).read_bytes())
            meta = {**meta, **self.form, "versions": versions}
            (partial / files.META).write_text(json.dumps(meta, indent=1))

    def _whole_weights(self) -> dict[str, Tensor]:
        """Student and teacher, fp32, whole, on rank 0; an empty dict elsewhere."""
        weights: dict[str, Tensor] = {}

        def put(name: str, value: Tensor) -> None:
            if self.run.first:
                weights[name] = value.detach().float().cpu().clone().contiguous()

        sharded, half = self.form["zero_stage"] > 0, self.form["precision"] != "fp32"
        masters = self._masters_without_zero() if half and not sharded else {}
        for name, parameter in self.task.named_parameters():
            if not parameter.requires_grad:
                continue
            value = safe_get_full_fp32_param(parameter) if sharded else None
            put(name, masters.get(parameter, parameter.data) if value is None else value)
        teacher = self.task.teacher
        if teacher is not None:
            named = teacher.model.named_parameters()
            for (name, parameter), held in zip(named, teacher.masters(local_tensor), strict=True):
                put(f"teacher.{name}", gather_whole(parameter, held))
        return weights

    def _masters_without_zero(self) -> dict[nn.Parameter, Tensor]:
        """The fp32 weights behind half-precision ones, which DeepSpeed finds only under ZeRO."""
        wrapped = self._wrapped.optimizer
        return {
            place.params[owner]: place.flat.view(-1)[start : start + size].view_as(
                place.params[owner]
            )
            for place in find_places(wrapped.optimizer, wrapped)
            for start, size, owner, _ in place.pieces
            if size == place.params[owner].numel()
        }

    def _load_elastic(self, path: Path, meta: dict[str, Any]) -> None:
        """What load_checkpoint does, for a start of another form than the checkpoint's."""
        fault = saved = None
        try:  # a rank that raised alone would leave the others waiting for it
            saved = elastic.read_saved(path, meta, self.task)
            share = (self.run.rank, self.run.world_size)
            elastic.check_saved(saved, read_tensors(path / WEIGHTS), share)
            read_tensors(path / STATE)
            if self.run.rank < meta["world_size"] and not self._rng_file(path).is_file():
                raise UserError(f"{self._rng_file(path)} is missing")
        except UserError as error:
            fault = str(error)
        faults = [found for found in dist.gather_objects(fault) if found]
        if faults:
            raise UserError(faults[0])
        assert saved is not None
        optimizer = self._wrapped.basic_optimizer
        places = find_places(optimizer, self._wrapped.optimizer)
        elastic.put_saved(saved, places, optimizer, self.task)
        if self.form["precision"] == meta["precision"] == "fp16":
            elastic.set_scaler(saved, self._wrapped.optimizer)
        self._wrapped.global_steps = meta["step"]
        self._wrapped.global_samples = meta["samples_seen"]

    def _rng_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"rng-rank{self.run.rank:05d}.pt"

    def _load_rng(self, path: Path, meta: dict[str, Any]) -> None:
        if self.run.rank >= meta["world_size"]:
            # Another stream than that of any start at another step: dropout draws anew.
            torch.manual_seed(self.run.seed + 1000 * (self.run.rank + 1) + 10**6 * meta["step"])
            return
        rng = self._files.load(str(self._rng_file(path)))
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.run.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.run.device)

    def _load_teacher(self, weights: dict[str, Tensor]) -> None:
        teacher = self.task.teacher
        if teacher is None:
            return
        named = teacher.model.named_parameters()
        for (name, parameter), held in zip(named, teacher.masters(local_tensor), strict=True):
            held.copy_(shard_of(parameter, weights[f"teacher.{name}"]))
        teacher.write_back(local_tensor)
        refresh(teacher.parameters())
