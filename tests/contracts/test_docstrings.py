"""What is public says what it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "burnish"
FILES = sorted(file for file in SOURCE.rglob("*.py") if file.read_text(encoding="utf-8").strip())

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> list[Definition]:
    return [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes of a module without a docstring."""
    return [node.name for node in public(tree.body) if not ast.get_docstring(node)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_public_names_are_documented(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module says what it owns"
    assert not undocumented(tree)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_source_is_ascii(file):
    file.read_text(encoding="utf-8").encode("ascii")
