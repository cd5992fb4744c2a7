"""Reward gradients: those of transformers' own classifier, whatever the packing, the split and the order of a pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from burnish.data.packing.layout import empty_block, layout
from burnish.losses.base import Loss
from burnish.losses.bradley_terry import BradleyTerry
from burnish.losses.classification import Classification
from burnish.mesh import Mesh, open_mesh
from burnish.model.config import ModelConfig
from burnish.model.export_scores import classifier_tensors
from burnish.model.heads.attach import sequence_classifier
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.model.shards import gathered
from burnish.policy.policy import Policy
from burnish.types import Block, Group, Sample
from tests.policy_model_helpers import largest_difference, random_documents
from tests.tiny_models import VOCAB_SIZE, tiny_model

ROW, DOCUMENTS = 40, 8
# Without token 0, the padding token, behind which transformers' classifier does not look.
PROMPTS, CHOSEN, REJECTED = (
    [[token + 1 for token in ids] for ids in random_documents(lengths, VOCAB_SIZE - 1, seed)]
    for seed, lengths in enumerate(([6, 3, 9, 5], [4, 7, 2, 6], [5, 1, 8, 3]))
)
MARGINS = [0.0, 0.5, -0.25, 1.0]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


def policy(mesh: Mesh, head: dict[str, Any], micro_batch_size: int = 1) -> Policy:
    model = PolicyModel.from_hf(tiny_model("llama"))
    prepare(model, ModelConfig.model_validate({"path": "tiny", "head": head}), mesh, seed=0)
    with torch.no_grad():
        model.head_tensors()["score.weight"].mul_(10)  # rewards near 1, where the loss is curved
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trainable_parameters()], lr=1.0)
    return Policy(model, optimizer, mesh=mesh, micro_batch_size=micro_batch_size, max_grad_norm=None)


def sample(ids: list[int], prefix: int | None = None, **columns: float) -> Sample:
    mask = np.ones(len(ids), bool)
    values = {name: np.array(value, np.float32) for name, value in ({"weight": 1.0} | columns).items()}
    return Sample(np.array(ids, np.int32), mask, "here", values, prefix)


def pair(index: int, *, shared: bool, rejected_first: bool) -> Group:
    prompt, margin = PROMPTS[index], MARGINS[index]
    before, prefix = ([], 0) if shared else (prompt, None)
    said = ((CHOSEN[index], 1.0), (REJECTED[index], -1.0))
    answers = [sample([*before, *ids], prefix, preference=sign, margin=margin) for ids, sign in said]
    if rejected_first:
        answers.reverse()
    return Group((sample(prompt, preference=0.0, margin=margin), *answers) if shared else tuple(answers))


def rows(groups: list[list[Group]]) -> list[Block]:
    return [layout(row, ROW, DOCUMENTS) for row in groups]


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}


def plain_classifier(policy: Policy) -> Any:
    """transformers' own model with the policy's weights."""
    config = policy.model.hf_config
    config.num_labels = len(policy.model.head_tensors()["score.weight"])
    classifier = sequence_classifier(config)._from_config(config, attn_implementation="eager")
    classifier.load_state_dict(gathered(classifier_tensors(policy.model)))
    return classifier


def score(classifier: Any, ids: list[int]) -> Tensor:
    return classifier(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_bradley_terry_is_that_of_the_plain_classifier(mesh: Mesh) -> None:
    packed = policy(mesh, {"type": "scalar"}, micro_batch_size=2)
    groups = [pair(i, shared=True, rejected_first=bool(i % 2)) for i in range(4)]
    metrics = packed.forward_backward(rows([groups[:2], groups[2:]]), BradleyTerry(centering=0.01))
    plain = plain_classifier(packed)
    total = torch.zeros(())
    for prompt, chosen, rejected, margin in zip(PROMPTS, CHOSEN, REJECTED, MARGINS, strict=True):
        better, worse = score(plain, prompt + chosen)[0], score(plain, prompt + rejected)[0]
        total = total - torch.nn.functional.logsigmoid(better - worse - margin) + 0.01 * (better + worse) ** 2
    (total / 4).backward()
    assert metrics["loss"][0] == pytest.approx(total.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    difference, name = largest_difference(gradients(packed), theirs)
    assert difference < 2e-5, name


def test_classification_is_that_of_the_plain_classifier(mesh: Mesh) -> None:
    packed = policy(mesh, {"type": "classification", "num_labels": 3})
    labels = [2, 0, 1, 2]
    groups = [Group((sample(ids, label=float(label)),)) for ids, label in zip(PROMPTS, labels, strict=True)]
    packed.forward_backward(rows([groups]), Classification())
    plain = plain_classifier(packed)
    scores = torch.stack([score(plain, ids) for ids in PROMPTS])
    torch.nn.functional.cross_entropy(scores, torch.tensor(labels)).backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    difference, name = largest_difference(gradients(packed), theirs)
    assert difference < 2e-5, name


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("rejected_first", [False, True])
def test_the_gradient_is_the_same_however_pairs_are_laid(
    mesh: Mesh, shared: bool, micro_batch_size: int, rejected_first: bool
) -> None:
    loss: Loss = BradleyTerry(centering=0.1)
    one, other = policy(mesh, {"type": "scalar"}), policy(mesh, {"type": "scalar"}, micro_batch_size)
    one.forward_backward(rows([[pair(i, shared=False, rejected_first=False)] for i in range(4)]), loss)
    groups = [pair(i, shared=shared, rejected_first=rejected_first) for i in (3, 1, 0, 2)]
    blocks = rows([groups[:1], groups[1:3], groups[3:]])
    other.forward_backward([*blocks, empty_block(ROW, DOCUMENTS, blocks[0].columns)], loss)
    difference, name = largest_difference(gradients(other), gradients(one))
    assert difference < 2e-5, name
