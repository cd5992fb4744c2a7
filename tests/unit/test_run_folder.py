from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from burnish.errors import ResumeError
from burnish.launch.run_folder import open_run_folder

OWN = """
import sys, time
from pathlib import Path
from burnish.launch.run_folder import open_run_folder
with open_run_folder(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_by_the_owners_name_and_a_killed_owner_holds_nothing(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "mine\n"
        with pytest.raises(ResumeError) as refused, open_run_folder(tmp_path):
            pass
        assert f"pid {owner.pid} on " in str(refused.value) and str(tmp_path) in str(refused.value)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with open_run_folder(tmp_path):
            assert f"pid {os.getpid()} on " in (tmp_path / "run.lock").read_text()
    finally:
        owner.kill()
        owner.communicate()


def test_the_folder_is_free_after_the_block_and_after_an_error_in_it(tmp_path):
    with pytest.raises(ZeroDivisionError), open_run_folder(tmp_path / "new" / "run"):
        raise ZeroDivisionError
    with open_run_folder(tmp_path / "new" / "run") as folder:
        assert folder.path == tmp_path / "new" / "run"


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match="Not a directory"), open_run_folder(tmp_path / "file" / "run"):
        pass


def with_a_checkpoint(run) -> None:
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10" / "manifest.json").write_text("{}")


def test_the_recipe_is_to_be_compared_once_there_is_a_checkpoint(tmp_path):
    recipe = {"optimizer": {"learning_rate": 0.1 + 0.2}, "seed": 0}
    with open_run_folder(tmp_path) as folder:
        assert folder.recipe() is None
        folder.write_recipe({"seed": 1})
        folder.write_recipe(recipe)
        assert folder.recipe() is None, "nothing was saved: nothing can be resumed wrongly"
        with_a_checkpoint(tmp_path)
        assert folder.recipe() == recipe
    assert not (tmp_path / "recipe.json.tmp").exists()


@pytest.mark.parametrize("text", [None, '{"seed": '])
def test_checkpoints_without_a_readable_recipe_are_refused(tmp_path, text):
    with_a_checkpoint(tmp_path)
    if text is not None:
        (tmp_path / "recipe.json").write_text(text)
    with open_run_folder(tmp_path) as folder, pytest.raises(ResumeError, match=r"recipe\.json: .*cannot be read"):
        folder.recipe()


def test_a_new_run_does_not_take_the_export_of_another_for_its_own(tmp_path):
    (tmp_path / "model").mkdir()
    with open_run_folder(tmp_path) as folder:
        with pytest.raises(ResumeError, match=r"model: there is the export of a finished run, but no checkpoint"):
            folder.recipe()
        with_a_checkpoint(tmp_path)
        folder.write_recipe({"seed": 1})
        assert folder.recipe() == {"seed": 1}


def test_a_run_goes_on_with_the_tokens_it_began_with(tmp_path):
    with open_run_folder(tmp_path) as folder:
        folder.hold_tokens({"tokenizer": "abc", "chat_template": "x"})
        folder.hold_tokens({"tokenizer": "abd", "chat_template": "x"})  # no checkpoint yet: nothing was learned
        folder.write_recipe({})
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "manifest.json").write_text("{}")
        folder.hold_tokens({"tokenizer": "abd", "chat_template": "x"})
        with pytest.raises(ResumeError, match="tokenizer: not what the run was trained with"):
            folder.hold_tokens({"tokenizer": "abc", "chat_template": "x"})
        assert json.loads((tmp_path / "tokens.json").read_text())["tokenizer"] == "abd"


def test_events_are_appended_over_restarts(tmp_path):
    with open_run_folder(tmp_path) as folder:
        folder.event("checkpoint_failed", step=20, reason="No space left on device")
    with open_run_folder(tmp_path) as folder:
        folder.event("resumed", step=10, losses=[float("nan"), 1.5])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    times = [event.pop("time") for event in events]
    assert events == [
        {"event": "checkpoint_failed", "step": 20, "reason": "No space left on device"},
        {"event": "resumed", "step": 10, "losses": ["NaN", 1.5]},
    ]
    assert times == sorted(times) and all(time.endswith("+00:00") for time in times)


def test_the_ledger_is_replaced(tmp_path):
    with open_run_folder(tmp_path) as folder:
        folder.write_ledger({"trained": 1})
        folder.write_ledger({"trained": 2, "dropped: too long": 3})
    assert json.loads((tmp_path / "ledger.json").read_text()) == {"trained": 2, "dropped: too long": 3}
