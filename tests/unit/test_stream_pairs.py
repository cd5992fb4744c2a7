"""Pairs with a shared prompt through the whole stream: never split, every token accounted, resumed exactly."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from burnish.data.config import DataConfig
from burnish.data.renderers.chat import Chat
from burnish.data.stream import open_stream
from burnish.errors import ResumeError
from burnish.types import Block, RowFormat
from tests.chat_helpers import byte_level
from tests.stream_helpers import same
from tests.tiny_run import write_jsonl

NUM_PAIRS = 40


def rows() -> list[dict[str, Any]]:
    """Row i has a prompt of 16 + i % 7 tokens and answers of 1 + i % 5 and 2 + i % 3, each with its end token."""
    return [
        {"prompt": "p" * (16 + i % 7), "chosen": "c" * (1 + i % 5), "rejected": "r" * (2 + i % 3)}
        for i in range(NUM_PAIRS)
    ]


def stream_of(path: Path):
    data = DataConfig.model_validate(
        {
            "train": [{"type": "jsonl", "path": str(path)}],
            "max_length": 32,
            "packing": {"type": "best_fit", "lanes": 2, "open_bins": 2, "row_length": 96},
        }
    )
    return closing(open_stream(data, Chat().open(byte_level(), RowFormat("preference")), seed=0, num_epochs=1))


def blocks_of(path: Path) -> tuple[list[Block], dict[str, Any]]:
    with stream_of(path) as stream:
        return [block for taken in iter(lambda: stream.take(1), []) for block in taken], stream.ledger()


def test_pairs_are_never_split_and_every_token_is_accounted(tmp_path: Path) -> None:
    blocks, ledger = blocks_of(write_jsonl(tmp_path / "pairs.jsonl", rows()))
    signs: dict[str, list[float]] = {}
    for block in blocks:
        for index, source in enumerate(block.sample_ids):
            signs.setdefault(source, []).append(block.columns["preference"][index].item())
            start, _, prefix_start, prefix_end = block.documents[index].tolist()
            ids = block.token_ids.tolist()
            if prefix_end:
                assert set(ids[prefix_start:prefix_end]) == {79}  # "p"
                assert ids[start] in (66, 81)  # "c", "r"
                assert block.position_ids[start].item() == prefix_end - prefix_start
                assert block.group_ids[index] == block.group_ids[int(block.document_ids[prefix_start])]
    assert len(signs) == NUM_PAIRS and all(found == [0, 1, -1] for found in signs.values())
    prompts = sum(16 + i % 7 for i in range(NUM_PAIRS))
    answers = sum(2 + i % 5 + 3 + i % 3 for i in range(NUM_PAIRS))
    assert ledger["tokens"] == {"trained": answers, "masked": prompts}
    assert ledger["slots"] - ledger["padding"] == prompts + answers


def test_a_stream_of_pairs_goes_on_where_it_was(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows())
    blocks, _ = blocks_of(path)
    with stream_of(path) as stream:
        for _ in range(5):
            stream.take(1)
        state = stream.state()
    with stream_of(path) as stream:
        stream.load(state)
        rest = [block for taken in iter(lambda: stream.take(1), []) for block in taken]
    assert len(rest) == len(blocks) - 5 > 3
    assert all(same(ours, theirs) for ours, theirs in zip(rest, blocks[5:], strict=True))


def test_a_margin_that_was_edited_between_checkpoint_and_resume_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows())
    with stream_of(path) as stream:
        for _ in range(5):
            stream.take(1)
        state = stream.state()
    write_jsonl(path, [{**row, "margin": 1} for row in rows()])
    with stream_of(path) as stream, pytest.raises(ResumeError, match="was used before the checkpoint and is another"):
        stream.load(state)
        stream.take(1)
