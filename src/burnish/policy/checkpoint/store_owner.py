"""Who writes to a store: one process at a time, without a lock that a dead one could keep and without a clock.

    owner/00000002         {"run": "5d1c0f3a", "who": "pid 411 on node-3, runs/7b", ...}, created on condition
    owner/00000002.beat    a number that its owner raises every 10 s, or "released"

The owner is who created the highest number. A newcomer creates the next one: at once where the owner has released it or
is of the same run, whose folder is locked, so that its process is dead; else after having seen the same beat for 45 s
of its own monotonic clock. Of two newcomers one creates the number. The one before finds the higher number when it
commits, and commits no more. Must not know what is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from typing import Any, NamedTuple

from burnish.errors import ResumeError
from burnish.policy.checkpoint.objects import Objects

RELEASED = b"released"


class Rhythm(NamedTuple):
    """How owners show that they live."""

    beat_seconds: float = 10.0
    deadline_seconds: float = 45.0
    """Without a beat for so long an owner is dead: four are missing, or its store has failed it for as long."""


class Owner:
    """The claim of this process on a store."""

    def __init__(self, objects: Objects, run_id: str, who: str, rhythm: Rhythm | None = None) -> None:
        """
        Args:
            run_id: the same for all processes that take turns on one run folder, and for no others.
            who: what another is told who finds this owner alive.
        """
        self._objects, self._run_id, self._rhythm = objects, run_id, rhythm or Rhythm()
        self._record = {"run": run_id, "who": f"pid {os.getpid()} on {socket.gethostname()}, {who}"}
        self._number = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="store-owner", daemon=True)

    def claim(self) -> None:
        """Becomes the owner, and shows it from now on.

        Raises:
            ResumeError: another run is.
            OSError: the store fails.
        """
        while self._number == 0:
            newest = self._newest()
            if newest and not self._may_follow(newest):
                continue  # another newcomer was faster: look at that one
            record = json.dumps(self._record | {"nonce": secrets.token_hex(8)}).encode()
            with contextlib.suppress(FileExistsError):
                self._objects.create(_name(newest + 1), record)
                self._number = newest + 1
        self._say(b"0", tries=None)
        self._thread.start()
        older = [f"owner/{name}" for name in self._objects.tree("owner/") if 0 < _number(name) < self._number]
        self._objects.remove(older)

    def check(self) -> None:
        """Raises OSError where this process has released the place, or another has taken it over."""
        newest = self._newest()
        if newest != self._number or self._released.is_set():
            reason = f"{self._read(newest)['who']} writes here now; this process must not any more"
            raise OSError(errno.EPERM, reason, self._objects.url)

    def release(self) -> None:
        """Gives the place up; never raises."""
        self._released.set()
        self._thread.join(self._rhythm.deadline_seconds)
        with contextlib.suppress(OSError):  # the next one waits for a beat then
            self._say(RELEASED, tries=2)

    def _may_follow(self, newest: int) -> bool:
        """Whether the owner is gone; False where a newer one has come meanwhile. Raises ResumeError where it lives."""
        owner = self._read(newest)
        first = self._last_beat(newest)
        if first == RELEASED or owner["run"] == self._run_id:
            return True
        give_up = time.monotonic() + self._rhythm.deadline_seconds
        while time.monotonic() < give_up:
            time.sleep(self._rhythm.beat_seconds / 4)
            if self._newest() != newest:
                return False
            beat = self._last_beat(newest)
            if beat == RELEASED:
                return True
            if beat != first:
                raise ResumeError(
                    f"another run writes here: {owner['who']}",
                    where=self._objects.url,
                    cure="wait for it, stop it, or give another checkpoint.store",
                )
        return True

    def _newest(self) -> int:
        return max(map(_number, self._objects.children("owner/").objects), default=0)

    def _read(self, number: int) -> dict[str, Any]:
        try:
            found = json.loads(bytes(self._objects.read(_name(number))))
        except (FileNotFoundError, ValueError):  # removed by a newer one; or not ours to understand
            found = {}
        return {"run": None, "who": f"somebody unknown, {_name(number)}"} | (found if isinstance(found, dict) else {})

    def _last_beat(self, number: int) -> bytes | None:
        try:
            return bytes(self._objects.read(f"{_name(number)}.beat"))
        except FileNotFoundError:  # created a moment ago, or its process died then
            return None

    def _beat(self) -> None:
        count = 0
        while not self._released.wait(self._rhythm.beat_seconds):
            count += 1
            with contextlib.suppress(OSError):  # the store is away; whoever waits for a beat cannot reach it either
                self._say(str(count).encode(), tries=1)

    def _say(self, beat: bytes, *, tries: int | None) -> None:
        self._objects.put(f"{_name(self._number)}.beat", beat, tries=tries)


def require_conditions(objects: Objects) -> None:
    """Raises ResumeError where the store creates an object that exists: two commits of one checkpoint would both
    succeed there. OSError where it fails."""
    name = f"owner/probe-{secrets.token_hex(8)}"
    try:
        objects.create(name, b"first")
        try:
            objects.create(name, b"second")
        except FileExistsError:
            return
        raise ResumeError(
            "this store ignores `If-None-Match: *`, so two runs could each believe that they committed a checkpoint",
            where=objects.url,
            cure="use a store with conditional writes (S3, GCS, Azure, MinIO and Ceph have them), or the run folder",
        )
    finally:
        objects.remove([name])


def _name(number: int) -> str:
    return f"owner/{number:08d}"


def _number(name: str) -> int:
    """2 of `00000002` and of `00000002.beat`; 0 for all else."""
    found = re.fullmatch(r"([0-9]{8})(\.beat)?", name)
    return int(found[1]) if found else 0
