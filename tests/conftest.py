"""Fixtures that several test files share; each is made once a session, or once a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import rl_helpers, tiny_run
from tests.e2e_helpers import Lab
from tests.zygote import Zygote

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Read when torch is imported. Tests run beside each other, and two threads make no tiny product quicker."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a two-layer Llama and its tokenizer. Read only."""
    return tiny_run.write_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short conversations as JSON lines. Read only."""
    return tiny_run.write_jsonl(tmp_path_factory.mktemp("tiny-data") / "train.jsonl", tiny_run.conversations(200))


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs whole commands in about a second each."""
    with Zygote() as running:
        yield running


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tiny_model: Path, tiny_train: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Whole commands in a folder of the test file's own, with prompts in it for reinforcement learning."""
    folder = tmp_path_factory.mktemp("lab")
    rl_helpers.write_prompts(folder)
    return Lab(zygote, folder, tiny_model, tiny_train)
