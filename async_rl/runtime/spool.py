"""The spool of a host: a folder of a run folder's layout, on a host that does not have the run folder itself.

With cluster.shared_fs false the driver's host alone has the run folder. A process on any other host writes to the spool
of its host instead, at the same relative paths, and ``driver.courier`` brings the files to the run folder. The process
itself knows nothing of that: its settings name the spool as the folder of the runs.

    <cluster.local_dir>/<run>-<digest>/<address>/<run>/       logs/ timeline/ prometheus/ checkpoints/

The path follows from the run and from the host, so that a run which is resumed finds what an earlier start left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from async_rl.config.schema import RunConfig
from async_rl.errors import CheckpointDamaged, CheckpointError, EngineError, ResourceError

_PRIVATE = 0o700


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Where one process finds the files of its run."""

    config: RunConfig
    """The settings as they hold on its host: their run folder is the spool, if the host has one."""
    run_dir: Path
    """The run folder on the driver's host."""

    @property
    def spooled(self) -> bool:
        """Whether the process writes to a spool."""
        return self.config.run_dir != self.run_dir

    def here(self, path: Path) -> Path:
        """Return where this process has what ``path``, below the run folder, names on the driver's host."""
        return self.config.run_dir / path.relative_to(self.run_dir) if self.spooled else path

    def folder(self, path: Path) -> Path:
        """Return ``here(path)`` as a folder that exists, if it is in a spool."""
        found = self.here(path)
        if self.spooled:
            found.mkdir(parents=True, exist_ok=True)
        return found

    @contextlib.contextmanager
    def errors_name_the_run_folder(self) -> Iterator[None]:
        """Raise errors of the block with paths in the run folder: the spool is gone when the user reads them."""
        try:
            yield
        except CheckpointDamaged as error:
            raise CheckpointDamaged(self._named(error.path), error.damage) from error
        except (CheckpointError, EngineError) as error:
            if not self.spooled:
                raise
            raise type(error)(self._named(str(error))) from error

    def _named(self, text: str) -> str:
        return text.replace(str(self.config.run_dir), str(self.run_dir))


def on_this_host(config: RunConfig) -> RunPaths:
    """Return where this process finds the files of its run, for its settings as the driver has them.

    Makes the spool of this host where it needs one. Raises ResourceError if that cannot be made.
    """
    if config.cluster.run_host is None:
        return RunPaths(config, config.run_dir)
    import ray  # not by who only asks ``why_unusable``

    return on_host(config, ray.util.get_node_ip_address())


def on_host(config: RunConfig, address: str) -> RunPaths:
    """Return what ``on_this_host`` returns on the host with this address."""
    if config.cluster.run_host in (None, address):
        return RunPaths(config, config.run_dir)
    try:
        runs = _folder(config, address)
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cluster.local_dir: cannot make a folder in {base_folder(config.cluster.local_dir)} on {address} "
            f"({error.strerror}), for what processes there write until it has reached the run folder; set "
            "cluster.local_dir to a folder on each host that can be written to"
        ) from None
    return RunPaths(config.model_copy(update={"runs": runs}), config.run_dir)


def why_unusable(local_dir: Path | None) -> str:
    """Return why no spool can be made on this host; an empty string if one can."""
    try:
        with tempfile.TemporaryDirectory(dir=_made_base(local_dir), prefix=".probe-"):
            return ""
    except OSError as error:
        return f"nothing can be written to {base_folder(local_dir)} ({error.strerror})"


def base_folder(local_dir: Path | None) -> Path:
    """Return the folder of all spools on this host."""
    return local_dir or Path(tempfile.gettempdir()) / f"async_rl-{os.getuid()}"


def remove(paths: RunPaths) -> None:
    """Remove the spool, and the folder around those of its run if this was the last. Without one, does nothing."""
    if paths.spooled:
        shutil.rmtree(paths.config.runs, ignore_errors=True)
        with contextlib.suppress(OSError):  # nodes of Ray on one machine share it
            paths.config.runs.parent.rmdir()


def _folder(config: RunConfig, address: str) -> Path:
    digest = zlib.crc32(f"{config.cluster.run_host} {config.run_dir}".encode())
    run = _made_private(_made_base(config.cluster.local_dir) / f"{config.name}-{digest:08x}")
    return run / address.replace(":", "-")


def _made_base(local_dir: Path | None) -> Path:
    base = base_folder(local_dir)
    if local_dir is None:
        return _made_private(base)
    base.mkdir(parents=True, exist_ok=True)  # of the user's choice, and maybe of all users
    return base


def _made_private(folder: Path) -> Path:
    """Make a folder of this user alone. Raises OSError if that cannot be made, or is another user's.

    Where all users may write, any of them may make a folder of that name, and would read what is written there.
    """
    folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, f"{folder} belongs to another user")
    return folder
