"""Writes a trainer's state to files and reads it back, through Megatron's distributed checkpointing.

Each rank writes its part, of what data-parallel ranks have alike a share each, and a trainer in any layout reads it.
While the files are written training continues. When a checkpoint is loaded the ranks compare all of its files with the
manifest, each a share. Knows nothing else of the folder around these files: ``driver.checkpoint_folder`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel

from async_rl.config.loading import to_yaml
from async_rl.config.schema import RunConfig
from async_rl.errors import CheckpointDamaged, CheckpointError
from async_rl.models.config import ModelConfig
from async_rl.models.names import Layout
from async_rl.runtime import manifest
from async_rl.runtime.manifest import Entries
from async_rl.runtime.process import release_freed_memory
from async_rl.trainer.megatron import platform
from async_rl.trainer.megatron.checkpoint_weights import differences
from async_rl.trainer.megatron.optimizer import Optimizer, ShardedState
from async_rl.trainer.megatron.platform import Device
from async_rl.trainer.megatron.writers import FileWriter, all_ranks
from async_rl.trainer.parallel import Place

_LAYERS: dict[Layout, str] = {
    "local": "Megatron's own layers, which a CPU has",
    "transformer_engine": "Transformer Engine's layers, which a GPU has",
}


class DistributedCheckpoint:
    """Saves and loads this rank's chunks and optimizer. All ranks make the same calls in the same order."""

    def __init__(
        self,
        config: RunConfig,
        model: ModelConfig,
        chunks: Sequence[DistributedDataParallel],
        optimizer: Optimizer,
        place: Place,
        device: Device,
    ) -> None:
        self._config = config
        self._model = model
        self._chunks = list(chunks)
        self._optimizer = optimizer
        self._place = place
        self._device = device
        self._layers = platform.layout(device)

    def begin_save(self, folder: Path, *, updates: int) -> Save:
        """Begin to write model, optimizer, schedule, random state and the number of updates made.

        Returns once all of it is copied: training may continue.
        """
        torch.distributed.barrier()
        writer = FileWriter()
        with platform.redirect_cuda_to(self._device), writer.in_place_of_forks():
            state = self._whole(updates=updates, loading=False)
            request = dist_checkpointing.save(state, str(folder), _fully_parallel(), async_sharded_save=True)
            writer.begin(request)
        settings = to_yaml(self._config) if self._place.rank == 0 else None
        return Save(folder, writer, request.finalize_fns, settings, self._place.rank, self._device)

    def load(self, path: Path) -> int:
        """Restore everything that was saved, and return the number of updates made.

        Raises CheckpointDamaged where a file is not as it was written, and CheckpointError where the checkpoint is not
        of this model.
        """
        state = self._read(path)
        for number, chunk in enumerate(self._chunks):
            chunk.module.load_state_dict(state[f"model{number}"])
        self._optimizer.load_state(state["optimizer"])
        torch.set_rng_state(state["rng"])
        updates: int = state["updates"]
        return updates

    def _read(self, path: Path) -> ShardedState:
        self._verify(path)
        try:
            saved = dist_checkpointing.load_common_state_dict(str(path))
            if differing := differences(saved["model"], self._model):
                raise ValueError(f"it is of a model with another {differing}")
            self._check_layers(path, saved.get("layers", self._layers))
            with platform.redirect_cuda_to(self._device):
                wanted = self._whole(updates=0, loading=True)
                state: ShardedState = dist_checkpointing.load(wanted, str(path))
        except (CheckpointingException, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit {self._config.model.path}: {' '.join(str(error).split())[:300]}"
            ) from error
        return state

    def _check_layers(self, path: Path, saved: Layout) -> None:
        """Refuse a checkpoint of other layers: names differ, and the optimizer's state, which has the device's form."""
        if saved != self._layers:
            was, here = (_LAYERS[layers] for layers in (saved, self._layers))
            raise CheckpointError(
                f"checkpoint {path} is of a trainer with {was}, and this one has {here}: set resources.device to what "
                f"it was, or begin a new run from its model: `async-rl export {path} FOLDER` and model.path FOLDER"
            )

    def _verify(self, path: Path) -> None:
        """Compare all files with the manifest, each rank a share of them. Raises CheckpointDamaged on every rank."""
        if not (path / manifest.NAME).exists():
            return  # not committed: of a caller that saved it itself
        entries = manifest.read(path)
        mine = sorted(entries)[self._place.rank :: torch.distributed.get_world_size()]
        altered = all_ranks(manifest.find_altered(path, {name: entries[name] for name in mine}))
        for damage in filter(None, altered):
            raise CheckpointDamaged(str(path), damage)

    def _whole(self, *, updates: int, loading: bool) -> ShardedState:
        weights = {f"model{number}": chunk.module.sharded_state_dict() for number, chunk in enumerate(self._chunks)}
        # Training draws no random numbers, so the state of any rank will do.
        rng = [torch.get_rng_state()]
        torch.distributed.broadcast_object_list(rng, src=0)
        return {
            **weights,
            "optimizer": self._optimizer.sharded_state(weights, loading=loading),
            "updates": updates,
            "rng": rng[0],
            "model": asdict(self._model),
            "layers": self._layers,
        }


class Save:
    """One rank's save, of which the files are being written. All ranks call ``finish``, once all are ``done``."""

    def __init__(
        self,
        folder: Path,
        writer: FileWriter,
        finalize: Sequence[Callable[[], None]],
        settings: str | None,
        rank: int,
        device: Device,
    ) -> None:
        self._folder = folder
        self._writer = writer
        self._finalize = finalize
        self._settings = settings
        self._rank = rank
        self._device = device

    def done(self) -> bool:
        """Return whether ``finish`` would not wait for this rank's files."""
        return self._writer.done()

    def finish(self) -> Entries:
        """Complete the save once the parts of all ranks are in place. Returns the entries of this rank's files.

        Raises CheckpointError on every rank if one of them could not write.
        """
        self._writer.wait()
        error = self._writer.error
        failed = None if error is None else f"trainer rank {self._rank}: {' '.join(str(error).split())[:300]}"
        for first in filter(None, all_ranks(failed)):
            raise CheckpointError(
                f"checkpoint {self._folder} cannot be written: {first}; make room there, or set `runs` to a folder on "
                "another disk, to which the run's folder is moved"
            )
        with platform.redirect_cuda_to(self._device):
            for step in self._finalize:
                step()
        entries = dict(self._writer.entries)
        if self._settings is not None:
            entries["config.yaml"] = manifest.write_file(self._folder / "config.yaml", self._settings.encode())
            # What Megatron writes on this rank besides the tensors: kilobytes to a few megabytes.
            others = {path.name for path in self._folder.iterdir() if path.is_file()}
            small = [name for name in others if not name.endswith(".distcp") and name not in entries]
            entries |= manifest.entries_of(self._folder, small)
        release_freed_memory()  # the copies that were written: without it, a trainer of 750 MiB grew by 8 % in minutes
        return entries


def _fully_parallel() -> FullyParallelSaveStrategyWrapper:
    """Return the strategy in which data-parallel ranks share the writing of what they have alike."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)
