"""Rows for every recipe from the docstrings of the running Python's own standard library.

    train, eval              conversations: a question and its answer
    preferences, unpaired    the same answers against those of other names
    topics                   a description and the package it is from
    search                   a question and the description that answers it
    steps                    sums worked out step by step, some of them wrong (no docstrings in these)

Real text, thousands of rows, no download, no licence question; the same rows on every machine with this Python version.
Sources are parsed, never imported, so nothing runs.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
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


def prepare_all(folder: Path) -> dict[str, int]:
    """Writes the rows of every recipe, each kind as `<kind>.jsonl` and `<kind>_eval.jsonl`; returns their numbers.

    `train.jsonl` and `eval.jsonl` are the conversations.
    """
    prepare(folder)
    counts = {}
    for kind, rows in kinds(list(documented(Path(sysconfig.get_paths()["stdlib"])))).items():
        with (folder / f"{kind}.jsonl").open("w") as train, (folder / f"{kind}_eval.jsonl").open("w") as held_out:
            for index, row in enumerate(rows):
                (held_out if index // 2 % 25 == 3 else train).write(json.dumps(row) + "\n")
        counts[kind] = len(rows)
    return counts


def kinds(entries: list[tuple[str, str, str]]) -> dict[str, list[dict[str, object]]]:
    """Rows of every kind but conversations, in an order that mixes the packages."""
    entries = sorted(entries, key=lambda entry: zlib.crc32(entry[0].encode()))
    found: dict[str, list[dict[str, object]]] = {"preferences": [], "unpaired": [], "topics": [], "search": []}
    for index, (name, signature, text) in enumerate(entries):
        other = entries[index - 1][2]
        question = QUESTIONS[zlib.crc32(name.encode()) % len(QUESTIONS)].format(name=name)
        right, wrong = (f"`{name}{signature}`\n\n{paragraph}" for paragraph in (text, other))
        if other != text:
            prompt = [{"role": "user", "content": question}]
            answers = [[{"role": "assistant", "content": answer}] for answer in (right, wrong)]
            found["preferences"].append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
            is_right = index % 2 == 0
            found["unpaired"].append({"prompt": prompt, "completion": answers[not is_right], "label": is_right})
        topic = name.split(".")[0]
        if topic in TOPICS:
            found["topics"].append({"text": text, "label": topic})
        words = name.replace(".", " ").replace("_", " ")
        found["search"].append({"query": f"python {words}", "positive": text})
    found["steps"] = [sums(random.Random(seed)) for seed in range(2000)]
    return found


TOPICS = ("asyncio", "email", "unittest", "multiprocessing", "tkinter")
"""Packages with many documented names: the classes of `topics`."""


def sums(rng: random.Random) -> dict[str, object]:
    """A chain of additions in which a step may go wrong; what follows a wrong step is wrong."""
    numbers = [rng.randint(1, 20) for _ in range(5)]
    total, steps, labels = numbers[0], [], []
    right = True
    for number in numbers[1:]:
        said = total + number + (rng.choice((-2, -1, 1, 3)) if rng.random() < 0.2 else 0)
        right = right and said == total + number
        steps.append(f"{total} + {number} = {said}")
        labels.append(right)
        total = said
    return {"prompt": "Add " + ", ".join(map(str, numbers)) + ".", "completions": steps, "labels": labels}


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
