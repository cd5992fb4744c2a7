"""Models that are described instead of named: their draw, and what the tokenizer adds."""

from __future__ import annotations

import pytest
import torch

from burnish.errors import ModelError
from burnish.mesh import open_mesh
from burnish.model.config import ModelConfig
from burnish.model.fresh import for_tokenizer
from burnish.model.load import load_model
from tests.events_helpers import vocabulary

TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("items"), "a b c", bos=True)


def weights(tokenizer, seed: int) -> dict[str, torch.Tensor]:
    with open_mesh() as mesh:
        model = load_model(for_tokenizer(ModelConfig(config=TINY), tokenizer), mesh, seed=seed)
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_weights_depend_on_the_seed_alone(tokenizer):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weights(tokenizer, 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = weights(tokenizer, 7), weights(tokenizer, 8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    # the family's own rule: a normal distribution of standard deviation 0.02
    assert 0.015 < first["model.layers.0.mlp.up_proj.weight"].std().item() < 0.025


def test_the_tokenizer_completes_what_is_absent(tokenizer):
    completed = for_tokenizer(ModelConfig(config=TINY), tokenizer).config
    assert completed == {**TINY, "vocab_size": 5, "bos_token_id": 1, "eos_token_id": None}
    written = for_tokenizer(ModelConfig(config=TINY | {"vocab_size": 64}), tokenizer).config
    assert written is not None and written["vocab_size"] == 64
    named = ModelConfig(path="some/model")
    assert for_tokenizer(named, tokenizer) is named


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "name a model by `path`, or describe a fresh one"),
        ({"path": "some/model", "config": TINY}, "name a model by `path`, or describe a fresh one"),
        ({"config": {"hidden_size": 8}}, "`config` needs a family"),
        ({"config": TINY, "adapter": {"type": "lora"}}, "those of a fresh `config` are random"),
    ],
)
def test_a_model_is_named_or_described(fields, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig.model_validate(fields)


def test_a_family_that_predicts_no_next_token_is_refused(tokenizer):
    with open_mesh() as mesh, pytest.raises(ModelError, match="not a causal language model"):
        load_model(ModelConfig(config={"model_type": "t5"}), mesh, seed=0)
