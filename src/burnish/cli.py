"""The command line: finds the command in `commands/`, imports that one alone, and turns errors into exit codes.

A command is a module with `add_arguments(parser)` and `run(args) -> int`. Nothing heavier than argparse is imported
before one is chosen, so that `burnish --help` is there at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence

import burnish
import burnish.commands
from burnish.errors import BurnishError

HELP = {
    "train": "run a recipe; the same command resumes it from its run_dir",
    "check": "everything that can be known before spending",
    "data": "rendered, masked, packed rows and the token ledger",
    "verify": "compare a model's every changed path with plain transformers",
    "export": "write a plain Hugging Face or PEFT folder",
    "generate": "talk to a model or a run",
    "chaos": "run a recipe while things go wrong, and get a verdict",
    "cache-teacher": "keep a teacher's likeliest tokens for all rows",
    "recipes": "list or copy the shipped recipes",
}
"""In the order they are shown; a command without a line here still works."""

INTERRUPTED = 130
"""Ctrl-C where nothing was under way that could be resumed; a run in progress says Stopped (75) itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` and returns its exit code; a mistake in the arguments exits with 2."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    if isinstance(sys.stdout, io.TextIOWrapper):  # what models write is shown as far as the output can, as errors are
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BurnishError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `burnish data ... | head` closed the pipe; keep the interpreter from failing on it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    modules = [m.name for m in pkgutil.iter_modules(burnish.commands.__path__) if not m.name.startswith("_")]
    found = [name.replace("_", "-") for name in modules]
    if not arguments or arguments[0] not in found:
        return _top_level(found).parse_args(arguments)
    name, *rest = arguments
    module = importlib.import_module(f"burnish.commands.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"burnish {name}", description=HELP.get(name))
    parser.set_defaults(run=module.run)
    module.add_arguments(parser)
    # Intermixed, so that options may stand between a recipe and its overrides: RECIPE --json num_steps=5.
    return parser.parse_intermixed_args(rest)


def _top_level(found: list[str]) -> argparse.ArgumentParser:
    """Knows the commands by name: for `--help`, `--version` and names that are none."""
    parser = argparse.ArgumentParser(prog="burnish", description="Post-training of language models, by recipe.")
    parser.add_argument("--version", action="version", version=f"burnish {burnish.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in [*(name for name in HELP if name in found), *(name for name in found if name not in HELP)]:
        commands.add_parser(name, help=HELP.get(name))
    return parser
