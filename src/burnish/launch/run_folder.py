"""The run folder: one owner, its recipe, its events, its token ledger.

    runs/quickstart/
      run.lock            held (flock) while a process trains here; says who
      recipe.json         the resolved recipe
      tokens.json         digests of what its token ids stand for
      metrics.jsonl       one object a step            (metrics_file.py)
      events.jsonl        resumes, failed saves, skipped steps: {"time": ..., "event": ..., ...}
      ledger.json         where every token went
      rollbacks.json      steps that the run went back because of, if it did
      checkpoint-<step>/  (policy/checkpoint)
      model/              the export

Must not know what a recipe means or how checkpoints are written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from burnish.errors import ResumeError
from burnish.launch.metrics_file import JsonLines, to_json, write_atomically


class RunFolder:
    """A run folder that this process owns. See `open_run_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved = lambda: saved_recipe(path)
        self._events = JsonLines(path / "events.jsonl")

    def recipe(self) -> dict[str, Any] | None:
        """The resolved recipe of the run to continue; None where there is nothing to continue: no checkpoint yet.

        See `saved_recipe`.
        """
        return self._saved()

    def look_elsewhere(self, saved: dict[str, Any] | None) -> None:
        """The checkpoints are in a store, with this recipe; None: it has none."""
        self._saved = lambda: saved

    def write_recipe(self, resolved: Mapping[str, Any]) -> None:
        """Writes `recipe.json`: at the first start, and again when a resume changes what it may change."""
        path, data = self.path / "recipe.json", json.dumps(resolved, indent=2).encode() + b"\n"
        if not path.exists() or path.read_bytes() != data:  # on a full disk a run can still be resumed
            write_atomically(path, data)

    def hold_tokens(self, facts: Mapping[str, Any]) -> None:
        """Notes what the run's ids stand for at its first start; see `require_tokens` for every later one."""
        if self.recipe() is None:
            write_atomically(self.path / "tokens.json", json.dumps(facts).encode() + b"\n")
        else:
            require_tokens(self.path, facts)

    def rollbacks(self) -> dict[str, Any]:
        """What `write_rollbacks` kept of the run that goes on; empty for a run that begins."""
        path = self.path / "rollbacks.json"
        if self.recipe() is None:  # what an earlier run in this folder went back for is not this one's
            path.unlink(missing_ok=True)
        return json.loads(path.read_bytes()) if path.exists() else {}

    def write_rollbacks(self, listed: Mapping[str, Any]) -> None:
        """Steps whose rows a rollback passes over, on the disk when this returns. Raises OSError."""
        write_atomically(self.path / "rollbacks.json", json.dumps(listed).encode() + b"\n")

    def event(self, kind: str, **facts: Any) -> None:
        """Appends to `events.jsonl`; on the disk when this returns, kept in memory where a full disk refuses it."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events.append({"time": now, "event": kind, **facts}, durable=True)

    def write_ledger(self, totals: Mapping[str, Any]) -> None:
        """Replaces `ledger.json`. Called every step and derived from the checkpoint on resume, so it is not synced."""
        with contextlib.suppress(OSError):  # a full disk: the next step writes it again
            write_atomically(self.path / "ledger.json", to_json(totals).encode() + b"\n", durable=False)

    def write_rollouts(self, step: int, groups: Sequence[Mapping[str, Any]], *, keep: bool) -> None:
        """Writes `rollouts/step-000012.jsonl`, a line a group; a step that is done again replaces its own.

        Args:
            keep: the files of other steps stay.
        """
        folder = self.path / "rollouts"
        with contextlib.suppress(OSError):  # a full disk: they are for reading, and the run goes on without them
            folder.mkdir(exist_ok=True)
            lines = "".join(to_json(group) + "\n" for group in groups).encode()
            write_atomically(folder / f"step-{step:06d}.jsonl", lines, durable=False)
            for other in [] if keep else folder.glob("step-*.jsonl"):
                if other.name != f"step-{step:06d}.jsonl":
                    other.unlink()

    def cut_rollouts(self, step: int) -> None:
        """Removes what steps after this one have left of rollouts and selected rows: they are done again."""
        for folder in ("rollouts", "selected"):
            for path in (self.path / folder).glob("step-*.jsonl"):
                if int(path.stem.removeprefix("step-")) > step:
                    path.unlink()

    def write_selected(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes `selected/step-000012.jsonl`; on the disk when this returns. Raises OSError."""
        folder = self.path / "selected"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"step-{step:06d}.jsonl", "".join(to_json(row) + "\n" for row in rows).encode())

    def close(self) -> None:
        self._events.close()


def saved_recipe(run_dir: Path) -> dict[str, Any] | None:
    """The resolved recipe of the run in `run_dir`, whoever owns it; None where there is no checkpoint to go on from.

    A run that ended before its first checkpoint may be started again with any recipe: nothing of it is used. But for
    an export: that is some earlier run's, and would be taken for this one's.

    Raises:
        ResumeError: checkpoints without a readable recipe that says what they are of, or an export without checkpoints.
    """
    path = run_dir / "recipe.json"
    if not any(run_dir.glob("checkpoint-*/manifest.json")):
        if (run_dir / "model").exists():
            raise ResumeError(
                "there is the export of a finished run, but no checkpoint of it",
                where=str(run_dir / "model"),
                cure="give another run_dir, or move that folder away to start anew here",
            )
        return None
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"the recipe that the checkpoints here belong to cannot be read: {error}",
            where=str(path),
            cure="restore recipe.json from a copy, or start again with another run_dir",
        ) from error


def require_tokens(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Raises ResumeError where ids of the run in `run_dir` stood for something else than `facts` say.

    A recipe names files (items, new tokens, a template) that may be edited: the model would go on with rows mixed up.
    """
    path = run_dir / "tokens.json"
    held = json.loads(path.read_bytes()) if path.exists() else {}
    changed = " and ".join(name.replace("_", " ") for name, fact in facts.items() if held.get(name, fact) != fact)
    if changed:
        raise ResumeError(
            f"{changed}: not what the run was trained with",
            where=str(run_dir),
            cure="bring back the files that the recipe makes it of as they were, or start a new run_dir",
        )


@contextlib.contextmanager
def open_run_folder(path: Path) -> Iterator[RunFolder]:
    """Creates the folder where needed and owns it until the end of the block.

    The kernel frees the lock of a process that died, however it died, so a stale lock needs no clean-up.

    Raises:
        ResumeError: another process owns it, or it cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ResumeError(
            f"the run folder cannot be written: {error.strerror}", where=str(path), cure="give another run_dir"
        ) from error
    try:
        _own(lock, path)
        folder = RunFolder(path)
        try:
            yield folder
        finally:
            folder.close()
    finally:
        os.close(lock)


def _own(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 4096, 0).decode().strip() or "a process that has just started"
        raise ResumeError(
            f"another process trains in this run folder: {owner}",
            where=str(path),
            cure="wait for it, stop it (kill -TERM leaves a checkpoint), or give another run_dir",
        ) from error
    started = datetime.now(UTC).isoformat(timespec="seconds")
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
