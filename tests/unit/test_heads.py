"""Heads: what a recipe may ask for, how they are drawn, and how they become part of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from burnish.errors import ModelError, RecipeError
from burnish.mesh import open_mesh
from burnish.model.config import ModelConfig
from burnish.model.export_scores import classifier_tensors, padded_tokenizer
from burnish.model.heads.attach import attach, open_heads
from burnish.model.heads.base import Head
from burnish.model.heads.classification import Classification
from burnish.model.heads.multi import Multi
from burnish.model.heads.scalar import Scalar
from burnish.model.load import load_model
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import gathered
from burnish.recipe import load_recipe
from burnish.types import Block, NewTokens, last_tokens
from tests import tiny_run
from tests.policy_model_helpers import pack
from tests.tiny_models import tiny_config, tiny_model

LM_AND_GRADE = {"type": "multi", "heads": {"lm": {"type": "lm"}, "grade": {"type": "linear", "size": 3}}}


class TwoLayers(Head):
    """A head of one's own."""

    def num_outputs(self, hf_config: Any) -> int:
        return 1

    def open(self, hf_config: Any, *, name: str, seed: int) -> nn.Module:
        return _TwoLayers(hf_config.hidden_size)


class _TwoLayers(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden_size, 4), nn.Linear(4, 1)

    def forward(self, hidden_TH: Tensor, block: Block, reads_T: Tensor) -> Tensor:
        return self.second(self.first(hidden_TH).relu()) * reads_T.unsqueeze(1)


