"""Whole commands on a tiny model, for the tests that look at what a person would see and find on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny_run
from tests.zygote import Zygote


class Lab:
    """A folder to work in, a tiny model, conversations, and a zygote that runs `burnish` commands."""

    def __init__(self, zygote: Zygote, folder: Path, model_path: Path, train: Path) -> None:
        self.zygote, self.folder, self.model_path, self.train_file = zygote, folder, model_path, train

    def recipe(self, name: str, **changes: Any) -> Path:
        """`<name>.yaml`, whose run folder is `<name>`; keys of `data` and `model` are changed one by one."""
        blocks = tiny_run.recipe(self.model_path, self.train_file, self.folder / name)
        for key in ("data", "model"):
            if key in changes:
                changes[key] = blocks[key] | changes[key]
        blocks = {key: value for key, value in (blocks | changes).items() if value is not None}
        return tiny_run.write_recipe(self.folder / f"{name}.yaml", blocks)

    def burnish(self, *argv: str | Path) -> tuple[int, str]:
        """Exit code and output of a command."""
        return self.zygote.run([str(word) for word in argv], self.folder / "output.log")

    def train(self, name: str, *overrides: str, expect: int = 0, **changes: Any) -> Path:
        """Trains a new recipe; its run folder. Fails the test with the output where the exit code is another."""
        code, output = self.burnish("train", self.recipe(name, **changes), *overrides)
        assert code == expect, output
        return self.folder / name

    def resume(self, name: str, *overrides: str, expect: int = 0) -> str:
        """The same command again; its output."""
        code, output = self.burnish("train", self.folder / f"{name}.yaml", *overrides)
        assert code == expect, output
        return output


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    found = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def column(run_dir: Path, name: str) -> list[float]:
    """One metric of all the steps that have it."""
    return [line[name] for line in tiny_run.read_metrics(run_dir) if name in line]


def ledger(run_dir: Path) -> dict[str, Any]:
    """`ledger.json`."""
    return json.loads((run_dir / "ledger.json").read_text())
