"""Whole `burnish` commands in about a second: forked from a process that has imported everything and run nothing.

Importing torch and transformers takes five seconds, which a test that kills twenty runs cannot pay each time. The
zygote imports them once and forks; it must never run a torch operator itself, because OpenMP's threads do not survive
a fork and the children would hang.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Trial:
    """One forked command."""

    def __init__(self, zygote: Zygote, pid: int, log: Path) -> None:
        self.zygote, self.pid, self.log = zygote, pid, log

    def wait(self) -> int:
        """Exit code; negative: the signal that ended it."""
        return self.zygote.ask({"wait": self.pid})["code"]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal, if it still runs."""
        os.kill(self.pid, number)

    def output(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text()


class Zygote:
    """The process that forks trials. Use as a context manager."""

    def __enter__(self) -> Zygote:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        assert json.loads(self._line()) == {"ready": True}
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def start(self, argv: list[str], log: Path, **environment: str) -> Trial:
        """Begins `burnish argv...` in a fork of its own, its output going to `log`."""
        request = {"argv": argv, "log": str(log), "environment": environment}
        return Trial(self, self.ask(request)["pid"], log)

    def run(self, argv: list[str], log: Path) -> tuple[int, str]:
        """Exit code and output of a whole command."""
        trial = self.start(argv, log)
        return trial.wait(), trial.output()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Polls every 5 ms; fails the test when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _serve() -> None:
    importlib.import_module("tests.preloaded")
    import transformers

    from burnish.cli import main

    transformers.utils.logging.disable_progress_bar()
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": _fork(main, request["argv"], request["log"], request["environment"])}
        print(json.dumps(answer), file=answers, flush=True)


def _fork(main: Callable[[list[str]], int], argv: list[str], log: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
