from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys

from burnish.launch.console import Console, summary


def test_plain_lines_in_a_pipe():
    output = io.StringIO()
    console = Console(20, output=output, every_seconds=0.0)
    console.note("resumed after step 3")
    console.step(4, {"loss": 2.30258, "tokens_per_second": 1234.4, "mfu": 0.41234, "other": 1.0})
    console.close()
    assert output.getvalue() == "resumed after step 3\nstep 4/20  loss 2.3026  tokens/s 1,234  mfu 41.2%\n"


def test_lines_are_rare_but_the_first_the_last_and_evaluations_are_shown():
    output = io.StringIO()
    console = Console(5, output=output, every_seconds=1000.0)
    for step in range(1, 6):
        console.step(step, {"loss": 1.0, **({"eval_loss": 0.5} if step == 3 else {})})
    shown = [re.sub(r"  eta .*", "", line) for line in output.getvalue().splitlines()]
    assert shown == ["step 1/5  loss 1.0000", "step 3/5  loss 1.0000  eval_loss 0.5000", "step 5/5  loss 1.0000"]
    assert output.getvalue().endswith("eta 0:00:00\n")


def test_a_run_of_epochs_has_no_total():
    output = io.StringIO()
    console = Console(None, output=output, every_seconds=0.0)
    console.step(0, {"eval_loss": 2.0})
    console.step(1, {"loss": 1.0})
    assert output.getvalue() == "step 0  eval_loss 2.0000\nstep 1  loss 1.0000\n"


def test_json_lines_hold_everything_exactly():
    output = io.StringIO()
    console = Console(20, json_lines=True, output=output)
    console.note("hello")
    console.step(1, {"loss": 0.1 + 0.2, "grad_norm": float("nan")})
    console.close()
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert lines == [{"note": "hello"}, {"step": 1, "loss": 0.30000000000000004, "grad_norm": "NaN"}]


def test_a_progress_bar_on_a_terminal():
    leader, follower = pty.openpty()
    with open(follower, "w", encoding="utf-8", closefd=True) as terminal:
        console = Console(2, output=terminal)
        console.note("a [note] in brackets")
        console.step(1, {"loss": 2.0})
        console.step(2, {"loss": 1.5, "eval_loss": 1.25})
        console.close()
        shown = b""
        while b"\x1b[?25h" not in shown:  # the cursor is back
            shown += os.read(leader, 1 << 16)
        shown = shown.decode()
    os.close(leader)
    assert "a [note] in brackets" in shown
    assert "1/2 " in shown and "\x1b[" in shown, "drawn over and over, not line by line"
    assert "step 2/2  loss 1.5000  eval_loss 1.2500" in shown, "an evaluation stays on the screen"


def test_a_run_outlives_whoever_watches_it():
    """As `burnish train r.yaml | head -1` and a log on a full disk: neither the run nor its exit code may suffer."""
    code = (
        "import sys, time\n"
        "from burnish.launch.console import Console\n"
        "console = Console(3, every_seconds=0.0)\n"
        "for step in (1, 2, 3): console.step(step, {'loss': 1.0})\n"
        "console.note('done'), console.close(), sys.stdout.flush()\n"
        "print('went on', file=sys.stderr)\n"
    )
    leader, follower = os.pipe()
    os.close(leader)
    with open("/dev/full", "w") as full, open(follower, "w") as closed_pipe:
        for output in (full, closed_pipe):
            done = subprocess.run([sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, timeout=60)
            assert (done.returncode, done.stderr) == (0, b"went on\n")


def test_a_character_that_the_output_has_not_is_written_as_in_python():
    """An environment's words, in an event: half of a pair of UTF-16, and Cyrillic in a log of Latin-1."""
    for encoding, shown in (("utf-8", "said \\udc80 да"), ("latin-1", "said \\udc80 \\u0434\\u0430")):
        output = io.TextIOWrapper(io.BytesIO(), encoding)
        Console(2, output=output).note("said \udc80 да")
        output.seek(0)
        assert output.read() == shown + "\n"


def test_summary_shows_the_well_known_in_a_fixed_order():
    metrics = {"mfu": 0.5, "unknown": 1.0, "learning_rate": 0.0001, "loss": float("nan"), "grad_norm": 12.3456}
    assert summary(metrics) == "loss nan  grad_norm 12.3  lr 1.00e-04  mfu 50.0%"
