"""What goes wrong while a model talks is said at once, not after a wait for a token that never comes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from burnish.rollout.generate import stream_answer
from tests import tiny_run


def test_a_failure_in_the_background_is_raised_here(tmp_path: Path) -> None:
    folder = tiny_run.write_model(tmp_path / "model")
    started = time.monotonic()
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream_answer(str(folder), "one two", max_new_tokens=0, temperature=0.0, seed=0))
    assert time.monotonic() - started < 60  # START_SECONDS is 120
