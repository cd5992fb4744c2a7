from __future__ import annotations

import logging
import resource
import sys
import threading
from pathlib import Path

import pytest

from burnish.errors import UserError
from burnish.track.tensorboard import TensorBoard


def scalars(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_points_are_on_the_disk_after_each_step_and_a_resumed_run_shows_none_twice(tmp_path):
    killed = TensorBoard().open(tmp_path, 0, {"seed": 0})
    for step in range(6):
        killed.log(step, {"loss": float(step)})
    assert scalars(tmp_path / "tensorboard") == [(step, float(step)) for step in range(6)]  # never closed
    resumed = TensorBoard().open(tmp_path, 3, {"seed": 0})
    for step in range(4, 8):
        resumed.log(step, {"loss": step + 0.5})
    resumed.close()
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)]
    assert scalars(tmp_path / "tensorboard") == expected
    killed.close()


def test_a_run_that_begins_anew_hides_all_of_the_old(tmp_path):
    for value in (1.0, 2.0):
        live = TensorBoard(log_dir="board").open(tmp_path, 0, {})
        live.log(0, {"loss": value})
        live.close()
    assert scalars(tmp_path / "board") == [(0, 2.0)]


def test_an_absolute_log_dir_is_taken_as_it_is(tmp_path):
    live = TensorBoard(log_dir=str(tmp_path / "elsewhere")).open(tmp_path / "run", 0, {})
    live.log(1, {"loss": 1.0})
    live.close()
    assert scalars(tmp_path / "elsewhere") == [(1, 1.0)]


# The failing thread is tensorboard's own; what it met is what the tracker must survive.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_reported_once_and_the_run_goes_on(tmp_path, caplog):
    threads = set(threading.enumerate())
    live = TensorBoard().open(tmp_path, 0, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
    with caplog.at_level(logging.WARNING, logger="burnish"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            for step in range(1, 6):
                live.log(step, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        live.close()
    for thread in set(threading.enumerate()) - threads:
        thread.join()  # pytest sees its exception in this test, and not at some later moment
    assert len(caplog.records) == 1 and "File too large" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_with_a_cure(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="cure: give a log_dir"):
        TensorBoard().open(tmp_path, 0, {})


class Missing:
    """An import hook: the machine without the package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_package_is_refused_with_a_cure(tmp_path):
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if "tensorboard" in name.split(".")}
    hook = Missing()
    sys.meta_path.insert(0, hook)
    try:
        with pytest.raises(UserError, match=r"pip install 'burnish\[tensorboard\]'"):
            TensorBoard().open(tmp_path, 0, {})
    finally:
        sys.meta_path.remove(hook)
        for name in [name for name in sys.modules if "tensorboard" in name.split(".")]:
            del sys.modules[name]
        sys.modules.update(loaded)
