"""Distillation through the policy and a frozen teacher of another family, against plain transformers models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.losses.base import Loss
from burnish.losses.hidden_kd import HiddenKD
from burnish.losses.kd import KD
from burnish.losses.topk_kd import TopKKD
from burnish.mesh import Mesh, open_mesh
from burnish.model.config import ModelConfig
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.policy.frozen import Frozen
from burnish.policy.policy import Policy
from burnish.types import Block
from tests.policy_model_helpers import largest_difference, pack, random_documents
from tests.tiny_models import VOCAB_SIZE, tiny_model

DOCUMENTS = random_documents([9, 4, 2, 12, 5, 3, 7], VOCAB_SIZE)
ROWS = [DOCUMENTS[0:2], DOCUMENTS[2:4], DOCUMENTS[4:6], DOCUMENTS[6:7]]
TRAINED = sum(map(len, DOCUMENTS)) - len(DOCUMENTS)
K = 5


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


def student() -> PolicyModel:
    """32 columns, no soft cap; rows of padding in its head."""
    return PolicyModel.from_hf(tiny_model("llama"), projection_chunk=7, pad_vocab_to=64)


def plain_teacher(hidden_size: int = 40) -> Any:
    """Soft-capped logits and a sliding window of 4."""
    return tiny_model("gemma2", seed=1, hidden_size=hidden_size)


def policy(mesh: Mesh, *, micro_batch_size: int = 1, teacher_size: int = 40) -> Policy:
    model, teacher = student(), PolicyModel.from_hf(plain_teacher(teacher_size), projection_chunk=4, pad_vocab_to=50)
    prepare(model, ModelConfig.model_validate({"path": "tiny", "dtype": "float32"}), mesh, seed=0)
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [p for _, p in model.trainable_parameters()], "lr_scale": 1.0}], lr=1.0)
    second = Frozen(teacher, mesh, 3, top_k=K)
    return Policy(model, optimizer, mesh=mesh, micro_batch_size=micro_batch_size, max_grad_norm=None, second=second)


def blocks() -> list[Block]:
    return [pack(row, 16) for row in ROWS]


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.trainable_parameters() if p.grad is not None}


def plain_divergence(loss: KD | TopKKD) -> tuple[float, dict[str, Tensor]]:
    """The mean over trained tokens from full logits in float64, one document at a time, and its gradients."""
    p_model, q_model = tiny_model("llama").double(), plain_teacher().double()
    total = torch.zeros((), dtype=torch.float64)
    for document in DOCUMENTS:
        ids, temperature = torch.tensor([document]), getattr(loss, "temperature", 1.0)
        log_p = (p_model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature).log_softmax(1)
        with torch.no_grad():
            log_q = (q_model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature).log_softmax(1)
        if isinstance(loss, TopKKD):
            log_q, ids_nK = log_q.topk(K)
            log_p = log_p.gather(1, ids_nK)
            log_p, log_q = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_p, log_q))
        if loss.kind == "jsd":
            m = loss.beta * log_q.exp() + (1 - loss.beta) * log_p.exp()
            total = total + loss.beta * (log_q.exp() * (log_q - m.log())).sum()
            total = total + (1 - loss.beta) * (log_p.exp() * (log_p - m.log())).sum()
        else:
            of, to = (log_q, log_p) if loss.kind == "forward" else (log_p, log_q)
            total = total + (of.exp() * (of - to)).sum()
    mean = total * getattr(loss, "temperature", 1.0) ** 2 / TRAINED
    mean.backward()
    return mean.item(), {name: p.grad for name, p in p_model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "loss",
    [KD(), KD(kind="reverse"), KD(kind="jsd", beta=0.3, temperature=2.0), TopKKD(), TopKKD(kind="reverse")],
    ids=lambda loss: f"{loss.type}-{loss.kind}",
)
def test_loss_and_gradients_are_those_of_two_plain_models(mesh: Mesh, loss: KD | TopKKD) -> None:
    ours = policy(mesh, micro_batch_size=2)
    summed, count = ours.forward_backward(blocks(), loss)["loss"]
    mean, theirs = plain_divergence(loss)
    assert count == TRAINED
    assert summed / count == pytest.approx(mean, rel=1e-5)
    head = {name: tensor[:VOCAB_SIZE] if tensor.shape[0] == 128 else tensor for name, tensor in gradients(ours).items()}
    difference, name = largest_difference(head, theirs)
    # Float32 knows a tail of 1e-3, one minus a mass, to 1e-4 of itself; the reverse divergence weighs by its logarithm.
    assert difference < (2e-4 if loss.type == "topk_kd" and loss.kind == "reverse" else 1e-5), name


@pytest.mark.parametrize("loss", [KD(kind="jsd"), TopKKD(), HiddenKD(), HiddenKD(kind="cosine")], ids=str)
def test_the_gradient_does_not_depend_on_micro_batches(mesh: Mesh, loss: Loss) -> None:
    found = {}
    for size in (1, 2, 4):
        ours = policy(mesh, micro_batch_size=size, teacher_size=32)
        metrics = ours.forward_backward(blocks(), loss)
        found[size] = gradients(ours), metrics["loss"]
    for size in (2, 4):
        assert found[size][1] == (pytest.approx(found[1][1][0], rel=1e-5), TRAINED)
        difference, name = largest_difference(found[size][0], found[1][0])
        assert difference < 5e-6, name


def test_the_states_compared_are_those_that_tokens_are_drawn_from(mesh: Mesh) -> None:
    summed, count = policy(mesh, teacher_size=32).forward_backward(blocks(), HiddenKD())["loss"]
    total, p_model, q_model = 0.0, tiny_model("llama"), plain_teacher(32)
    for document in DOCUMENTS:
        ids = torch.tensor([document])
        with torch.no_grad():
            states = [
                model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1] for model in (p_model, q_model)
            ]
        total += (states[0] - states[1]).square().mean(1).sum().item()
    assert (summed, count) == (pytest.approx(total, rel=1e-5), TRAINED)
