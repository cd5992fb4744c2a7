"""Compiled layers: same numbers, one graph a kind of layer, none more for another packed layout."""

from __future__ import annotations

import copy

import pytest
import torch

from burnish.model.config import Compile
from burnish.model.parallel import compile_layers, recompute_layers
from burnish.model.policy_model import PolicyModel
from tests.policy_model_helpers import gradients, largest_difference, packed_loss, plain_loss, random_documents
from tests.tiny_models import tiny_model


# Dynamo asks every tensor for `.grad` and hides the warning by itself, but not from a filter that makes it an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("recompute", ["none", pytest.param("selective", marks=pytest.mark.long)])
def test_one_graph_serves_every_layer_and_layout(recompute: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = tiny_model("qwen3", num_hidden_layers=3)
    model = PolicyModel.from_hf(copy.deepcopy(plain))
    model.train()
    if recompute != "none":
        recompute_layers(model, selective=True)
    compile_layers(model, Compile())
    for lengths in ([11, 6, 3], [20], [2, 2, 9, 8]):
        documents = random_documents(lengths, 96)
        expected = plain_loss(plain, documents)
        expected.backward()
        loss = packed_loss(model, documents, 24)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
        error, name = largest_difference(gradients(model), gradients(plain))
        assert error < 2e-5, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
