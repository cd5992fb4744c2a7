"""What processes need that belong to another one: they end with it, however it ends, and take along what they began."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""By these a process of many knows its place. One that stands beside them has none: what found them in its environment
would wait for others."""

GONE_SECONDS = 10.0
"""A killed process is gone in milliseconds, unless the kernel waits for a disk or a device on its behalf."""


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel end this process with the thread that started it, where the kernel can: Linux.

    Args:
        parent: process id of the parent; without it any more, this process ends now.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def family(pid: int) -> list[int]:
    """A process and all below it, where there is a /proc. A child whose parent has ended is nobody's, and not among
    them."""
    found = [pid]
    for member in found:  # grows on the way
        with contextlib.suppress(OSError):  # it has ended since
            for children in Path(f"/proc/{member}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found


def end_family(leader: int) -> None:
    """Kills a process group, and what its leader's children have begun in groups and sessions of their own; nothing
    where it has ended.

    Not found is what left the group and has lost its parent: after a double fork, or where the leader is dead already.
    """
    members: list[int] = []
    with contextlib.suppress(ProcessLookupError):  # it was reaped, and its group may live on
        if os.getpgid(leader) == leader:  # else its number is another process's by now
            members = family(leader)
    for kill, number in [(os.killpg, leader), *((os.kill, member) for member in members)]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(number, signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """An exit code as words: -9 is `ended by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    known = {member.value: member.name for member in signal.Signals}
    return f"ended by {known.get(-code, f'signal {-code}')}"
