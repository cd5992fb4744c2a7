"""Reinforcement learning in seconds: recipes for the tiny model, and what their runs leave behind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests import tiny_run

PROMPTS = [f"turn around: {' '.join(words)}" for words in (["red"], ["cat", "dog"], ["sun"], ["tree", "river", "moon"])]


def write_prompts(folder: Path, count: int = 40) -> Path:
    """`count` rows with a prompt and an answer."""
    rows = [{"prompt": PROMPTS[i % len(PROMPTS)], "answer": PROMPTS[i % len(PROMPTS)][13:]} for i in range(count)]
    return tiny_run.write_jsonl(folder / "prompts.jsonl", rows)


def changes(prompts: Path, **workflow: Any) -> dict[str, Any]:
    """What is other than in `tiny_run.recipe`: GRPO on the share of vowels."""
    rollout = {"group_size": 4, "sampling": {"max_new_tokens": 8}} | workflow.pop("rollout", {})
    blocks: dict[str, Any] = {
        "type": "rl",
        "preset": "grpo",
        "rollout": rollout,
        "rewards": [{"type": "regex", "name": "vowels", "pattern": "[aeiou]", "match": "share"}],
    }
    return {
        "workflow": {key: value for key, value in (blocks | workflow).items() if value is not None},
        "data": {"train": [{"type": "jsonl", "path": str(prompts)}], "max_length": 64},
        "global_batch_size": 4,
        "num_steps": 6,
        "checkpoint": {"save_every": 2, "keep": 2},
    }


def groups(run_dir: Path) -> list[dict[str, Any]]:
    """Every group that was trained, in order, as it stands in the run folder for reading."""
    files = sorted((run_dir / "rollouts").glob("step-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def trained(run_dir: Path) -> Counter[int]:
    """How often each prompt was trained, by its index."""
    return Counter(group["index"] for group in groups(run_dir))


def texts(run_dir: Path) -> list[list[str]]:
    """What was said, group by group."""
    return [[rollout["text"] for rollout in group["rollouts"]] for group in groups(run_dir)]
