"""Every shipped recipe, two steps long, on a tiny model and a few of its own kind of rows."""

from __future__ import annotations

import importlib.util
import json
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

from tests import tiny_run
from tests.e2e_helpers import column
from tests.zygote import Zygote

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
LIKE_OTHERS = ("grpo_smollm2", "ppo", "best_of_n")
"""What these do is tested by itself (`test_rl.py`): in `make test` only their schema is."""
MODEL = ".cache/models/SmolLM2-135M-Instruct"


def script(name: str) -> ModuleType:
    """A module of `scripts/`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `scripts/prepare.py` writes, from two packages of the standard library and at most 80 rows of a kind."""
    folder = tmp_path_factory.mktemp("rows")
    data = script("quickstart_data")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    entries = [
        (f"{package}.{name}", signature, text[:60])
        for package in ("asyncio", "email")
        for name, signature, text in list(data.documented(stdlib / package))[:40]
    ]
    for kind, made in data.kinds(entries).items():
        for part in (kind, f"{kind}_eval"):
            tiny_run.write_jsonl(folder / f"{part}.jsonl", made[:80])
    for part in ("train", "eval"):
        tiny_run.write_jsonl(folder / f"{part}.jsonl", tiny_run.conversations(60))
    (folder / "items.json").write_text(json.dumps({"<item_1>": "red cat", "<item_2>": "green dog"}))
    events = [f"{user}\t{(user + 3 * time) % 17}\t{1 + time % 5}\t{time}" for user in range(40) for time in range(12)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "ml-100k.inter").write_text("\n".join([header, *events]) + "\n")
    films = [f"{item}\t{'Comedy Drama' if item % 2 else 'War'}" for item in range(17)]
    (folder / "ml-100k.item").write_text("\n".join(["item_id:token\tclass:token_seq", *films]) + "\n")
    return folder


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[pytest.mark.long] * (f.stem in LIKE_OTHERS)) for f in SHIPPED if "vllm" not in f.stem],
    ids=lambda file: file.stem,
)
def test_a_shipped_recipe_trains(file: Path, rows: Path, zygote: Zygote, tiny_model: Path, tmp_path: Path):
    text = file.read_text(encoding="utf-8")
    for shipped, here in ((MODEL, tiny_model), (".cache/quickstart", rows), ("data/movielens", rows)):
        text = text.replace(shipped, str(here))
    blocks = YAML(typ="safe").load(text)
    if (first := Path(blocks["model"].get("path", ""))).parts[:1] == ("runs",):  # it begins where another ends
        before = YAML(typ="safe").load((file.parent / f"{first.parts[1]}.yaml").read_text(encoding="utf-8"))
        blocks["model"], blocks["data"]["tokenizer"] = before["model"], before["data"]["tokenizer"]
        for name in ("path", "learn_from"):
            given = blocks["data"]["tokenizer"].get(name)
            if given is not None:
                blocks["data"]["tokenizer"][name] = str(tiny_model) if name == "path" else [str(rows / "ml-100k.inter")]
    blocks.pop("num_epochs", None)
    blocks.get("schedule", {}).pop("warmup_steps", None)  # longer than two steps
    if "config" in blocks["model"]:
        blocks["model"]["config"] |= {"num_hidden_layers": 2}
    recipe = tiny_run.write_recipe(
        tmp_path / "recipe.yaml", blocks | {"num_steps": 2, "run_dir": str(tmp_path / "run")}
    )
    code, output = zygote.run(["train", str(recipe)], tmp_path / "output.log")
    assert code == 0, output
    if blocks["workflow"]["type"] == "best_of_n":  # nothing is trained, and which answers are right is left to chance
        assert len(list((tmp_path / "run" / "selected").iterdir())) == 2
        return
    assert len(column(tmp_path / "run", "loss")) == 2
    exported = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert exported & {"config.json", "adapter_config.json"} and "tokenizer.json" in exported
