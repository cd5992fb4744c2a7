"""Several ranks of one process group, forked from a process that has imported torch and run no operator.

A spawned process would import torch, transformers and peft anew: 8 seconds of a core for each rank of each test.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

PRELOADED = ["tests.ranks", "tests.preloaded"]


def run_ranks(count: int, work: Callable[..., None], *args: Any, seconds: float = 120.0) -> None:
    """Calls `work(rank, *args)` in `count` processes with the environment that torchrun would give them.

    Fails with the first rank's traceback, or when `seconds` are over: then the ranks are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    ranks = [
        context.Process(target=_rank, args=(rank, count, port, pipes[rank][1], work, args)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        waiting: dict[Any, int] = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        failures: list[str] = []
        while waiting and not failures:
            ready: list[Any] = wait(waiting, timeout=seconds)
            assert ready, f"{count} ranks of {work.__name__} have not ended after {seconds} s"
            for receiver in ready:
                rank = waiting.pop(receiver)
                try:
                    error = receiver.recv()
                except EOFError:
                    error = f"rank {rank} died without a word"
                failures += [error] if error else []
        assert not failures, "\n".join(failures)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, count: int, port: int, sender: Any, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    try:
        work(rank, *args)
        sender.send("")
    except BaseException:
        sender.send(f"rank {rank}:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Once in some ten times, gloo's threads abort a process of several ranks while it is torn down ("terminate called
    # without an active exception"), which says nothing about what is tested.
    os._exit(0)
