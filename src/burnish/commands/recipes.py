"""`burnish recipes [ls | cp NAME [TO]]`: the recipes that come with Burnish."""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
from pathlib import Path

from burnish.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish recipes`."""
    parser.add_argument("action", choices=("ls", "cp"), nargs="?", default="ls", help="list (the default), or copy one")
    parser.add_argument("name", metavar="NAME", nargs="?", help="cp: which")
    parser.add_argument(
        "to", metavar="TO", nargs="?", type=Path, default=Path(), help="cp: a file or folder (default: .)"
    )
    parser.add_argument("--json", action="store_true", help="ls: a JSON object, name to description")


def run(args: argparse.Namespace) -> int:
    """Lists, or copies."""
    return _list(args) if args.action == "ls" else _copy(args)


def shipped() -> dict[str, Path]:
    """Name to file: from the wheel, or from the repository in an editable installation."""
    package = Path(__file__).parents[1]
    folder = next(f for f in (package / "recipes", package.parents[1] / "recipes") if f.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _list(args: argparse.Namespace) -> int:
    said = {name: _first_comment(file) for name, file in shipped().items()}
    if args.json:
        print(json.dumps(said, indent=2))
        return 0
    width = max(map(len, said))
    for name, comment in said.items():
        print(f"{name:{width}}  {comment}")
    return 0


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("#").strip() for line in lines if line.startswith("#")), "")


def _copy(args: argparse.Namespace) -> int:
    files = shipped()
    if args.name not in files:
        near = difflib.get_close_matches(args.name or "", files, n=1)
        cure = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(files)}"
        raise UserError(f"no shipped recipe `{args.name or ''}`", cure=cure)
    to = args.to / files[args.name].name if args.to.is_dir() else args.to
    if to.exists():
        raise UserError("exists already", where=str(to), cure="give another name as TO")
    if not to.parent.is_dir():
        raise UserError("no such folder", where=str(to.parent), cure="make it first, or give another TO")
    shutil.copyfile(files[args.name], to)
    print(to)
    return 0
