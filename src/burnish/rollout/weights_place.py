"""Where versions of the weights lie, and that nothing of a dead run stays there."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from burnish.errors import UserError

PREFIX = f"burnish-weights-{os.getuid()}-"


def claim_memory(under: Path | None = None) -> tuple[Path, Callable[[], None]]:
    """A new folder in this machine's memory, and what gives up the claim to it. Folders that nobody claims any more are
    removed: a claim is a lock on the folder itself, which ends with its process, however that dies.

    Args:
        under: instead of the machine's own place.
    """
    place = under or memory()
    for left in place.glob(f"{PREFIX}*"):
        claim = _lock(left)
        if claim is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(claim)
    while True:
        root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        claim = _lock(root)
        if claim is not None and root.exists():
            return root, partial(os.close, claim)
        if claim is not None:  # another run took it for a dead one's, in the moment before it was locked
            os.close(claim)


def claim_folder(run_dir: Path, folder: str | None) -> Path:
    """A folder of this run on this machine alone, emptied of what an earlier process left: a run has one trainer at a
    time. What one left that was killed on another machine stays.

    Args:
        folder: that machines share, where several may have a run of one path; by default `weights` in the run's own.

    Raises:
        UserError: it cannot be made.
    """
    run_dir = run_dir.absolute()
    root = run_dir / "weights"
    if folder is not None:
        path = f"{zlib.crc32(os.fsencode(run_dir)):08x}"
        root = Path(folder).expanduser().absolute() / f"{run_dir.name}-{socket.gethostname()}-{path}"
    try:
        if root.exists():
            shutil.rmtree(root)
        root.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"no folder for weights can be made: {error}", "rollout.sync.folder", "name one that can be written"
        ) from error
    return root


def memory() -> Path:
    """Where files are in memory; without such a place, where temporary ones are."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock; None where another process does, or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
