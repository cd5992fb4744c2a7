"""`burnish data RUN --rollouts`: what the policy said in a step, and what each answer was worth."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.errors import DataError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and line feed: what a model writes may be a terminal's commands."""


def show(run_dir: Path, step: int | None, count: int, form: str) -> None:
    """Prints the first groups of a step, `count` at most.

    Args:
        step: None: the last one that is kept.
        form: "text", or "json": an object a group, as the run wrote it, with its step.

    Raises:
        DataError: there are none, or not of this step.
    """
    kept = _kept(run_dir)
    step = max(kept) if step is None else step
    if step not in kept:
        raise DataError(
            f"no rollouts of step {step}", where=str(run_dir), cure=f"kept are those of {_told(sorted(kept))}"
        )
    with open(kept[step], encoding="utf-8") as file:
        groups = [json.loads(line) for line in islice(file, count)]
        num_more = sum(1 for _ in file)
    if form == "json":
        for group in groups:
            sys.stdout.write(json.dumps({"step": step, **group}) + "\n")
        return
    display = _Display()
    for group in groups:
        display.show(group)
    display.end(run_dir, step, len(groups), num_more, _told(sorted(kept)))


def _kept(run_dir: Path) -> dict[int, Path]:
    """The files of the run by their step."""
    files = {int(path.stem.removeprefix("step-")): path for path in (run_dir / "rollouts").glob("step-*.jsonl")}
    if not files:
        raise DataError(
            "it holds no rollouts",
            where=str(run_dir),
            cure="workflows that train on what the policy says write them from their first step on",
        )
    return files


def _told(steps: Sequence[int]) -> str:
    """`steps 1 to 40`, `steps 2, 4 and 6`, `step 3`."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) == 2:
        return f"steps {steps[0]} and {steps[1]}"
    if len(steps) > 4 or steps[-1] - steps[0] == len(steps) - 1:
        whole = steps[-1] - steps[0] == len(steps) - 1
        return f"steps {steps[0]} to {steps[-1]}" + ("" if whole else f", {len(steps)} of them")
    return f"steps {', '.join(map(str, steps[:-1]))} and {steps[-1]}"


def visible(text: str) -> str:
    r"""Control characters as they are written in Python.

    >>> visible("red\x1b[31m")
    'red\\x1b[31m'
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class _Display:
    """For people: each prompt, then its rollouts, the better than expected green on a terminal, the worse red."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)

    def show(self, group: dict[str, Any]) -> None:
        from rich.text import Text

        self._console.print(Text(visible(f"{group['where']} | prompt {group['index']}"), style="bold"))
        self._console.print(Text(visible(group["prompt"]), style="dim"))
        for number, rollout in enumerate(group["rollouts"]):
            better = rollout["advantage"] or 0.0
            style = "green" if better > 0 else "red" if better < 0 else ""
            self._console.print(Text(f"  {number}: {_title(rollout)}", style=f"bold {style}"))
            self._console.print(Text(visible(rollout["text"])))
        self._console.print()

    def end(self, run_dir: Path, step: int, num_shown: int, num_more: int, kept: str) -> None:
        from rich.text import Text

        total = num_shown + num_more
        said = f"step {step} of {run_dir}: {num_shown} of {total} prompt{'s' * (total != 1)}; {kept} kept"
        self._console.print(Text(said))


def _title(rollout: dict[str, Any]) -> str:
    """`reward 1.25 = math 1, overlong -0.5 | advantage +0.8 | 31 tokens, stop`; what is as always is left out."""
    terms = ", ".join(f"{name} {_number(value)}" for name, value in rollout["terms"].items())
    advantage = rollout["advantage"]
    parts = [
        f"reward {_number(rollout['reward'])}" + (f" of {terms}" if terms else ""),
        "" if advantage is None else f"advantage {advantage:+.3g}",
        f"{rollout['tokens']} token{'s' * (rollout['tokens'] != 1)}, {rollout['finish_reason']}",
        f"{rollout['turns']} turns" if rollout["turns"] != 1 else "",
        f"lag {rollout['lag']}" if rollout["lag"] else "",
    ]
    return " | ".join(part for part in parts if part)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
