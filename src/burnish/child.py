"""What processes need that belong to another one: they end with it, however it ends, and take along what they began."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys


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


def end_family(leader: int) -> None:
    """Kills a process group; nothing where it has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """An exit code as words: -9 is `ended by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    known = {member.value: member.name for member in signal.Signals}
    return f"ended by {known.get(-code, f'signal {-code}')}"
