"""Which rank a failure began at, when all that is known is how ranks ended or where they stand.

One rank that dies or hangs takes the others with it: their connections break, or they wait for it. A person wants to
read of the first. Pure functions of text; must not know how it was come by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from burnish.errors import EXIT_DONE, EXIT_STOPPED
from burnish.launch.worker_group import Beat, Ended, Outcome, Stack

_BROKEN = re.compile(
    r"connection (?:reset|closed|refused)|broken pipe|remote process exited|socket timeout|timed out waiting|"
    r"wait timeout|Dist(?:Network|Store|Backend)Error",
    re.IGNORECASE,
)
"""What torch.distributed says on a rank that another has left: gloo, NCCL and the store, each in its own words."""

_CHAINED = re.compile(
    r"^(?:During handling of the above exception|The above exception was the direct cause).*$", re.MULTILINE
)


def failed(outcome: Outcome) -> bool:
    """Neither done nor paused."""
    return outcome.code not in (EXIT_DONE, EXIT_STOPPED)


def is_echo(outcome: Outcome) -> bool:
    """Whether it only says that another rank has gone, as when every exception of its traceback is about a connection.

    A rank that fails by itself may meet one too, while it closes what it had open: then that is the last of a chain.
    """
    if outcome.echo:
        return True
    if outcome.code < 0 or not outcome.retry or not outcome.words:
        return False
    return all(_BROKEN.search(_message(part)) for part in _CHAINED.split(outcome.words))


def first_failing(ended: Sequence[Ended]) -> Ended | None:
    """The rank that the others followed, of those that ended so far and in that order; None if none failed.

    What would end so again comes first: a refusal, a run that failed by itself. After it what is certain, a signal or
    an error of its own. A broken connection is blamed where there is nothing else.
    """
    failures = [each for each in ended if failed(each.outcome)]
    own = [each for each in failures if not is_echo(each.outcome)]
    final = [each for each in own if not each.outcome.retry]
    return next(iter([*final, *own, *failures]), None)


def hanging(stacks: Mapping[int, Stack], beats: Sequence[Beat]) -> list[int]:
    """The ranks that the others wait for, of those whose stacks were asked for; there is at least one.

    Stopped ones are certain. Next those that stand outside torch.distributed while others wait inside it. Where that
    does not tell them apart, those that have come least far.
    """
    stopped = [rank for rank, stack in stacks.items() if stack.stopped]
    if stopped:
        return stopped
    busy = [rank for rank, stack in stacks.items() if not _waits(stack.text)]
    suspects = busy or list(stacks)
    least = min(beats[rank].count for rank in suspects)
    return [rank for rank in suspects if beats[rank].count == least]


def _message(traceback: str) -> str:
    """The exception that a traceback ends with: what follows its last indented line."""
    lines = traceback.strip().split("\n")
    last = max((number for number, line in enumerate(lines) if line.startswith("  File ")), default=-1)
    return "\n".join(line for line in lines[last + 1 :] if not line.startswith("    "))


def _waits(stacks: str) -> bool:
    """Whether the innermost frame of a thread is in torch.distributed."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)
    innermost = (thread.strip().partition("\n")[0] for thread in threads)
    return any("torch/distributed/" in frame for frame in innermost)
