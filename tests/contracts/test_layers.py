"""Who may import whom, and what stays out of a recipe's way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "burnish"

FEW_PLACES = {
    "peft": {f"model/{file}.py" for file in ("adapters/lora", "adapters/targets", "adapters/weights")}
    | {"model/export.py", "model/export_scores.py"},
    "tensorboard": {"track/tensorboard.py"},
    "datasets": {"data/sources/huggingface.py"},
    "obstore": {"policy/checkpoint/objects.py"},
    "ruamel": {"recipe/written.py"},
    "ray": {"ray_cluster.py", "launch/ray.py", "rollout/workers/ray.py"},
    "vllm": {"rollout/engines/vllm.py", "rollout/vllm_live.py", "rollout/vllm_extension.py"},
}
"""Libraries that one file alone imports, so that one file alone changes with them; adapters are written in one
folder, and read back where exports are proved."""


def test_imports_point_down():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def imported(file: Path) -> set[str]:
    """Top-level names of the modules that `file` imports anywhere in it, but for type checking."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checking = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in checking for inner in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
            # `from torch.utils.tensorboard import SummaryWriter` is an import of tensorboard.
            names |= {"tensorboard"} & set(node.module.split("."))
    return names


@pytest.mark.parametrize("library", FEW_PLACES)
def test_a_library_is_imported_where_it_belongs(library):
    importers = {str(f.relative_to(SOURCE)) for f in SOURCE.rglob("*.py") if library in imported(f)}
    assert importers == FEW_PLACES[library]


def test_nothing_imports_relatively():
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level], file


def test_a_whole_recipe_is_read_and_explained_without_torch():
    code = """
import sys
from burnish.errors import RecipeError
from burnish.recipe import Recipe, load_recipe
load_recipe("recipes/quickstart.yaml")
Recipe.model_json_schema()
try:
    load_recipe("recipes/quickstart.yaml", ["zork=1"])
except RecipeError:
    pass
print([name for name in ("torch", "transformers", "peft", "datasets", "tokenizers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
