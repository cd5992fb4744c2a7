"""Which layers a recipe's names stand for, and what is said of names that stand for none."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from burnish.errors import ModelError
from burnish.model.adapters.lora import LoRA
from tests.lora_helpers import adapted

SPELLINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "names": ({"target_modules": ["q_proj"]}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
    "suffixes": ({"target_modules": ["1.mlp.up_proj", "embed_tokens"]}, {"layers.1.mlp.up_proj", "embed_tokens"}),
    "regex": ({"target_modules": r".*\.1\..*(up|down)_proj"}, {"layers.1.mlp.up_proj", "layers.1.mlp.down_proj"}),
    "layers": ({"target_modules": ["v_proj"], "layers_to_transform": [1]}, {"layers.1.self_attn.v_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    fields, expected = SPELLINGS[spelling]
    trained = adapted("llama", LoRA(r=2, **fields)).trainable_parameters()
    assert {name.partition(".lora_")[0] for name, _ in trained} == {f"model.{name}" for name in expected}


def test_a_norm_is_not_every_module_whose_name_ends_in_norm() -> None:
    model = adapted("llama", LoRA(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    saved = [name for name, _ in model.trainable_parameters() if "modules_to_save" in name]
    assert saved == ["model.norm.modules_to_save.default.weight"]
    assert model.adapter.peft_config(model).modules_to_save == ["model.norm"]


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no such layer": (
        {"target_modules": ["q_porj"]}, "no linear layer or embedding is called 'q_porj'", "target_modules", "q_proj",
    ),
    "a container": ({"target_modules": ["mlp"]}, "is called 'mlp'", "target_modules", "all-linear"),
    "a regex of nothing": ({"target_modules": "q_proj"}, "the whole name of no layer", "target_modules", "[.]"),
    "a regex of containers": ({"target_modules": ".*mlp"}, "model.layers.0.mlp is a LlamaMLP", "target_modules", ""),
    "both": (
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        "leave no layer called 'lm_head'", "target_modules", "remove 'lm_head'",
    ),
    "no layer of that number": (
        {"layers_to_transform": [0, 2]}, "the model has 2 layers", "layers_to_transform", "0 to 1",
    ),
    "an embedding in no layer": (
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
        "leave no layer called 'embed_tokens'", "target_modules", "remove 'embed_tokens'",
    ),
    "nothing to save": ({"modules_to_save": ["nrom"]}, "no module is called 'nrom'", "modules_to_save", "norm"),
    "dropout": (
        {"target_modules": ["lm_head"], "lora_dropout": 0.1}, "no place for dropout", "lora_dropout", "lora_dropout: 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_key_and_a_cure(case: str) -> None:
    fields, reason, key, cure = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        adapted("llama", LoRA(r=2, **fields))
    assert reason in caught.value.reason and cure in caught.value.cure
    assert caught.value.where == f"model.adapter.{key}"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_modules": "(q_proj"}, "no regular expression: missing"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "put the layers into the regular expression"),
    ],
)
def test_a_recipe_that_cannot_be_meant(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        LoRA.model_validate(fields)
