"""Embedding folders: equal to the model, for families, precisions and heads; and what is wrong with one is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from burnish.mesh import Mesh, open_mesh
from burnish.model.config import ModelConfig
from burnish.model.export import export
from burnish.model.export_embedding import compare_embeddings
from burnish.model.load import load_model
from burnish.model.policy_model import PolicyModel
from tests import tiny_run
from tests.tiny_models import tiny_model as family_model

LORA = {"type": "lora", "r": 4, "lora_alpha": 32}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


def opened(mesh: Mesh, path: Path, head: dict[str, Any], **more: Any) -> PolicyModel:
    head = {"type": "embedding", **head}
    model = load_model(ModelConfig.model_validate({"path": str(path), "head": head, **more}), mesh, seed=0)
    for name, parameter in model.trainable_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.2, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(
    ("family", "head", "more", "tolerance"),
    [
        ("qwen3_moe", {"pooling": "last", "dimensions": 7}, {}, 1e-5),  # fused experts go back to single ones
        ("gpt_neox", {"pooling": "mean"}, {"adapter": LORA}, 1e-5),
        ("gemma2", {"pooling": "mean", "normalize": False}, {"dtype": "bfloat16"}, 0.05),
    ],
)
def test_the_folder_gives_the_models_vectors(
    mesh: Mesh, tmp_path: Path, family: str, head: dict[str, Any], more: dict[str, Any], tolerance: float
) -> None:
    family_model(family, vocab_size=320).save_pretrained(tmp_path / "base")
    tiny_run.write_tokenizer(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = opened(mesh, tmp_path / "base", head, **more)
    report = export(model, tokenizer, tmp_path / "out", merge=False, base_path=str(tmp_path / "base"))
    assert report.what == "embedding"
    assert report.max_difference < tolerance * report.largest_logit
    assert report.largest_logit > 0.1
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any("lm_head" in name or "lora" in name or name.startswith("model.") for name in names)
    assert tokenizer("sun").input_ids == AutoTokenizer.from_pretrained(tmp_path / "out")("sun").input_ids[:-1]


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_pooling(folder: Path, base: Path) -> None:
    edit(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True, pooling_mode_lasttoken=False)


def no_end(folder: Path, base: Path) -> None:
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def no_norm(folder: Path, base: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:-1]))


def another_map(folder: Path, base: Path) -> None:
    file = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": load_file(file)["linear.weight"].flip(0).contiguous()}, file)


@pytest.mark.parametrize("spoil", [other_pooling, no_end, no_norm, another_map])
def test_a_folder_that_says_something_else_is_noticed(
    mesh: Mesh, tmp_path: Path, tiny_model: Path, spoil: Callable[[Path, Path], None]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = opened(mesh, tiny_model, {"pooling": "last", "dimensions": 6})
    export(model, tokenizer, tmp_path / "out", merge=False, base_path=str(tiny_model))
    intact, largest = compare_embeddings(model, tokenizer, tmp_path / "out", torch.float32)
    assert intact < 1e-5 * largest
    spoil(tmp_path / "out", tiny_model)
    spoilt, _ = compare_embeddings(model, tokenizer, tmp_path / "out", torch.float32)
    assert spoilt > 0.01 * largest