def attached(head: dict[str, Any], **overrides: Any) -> PolicyModel:
    model = PolicyModel.from_hf(tiny_model("llama", **overrides), pad_vocab_to=64)
    attach(model, ModelConfig.model_validate({"path": "tiny", "head": head}).head, seed=0)
    return model


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ({"type": "scaler"}, "did you mean 'scalar'"),
        ({"type": "classification"}, "name the classes with"),
        ({"type": "classification", "labels": ["a", "b"], "num_labels": 2}, "name the classes with"),
        ({"type": "classification", "num_labels": 1}, "greater than or equal to 2"),
        ({"type": "classification", "labels": ["a", "b", "a"]}, "the class a is named twice"),
        ({"type": "linear", "size": 0}, "greater than or equal to 1"),
        ({"type": "multi", "heads": {"a b": {"type": "lm"}}}, "'a b' cannot name a head"),
        ({"type": "multi", "heads": {"a": {"type": "lm"}, "b": {"type": "lm"}}}, "a and b would both make tokens"),
        ({"type": "multi", "heads": {"a": LM_AND_GRADE}}, "no type 'multi'"),
    ],
)
def test_heads_that_cannot_be_are_refused(head: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ModelConfig.model_validate({"path": "tiny", "head": head})


def test_weights_come_from_seed_and_name_alone() -> None:
    config = tiny_config("llama", hidden_size=2048, initializer_range=0.05)
    torch.manual_seed(0)
    one = open_heads(Scalar(), config, seed=3)["score"].state_dict()["weight"]
    torch.manual_seed(1)
    again = open_heads(Scalar(), config, seed=3)["score"].state_dict()["weight"]
    other = open_heads(Scalar(), config, seed=4)["score"].state_dict()["weight"]
    assert one.dtype == torch.float32 and torch.equal(one, again)
    assert not torch.equal(one, other)
    # The standard error of the standard deviation of 2048 draws is 0.05 / sqrt(4096) = 0.0008.
    assert one.std().item() == pytest.approx(0.05, abs=0.004)


def test_scores_are_the_matrix_times_the_state_of_the_token_itself() -> None:
    model = attached(LM_AND_GRADE)
    block = pack([[5, 6, 7], [8, 9]], 8)
    last = last_tokens(block)
    outputs = model(block, needs=frozenset({"scores"}), reads=last)
    with torch.no_grad():
        hidden = [model.hidden_states(pack([ids], len(ids))) for ids in ([5, 6, 7], [8, 9])]
    expected = torch.zeros(8, 3)
    expected[2], expected[4] = (model.head_tensors()["grade.weight"] @ states[-1] for states in hidden)
    torch.testing.assert_close(outputs.scores["grade"], expected, rtol=0, atol=1e-6)
    assert outputs.logprobs is None and outputs.weighted_nll is None


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 2}])
def test_a_head_trains_whatever_else_is_frozen(adapter: dict[str, Any] | None, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = {"path": str(tmp_path), "head": {"type": "scalar"}, "adapter": adapter, "dtype": "bfloat16"}
    with open_mesh("cpu") as mesh:
        model = load_model(ModelConfig.model_validate(config), mesh, seed=0)
        block = pack([[5, 6, 7], [8, 9]], 8)
        outputs = model(block, needs=frozenset({"scores"}), reads=last_tokens(block))
        assert outputs.scores["score"].dtype == torch.float32  # the rest computes in bfloat16
        outputs.scores["score"].sum().backward()
    names = {name for name, _ in model.trainable_parameters()}
    assert "score.weight" in names and "lm_head.weight" not in names
    assert ("model.norm.weight" in names) == (adapter is None)
    assert model.head_tensors()["score.weight"].dtype == torch.float32
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == names


def test_a_language_model_head_that_nothing_reads_leaves_memory() -> None:
    """96 rows are padded to 128; 64 are what the packing probe looks at. A tied one is the embedding, and stays."""
    assert attached({"type": "scalar"}).head.weight.shape == (64, 32)
    assert attached({"type": "scalar"}).vocab_size == 96
    assert attached({"type": "scalar"}, tie_word_embeddings=True).head.weight.shape == (128, 32)
    kept = attached(LM_AND_GRADE)
    assert kept.head.weight.shape == (128, 32) and kept.head.weight.requires_grad
    # Two heads have no standard folder of their own: their export is the language model's, which needs all of it.
    two = attached({"type": "multi", "heads": {"a": {"type": "scalar"}, "b": {"type": "scalar"}}})
    assert two.head.weight.shape == (128, 32) and not two.head.weight.requires_grad


def test_new_tokens_have_rows_to_train_in_the_embedding_alone(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = ModelConfig.model_validate(
        {"path": str(tmp_path), "head": {"type": "scalar"}, "adapter": {"type": "lora"}}
    )
    with open_mesh("cpu") as mesh:
        model = load_model(config, mesh, seed=0, new_tokens=NewTokens(96, ((5, 6), ())))
    names = {name for name, _ in model.trainable_parameters() if ".lora_" not in name}
    assert names == {"model.embed_tokens.new_rows", "score.weight"}
    written = gathered(classifier_tensors(model))
    assert written["model.embed_tokens.weight"].shape == (98, 32) and "lm_head.weight" not in written


@pytest.mark.parametrize("name", ["model", "lm_head", "layers", "heads", "forward", "vocab_size"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    head = Multi.model_validate({"heads": {"lm": {"type": "lm"}, name: {"type": "scalar"}}})
    with pytest.raises(ModelError, match=f"'{name}' cannot name a head"):
        attach(PolicyModel.from_hf(tiny_model("llama")), head, seed=0)


def test_a_family_without_a_sequence_classifier_is_refused_unless_it_stays_a_language_model() -> None:
    config = tiny_config("granite")
    with pytest.raises(ModelError, match="no sequence classification model for granite"):
        open_heads(Classification(num_labels=2), config, seed=0)
    assert open_heads(Multi.model_validate({"heads": LM_AND_GRADE["heads"]}), config, seed=0).keys() == {"grade"}


def test_a_head_of_ones_own_trains_and_is_written_beside_the_language_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from burnish.model.export import export

    tiny_model("llama", vocab_size=320).save_pretrained(tmp_path / "base")
    tiny_run.write_tokenizer(tmp_path / "base")
    config = ModelConfig.model_validate({"path": str(tmp_path / "base"), "head": {"type": f"{__name__}:TwoLayers"}})
    with open_mesh("cpu") as mesh:
        model = load_model(config, mesh, seed=0)
        assert model.head.weight.shape[0] == 320
        export(model, AutoTokenizer.from_pretrained(config.name), tmp_path / "out", merge=False, base_path=config.name)
    written = load_file(tmp_path / "out" / "heads.safetensors")
    assert torch.equal(written["score.first.weight"], model.head_tensors()["score.first.weight"])
    assert len(written) == 4


@pytest.mark.parametrize(("pads", "expected"), [("<|endoftext|>", "<|endoftext|>"), ("<|im_end|>", "<|im_start|>")])
def test_exports_pad_with_a_token_that_ends_no_document(pads: str, expected: str, tmp_path: Path) -> None:
    """transformers reads the score before the padding: where that is the end of an answer too, one token too early."""
    from transformers import AutoTokenizer

    tiny_run.write_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token, tokenizer.padding_side = pads, "left"
    padded = padded_tokenizer(tokenizer, {tokenizer.eos_token_id, None})
    assert (padded.pad_token, padded.padding_side) == (expected, "right")
    assert tokenizer.pad_token == pads


RECIPE = """\
workflow: {type: reward, loss: {type: %s}}
model: {path: some/model, head: %s}
data: {train: [{type: jsonl, path: train.jsonl}], max_length: 64}
num_steps: 2
run_dir: runs/a
"""


@pytest.mark.parametrize(
    ("loss", "head", "reason", "cure"),
    [
        ("bradley_terry", "{type: lm}", "reads the scores of a head 'score'; the model has lm", "{type: scalar}"),
        ("bradley_terry", "{type: linear, size: 2}", "reads one number, the head 'score' says 2", "{type: scalar}"),
        ("regression", "{type: classification, num_labels: 3}", "reads one number", "{type: scalar}"),
        ("process, head: steps", "{type: scalar}", "a head 'steps'; the model has score", "{steps: {type: scalar}}"),
        ("classification", "{type: scalar}", "the head 'score' has no classes", "{type: classification, labels"),
        ("nll", "{type: scalar}", "reads weighted_nll of the language model's head", "lm: {type: lm}"),
        (
            "bradley_terry",
            "{type: multi, heads: {score: {type: scalar}, other: {type: scalar}}}",
            "no loss reads the head 'other'",
            "remove it",
        ),
    ],
)
def test_losses_and_heads_that_do_not_fit_are_refused(
    loss: str, head: str, reason: str, cure: str, tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE % (loss, head))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [])
    problems = [problem for problem in caught.value.problems if problem.reason.startswith("model.head: ")]
    assert any(reason in problem.reason and cure in problem.cure for problem in problems), problems
    assert all(problem.where == f"{file}:2" for problem in problems)


def test_labels_are_of_the_classes_of_the_head_they_are_compared_with(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE % ("classification, label: tone", "{type: classification, labels: [cold, warm]}"))
    row_format = load_recipe(file, []).row_format()
    assert (row_format.kind, row_format.labels) == ("labelled", {"tone": ("cold", "warm")})
