"""The parent's end of the template process: a deadline on every answer, and a clear refusal when it is killed.

Neither a template nor a row can hang a run or take its memory: see `worker.py` for the limits.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import burnish
from burnish.data.rendering import worker
from burnish.errors import DataError

_ANSWER_SECONDS = 300.0
"""Wall-clock backstop for one answer; the processor limit ends a busy template long before."""

Located = tuple[str, list[tuple[int, int]]]
"""Text of a conversation, and the characters the model is trained to write."""


class TemplateProcess:
    """One chat template in a process of its own. Thread-safe; a forked child of ours starts another.

    `spec`: `source`, `variables`, `specials`, `today` as `ChatTemplate` and `learn` take them. `name` is for people.
    """

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self._name, self._spec = name, spec
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def open(self) -> dict[str, Any]:
        """Starts the process; what the template does, as `probe.Report` has it.

        Raises:
            DataError: the template is broken, exceeds a limit, or its mask cannot be proved.
        """
        with self._lock:
            return self._start()

    def locate(self, conversations: Sequence[bytes]) -> list[Located | DataError]:
        """One answer a conversation, `marshal` of (messages, tools, chat_template_kwargs); errors have no place yet."""
        return self.answers("locate", conversations)

    def answers(self, what: str, records: Sequence[bytes]) -> list[Any]:
        """What the process says of each record, as the method `what` of `worker.py` has it; or a DataError."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            try:
                return self._answered(self._ask((what, list(records))))
            except _Died as died:
                if len(records) == 1:
                    return [self._killed(died)]
            answers: list[Any] = []
            for record in records:  # which one was it?
                try:
                    self._start()
                    answers += self._answered(self._ask((what, [record])))
                except _Died as died:
                    return answers + [self._killed(died)] * (len(records) - len(answers))
            return answers

    def _answered(self, answers: list[Any]) -> list[Any]:
        return [a if a[0] is not None else DataError(a[1], cure=a[2]) for a in answers]

    def _killed(self, died: _Died) -> DataError:
        return DataError(
            f"the chat template of {self._name} was stopped: {died}",
            cure="do not trust this template: give another with `renderer.chat_template_path`",
        )

    def _start(self) -> dict[str, Any]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return {}
        # `-P` and PYTHONPATH: the child must find this very package, and never a module of the current folder.
        path = os.pathsep.join([str(Path(burnish.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
        )
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._process, self._owner)
        try:
            answer = self._ask(self._spec)
        except _Died as died:
            raise self._killed(died) from None
        if isinstance(answer, tuple):
            raise DataError(answer[1], where=self._name, cure=answer[2])
        return answer

    def _ask(self, request: Any) -> Any:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        payload = marshal.dumps(request)
        try:
            self._process.stdin.write(len(payload).to_bytes(worker.HEADER, "little") + payload)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._give_up()
        deadline = time.monotonic() + _ANSWER_SECONDS
        size = int.from_bytes(self._receive(worker.HEADER, deadline), "little")
        return marshal.loads(self._receive(size, deadline))

    def _receive(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        received = bytearray()
        while len(received) < size:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(pipe, min(size - len(received), 1 << 20)) if ready else b""
            if not chunk:
                self._give_up()
            received += chunk
        return bytes(received)

    def _give_up(self) -> None:
        """Buries the process. Always raises _Died."""
        assert self._process is not None
        process, self._process = self._process, None
        hung = process.poll() is None and _wait(process, 1.0) is None
        _end(process, self._owner)
        if hung:
            raise _Died(f"no answer in {_ANSWER_SECONDS:.0f} s")
        if process.returncode == -signal.SIGXCPU:
            raise _Died(f"more than {worker.CPU_SECONDS} s of processor time")
        raise _Died(
            f"its process ended with code {process.returncode}; memory is limited to {worker.MEMORY_BYTES >> 20} MiB"
        )


class _Died(Exception):
    """The template process is gone, and why."""


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End of input ends the process; if it is busy, it is killed. Not from a forked child: the parent still uses it."""
    if owner != os.getpid():
        return
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):  # bytes for a process that is gone
                pipe.close()
    if _wait(process, 0.2) is None:
        process.kill()
        process.wait()
