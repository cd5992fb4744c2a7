"""The parent's end of a reward process: starting it, asking without waiting, hearing answers, burying it.

Must know neither rewards nor deadlines: see `pool.py`. What the process does is in `worker.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import burnish
from burnish.child import GONE_SECONDS, OF_RANKS, end_family, how_it_ended
from burnish.ray_cluster import SECRETS
from burnish.rewards import worker
from burnish.rewards.worker import HEADER


class RewardProcess:
    """An interpreter in a session of its own. No call waits for it.

    Args:
        parts: pickle of (rewards, environment); its first answer says whether they could be opened.
    """

    def __init__(self, parts: bytes) -> None:
        self._channel, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        # `-P` and PYTHONPATH: the child must find this very package, and never a module of the current folder.
        path = os.pathsep.join([str(Path(burnish.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {name: value for name, value in os.environ.items() if name not in (*OF_RANKS, *SECRETS)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", worker.__name__, str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                env={**environment, "PYTHONPATH": path.rstrip(os.pathsep)},
            )
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        self._channel.setblocking(False)
        self._received, self._unsent = bytearray(), bytearray()
        self.ask((list(sys.path), parts))

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """What becomes readable when it answers or dies, and writable when `wants_room`."""
        return self._channel.fileno()

    @property
    def wants_room(self) -> bool:
        """Whether a request is not yet in its hands."""
        return bool(self._unsent)

    @property
    def is_answering(self) -> bool:
        """Whether a part of an answer is here."""
        return bool(self._received)

    def ask(self, request: Any) -> None:
        """Queues a request; it has answered the last one."""
        payload = pickle.dumps(request)
        self._unsent += len(payload).to_bytes(HEADER, "little") + payload
        self._send()

    def receive(self) -> list[dict[str, Any]]:
        """Whole answers that are here, after sending what there is room for."""
        self._send()
        with contextlib.suppress(BlockingIOError, ConnectionError):  # that it died is for `death` to say
            while piece := self._channel.recv(1 << 20):
                self._received += piece
        answers = []
        while len(self._received) >= HEADER:
            end = HEADER + int.from_bytes(self._received[:HEADER], "little")
            if len(self._received) < end:
                break
            answers.append(json.loads(self._received[HEADER:end]))
            del self._received[:end]
        return answers

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self._unsent:
                del self._unsent[: self._channel.send(self._unsent)]

    def death(self) -> str:
        """How it ended, for people; "" while it lives. It is not reaped: its group's number stays its own."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return ""
        exited = ended.si_code == os.CLD_EXITED
        return f"its process is gone: {how_it_ended(ended.si_status if exited else -ended.si_status)}"

    def kill(self) -> None:
        """Ends it with all that it has started; the second time nothing happens.

        What it started in a session of its own lives on where this process had no time to call this, killed itself, or
        where a double fork or the death of the reward's own process has cut it off: see `child.end_family`.
        """
        if self._channel.fileno() < 0:
            return
        end_family(self.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GONE_SECONDS)
        self._close()

    def _close(self) -> None:
        self._channel.close()
        os.close(self._lifeline)
