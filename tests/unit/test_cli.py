"""The command line: quick, one command imported, errors as exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import burnish
from burnish import cli, commands
from burnish.errors import RunFailed, Stopped

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "pydantic", "ruamel")


def burnish_command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "burnish", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_help_is_there_at_once_and_imports_nothing_heavy():
    code = (
        "import sys, burnish.cli\n"
        "try: burnish.cli.main(sys.argv[1:])\n"
        f"except SystemExit: print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    seconds = []
    for arguments in (["--help"], ["train", "--help"], ["check", "--help"]):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - started)
        assert done.stdout.splitlines()[-1] == "[]", arguments
    assert min(seconds) < 0.7


def test_help_lists_the_commands_in_the_order_of_use(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.split("COMMAND")[-1].splitlines()
    # The help of a long name wraps to a line of its own.
    names = [line.split()[0] for line in lines if line.startswith("    ") and line[4] != " "]
    assert names == ["train", "check", "data", "verify", "export", "generate", "chaos", "cache-teacher", "recipes"]


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"burnish {burnish.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["check"]])
def test_mistakes_in_the_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: burnish" in capsys.readouterr().err


def test_options_may_stand_between_a_recipe_and_its_overrides(tmp_path: Path, capsys):
    (tmp_path / "r.yaml").write_text("model: {path: x}")
    told = []
    for arguments in (["--json", "r.yaml", "a=1"], ["r.yaml", "--json", "a=1"], ["r.yaml", "a=1", "--json"]):
        assert cli.main(["check", *(a.replace("r.yaml", str(tmp_path / "r.yaml")) for a in arguments)]) == 2
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    assert "override 'a=1': a: unknown key" in told[0]


def test_a_refused_recipe_exits_2_without_a_traceback(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("model: {path: x}\nnum_stps: 3\n")
    started = time.perf_counter()
    done = burnish_command("train", "r.yaml", cwd=tmp_path)
    assert time.perf_counter() - started < 4
    assert (done.returncode, done.stdout) == (2, "")
    assert "r.yaml:2: num_stps: unknown key\n  cure: did you mean `num_steps`?" in done.stderr
    assert "Traceback" not in done.stderr


COMMAND = """
from burnish.errors import RunFailed, Stopped

def add_arguments(parser):
    parser.add_argument("what")

def run(args):
    match args.what:
        case "stop": raise Stopped("stopped after step 3")
        case "fail": raise RunFailed("three bad steps")
        case "interrupt": raise KeyboardInterrupt
        case "bug": raise ZeroDivisionError
    print("did", args.what)
    return 0
"""


@pytest.fixture
def dropped_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file beside the other commands; nothing else is edited."""
    (tmp_path / "frobnicate.py").write_text(COMMAND)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    yield
    sys.modules.pop("burnish.commands.frobnicate", None)


def test_a_command_dropped_into_the_folder_needs_no_other_edit(dropped_command, capsys):
    assert cli.main(["frobnicate", "this"]) == 0
    assert capsys.readouterr().out == "did this\n"


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("stop", Stopped.exit_code, "stopped after step 3\n"),
        ("fail", RunFailed.exit_code, "three bad steps\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_errors_are_a_message_and_an_exit_code(dropped_command, capsys, what, code, said):
    assert cli.main(["frobnicate", what]) == code
    assert capsys.readouterr().err == said


def test_exit_codes_are_those_of_the_manual():
    assert (Stopped.exit_code, RunFailed.exit_code) == (75, 1)


def test_a_bug_keeps_its_traceback(dropped_command):
    with pytest.raises(ZeroDivisionError):
        cli.main(["frobnicate", "bug"])


def test_a_closed_pipe_is_no_error():
    code = "import sys, burnish.cli; sys.exit(burnish.cli.main(['check', '--schema']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), said) == (0, b"")


def test_shipped_recipes_are_listed_with_their_first_line(capsys):
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert cli.main(["recipes", "ls"]) == 0
    assert capsys.readouterr().out == listed
    assert any(
        line.split(maxsplit=1)[0] == "quickstart" and "Teaches SmolLM2-135M" in line for line in listed.splitlines()
    )
    assert cli.main(["recipes", "ls", "--json"]) == 0
    assert "quickstart" in json.loads(capsys.readouterr().out)


def test_a_shipped_recipe_is_copied_and_never_over_a_file(tmp_path: Path, capsys):
    from burnish.commands.recipes import shipped

    assert cli.main(["recipes", "cp", "quickstart", str(tmp_path)]) == 0
    copy = tmp_path / "quickstart.yaml"
    assert capsys.readouterr().out == f"{copy}\n"
    assert copy.read_text() == shipped()["quickstart"].read_text()
    copy.write_text("mine")
    assert cli.main(["recipes", "cp", "quickstart", str(copy)]) == 2
    assert copy.read_text() == "mine"
    capsys.readouterr()
    assert cli.main(["recipes", "cp", "quickstart", str(tmp_path / "no" / "r.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'no'}: no such folder\n")
    assert cli.main(["recipes", "cp", "quikstart"]) == 2
    assert "did you mean `quickstart`?" in capsys.readouterr().err
