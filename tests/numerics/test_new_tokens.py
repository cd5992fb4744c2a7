"""The life of an added token: where its row begins, what trains, checkpoint, export, equal logits afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from burnish.mesh import open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.load import load_model
from burnish.model.policy_model import one_document
from burnish.types import NewTokens
from tests.tiny_models import tiny_model


def saved(tmp_path, family: str, **changes):
    """A tiny model in a folder, and its number of rows."""
    plain = tiny_model(family, **changes)
    plain.save_pretrained(tmp_path / "base")
    return plain, plain.get_input_embeddings().weight.shape[0]


NEEDS = frozenset({"weighted_nll"})


def nll(model, token_ids):
    block = one_document(token_ids)
    reads = block.loss_mask
    return model(block, needs=NEEDS, reads=reads, coefficients=reads.float()).weighted_nll


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_new_row_begins_at_the_mean_of_what_spelt_it_or_of_all_rows(tmp_path, family):
    plain, rows = saved(tmp_path, family)
    new = NewTokens(rows, sources=((5, 9), ()))
    with open_mesh("cpu") as mesh:
        model = load_model(ModelConfig(path=str(tmp_path / "base")), mesh, seed=0, new_tokens=new)
    grown = dict(model.hf_tensors(merge=True))
    for matrix in (plain.get_input_embeddings().weight, plain.get_output_embeddings().weight):
        name = next(n for n, p in plain.named_parameters(remove_duplicate=False) if p is matrix)
        assert torch.equal(grown[name][:rows], matrix)
        assert torch.allclose(grown[name][rows], (matrix[5] + matrix[9]) / 2)
        assert torch.allclose(grown[name][rows + 1], matrix.mean(0))
        assert len(grown[name]) == rows + 2


def test_unused_rows_of_a_padded_vocabulary_are_taken_before_any_is_added(tmp_path):
    _, rows = saved(tmp_path, "llama")
    with open_mesh("cpu") as mesh:
        new = NewTokens(rows - 3, sources=((5, 9),))
        model = load_model(ModelConfig(path=str(tmp_path / "base")), mesh, seed=0, new_tokens=new)
    assert model.vocab_size == rows


@pytest.mark.parametrize("adapter", [None, LoRA(r=2)])
@pytest.mark.parametrize("family, tied", [("llama", True), ("llama", False), ("gemma3", True)])
def test_only_the_new_rows_train_and_their_gradient_is_that_of_the_whole_matrix(tmp_path, family, tied, adapter):
    _, rows = saved(tmp_path, family, tie_word_embeddings=tied)
    new = NewTokens(rows, sources=((5, 9), ()))
    ids = torch.tensor([3, rows, 7, rows + 1, rows, 2])
    with open_mesh("cpu") as mesh:
        path = str(tmp_path / "base")
        model = load_model(ModelConfig(path=path, adapter=adapter), mesh, seed=0, new_tokens=new)
        whole = load_model(ModelConfig(path=path), mesh, seed=0, new_tokens=replace(new, train_all=True))
    assert torch.allclose(nll(model, ids), nll(whole, ids), rtol=1e-6)
    nll(model, ids).backward()
    nll(whole, ids).backward()
    names = [name for name, _ in model.trainable_parameters()]
    assert sum(name.endswith("new_rows") for name in names) == (1 if tied else 2)
    embedding, theirs = model.causal_lm.get_input_embeddings(), whole.causal_lm.get_input_embeddings()
    assert not embedding.weight.requires_grad
    assert torch.allclose(embedding.new_rows.grad, theirs.weight.grad[rows : rows + 2], rtol=1e-5, atol=1e-6)
    if not tied:
        assert torch.allclose(model.head.new_rows.grad, whole.head.weight.grad[rows : rows + 2], rtol=1e-5, atol=1e-6)


def test_a_step_changes_the_new_rows_alone_and_they_leave_in_the_whole_model(tmp_path):
    plain, rows = saved(tmp_path, "llama", tie_word_embeddings=True)
    new = NewTokens(rows, sources=((5, 9), ()))
    ids = torch.tensor([3, rows, 7, rows + 1, rows, 2])
    with open_mesh("cpu") as mesh:
        model = load_model(ModelConfig(path=str(tmp_path / "base"), adapter=LoRA(r=2)), mesh, seed=0, new_tokens=new)
    before = {name: tensor.clone() for name, tensor in model.hf_tensors(merge=False)}
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trainable_parameters()], lr=0.1)
    nll(model, ids).backward()
    optimizer.step()
    after = dict(model.hf_tensors(merge=False))
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name][:rows], before[name][:rows])
    assert (after[name][rows:] - before[name][rows:]).abs().min(1).values.gt(0).all()
    assert {n for n in after if not torch.equal(after[n], before[n])} == {name, "lm_head.weight"}
    plain.resize_token_embeddings(rows + 2, mean_resizing=False)
    plain.load_state_dict(dict(model.hf_tensors(merge=True)))
    expected = plain(input_ids=ids[None]).logits[0]
    assert torch.allclose(model.logits(one_document(ids)), expected, rtol=1e-4, atol=1e-5)
