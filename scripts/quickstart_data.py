"""Question/answer conversations from the docstrings of the running Python's own standard library.

Real text, thousands of rows, no download, no licence question; the same rows on every machine with this Python version.
Sources are parsed, never imported, so nothing runs.
"""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "pydoc_data", "turtledemo"}
HELD_OUT_EVERY = 220
"""One name in this many is held out, chosen by the checksum of the name: adding a module moves no other row."""
QUESTIONS = (
    "What does `{name}` do in Python?",
    "Explain Python's `{name}`.",
    "What is `{name}` of the standard library for?",
)


def prepare(folder: Path) -> tuple[int, int]:
    """Writes `train.jsonl` and `eval.jsonl`; returns their numbers of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [0, 0]
    with (folder / "train.jsonl").open("w") as train, (folder / "eval.jsonl").open("w") as held_out:
        for name, signature, docstring in documented(Path(sysconfig.get_paths()["stdlib"])):
            digest = zlib.crc32(name.encode())
            question = QUESTIONS[digest % len(QUESTIONS)].format(name=name)
            answer = f"`{name}{signature}`\n\n{docstring}"
            row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            is_held_out = digest // 7 % HELD_OUT_EVERY == 0
            (held_out if is_held_out else train).write(json.dumps(row) + "\n")
            counts[is_held_out] += 1
    return counts[0], counts[1]


def documented(stdlib: Path) -> Iterator[tuple[str, str, str]]:
    """(qualified name, signature, first paragraph) of every documented public function and class, in order of name."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if SKIPPED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from members(ast.parse(path.read_bytes()), module)


def members(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    """The documented members of a module or class, its classes' members included."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
        if docstring:
            paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
            if 20 <= len(paragraph) <= 600:
                yield name, signature, paragraph
        if isinstance(child, ast.ClassDef):
            yield from members(child, name)
